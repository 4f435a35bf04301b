"""Shared by the tests of rerankers: golden calls as calls of ours, alone, together and in mixtures of jobs."""

from __future__ import annotations

import random
from collections.abc import Sequence as Rows
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from embedq import core
from embedq.core.engine import Engine
from embedq.core.options import RerankOptions
from tests.conftest import GOLDEN
from tests.golden_cases import Call, difference

#: What FlagEmbedding's constructors and calls share with ours.
_SAME = (
    "max_length",
    "query_max_length",
    "normalize",
    "prompt",
    "cutoff_layers",
    "compress_layers",
    "compress_ratio",
)

#: Its names of the instructions -> ours. Its None is no instruction; ours would be the model's own.
_INSTRUCTIONS = {
    "query_instruction_for_rerank": "query_instruction",
    "query_instruction_format": "query_instruction_format",
    "passage_instruction_for_rerank": "passage_instruction",
    "passage_instruction_format": "passage_instruction_format",
}


def load(case: str, **model: Any) -> Engine:
    """An engine with the checkpoint of a case, in float32 on the CPU unless `model` says otherwise."""
    chosen = {"precision": "float32", **model}
    return core.load(str(GOLDEN / case / "model"), device="cpu", model=chosen)


def options(call: Call) -> dict[str, Any]:
    """The options of our call that stands for `call`."""
    given = call.constructor | call.kwargs
    same = {name: given[name] for name in _SAME if name in given}
    return same | {ours: given[name] or "" for name, ours in _INSTRUCTIONS.items() if name in given}


def pairs(call: Call) -> list[tuple[str, str]]:
    return [(first, second) for first, second in call.inputs]


def encode(engine: Engine, pairs: list[tuple[str, str]], **given: Any) -> list[list[int]]:
    """The ids that the model would get."""
    model: Any = engine.models["model"]
    tokens = model.encode_pairs(pairs, RerankOptions.checked(given))
    return [one.ids.tolist() for one in tokens]


def plain_ids(case: str, text: str) -> list[int]:
    """The ids of a text, without special tokens."""
    tokenizer = Tokenizer.from_file(str(GOLDEN / case / "model" / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def assert_same_ids(engine: Engine, call: Call) -> None:
    assert encode(engine, pairs(call), **options(call)) == call.token_ids["input_ids"]


def assert_same_scores(engine: Engine, call: Call) -> None:
    """All pairs of the call at once."""
    assert difference(engine.score(pairs(call), **options(call)), call.expected[""]) <= 1


def assert_same_scores_alone(engine: Engine, call: Call) -> None:
    """Every pair by itself, nothing padded."""
    scores = [engine.score([pair], **options(call)) for pair in pairs(call)]
    assert difference(np.concatenate(scores, axis=-1), call.expected[""]) <= 1


def assert_same_scores_in_mixtures(engine: Engine, calls: Rows[Call], seed: int, num_jobs: int = 40) -> None:
    """Jobs of random pairs and calls at once, so that pairs of different jobs share batches."""
    draw = random.Random(seed)
    jobs = []
    for _ in range(num_jobs):
        call = draw.choice(calls)
        chosen = draw.choices(range(len(call.inputs)), k=draw.randint(1, 9))
        jobs.append((call, chosen))

    def worst(job: tuple[Call, list[int]]) -> float:
        call, chosen = job
        some = [pairs(call)[index] for index in chosen]
        return difference(engine.score(some, **options(call)), call.expected[""][..., chosen])

    with ThreadPoolExecutor(8) as threads:
        assert max(threads.map(worst, jobs)) <= 1


#: Least cosine of a call's scores in bfloat16 with the float32 ones.
MIN_COSINE = 0.999


def assert_close_in_bfloat16(engine: Engine, call: Call) -> None:
    """Each raw score within 0.15 and 1 %; the sigmoid brings scores at least four times nearer."""
    within, expected = 0.15, call.expected[""]
    allowed = within / 4 if call.kwargs.get("normalize") else within + 0.01 * np.abs(expected)
    scores = engine.score(pairs(call), **options(call))
    assert scores.dtype == np.float32
    assert (np.abs(scores - expected) <= allowed).all()
    cosine = np.vdot(scores, expected) / np.linalg.norm(scores) / np.linalg.norm(expected)
    print(f"{call}: bfloat16 cosine {cosine:.5f}")
    assert cosine >= MIN_COSINE
