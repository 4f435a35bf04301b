"""A model directory's own files decide how it is run, or that it must not be served."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from embedq.core.checkpoint.network_types import ENCODER_TYPES
from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.checkpoint.revision import with_revision
from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.errors import CannotLoadModel
from embedq.core.options import EmbedOptions
from embedq.core.settings import ModelSettings
from embedq.deploy.demo import minilm as demo_model
from tests import saved_forms
from tests.checkpoints import (
    as_sentence_transformer,
    change_config,
    save_cross_encoder,
    save_encoder,
    write_json,
)


def read(directory: Path, **given: Any) -> ModelSpec:
    return read_spec("m", ModelSettings(path=str(directory), **given))


def refusal(directory: Path, **given: Any) -> str:
    """The message that an operator reads when this directory is refused."""
    with pytest.raises(CannotLoadModel) as caught:
        read(directory, **given)
    return str(caught.value)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A plain transformers directory."""
    return save_encoder(tmp_path / "model")


def written(spec: ModelSpec, **options: Any) -> str:
    """The text "it" as a call with these options has it tokenized."""
    (text,) = spec.write(["it"], EmbedOptions(**options))
    return text


def test_the_real_minilm_is_read_as_its_files_say(minilm: Path) -> None:
    assert read(minilm, sha256=demo_model.SHA256) == ModelSpec(
        alias="m",
        path=minilm,
        family="encoder",
        pooling="mean",
        normalize=True,
        max_length=256,
        dimensions=384,
        pad_token_id=0,
        hidden_size=384,
        config=json.loads((minilm / "config.json").read_text()),
    )


def test_a_plain_directory_is_pooled_by_mean_and_normalised(encoder: Path) -> None:
    spec = read(encoder)
    assert (spec.family, spec.pooling, spec.normalize, spec.lower) == ("encoder", "mean", True, False)
    assert (spec.max_length, spec.dimensions, spec.pad_token_id) == (64, 32, 0)
    assert read(encoder, pooling="cls").pooling == "cls"


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "mean", "include_prompt": True, "embedding_dimension": 32}, "mean"),
        ({"pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode": ["cls", "mean"]}, "cls+mean"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, "cls+max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len"),
        ({"pooling_mode": "weightedmean"}, "weighted_mean"),
        ({"embedding_dimension": 32}, "mean"),
    ],
)
def test_pooling_is_read_in_the_old_and_the_new_notation(encoder: Path, pooling: dict[str, Any], name: str) -> None:
    assert read(as_sentence_transformer(encoder, pooling)).pooling == name


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_mean_tokens": False},
        {"pooling_mode": "attention"},
        {"pooling_mode": ["cls", "attention"]},
        {"pooling_mode": "mean", "temperature": 2},
        {},
    ],
)
def test_a_pooling_we_do_not_have_is_refused(encoder: Path, pooling: dict[str, Any]) -> None:
    as_sentence_transformer(encoder)
    write_json(encoder / "1_Pooling" / "config.json", pooling)
    message = refusal(encoder)
    assert "1_Pooling/config.json" in message
    assert "temperature" in message or ("cls" in message and "mean" in message)


def test_a_pooling_may_leave_out_the_prompt(encoder: Path) -> None:
    as_sentence_transformer(encoder, {"pooling_mode_mean_tokens": True, "include_prompt": False})
    assert not read(encoder).include_prompt


def test_vectors_are_normalised_only_if_a_module_says_so(encoder: Path) -> None:
    assert not read(as_sentence_transformer(encoder, modules=["Transformer", "Pooling"])).normalize
    assert read(as_sentence_transformer(encoder)).normalize


@pytest.mark.parametrize(
    "modules",
    [
        ["Transformer", "Pooling", "LSTM", "Normalize"],
        ["Transformer"],
        ["Pooling", "Transformer"],
        ["Transformer", "Pooling", "Pooling"],
        ["Transformer", "Pooling", "Normalize", "Transformer"],
        ["CLIPModel"],
        [],
    ],
)
def test_modules_we_cannot_run_are_refused_by_name(encoder: Path, modules: list[str]) -> None:
    message = refusal(as_sentence_transformer(encoder, modules=modules))
    assert "modules.json" in message
    assert ", ".join(modules) in message


