"""Encoders and cross-encoders in half precisions without padding, whole: on a CPU, and on CUDA where there is one."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, XLMRobertaConfig

from embedq import core
from embedq.core.engine import Engine
from embedq.core.models.encoders import linear
from embedq.core.models.encoders.m3 import FILES
from embedq.core.models.token_layout import TokenLayout
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence
from embedq.core.settings import Precision
from tests import tiny_models
from tests.checkpoints import PATIENCE_S
from tests.conftest import GOLDEN
from tests.loops import wait_for_waiting
from tests.test_transfer import DEVICES

if not (linear.is_available() or torch.cuda.is_available()):
    pytest.skip("neither this CPU nor a device computes without padding", allow_module_level=True)

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")

#: Heads of 32, which CUDA's kernel takes; those of the golden cases are narrower than it can be asked for.
SIZES = {
    "vocab_size": 764,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 300,
}

KINDS = ("bert", "m3", "bert reranker", "xlm-roberta reranker")

MIN_COSINE = 0.999

GOLDEN_CASES = ("flagmodel_cls", "flagmodel_mean", "bge_m3", "flagreranker_bert", "flagreranker_xlmr")


def save(directory: Path, kind: str) -> Path:
    """A random model of that kind, with the tokenizer of a golden case."""
    xlmr = XLMRobertaConfig(**SIZES, pad_token_id=1)
    if kind == "bert":
        return tiny_models.add_modules(
            tiny_models.save(directory, BertConfig(**SIZES), "flagmodel_mean"), "mean_tokens"
        )
    if kind == "m3":
        tiny_models.save(directory, xlmr, "bge_m3")
        for name, num_outputs in (("colbert", 64), ("sparse", 1)):
            torch.save(torch.nn.Linear(64, num_outputs).state_dict(), directory / FILES[name])
        return directory
    config, case = (xlmr, "flagreranker_xlmr")
    if kind == "bert reranker":
        config, case = BertConfig(**SIZES), "flagreranker_bert"
    config.num_labels = 1
    torch.manual_seed(4)
    module = AutoModelForSequenceClassification.from_config(config)
    for weight in module.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    module.save_pretrained(directory)
    for file in (GOLDEN / case / "model").glob("*token*.json"):
        shutil.copy(file, directory)
    return directory


def texts(count: int = 60) -> list[str]:
    draw = random.Random(5)
    words = ["ferry", "garden", "rain", "map", "boat", "the", "island"]
    return [" ".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(count)]


def answers(engine: Engine) -> list[np.ndarray]:
    """Vectors whose directions are compared: one of all scores, one of all sparse weights, others by text."""
    model = engine.models["model"]
    if "score" in model.outputs:
        return [engine.score([("a ferry in the rain", text) for text in texts()], normalize=False)]
    if "sparse" not in model.outputs:
        return list(np.asarray(engine.embed(texts())))
    found = engine.embed(texts(), outputs=("dense", "sparse", "colbert"))
    assert found.sparse
    assert found.colbert
    words = np.zeros((len(texts()), 1_000))
    for row, sparse in zip(words, found.sparse, strict=True):
        row[sparse.ids] = sparse.weights
    return [*np.asarray(found.dense), words, *found.colbert]


def lowest_cosine(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return min(
        float(np.vdot(one, other) / max(np.linalg.norm(one) * np.linalg.norm(other), 1e-9))
        for one, other in zip(found, expected, strict=True)
    )


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[np.ndarray]]:
    """A model's directory, and what it answers in float32 on a CPU."""
    directory = save(tmp_path_factory.mktemp("model"), request.param)
    with core.load(str(directory), device="cpu", precision="float32") as engine:
        assert engine.models["model"].is_padded
        return str(directory), answers(engine)


@pytest.fixture(params=["bfloat16", "float16"])
def precision(request: pytest.FixtureRequest) -> Precision:
    chosen: Precision = request.param
    return chosen


def on(path: str, device: str, precision: Precision, **settings: Any) -> Engine:
    if device == "cpu" and (precision != "bfloat16" or not linear.is_available()):
        pytest.skip("a CPU does without padding in bfloat16 alone, where it has products in it")
    return core.load(path, device=device, precision=precision, **settings)


