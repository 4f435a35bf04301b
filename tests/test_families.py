"""A family fits its directory or is refused, and the refusal names the families with what each means."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from embedq.core.checkpoint import files
from embedq.core.checkpoint.families import MEANINGS
from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.errors import CannotLoadModel
from embedq.core.models import FAMILIES
from embedq.core.settings import ModelSettings
from tests import saved_forms
from tests.checkpoints import as_sentence_transformer, change_config, save_cross_encoder, save_encoder


def refusal(path: Path, **given: Any) -> str:
    with pytest.raises(CannotLoadModel) as caught:
        read_spec("m", ModelSettings(path=str(path), **given))
    return str(caught.value)


def test_every_family_has_a_meaning_and_a_class() -> None:
    assert MEANINGS.keys() == FAMILIES.keys()


def test_an_unknown_family_is_refused_with_all_there_are(tmp_path: Path) -> None:
    message = refusal(save_encoder(tmp_path), family="bert")
    assert "family is 'bert'" in message
    assert all(f"{name} ({meaning})" in message for name, meaning in MEANINGS.items())


@pytest.mark.parametrize("family", ["decoder", "icl", "llm_reranker", "qwen3_reranker"])
def test_a_family_of_decoders_is_refused_for_an_encoder(family: str, tmp_path: Path) -> None:
    # It would run without a mask: the vectors of a text would be those of its padding, too.
    assert f"is of type bert, which family {family}" in refusal(save_encoder(tmp_path), family=family)


@pytest.mark.parametrize("family", ["encoder", "m3"])
def test_a_family_of_encoders_is_refused_for_a_decoder(family: str, tmp_path: Path) -> None:
    assert f"is of type qwen3, which family {family}" in refusal(saved_forms.qwen3(tmp_path), family=family)


def test_a_reranker_that_brings_code_is_no_qwen3_reranker(tmp_path: Path) -> None:
    path = saved_forms.qwen3(tmp_path)
    change_config(path, auto_map={"AutoModelForCausalLM": "modeling_other.Other"})
    assert "it is no Qwen3-Reranker" in refusal(path, family="qwen3_reranker")


def test_what_the_modules_are_comes_before_what_is_set(tmp_path: Path) -> None:
    path = saved_forms.save("bert cross encoder", tmp_path / "reranker")
    assert "describes a CrossEncoder of family cross_encoder" in refusal(path, family="encoder")
    embedder = as_sentence_transformer(save_encoder(tmp_path / "embedder"))
    assert "describes a SentenceTransformer, and family cross_encoder is a reranker" in refusal(
        embedder, family="cross_encoder"
    )


def test_a_masked_language_model_is_no_embedder_unless_it_is_said_to_be(tmp_path: Path) -> None:
    change_config(save_encoder(tmp_path), architectures=["BertForMaskedLM"])
    assert 'family = "splade"' in refusal(tmp_path)
    for given in ({"family": "encoder"}, {"family": "encoder", "layout": "transformers"}):
        assert read_spec("m", ModelSettings.model_validate({"path": str(tmp_path)} | given)).family == "encoder"
    assert read_spec("m", ModelSettings(path=str(as_sentence_transformer(tmp_path)))).family == "encoder"


def test_a_type_whose_code_is_its_own_is_refused_by_what_would_be_needed(tmp_path: Path) -> None:
    change_config(save_encoder(tmp_path), model_type="own", auto_map={"AutoModel": "modeling_own.Own"})
    message = refusal(tmp_path)
    assert "transformers has no code for" in message
    assert "trust_remote_code" not in message


def test_a_classifier_keeps_its_family(tmp_path: Path) -> None:
    assert read_spec("m", ModelSettings(path=str(save_cross_encoder(tmp_path)))).family == "cross_encoder"


@pytest.mark.parametrize(
    ("file", "is_fetched"),
    [
        ("2_Dense/pytorch_model.bin", True),
        ("3_LayerNorm/pytorch_model.bin", True),
        ("pytorch_model.bin", False),
        ("0_Transformer/pytorch_model.bin", False),
        ("chat_template.jinja", True),
        ("modeling_own.py", False),
    ],
)
def test_what_a_hub_download_brings(file: str, is_fetched: bool) -> None:
    assert any(fnmatch(file, pattern) for pattern in files.PATTERNS) == is_fetched
