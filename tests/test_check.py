"""`embedq check`: what a user who brings a model of their own reads, and every refusal's cure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from embedq.__main__ import embedq
from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.errors import CannotLoadModel, InvalidInput
from embedq.core.settings import ModelSettings
from tests import oracle, saved_forms
from tests.checkpoints import as_sentence_transformer, change_config, save_encoder, write_json


def run(*words: str) -> tuple[int, str]:
    """Exit code and output of `embedq check`; a refusal is raised, as the command line's last step prints it."""
    with oracle.quiet():
        done = CliRunner().invoke(embedq, ["check", *words], standalone_mode=False, catch_exceptions=False)
    return int(done.return_value or 0), done.output


def lines_of(path: Path) -> tuple[int, dict[str, str], str]:
    """Exit code, lines by their first words, and all of the output."""
    code, told = run(str(path))
    return code, {line.split("  ")[0]: " ".join(line.split()) for line in told.splitlines()}, told


def test_it_says_what_was_read_from_which_file(tmp_path: Path) -> None:
    code, lines, told = lines_of(saved_forms.save("bert dense normalize", tmp_path / "model"))
    assert code == 0
    assert lines["kind"] == "kind SentenceTransformer config_sentence_transformers.json"
    assert lines["family"].startswith("family encoder: embeds with a network")
    assert lines["pooling"] == "pooling mean 1_Pooling/config.json"
    assert lines["modules"] == "modules Dense modules.json"
    assert "its weights fit, and it runs" in told


def test_files_above_the_directory_are_not_read(tmp_path: Path) -> None:
    as_sentence_transformer(save_encoder(tmp_path))
    _, lines, _ = lines_of(save_encoder(tmp_path / "network"))
    assert lines["kind"] == "kind transformers checkpoint config.json"
    assert lines["pooling"] == "pooling mean the default"


@pytest.mark.parametrize(
    ("form", "name", "said"),
    [
        ("bert, SPLADE", "family", "modules.json"),
        ("bert, SPLADE", "modules", "SpladePooling modules.json"),
        ("StaticEmbedding", "network", "none: a table of vectors model.safetensors"),
        ("StaticEmbedding", "max_length", "the family"),
        ("bert, network in 0_Transformer", "kind", "SentenceTransformer config_sentence_transformers.json"),
    ],
)
def test_it_says_of_other_forms_what_they_are(form: str, name: str, said: str, tmp_path: Path) -> None:
    _, lines, told = lines_of(saved_forms.save(form, tmp_path / "model"))
    assert lines[name].endswith(said)
    assert "last_token" not in told


def test_weights_of_words_are_not_held_against_the_library(tmp_path: Path) -> None:
    path = saved_forms.save("bert, SPLADE", tmp_path / "model")
    with pytest.raises(InvalidInput, match="family splade has weights of words"):
        run(str(path), "--against", "sentence-transformers")


@pytest.mark.parametrize(
    "form", ["bert dense normalize", "bert cross encoder", "qwen3 chat", "bert, network in 0_Transformer"]
)
def test_it_holds_a_model_against_the_library(form: str, tmp_path: Path) -> None:
    path = saved_forms.save(form, tmp_path / "model")
    code, told = run(str(path), "--against", "sentence-transformers")
    assert (code, "which is equal" in told) == (0, True)


def test_numbers_that_differ_from_the_library_end_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved_forms.save("bert dense normalize", tmp_path / "model")
    monkeypatch.setattr("embedq.core.check.TOLERANCE", -1.0)  # nothing is as equal as that
    code, told = run(str(path), "--against", "sentence-transformers")
    assert (code, "which is more than" in told) == (1, True)


def _without_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without_weights, "no other weights either: was the download complete?"),
        (partial(saved_forms.store_as, "pytorch_model.bin"), "`embedq convert "),
        (partial(saved_forms.store_as, "pytorch_model.bin.index.json"), "save_pretrained('"),
        (partial(saved_forms.store_as, "onnx/model.onnx"), "weights for ONNX, which embedq does not run"),
        (partial(saved_forms.store_as, "model.gguf"), "weights for llama.cpp (GGUF)"),
    ],
    ids=["none", "pickle", "pickles", "onnx", "gguf"],
)
def test_a_directory_without_safetensors_is_told_the_cure_for_what_it_has(
    change: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    change(save_encoder(tmp_path))
    with pytest.raises(CannotLoadModel) as caught:
        run(str(tmp_path))
    assert said in str(caught.value)
    assert ("embedq convert" in str(caught.value)) == (said == "`embedq convert ")


@pytest.mark.parametrize("kind", ["MultiVectorEncoder", "ColBERT"])
def test_a_kind_that_is_not_served_is_named(kind: str, tmp_path: Path) -> None:
    path = saved_forms.save("bert dense normalize", tmp_path / "model")
    write_json(path / "config_sentence_transformers.json", {"model_type": kind})
    with pytest.raises(CannotLoadModel, match=f"is a {kind} of sentence-transformers"):
        run(str(path))


def test_a_missing_tokenizer_is_told_with_the_line_that_makes_it(tmp_path: Path) -> None:
    (save_encoder(tmp_path) / "tokenizer.json").unlink()
    with pytest.raises(
        CannotLoadModel, match=r"import AutoTokenizer as T; T\.from_pretrained\('.*'\)\.save_pretrained"
    ):
        run(str(tmp_path))


@pytest.mark.parametrize("model_type", ["own", "new", "NomicOwn"])
def test_no_refusal_advises_what_embedq_never_does(model_type: str, tmp_path: Path) -> None:
    change_config(save_encoder(tmp_path), model_type=model_type, auto_map={"AutoModel": "own.Own"})
    for family in (None, "encoder", "cross_encoder"):
        with pytest.raises(CannotLoadModel) as caught:
            read_spec("m", ModelSettings(path=str(tmp_path), family=family))
        assert "trust_remote_code" not in str(caught.value)
        assert "never run" in str(caught.value)