@pytest.mark.parametrize("content", [{}, [1], "text", None, [{"type": 3}]])
@pytest.mark.parametrize(
    "file", ["modules.json", "config.json", "config_sentence_transformers.json", "1_Pooling/config.json"]
)
def test_files_of_a_wrong_form_are_refused_and_not_guessed(encoder: Path, file: str, content: Any) -> None:
    as_sentence_transformer(encoder)
    if file == "config_sentence_transformers.json" and content == {}:
        return  # that one may be empty
    write_json(encoder / file, content)
    assert str(encoder) in refusal(encoder)


def test_prompts_and_the_default_prompt_are_read(encoder: Path) -> None:
    described = {"prompts": {"query": "find: ", "passage": "text: ", "empty": ""}, "default_prompt_name": "query"}
    spec = read(as_sentence_transformer(encoder, described=described))
    assert spec.prompts == {"query": "find: ", "passage": "text: ", "empty": "", "document": "text: "}
    assert written(spec, input_type="query") == "find: it"
    assert written(spec, input_type="document") == "text: it"
    assert written(spec) == "find: it"
    assert written(spec, input_type="query", instruction="mine: ") == "mine: it"
    assert written(spec, input_type="query", instruction="") == "it"


@pytest.mark.parametrize(("document", "expected"), [("text: ", "text: it"), ("", "it"), (None, "it")])
def test_a_type_without_a_prompt_gets_none_whatever_the_default_one_is(
    encoder: Path, document: str | None, expected: str
) -> None:
    prompts = {"query": "find: "} | ({} if document is None else {"document": document})
    described = {"prompts": prompts, "default_prompt_name": "query"}
    assert written(read(as_sentence_transformer(encoder, described=described)), input_type="document") == expected


def test_a_checkpoint_without_prompts_puts_nothing_before_texts(encoder: Path) -> None:
    spec = read(as_sentence_transformer(encoder))
    assert {written(spec, input_type=one) for one in (None, "query", "document")} == {"it"}


@pytest.mark.parametrize(
    ("positions", "tokenizer_limit", "stated", "asked", "limit"),
    [
        (64, None, None, None, 64),
        (64, 32, None, None, 32),
        (64, 10**30, None, None, 64),
        (64, None, 40, None, 40),
        (64, None, 400, None, 64),
        (64, None, 40, 50, 50),
        (64, 32, None, 32, 32),
    ],
)
def test_the_length_limit_is_the_shortest_that_applies(
    encoder: Path, positions: int, tokenizer_limit: int | None, stated: int | None, asked: int | None, limit: int
) -> None:
    as_sentence_transformer(encoder, sentence={"max_seq_length": stated} if stated else {})
    change_config(encoder, max_position_embeddings=positions)
    write_json(encoder / "tokenizer_config.json", {"model_max_length": tokenizer_limit})
    assert read(encoder, max_length=asked).max_length == limit


def test_a_length_above_what_the_weights_carry_is_refused(encoder: Path) -> None:
    message = refusal(encoder, max_length=65)
    assert "65" in message
    assert "64" in message


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert", "mpnet"])
@pytest.mark.parametrize("pad_token_id", [1, None])
def test_position_offsets_are_taken_off_the_limit(encoder: Path, model_type: str, pad_token_id: int | None) -> None:
    change_config(encoder, model_type=model_type, max_position_embeddings=66, pad_token_id=pad_token_id)
    spec = read(encoder)
    assert (spec.max_length, spec.pad_token_id) == (64, 1)


def test_a_cross_encoder_is_known_by_its_architecture(tmp_path: Path) -> None:
    spec = read(save_cross_encoder(tmp_path))
    assert (spec.family, spec.pooling, spec.dimensions, spec.is_embedder, spec.max_length) == (
        "cross_encoder",
        None,
        1,
        False,
        64,
    )


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_classifier_with_several_labels_is_refused(tmp_path: Path, num_labels: int) -> None:
    assert f"{num_labels} labels" in refusal(save_cross_encoder(tmp_path, num_labels=num_labels))


