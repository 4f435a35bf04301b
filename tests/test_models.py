"""Real weights through the engine: every family and type, and every checkpoint that must be refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from embedq import core
from embedq.core.checkpoint.network_types import ENCODER_TYPES
from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.engine import Engine
from embedq.core.errors import CannotLoadModel, InvalidSettings
from embedq.core.models import weights
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.settings import ModelSettings, read_settings
from tests.checkpoints import change_config, change_weights, save_cross_encoder, save_encoder

TOLERANCE = 1e-5


def load(directory: Path, **settings: Any) -> Engine:
    return core.load(str(directory), device="cpu", precision="float32", **settings)


def model_of(engine: Engine) -> Any:
    """Its one model, of whichever family."""
    return engine.models["model"]


@pytest.mark.parametrize("model_type", sorted(ENCODER_TYPES))
def test_every_supported_type_gives_what_transformers_gives_up_to_its_longest_sequence(
    model_type: str, tmp_path: Path
) -> None:
    texts = ["the ferry garden", "island " * 100, "", "a map"]
    with load(save_encoder(tmp_path, model_type)) as engine:
        vectors = np.asarray(engine.embed(texts, normalize=False))
        tokens = model_of(engine).encode_texts(texts, EmbedOptions())
    assert max(len(one.ids) for one in tokens) == 64
    reference = AutoModel.from_pretrained(tmp_path, local_files_only=True).eval()
    for vector, one in zip(vectors, tokens, strict=True):
        with torch.inference_mode():
            hidden = reference(input_ids=torch.from_numpy(one.ids[None].astype(np.int64))).last_hidden_state
        np.testing.assert_allclose(vector, hidden[0].mean(dim=0).numpy(), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("model_type", sorted(ENCODER_TYPES))
def test_a_cross_encoder_of_every_supported_type_gives_the_logits_of_transformers(
    model_type: str, tmp_path: Path
) -> None:
    passages = ["a garden", "", "the island " * 50]
    with load(save_cross_encoder(tmp_path, model_type)) as engine:
        scores = engine.rerank("the ferry", passages).scores
        tokens = model_of(engine).encode_pairs([("the ferry", passage) for passage in passages], RerankOptions())
    reference = AutoModelForSequenceClassification.from_pretrained(tmp_path, local_files_only=True).eval()
    has_types = getattr(reference.config, "type_vocab_size", 0) == 2
    for score, one in zip(scores, tokens, strict=True):
        given = {"input_ids": one.ids} | ({"token_type_ids": one.type_ids} if has_types else {})
        with torch.inference_mode():
            logits = reference(
                **{name: torch.from_numpy(ids[None].astype(np.int64)) for name, ids in given.items()}
            ).logits
        assert score == pytest.approx(float(logits[0, 0]), abs=TOLERANCE, rel=TOLERANCE)


def test_bfloat16_gives_nearly_the_same_vectors_as_float32(minilm: Path) -> None:
    texts = ["The ferry leaves at seven.", "a lighthouse", "Brot und Butter " * 30]
    with load(minilm) as exact, core.load(str(minilm), device="cpu", precision="bfloat16") as rounded:
        one, other = np.asarray(exact.embed(texts)), np.asarray(rounded.embed(texts))
        assert rounded.models["model"].precision == "bfloat16"
    assert other.dtype == np.float32
    assert (one * other).sum(axis=1).min() > 0.995


def _drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _halve(name: str) -> Callable[[dict[str, Any]], None]:
    def halve(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()

    return halve


def _rename(start: str, new: str) -> Callable[[dict[str, Any]], None]:
    """Put `new` where names begin with `start`."""

    def rename(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(start)]:
            tensors[new + name.removeprefix(start)] = tensors.pop(name)

    return rename


def _add(*names: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: torch.ones(2) for name in names})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_drop("encoder.layer.1.output.dense.weight"), "lacks 1 weights the model needs, among them encoder.layer.1"),
        (_drop("embeddings.word_embeddings.weight"), "among them embeddings.word_embeddings.weight"),
        (
            _halve("embeddings.word_embeddings.weight"),
            r"word_embeddings\.weight of shape \[\d+, 32\]; config.json desc",
        ),
        (dict.clear, "lacks|cannot be loaded"),
        (_rename("", "unknown."), r"lacks \d+ weights .* among them emb.*; it has \d+ .* among them unknown\.emb"),
    ],
    ids=["a layer's", "the embeddings", "another shape", "all", "all but under other names"],
)
def test_weights_that_are_missing_or_misshapen_are_refused_and_not_made_up(
    change: Callable[[dict[str, Any]], None], told: str, tmp_path: Path
) -> None:
    change_weights(save_encoder(tmp_path), change)
    with pytest.raises(CannotLoadModel, match=told):
        load(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.2.output.dense.weight",  # config.json says there are two layers
        "encoder.layer.0.attention.self.query.lora_A.weight",
        "encoder.layer.0.output.dense.weight_scale",
        "bert.encoder.layer.7.output.dense.bias",
        "projection.weight",
    ],
)
@pytest.mark.parametrize("save", [save_encoder, save_cross_encoder])
def test_a_weight_that_the_network_would_ignore_is_refused_by_name(
    save: Callable[[Path], Path], name: str, tmp_path: Path
) -> None:
    change_weights(save(tmp_path), _add(name, "embeddings.position_ids"))
    with pytest.raises(CannotLoadModel, match=rf"has 1 weights that .* does not use, among them .*{name[-20:]}"):
        load(tmp_path)


def test_heads_of_other_tasks_and_stored_positions_are_left_unread(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    with load(tmp_path) as engine:
        before = np.asarray(engine.embed(["the ferry"]))
    heads = ["cls.predictions.bias", "lm_head.dense.weight", "classifier.weight", "vocab_projector.bias"]
    change_weights(tmp_path, _add(*heads, "embeddings.position_ids", "encoder.layer.0.rotary_emb.inv_freq"))
    with load(tmp_path) as engine:
        np.testing.assert_array_equal(engine.embed(["the ferry"]), before)


@pytest.mark.parametrize("model_type", ["bert", "gemma2", "modernbert"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_network_is_what_transformers_makes_of_it_whatever_dtype_its_file_has(
    model_type: str, stored: torch.dtype, precision: str, tmp_path: Path
) -> None:
    change_config(save_encoder(tmp_path, model_type), pad_token_id=0)
    change_weights(tmp_path, lambda tensors: tensors.update({name: one.to(stored) for name, one in tensors.items()}))
    reference = AutoModel.from_pretrained(tmp_path, dtype=getattr(torch, precision), local_files_only=True).eval()
    spec = read_spec("m", ModelSettings(path=str(tmp_path), family="decoder" if model_type == "gemma2" else "encoder"))
    network = weights.load("AutoModel", spec, "cpu", precision)
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        assert torch.equal(network(input_ids=ids).last_hidden_state, reference(input_ids=ids).last_hidden_state)
    assert all(weight.dtype == getattr(torch, precision) for weight in network.parameters())


def test_a_cross_encoder_without_its_head_is_refused(tmp_path: Path) -> None:
    change_weights(save_cross_encoder(tmp_path), _drop("classifier.weight"))
    with pytest.raises(CannotLoadModel, match=r"classifier\.weight"):
        load(tmp_path)


def test_an_encoder_may_lack_the_pooler_that_it_never_uses(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    with load(tmp_path) as engine:
        before = np.asarray(engine.embed(["the ferry"]))
    change_weights(tmp_path, _drop("pooler.dense.weight"))
    with load(tmp_path) as engine:
        np.testing.assert_array_equal(engine.embed(["the ferry"]), before)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 100], ids=["empty", "text", "binary"])
def test_a_weights_file_that_is_broken_is_refused(content: bytes, tmp_path: Path) -> None:
    (save_encoder(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(CannotLoadModel, match="cannot be loaded"):
        load(tmp_path)


def test_a_weights_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    weights = save_encoder(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CannotLoadModel, match="cannot be loaded"):
        load(tmp_path)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('this was run')")
    change_config(tmp_path, auto_map={"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})
    with load(tmp_path) as engine:
        assert np.asarray(engine.embed(["the ferry"])).shape == (1, 32)


def test_warming_up_runs_a_real_model(tmp_path: Path) -> None:
    with load(save_cross_encoder(tmp_path)) as engine:
        engine.warm_up()
        assert engine.backlog.max_tokens("model") in (1024, 2048)  # by the cores


def test_loading_one_checkpoint_takes_no_models_or_defaults_of_a_workers_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("embedq.toml").write_text('default_embed = "other"\nmax_jobs = 3\n[models]\nother = "/no/such/place"\n')
    with load(save_encoder(tmp_path / "model"), alias="mine") as engine:
        assert list(engine.models) == ["mine"]
        assert engine.embed(["the ferry"]).model == "mine"
        assert engine.settings.max_jobs == 3


def test_several_models_are_loaded_side_by_side(tmp_path: Path) -> None:
    models = {"e": str(save_encoder(tmp_path / "e")), "r": str(save_cross_encoder(tmp_path / "r"))}
    with core.load_all(read_settings(models=models, device="cpu")) as engine:
        assert engine.embed(["the ferry"]).model == "e"
        assert engine.rerank("the ferry", ["a map", "an island"]).model == "r"


def test_no_models_are_refused_with_the_way_to_name_one() -> None:
    with pytest.raises(InvalidSettings, match="EMBEDQ_MODELS=alias=path"):
        core.load_all(read_settings())
