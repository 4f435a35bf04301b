"""The bare forward pass: without padding and with it, no engine around it; and the device's limit beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.models import Launched, Model, load_model
from embedq.core.models.encoders import network
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence, Tokens
from embedq.core.settings import ModelSettings
from tests.bench.accelerator.asked import Asked
from tests.bench.accelerator.texts import lengths_of
from tests.bench.peers import flops
from tests.bench.report import Figure

#: Tokens of a batch: the engine's default on accelerators; few where all is to be quick.
_BATCH_TOKENS, _QUICK_BATCH_TOKENS = 16_384, 400

#: Batches that take turns; the mixed ones are all different.
_NUM_BATCHES, _QUICK_NUM_BATCHES = 8, 2

#: Widths of the square matrices that the limit is measured with, and products of one count.
_WIDTHS, _QUICK_WIDTHS = (4_096, 8_192), (512,)
_PRODUCTS, _COUNTS = 20, 5
_QUICK_PRODUCTS, _QUICK_COUNTS = 2, 2


def measure(asked: Asked) -> Iterator[Figure]:
    """Figures of each kind of lengths, both ways."""
    limit = matrix_limit(asked)
    yield Figure(f"{asked.model}_limit", "products of matrices, the device's limit", limit / 1e12, "TFLOP/s")
    rates: dict[str, dict[str, float]] = {}
    for way in ("packed", "padded"):
        model = load(asked, is_padded=way == "padded")
        if way == "packed":
            yield Figure(
                f"{asked.model}_is_packed", "runs without padding (1) or with (0)", float(not model.is_padded), ""
            )
        rates[way] = {}
        for kind, bounds in asked.kinds.items():
            lengths, per_s, launch_s = _rate(asked, model, bounds)
            rates[way][kind] = lengths.sum() / len(lengths) * per_s
            yield from _figures(asked, way, kind, limit, _Rate(lengths, per_s, launch_s))
        del model
    for kind in asked.kinds:
        ratio = rates["packed"][kind] / rates["padded"][kind]
        yield Figure(f"{asked.model}_forward_{kind}_gain", f"{kind}: without padding to with it", ratio, "×")


def load(asked: Asked, is_padded: bool = False) -> Model:
    """The model as a worker has it, or in transformers' own, padded way."""
    settings = ModelSettings(path=asked.directory, max_length=asked.max_length)
    spec = read_spec("bench", settings)
    if not is_padded:
        return load_model(spec, asked.device, asked.precision)  # type: ignore[arg-type]
    with patch.object(network, "_may_be_packed", lambda *_: False):
        return load_model(spec, asked.device, asked.precision)  # type: ignore[arg-type]


def matrix_limit(asked: Asked) -> float:
    """FLOP/s of products of square matrices, the best of several counts: what else runs only takes away."""
    best = 0.0
    widths, num_products, num_counts = (
        (_QUICK_WIDTHS, _QUICK_PRODUCTS, _QUICK_COUNTS) if asked.is_quick else (_WIDTHS, _PRODUCTS, _COUNTS)
    )
    for width in widths:
        one, other = (torch.randn(width, width).to(asked.device, getattr(torch, asked.precision)) for _ in range(2))
        for _ in range(num_counts):
            started_s = time.perf_counter()
            for _ in range(num_products):
                product = torch.mm(one, other)
            product[0, 0].item()  # waits for all
            best = max(best, num_products * 2 * width**3 / (time.perf_counter() - started_s))
    return best


class _Rate:
    def __init__(self, lengths: np.ndarray, per_s: float, launch_s: float) -> None:
        self.lengths, self.per_s, self.launch_s = lengths, per_s, launch_s


def _rate(asked: Asked, model: Model, bounds: tuple[int, int]) -> tuple[np.ndarray, float, float]:
    batches = _batches(asked, model, bounds)
    options: Any = RerankOptions() if asked.is_scored else EmbedOptions()
    wanted = model.wanted(options)
    calls: list[Callable[[], Launched]] = [lambda batch=batch: model.launch(batch, wanted) for batch in batches]  # type: ignore[misc]
    per_s, launch_s = rate(calls, asked.seconds)
    # Of one round of all batches: its lengths, and how many such rounds a second has.
    return np.array([one.length for batch in batches for one in batch]), per_s / len(batches), launch_s


def rate(calls: list[Callable[[], Launched]], seconds: float) -> tuple[float, float]:
    """(passes per second, the next one queued while one runs; seconds in which the host queues one)."""
    for call in calls:
        call()()
    num_done, launch_s, running = 0, 0.0, None
    started_s = time.perf_counter()
    while num_done < len(calls) or time.perf_counter() - started_s < seconds:
        begun_s = time.perf_counter()
        following = calls[num_done % len(calls)]()
        launch_s += time.perf_counter() - begun_s
        if running:
            running()
        running, num_done = following, num_done + 1
    assert running
    running()
    return num_done / (time.perf_counter() - started_s), launch_s / num_done


def _batches(asked: Asked, model: Model, bounds: tuple[int, int]) -> list[list[Sequence]]:
    """Batches as the engine would form them: in the order of age, or of like lengths where the model pads."""
    budget = _QUICK_BATCH_TOKENS if asked.is_quick else _BATCH_TOKENS
    count = (_QUICK_NUM_BATCHES if asked.is_quick else _NUM_BATCHES) * budget * 2 // sum(bounds)
    lengths = lengths_of(bounds, count)
    if model.is_padded:
        lengths = np.sort(lengths)
    random_ = np.random.default_rng(1)
    batches: list[list[Sequence]] = [[]]
    num_tokens = 0
    for length in lengths.tolist():
        last = batches[-1]
        num_tokens = length * (len(last) + 1) if model.is_padded else num_tokens + length
        if last and (num_tokens > budget or len(last) == 512):
            batches.append([])
            num_tokens = length
        ids = random_.integers(5, int(model.spec.config["vocab_size"]), length).astype(np.int32)
        batches[-1].append(Sequence(Tokens(ids, np.zeros(length, np.int32))))
    return batches


def _figures(asked: Asked, way: str, kind: str, limit: float, found: _Rate) -> Iterator[Figure]:
    config = json.loads((asked.path / "config.json").read_text(encoding="utf-8"))
    key, told = f"{asked.model}_forward_{kind}_{way}", f"bare pass, {kind} tokens, {way}"
    tokens_per_s = float(found.lengths.sum() * found.per_s)
    share = flops.of_sequences(config, found.lengths, asked.is_scored) * found.per_s / limit
    yield Figure(f"{key}_tokens_per_s", told, tokens_per_s, "tokens/s")
    yield Figure(f"{key}_texts_per_s", "  the same", len(found.lengths) * found.per_s, "texts/s")
    yield Figure(f"{key}_share", "  of the limit", share, "")
    yield Figure(f"{key}_launch_ms", "  host's part of a pass", 1000 * found.launch_s, "ms")
