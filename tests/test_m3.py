"""BGE-M3 beyond the golden vectors: scores, heads that are missing or wrong, one pass for all outputs."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedq import core
from embedq.core.errors import CannotLoadModel, DeviceFailure, InvalidInput
from embedq.core.models.encoders.m3 import _by_token
from embedq.core.models.token_layout import TokenLayout
from embedq.core.sequence import Sequence, Tokens
from tests.conftest import GOLDEN
from tests.golden_cases import Call, difference, read

DIRECTORY = GOLDEN / "bge_m3" / "model"

#: The last call but one depends on what shares a batch, which is not ours to repeat.
SCORES = [call for call in read("bge_m3") if call.method == "compute_score" and not call.depends_on_batching]

#: FlagEmbedding's names of scores -> the mode that gives them, and which of the three weights count.
MODES = {
    "dense": ("dense", None),
    "sparse": ("sparse", None),
    "colbert": ("colbert", None),
    "sparse+dense": ("weighted", (1, 1, 0)),
    "colbert+sparse+dense": ("weighted", (1, 1, 1)),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(DIRECTORY, tmp_path / "model"))


def load(path: Path = DIRECTORY, **settings: Any) -> Any:
    return core.load(str(path), precision="float32", device="cpu", **settings)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("call", SCORES, ids=str)
def test_scores_are_those_of_compute_score(call: Call, name: str) -> None:
    mode, counted = MODES[name]
    weights = call.kwargs.get("weights_for_different_modes", [1, 1, 1])
    chosen = counted and tuple(weight * counts for weight, counts in zip(weights, counted, strict=True))
    with load() as engine:
        scores = engine.score(
            call.inputs,
            mode=mode,
            weights=chosen,
            query_max_length=call.kwargs.get("max_query_length", call.constructor["query_max_length"]),
            max_length=call.kwargs.get("max_passage_length", call.constructor["passage_max_length"]),
        )
    assert difference(scores, np.atleast_1d(call.expected[name])) <= 1


def test_a_directory_is_recognised_by_its_heads() -> None:
    with load() as engine:
        assert (engine.models["model"].spec.family, engine.models["model"].spec.pooling) == ("m3", "cls")
        assert engine.models["model"].outputs == {"dense", "sparse", "colbert"}


@pytest.mark.parametrize(("output", "file"), [("sparse", "sparse_linear.pt"), ("colbert", "colbert_linear.pt")])
def test_a_missing_head_costs_its_output_only(directory: Path, output: str, file: str) -> None:
    (directory / file).unlink()
    with load(directory) as engine, load() as whole:
        rest = [name for name in ("dense", "sparse", "colbert") if name != output]
        found, expected = (one.embed(["a ferry"], outputs=rest) for one in (engine, whole))
        assert found.dense.tobytes() == expected.dense.tobytes()
        with pytest.raises(InvalidInput, match=f"no '{output}' output: its directory has no {file}"):
            engine.embed(["a ferry"], outputs=[output])
        with pytest.raises(InvalidInput, match=file):
            engine.score([("a ferry", "a boat")], mode="weighted")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(1, 47)}, r"weight of shape \(any, 48\)"),
        ({"bias": torch.zeros(1)}, "must hold weight"),
        ({"weight": torch.zeros(1, 48), "bias": torch.zeros(1), "more": torch.zeros(1)}, "'more'"),
        ({"weight": torch.zeros(2, 48)}, "has 2 outputs per token"),
        ([torch.zeros(1, 48)], "holds list"),
        ({"weight": random.Random(0)}, "cannot be read as weights: UnpicklingError"),
    ],
)
def test_a_wrong_head_is_refused(directory: Path, state: Any, message: str) -> None:
    torch.save(state, directory / "sparse_linear.pt")
    with pytest.raises(CannotLoadModel, match=message):
        load(directory)


def test_a_head_that_runs_code_is_not_run(directory: Path, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Runs()}, directory / "sparse_linear.pt")
    with pytest.raises(CannotLoadModel, match="UnpicklingError"):
        load(directory)
    assert not (tmp_path / "ran").exists()


def test_the_head_may_be_narrower_than_the_network(directory: Path) -> None:
    state = torch.load(directory / "colbert_linear.pt", weights_only=True)
    torch.save({name: value[:16] for name, value in state.items()}, directory / "colbert_linear.pt")
    with load(directory) as engine, load() as whole:
        found = engine.embed(["a ferry and a boat"], outputs=["colbert"], normalize=False).colbert[0]
        expected = whole.embed(["a ferry and a boat"], outputs=["colbert"], normalize=False).colbert[0]
    np.testing.assert_allclose(found, expected[:, :16], atol=1e-5)


def test_all_outputs_come_from_one_pass_and_only_what_is_wanted_is_computed() -> None:
    passes = []
    with load() as engine:
        model = engine.models["model"]
        parts = {"network": model._network, **model._heads}
        for name, part in parts.items():
            part.register_forward_hook(lambda *_, name=name: passes.append(name))
        engine.embed(["a ferry", "a boat"], outputs=["dense", "sparse", "colbert"])
        assert sorted(passes) == ["colbert", "network", "sparse"]
        passes.clear()
        engine.embed(["a ferry"], outputs=["dense"])
        assert passes == ["network"]


def test_each_token_keeps_its_largest_weight() -> None:
    draw = np.random.default_rng(7)
    silent = np.array([0, 1, 2, 3], np.int32)
    for num_sequences in (1, 2, 17):
        lengths = draw.integers(1, 30, num_sequences)
        batch = [
            Sequence(Tokens(draw.integers(0, 12, length).astype(np.int32)), rows=[(None, row)])
            for row, length in enumerate(lengths)
        ]
        layout = TokenLayout(batch, "cpu")
        weights = np.maximum(draw.normal(size=layout.num_tokens), 0).astype(np.float32)
        for found, sequence, own in zip(_by_token(layout, weights, silent), batch, layout.split(weights), strict=True):
            expected: dict[int, np.float32] = {}
            for token, weight in zip(sequence.tokens.ids.tolist(), own, strict=True):
                if weight > 0 and token not in silent:
                    expected[token] = max(weight, expected.get(token, weight))
            assert found.ids.tolist() == sorted(expected)
            assert found.weights.tolist() == [expected[token] for token in sorted(expected)]
            assert (found.ids.dtype, found.weights.dtype) == (np.int32, np.float32)


def test_a_text_without_words_has_no_weights() -> None:
    with load() as engine:
        (found,) = engine.embed([""], outputs=["sparse"]).sparse
    assert (len(found.ids), len(found.weights)) == (0, 0)


@pytest.mark.parametrize("output", ["sparse", "colbert"])
def test_a_broken_head_is_an_error_and_not_a_text_without_words(directory: Path, output: str) -> None:
    file = directory / f"{output}_linear.pt"
    state = torch.load(file, weights_only=True)
    state["weight"][0, 0] = torch.nan
    torch.save(state, file)
    with load(directory) as engine, pytest.raises(DeviceFailure, match=f"infinite {output} values in float32"):
        engine.embed(["a ferry"], outputs=[output])
