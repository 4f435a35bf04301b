"""Texts to token ids: the Rust tokenizer alone and all of ours around it, by threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.settings import ModelSettings
from embedq.core.tokenizer import Tokenizer
from tests.bench.accelerator import texts
from tests.bench.accelerator.asked import Asked
from tests.bench.report import Figure

#: Texts encoded in one go, as the encode threads take them from large jobs.
_SLICE = 64

#: Texts of one count.
_NUM_TEXTS = 2_048


def measure(asked: Asked) -> Iterator[Figure]:
    """Texts per second of each kind, by as many threads as the engine may have."""
    spec = read_spec("bench", ModelSettings(path=asked.directory, max_length=asked.max_length))
    rust = RustTokenizer.from_file(str(asked.path / "tokenizer.json"))
    ours = Tokenizer(spec)
    # Its own threads would hide what one of ours does.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        for kind, bounds in asked.kinds.items():
            if kind == "mixed":
                continue
            found = texts.draw(asked.path, bounds, 200 if asked.is_quick else _NUM_TEXTS)
            slices = [found[start : start + _SLICE] for start in range(0, len(found), _SLICE)]
            for name, encode in (("rust", rust.encode_batch), ("ours", _of(ours, asked))):
                for num_threads in (1, 2, 4)[: 2 if (os.cpu_count() or 1) < 4 else 3]:
                    per_s = _texts_per_s(encode, slices, num_threads, asked.seconds / 3)
                    told = f"{kind} tokens, {'Rust alone' if name == 'rust' else 'ours'}, threads: {num_threads}"
                    yield Figure(f"{asked.model}_tokenizing_{kind}_{name}_{num_threads}", told, per_s, "texts/s")
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _of(ours: Tokenizer, asked: Asked) -> Callable[[list[str]], Any]:
    if asked.is_scored:
        return lambda some: ours.encode_pairs([(texts.QUERY, text) for text in some])
    return ours.encode


def _texts_per_s(
    encode: Callable[[list[str]], Any], slices: list[list[str]], num_threads: int, seconds: float
) -> float:
    encode(slices[0])
    counts = [0] * num_threads
    started_s = time.perf_counter()

    def work(number: int) -> None:
        index = number
        while not counts[number] or time.perf_counter() - started_s < seconds:
            some = slices[index % len(slices)]
            encode(some)
            counts[number] += len(some)
            index += num_threads

    threads = [threading.Thread(target=work, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started_s)