@DEVICES
def test_without_padding_the_answers_are_those_of_float32(
    saved: tuple[str, list[np.ndarray]], device: str, precision: Precision
) -> None:
    path, expected = saved
    with on(path, device, precision) as engine:
        assert not engine.models["model"].is_padded
        assert lowest_cosine(answers(engine), expected) >= MIN_COSINE
        stats = engine.stats()
    assert stats["padded_tokens"] == stats["tokens"]


@DEVICES
def test_a_batch_that_does_not_fit_runs_in_parts(saved: tuple[str, list[np.ndarray]], device: str) -> None:
    path, expected = saved
    failed: list[int] = []

    def allocate(layout: TokenLayout, **pooling: Any) -> torch.Tensor:
        if layout.num_tokens > 300:
            failed.append(layout.num_tokens)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        states: torch.Tensor = run(layout, **pooling)
        return states

    with on(path, device, "bfloat16") as engine:
        network = engine.models["model"]._network  # type: ignore[attr-defined]
        run, network._run = network._run, allocate
        assert lowest_cosine(answers(engine), expected) >= MIN_COSINE
        assert failed
        assert engine.backlog.max_tokens("model") == max(256, min(failed) * 3 // 4)
        assert engine.meter.passes["model"].num_memory_splits == len(failed)


@CUDA
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_models_answer_on_cuda_as_on_a_cpu(case: str, precision: Precision) -> None:
    """Padded: their heads are too narrow for the kernel."""
    path = str(GOLDEN / case / "model")
    with core.load(path, device="cpu", precision="float32") as engine:
        expected = answers(engine)
    with core.load(path, device="cuda:0", precision=precision) as engine:
        assert lowest_cosine(answers(engine), expected) >= MIN_COSINE


@pytest.fixture
def no_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@CUDA
def test_a_pass_is_launched_without_waiting_for_the_device(
    saved: tuple[str, list[np.ndarray]], request: pytest.FixtureRequest
) -> None:
    with core.load(saved[0], device="cuda:0", precision="bfloat16") as engine:
        model: Any = engine.models["model"]
        if "score" in model.outputs:
            given: Any = RerankOptions()
            tokens = model.encode_pairs([("a ferry", text) for text in texts()], given)
        else:
            given = EmbedOptions(outputs=tuple(sorted(model.outputs)))
            tokens = model.encode_texts(texts(), given)
        batch, wanted = [Sequence(one) for one in tokens], model.wanted(given)
        first = model.launch(batch, wanted)()  # what libraries do once may wait
        request.getfixturevalue("no_waits")
        finish = model.launch(batch, wanted)
        torch.cuda.set_sync_debug_mode("default")
        for name, rows in finish().items():
            assert len(rows) == len(first[name]) == len(batch)


@CUDA
def test_real_memory_that_runs_out_costs_halved_batches_and_no_answer(tmp_path: Path) -> None:
    path, begun, gate = save(tmp_path, "bert"), threading.Semaphore(0), threading.Event()
    many = texts(15_000)  # some 450,000 tokens
    sizes: Any = {"max_batch_tokens": 1 << 19, "max_batch_sequences": 1 << 15, "max_batch_s": 1e6}

    def hold(*_: Any) -> None:
        begun.release()
        assert gate.wait(PATIENCE_S)

    with core.load(str(path), device="cuda:0", precision="bfloat16", **sizes) as engine:
        expected = list(np.asarray(engine.embed(many)))
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + (64 << 20)) / total)
        try:
            engine.models["model"]._network.register_forward_pre_hook(hold)  # type: ignore[attr-defined]
            first = engine.submit(lambda: engine.calls.embed(["holds the device while the others come"]))
            assert begun.acquire(timeout=PATIENCE_S)
            job = engine.submit(lambda: engine.calls.embed(many))
            model: Any = engine.models["model"]
            different = {one.ids.tobytes() for one in model.encode_texts(many, EmbedOptions())}
            wait_for_waiting(engine.backlog, len(different))
            gate.set()
            found = list(np.asarray(job.answer.result(PATIENCE_S)))
            assert len(first.answer.result(PATIENCE_S)) == 1
        finally:
            gate.set()
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert engine.meter.passes["model"].num_memory_splits > 0
    assert lowest_cosine(found, expected) >= MIN_COSINE
