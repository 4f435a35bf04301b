"""Every golden call of the embedders: token ids first, then numbers, however the texts share batches."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from embedq.core.errors import InvalidInput
from embedq.core.vectors import normalized
from tests.embedder_calls import differences, embed, load, rows_of, token_ids
from tests.golden_cases import Call, calls

CASES = (
    "flagmodel_cls",
    "flagmodel_mean",
    "flagmodel_query_instruction",
    "flagmodel_truncate_dim",
    "bge_m3",
    "flagllmmodel_last_token",
    "flagllmmodel_qwen2_right_padding",
    "flagllmmodel_qwen3",
    "flagiclmodel",
    "st_mean_pooling",
    "st_modernbert",
    "st_qwen3_embedding",
)

CALLS = [call for call in calls(*CASES) if call.method != "compute_score"]

#: By model, with its settings, the calls that are made of it.
BY_MODEL = {
    str(first): [call for call in CALLS if (call.case, call.constructor) == (first.case, first.constructor)]
    for first in CALLS
}

#: One call for every model.
FIRSTS = list({id(BY_MODEL[str(call)][0]): call for call in reversed(CALLS)}.values())

#: Least cosine of a vector in bfloat16 with the float32 one.
MIN_COSINE = 0.999

#: Jobs that arrive at once.
NUM_JOBS = 8


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_token_ids_and_numbers_are_those_of_the_library(call: Call) -> None:
    with load(call) as engine:
        assert token_ids(engine, call) == call.token_ids["input_ids"]
        found = differences(embed(engine, call), call)
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_text_gives_the_same_without_company(call: Call) -> None:
    with load(call, max_batch_sequences=1) as engine:
        found = differences(embed(engine, call), call)
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("first", FIRSTS, ids=str)
def test_jobs_that_share_batches_give_the_same(first: Call) -> None:
    """Random texts, asked for in the ways of the calls that one model got."""
    draw = random.Random(str(first))
    calls = [call for call in BY_MODEL[str(first)] if not call.is_bare]
    drawn = [draw.choice(calls) for _ in range(NUM_JOBS)]
    jobs = [rows_of(call, draw.choices(range(len(call.inputs)), k=draw.randint(1, 12))) for call in drawn]
    ready = threading.Barrier(NUM_JOBS)
    with load(first) as engine, ThreadPoolExecutor(NUM_JOBS) as callers:

        def run(job: Call) -> dict[str, float]:
            ready.wait()
            return differences(embed(engine, job), job)

        for found in callers.map(run, jobs):
            assert max(found.values()) <= 1, found


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_half_precision_points_the_same_way(call: Call) -> None:
    with load(call, precision="bfloat16") as engine:
        assert engine.models["model"].precision == "bfloat16"
        found = np.asarray(embed(engine, call, outputs=("dense",)))
    with load(call) as engine:
        exact = np.asarray(embed(engine, call, outputs=("dense",)))
    cosines = (normalized(found) * normalized(exact)).sum(axis=1)
    assert cosines.min() >= MIN_COSINE


def test_more_dimensions_than_there_are_are_refused() -> None:
    """FlagEmbedding gives all there are."""
    call = next(call for call in CALLS if call.id == "cut_larger_than_size")
    with load(call) as engine, pytest.raises(InvalidInput, match=r"dimensions may be up to 48 .*given 4096"):
        embed(engine, call, dimensions=4096)


def test_a_call_can_bring_the_instruction_itself() -> None:
    call = next(call for call in CALLS if str(call) == "flagllmmodel_last_token-queries")
    given = call.constructor
    bare = replace(
        call, constructor=given | {"query_instruction_for_retrieval": None, "query_instruction_format": "{}{}"}
    )
    own = {
        "instruction": given["query_instruction_for_retrieval"],
        "instruction_format": given["query_instruction_format"],
    }
    with load(bare) as engine:
        assert differences(embed(engine, bare, **own), call)["dense"] <= 1
        assert differences(embed(engine, bare), call)["dense"] > 1
