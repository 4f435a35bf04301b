"""Golden cases: the inputs of a call, and what the original library made of them.

Reads `tests/golden/<case>/`: inputs.json, expected.npz, expected_sparse.json, token_ids.json. Knows
nothing of how we compute: a test turns a `Call` into a call of ours and compares.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import GOLDEN

#: Absolute, for vectors of length 1, ColBERT rows, sparse weights and scores within 0..1; for larger
#: values relative as well. From the cases' own meta.json.
TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a case."""

    case: str
    id: str
    #: The library's class: "FlagModel", "SentenceTransformer", …
    library: str
    #: Name of the library's method: "encode", "encode_queries", "compute_score", "predict", …
    method: str
    #: Texts or [first, second] pairs; a bare text or pair is a list of one, and `is_bare`.
    inputs: list[Any]
    is_bare: bool
    #: The query of method "rank".
    query: str | None
    kwargs: dict[str, Any]
    #: Keyword arguments of the constructor, this call's own among them.
    constructor: dict[str, Any]
    #: Arrays by what is behind the call's id: "" for the only one, else "dense", "colbert", …
    expected: dict[str, np.ndarray]
    #: Per text a dict of token id -> weight; None where the call gave none.
    expected_sparse: list[dict[int, float]] | None
    #: "input_ids", "token_type_ids", "query_input_ids", … -> rows without padding, in input order.
    token_ids: dict[str, list[list[int]]]
    #: The numbers are right only for the batches that this call's batch_size made.
    depends_on_batching: bool

    def __str__(self) -> str:
        return f"{self.case}-{self.id}"

    @property
    def model(self) -> Path:
        """The checkpoint's directory."""
        return GOLDEN / self.case / "model"


@cache
def read(case: str) -> tuple[Call, ...]:
    """Every call of a case, in order."""
    directory = GOLDEN / case
    described = _json(directory / "inputs.json")
    token_ids = _json(directory / "token_ids.json")
    sparse = _json(directory / "expected_sparse.json") if (directory / "expected_sparse.json").is_file() else {}
    with np.load(directory / "expected.npz") as file:
        arrays = {name: file[name] for name in file.files}
    calls = []
    for call in described["calls"]:
        is_bare = "input_value" in call
        calls.append(
            Call(
                case=case,
                id=call["id"],
                library=described["class"],
                method=call["method"],
                inputs=[call["input_value"]] if is_bare else described["inputs"][call["input"]],
                is_bare=is_bare,
                query=call.get("query"),
                kwargs=call["kwargs"],
                constructor=described["constructor"] | call.get("constructor_overrides", {}),
                expected=_of(call["id"], arrays),
                expected_sparse=_weights(sparse.get(call["id"])),
                token_ids=token_ids[call["id"]],
                depends_on_batching=call.get("depends_on_batching", False),
            )
        )
    return tuple(calls)


def calls(*cases: str) -> list[Call]:
    """Every call of all `cases`; for `pytest.mark.parametrize(…, ids=str)`."""
    return [call for case in cases for call in read(case)]


def difference(found: Any, expected: np.ndarray) -> float:
    """The largest difference, as a share of what `TOLERANCE` allows of it: above 1 is too much."""
    found = np.asarray(found)
    assert found.shape == expected.shape, f"shape {found.shape} instead of {expected.shape}"
    allowed = TOLERANCE * np.maximum(1, np.abs(expected))
    return float((np.abs(found.astype(np.float64) - expected) / allowed).max(initial=0))


def _of(call: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {name.removeprefix(f"{call}."): array for name, array in arrays.items() if name.startswith(f"{call}.")}
    return found | ({"": arrays[call]} if call in arrays else {})


def _weights(rows: list[dict[str, float]] | None) -> list[dict[int, float]] | None:
    if rows is None:
        return None
    return [{int(token): weight for token, weight in row.items()} for row in rows]


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
