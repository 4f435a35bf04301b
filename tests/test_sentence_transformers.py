"""sentence-transformers directories: what follows the pooling, compared with the library itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, Gemma3TextConfig, ModernBertConfig, PretrainedConfig, Qwen3Config

from embedq import core
from embedq.core.errors import CannotLoadModel
from tests import tiny_models

TEXTS = ["a ferry", "", " rain \n", "The garden of the lighthouse is small. " * 4, "灯塔"]

TANH = "torch.nn.modules.activation.Tanh"
IDENTITY = "torch.nn.modules.linear.Identity"

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_DECODER = _SIZES | {"num_key_value_heads": 2, "head_dim": 16}

#: Name -> configuration, the case whose tokenizer goes with it, pooling, Dense modules.
MODELS: dict[str, tuple[PretrainedConfig, str, str, list[tuple[int, int, str]]]] = {
    "bert": (BertConfig(vocab_size=800, **_SIZES), "st_mean_pooling", "mean_tokens", [(32, 24, TANH)]),
    "bert_last_token": (BertConfig(vocab_size=800, **_SIZES), "st_mean_pooling", "lasttoken", []),
    "modernbert": (
        ModernBertConfig(vocab_size=1150, pad_token_id=1145, local_attention=16, **_SIZES),
        "st_modernbert",
        "cls_token",
        [(32, 40, TANH)],
    ),
    "qwen3": (
        Qwen3Config(vocab_size=1150, pad_token_id=1140, **_DECODER),
        "st_qwen3_embedding",
        "lasttoken",
        [(32, 16, TANH)],
    ),
    # As EmbeddingGemma: attention in both directions with windows, the mean, two projections.
    "gemma3": (
        Gemma3TextConfig(
            vocab_size=1300,
            pad_token_id=2,
            sliding_window=8,
            query_pre_attn_scalar=16,
            use_bidirectional_attention=True,
            layer_types=["sliding_attention", "full_attention"],
            **_DECODER,
        ),
        "flagllmmodel_last_token",
        "mean_tokens",
        [(32, 64, IDENTITY), (64, 32, IDENTITY)],
    ),
}


def save(name: str, directory: Path) -> Path:
    config, case, pooling, dense = MODELS[name]
    return tiny_models.add_modules(tiny_models.save(directory, config, case), pooling, dense)


def load(path: Path) -> Any:
    return core.load(str(path), precision="float32", device="cpu")


def library(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(path), device="cpu")


@pytest.mark.parametrize("name", MODELS)
def test_vectors_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    path = save(name, tmp_path)
    with load(path) as engine:
        found = engine.embed(TEXTS).dense
        assert engine.models["model"].spec.dimensions == found.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = library(path).encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_a_directory_that_the_library_saved_itself_is_read(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library(save("bert", tmp_path / "old"))
        model.save(str(tmp_path / "new"))
        expected = model.encode(TEXTS)
    with load(tmp_path / "new") as engine:
        np.testing.assert_allclose(engine.embed(TEXTS).dense, expected, atol=1e-5)


def test_a_pickled_projection_is_read_for_its_tensors_only(tmp_path: Path) -> None:
    path = save("bert", tmp_path / "model")
    with load(path) as engine:
        expected = engine.embed(TEXTS).dense

    file = path / "2_Dense" / "model.safetensors"
    torch.save(load_file(file), path / "2_Dense" / "pytorch_model.bin")
    file.unlink()
    with load(path) as engine:
        np.testing.assert_array_equal(engine.embed(TEXTS).dense, expected)

    class Runs:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"linear.weight": Runs()}, path / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(CannotLoadModel, match="UnpicklingError"):
        load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"activation_function": "os.system"}, "activation 'os.system', which is no class of torch.nn"),
        ({"activation_function": "torch.nn.functional.tanh"}, "no class of torch.nn"),
        ({"activation_function": "torch.hub.load"}, "no class of torch.nn"),
        ({"activation_function": "torch.nn.modules.linear.Linear"}, "Linear, which needs arguments"),
        ({"use_residual": True}, "residual"),
        ({"module_input_name": "token_embeddings"}, "something else than sentence_embedding"),
        ({"in_features": 31}, "takes 31 values, but the layer before it returns 32"),
        ({"out_features": 25}, "has 24 outputs with bias; its config.json states 25 with"),
        ({"bias": False}, "with bias; its config.json states 24 without"),
    ],
)
def test_a_projection_we_cannot_run_is_refused(stated: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = save("bert", tmp_path)
    tiny_models.change(path / "2_Dense" / "config.json", **stated)
    with pytest.raises(CannotLoadModel, match=message):
        load(path)


def test_a_projection_without_weights_is_refused(tmp_path: Path) -> None:
    path = save("bert", tmp_path)
    (path / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(CannotLoadModel, match=r"looked for model\.safetensors and pytorch_model\.bin"):
        load(path)


def test_the_first_projection_must_fit_the_network(tmp_path: Path) -> None:
    config, case, _, _ = MODELS["bert"]
    path = tiny_models.add_modules(tiny_models.save(tmp_path, config, case), "mean_tokens", [(16, 8, TANH)])
    with pytest.raises(CannotLoadModel, match="takes 16 values, but the layer before it returns 32"):
        load(path)


def test_prompts_go_before_texts_by_their_type(tmp_path: Path) -> None:
    path = save("bert", tmp_path)
    described = {"prompts": {"query": "find: ", "document": "read: "}, "default_prompt_name": "document"}
    tiny_models.write(path / "config_sentence_transformers.json", described)
    with load(path) as engine:
        plain = engine.embed(["find: a", "read: a"], instruction="").dense
        asked = [engine.embed(["a"], input_type=one).dense[0] for one in ("query", "document", None)]
    np.testing.assert_allclose(asked, plain[[0, 1, 1]], atol=1e-5)


def test_a_weight_file_that_does_not_fit_its_description_is_refused(tmp_path: Path) -> None:
    path = save("bert", tmp_path)
    save_file({"linear.weight": torch.zeros(24, 30)}, path / "2_Dense" / "model.safetensors")
    with pytest.raises(CannotLoadModel, match=r"linear.weight of shape \(any, 32\)"):
        load(path)