def test_a_classifier_that_does_not_tell_its_labels_has_two(tmp_path: Path) -> None:
    change_config(save_cross_encoder(tmp_path), id2label=None)
    assert "2 labels" in refusal(tmp_path)


@pytest.mark.parametrize("model_type", ["mamba", "nothing", None, 3, ["bert"]])
def test_an_unknown_model_type_is_refused_with_the_known_ones(encoder: Path, model_type: Any) -> None:
    change_config(encoder, model_type=model_type)
    message = refusal(encoder)
    assert str(model_type) in message
    assert all(known in message for known in ENCODER_TYPES)


def test_a_directory_without_config_json_is_refused(encoder: Path) -> None:
    (encoder / "config.json").unlink()
    assert "config.json" in refusal(encoder)


def test_a_file_that_is_not_json_is_refused_by_name(encoder: Path) -> None:
    (encoder / "config.json").write_bytes(b"\xff{")
    assert "config.json cannot be read" in refusal(encoder)


def test_weights_that_are_a_pickle_are_refused(encoder: Path) -> None:
    (encoder / "model.safetensors").rename(encoder / "pytorch_model.bin")
    message = refusal(encoder)
    assert "A pickle (pytorch_model.bin)" in message
    assert "model.safetensors" in message


def test_a_directory_without_weights_is_refused(encoder: Path) -> None:
    (encoder / "model.safetensors").unlink()
    assert "no weights as safetensors" in refusal(encoder)


def test_weights_with_another_hash_are_refused(encoder: Path) -> None:
    right = hashlib.sha256((encoder / "model.safetensors").read_bytes()).hexdigest()
    assert read(encoder, sha256=right)
    message = refusal(encoder, sha256="0" * 64)
    assert right in message
    assert "0" * 64 in message


@pytest.mark.parametrize("content", [b"nothing", None], ids=["broken", "absent"])
def test_a_table_of_vectors_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    directory = saved_forms.save("StaticEmbedding", tmp_path / "model")
    file = next(directory.rglob("model.safetensors"))
    if content is None:
        save_file({"other": torch.ones(2, 2)}, file)
    else:
        file.write_bytes(content)
    assert str(file) in refusal(directory)


def test_a_family_is_refused_for_a_table_of_vectors(tmp_path: Path) -> None:
    directory = saved_forms.save("StaticEmbedding", tmp_path / "model")
    assert "describes a SentenceTransformer of family static" in refusal(directory, family="encoder")


@pytest.mark.parametrize("file", ["2_Dense/model.safetensors", "modules.json", "0_Transformer/config.json"])
def test_all_files_of_a_checkpoint_with_its_network_in_a_folder_are_part_of_the_revision(
    tmp_path: Path, file: str
) -> None:
    directory = saved_forms.save("bert dense normalize", tmp_path / "model")
    saved_forms.into_folder(directory)
    before = with_revision(read(directory)).revision
    assert with_revision(read(directory)).revision == before
    content = (directory / file).read_bytes()
    changed = bytes([*content[:-1], content[-1] ^ 1]) if file.endswith(".safetensors") else content + b"\n"
    (directory / file).write_bytes(changed)
    assert with_revision(read(directory)).revision.partition(".")[0] != before.partition(".")[0]


def test_a_hash_of_weights_in_several_files_is_refused(encoder: Path) -> None:
    (encoder / "model.safetensors").rename(encoder / "model-00001-of-00001.safetensors")
    write_json(encoder / "model.safetensors.index.json", {"weight_map": {}})
    assert "several files" in refusal(encoder, sha256="0" * 64)


@pytest.mark.parametrize("pooling_mode", ["mean", "cls"])
def test_what_sentence_transformers_saves_today_is_read(encoder: Path, tmp_path: Path, pooling_mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Normalize, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling

        transformer = Transformer(str(encoder), max_seq_length=40)
        model = SentenceTransformer(
            modules=[transformer, Pooling(32, pooling_mode), Normalize()], prompts={"query": "find: "}, device="cpu"
        )
        model.save(str(tmp_path / "saved"))
    spec = read(tmp_path / "saved")
    assert (spec.pooling, spec.normalize, spec.max_length) == (pooling_mode, True, 40)
    assert spec.prompts == {"query": "find: ", "document": ""}
