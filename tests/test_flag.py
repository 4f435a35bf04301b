"""Every golden call of FlagEmbedding, made to our faces as it was made to its classes.

Run with -s for the table of differences.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.conftest import GOLDEN
from tests.flag_calls import Faces, Row, check_ids, compare, make, recorded
from tests.golden_cases import Call, calls

CASES = [
    "bge_m3",
    "flagiclmodel",
    "flagllmmodel_last_token",
    "flagllmmodel_qwen2_right_padding",
    "flagllmmodel_qwen3",
    "flagllmreranker",
    "flagllmreranker_bos_is_pad",
    "flagllmreranker_llama",
    "flagmodel_cls",
    "flagmodel_mean",
    "flagmodel_query_instruction",
    "flagmodel_truncate_dim",
    "flagreranker_bert",
    "flagreranker_xlmr",
    "layerwise_reranker",
    "lightweight_reranker",
]


@pytest.fixture(scope="module")
def faces() -> Iterator[Faces]:
    faces = Faces()
    yield faces
    faces.close()


@pytest.fixture(scope="module")
def table() -> Iterator[list[Row]]:
    rows: list[Row] = []
    yield rows
    print(f"\n\n{'call':<58} {'numbers':<22} {'difference':>10}  of what is allowed")
    for call, name, difference, share in rows:
        print(f"{call:<58} {name:<22} {difference:10.1e} {share:12.1%}")
    print(f"{len(rows)} comparisons, the largest {max(row[3] for row in rows):.1%} of what is allowed")


def test_no_case_of_flag_embedding_is_left_out() -> None:
    described = {file.parent.name: json.loads(file.read_text()) for file in GOLDEN.glob("*/inputs.json")}
    assert sorted(case for case, inputs in described.items() if inputs["package"] == "FlagEmbedding") == CASES


@pytest.mark.parametrize("call", calls(*CASES), ids=str)
def test_a_call_gives_what_flag_embedding_gives(call: Call, faces: Faces, table: list[Row]) -> None:
    face = faces.of(call)
    with recorded(face) as seen:
        given = make(face, call)
    check_ids(seen, call)
    rows = compare(given, call)
    table += rows
    assert max(share for *_, share in rows) <= 1
