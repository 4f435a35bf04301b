"""BERT's kin without transformers: the same numbers, bit by bit, and transformers itself where anything is unusual."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from embedq import core
from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.models import weights
from embedq.core.models.encoders import bert
from embedq.core.settings import ModelSettings
from tests import lora
from tests.checkpoints import change_config, change_weights, save_cross_encoder, save_encoder

TYPES = ["bert", "roberta", "xlm-roberta", "camembert"]

Change = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    bert._computes_as_transformers.cache_clear()
    yield
    bert._computes_as_transformers.cache_clear()


def spec_of(directory: Path) -> ModelSpec:
    return read_spec("m", ModelSettings(path=str(directory)))


def given() -> dict[str, torch.Tensor]:
    """A padded batch in which token 1, which some types take for padding, is also within a text."""
    ids = torch.arange(2 * 30).reshape(2, 30) % 50 + 5
    ids[0, 7] = 1
    mask = torch.ones_like(ids)
    ids[1, 20:], mask[1, 20:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("model_type", TYPES)
def test_the_stored_numbers_are_those_of_transformers(model_type: str) -> None:
    config = transformers.AutoConfig.for_model(model_type, num_labels=1, **bert.TINY)
    reference = AutoModelForSequenceClassification.from_config(config).eval()
    own_names = {
        bert._own_name(name, bert._PREFIXES[model_type], True): name for name, _ in reference.named_parameters()
    }
    shapes = {own: reference.get_parameter(name).shape for own, name in own_names.items()}
    made = {own_names[own]: weight for own, weight in bert.tiny_weights(shapes).items()}
    reference.load_state_dict(made, strict=False)
    expected = torch.tensor(bert._FACTS[model_type == "bert"])
    torch.testing.assert_close(bert.tiny_rows(reference, model_type), expected, rtol=0, atol=bert._TOLERANCE / 4)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_states_are_those_of_transformers(model_type: str, stored: torch.dtype, precision: str, tmp_path: Path) -> None:
    change_weights(
        save_encoder(tmp_path, model_type),
        lambda tensors: tensors.update({name: one.to(stored) for name, one in tensors.items()}),
    )
    network = bert.load(spec_of(tmp_path), "cpu", precision)
    reference = AutoModel.from_pretrained(tmp_path, dtype=getattr(torch, precision), local_files_only=True).eval()
    assert isinstance(network, bert.Bert)
    with torch.inference_mode():
        assert torch.equal(network(**given()).last_hidden_state, reference(**given()).last_hidden_state)
        alone = given()["input_ids"][:1]
        assert torch.equal(network(alone).last_hidden_state, reference(alone).last_hidden_state)
    assert all(weight.dtype == getattr(torch, precision) for weight in network.parameters())
    assert not any(weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    network = bert.load(spec_of(save_cross_encoder(tmp_path, model_type)), "cpu", "float32", is_classifier=True)
    reference = AutoModelForSequenceClassification.from_pretrained(tmp_path, local_files_only=True).eval()
    assert isinstance(network, bert.Classifier)
    types = {"token_type_ids": (torch.arange(60).reshape(2, 30) % 30 > 12).long() % reference.config.type_vocab_size}
    with torch.inference_mode():
        assert torch.equal(network(**given(), **types).logits, reference(**given(), **types).logits)
        assert torch.equal(network(**given()).logits, reference(**given()).logits)


def test_a_file_that_has_a_head_too_is_read_by_its_longer_names(tmp_path: Path) -> None:
    save_cross_encoder(tmp_path)
    change_config(tmp_path, architectures=["BertModel"])
    network = bert.load(spec_of(tmp_path), "cpu", "float32")
    reference = AutoModel.from_pretrained(tmp_path, local_files_only=True).eval()
    assert network is not None
    with torch.inference_mode():
        assert torch.equal(network(**given()).last_hidden_state, reference(**given()).last_hidden_state)


def _weights(change: Callable[[dict[str, Any]], Any]) -> Change:
    return lambda directory: change_weights(directory, change)


def _says_nothing_of_pytorch(directory: Path) -> None:
    save_file(load_file(directory / "model.safetensors"), directory / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda directory: change_config(directory, hidden_act="relu"),
        lambda directory: change_config(directory, is_decoder=True),
        lambda directory: change_config(directory, position_embedding_type="relative_key"),
        lambda directory: change_config(directory, a_switch_of_tomorrow=1),
        lambda directory: change_config(directory, type_vocab_size=None),
        lora.adapter,
        _weights(lambda tensors: tensors.pop("encoder.layer.1.output.dense.bias")),
        _weights(lambda tensors: tensors.update({"encoder.layer.2.output.dense.bias": torch.ones(2)})),
        _weights(lambda tensors: tensors.update({"bert.embeddings.LayerNorm.bias": torch.ones(32)})),
        _weights(lambda tensors: tensors.update({"embeddings.LayerNorm.bias": torch.ones(31)})),
        _weights(lambda tensors: tensors.update({"embeddings.LayerNorm.bias": torch.ones(32, dtype=torch.float64)})),
        _says_nothing_of_pytorch,
        lambda directory: (directory / "model.safetensors").write_bytes(b"nothing"),
    ],
    ids=["activation", "decoder", "positions", "unknown key", "no size", "adapter", "a weight less", "a weight more",
         "one under two names", "shape", "dtype", "metadata", "broken"],
)  # fmt: skip
def test_what_is_unusual_is_left_to_transformers(change: Change, tmp_path: Path) -> None:
    save_encoder(tmp_path)
    spec = spec_of(tmp_path)
    assert bert.load(spec, "cpu", "float32") is not None
    change(tmp_path)
    assert bert.load(spec_of(tmp_path), "cpu", "float32") is None


@pytest.mark.parametrize(
    "fault",
    [
        ("gelu", lambda rows: torch.ops.aten.gelu(rows, approximate="tanh")),
        (
            "scaled_dot_product_attention",
            lambda queries, keys, values, mask, scale: (queries @ keys.transpose(2, 3) * scale).softmax(-1) @ values,
        ),
    ],
    ids=["gelu", "no mask"],
)
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_machine_that_gives_other_numbers_runs_transformers_and_says_so(
    fault: tuple[str, Any],
    model_type: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = spec_of(save_encoder(tmp_path, model_type))
    monkeypatch.setattr(torch.nn.functional, *fault)
    assert bert.load(spec, "cpu", "float32") is None
    (record,) = caplog.records
    assert (record.levelno, vars(record)["action"]) == (logging.WARNING, "not_as_transformers")


@pytest.mark.parametrize("save", [save_encoder, save_cross_encoder])
def test_a_worker_of_such_a_model_never_imports_transformers(save: Callable[[Path], Path], tmp_path: Path) -> None:
    """Nor what takes long: torch's compiler and what that needs."""
    program = """
import sys
from embedq import core
from embedq.workers import worker
with core.load(sys.argv[1], device="cpu", precision=sys.argv[2]) as engine:
    engine.warm_up()
    engine.rerank("the ferry", ["a map"])
print(*({"transformers", "torch._dynamo", "sympy", "scipy", "jinja2"} & set(sys.modules)))
"""
    for precision in ("float32", "auto"):
        command = [sys.executable, "-c", program, str(save(tmp_path)), precision]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.split() == []


def test_loading_by_transformers_leaves_its_logging_as_it_was(tmp_path: Path) -> None:
    logs = transformers.utils.logging
    before = (logs.get_verbosity(), logs.is_progress_bar_enabled())
    logs.set_verbosity_info()
    try:
        weights.load("AutoModel", spec_of(save_encoder(tmp_path, "distilbert")), "cpu", "float32")
        assert (logs.get_verbosity(), logs.is_progress_bar_enabled()) == (logging.INFO, before[1])
    finally:
        logs.set_verbosity(before[0])


def test_vectors_are_the_same_by_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the ferry", "", "a map of the island " * 20]
    vectors: list[np.ndarray] = []
    for is_own in (True, False):
        if not is_own:
            monkeypatch.setattr(bert, "load", lambda *_, **__: None)
        with core.load(str(save_encoder(tmp_path)), device="cpu", precision="float32") as engine:
            vectors.append(np.asarray(engine.embed(texts)))
    np.testing.assert_array_equal(vectors[0], vectors[1])
