"""Layerwise and lightweight rerankers behind the engine: the library's ids and scores, layers, compression, heads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedq import core
from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.engine import Engine
from embedq.core.errors import CannotLoadModel, InvalidInput
from embedq.core.options import RerankOptions
from embedq.core.settings import ModelSettings
from tests import rerankers
from tests.conftest import GOLDEN
from tests.decoders import changed_copy
from tests.golden_cases import Call, calls, read

CASES = ("layerwise_reranker", "lightweight_reranker")
each_case = pytest.mark.parametrize("case", CASES)
each_call = pytest.mark.parametrize("call", calls(*CASES), ids=str)

PAIRS = [(first, second) for first, second in read("layerwise_reranker")[0].inputs]


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    """By case; heads as FlagEmbedding has them, which is the lightweight reranker's default."""
    with ExitStack() as stack:
        heads = {"layerwise_reranker": "request", "lightweight_reranker": None}
        yield {case: stack.enter_context(rerankers.load(case, heads_by=heads[case])) for case in CASES}


@pytest.fixture(scope="module")
def own_heads() -> Iterator[dict[str, Engine]]:
    """By case; each layer read by the head trained for it, which is the layerwise reranker's default."""
    with ExitStack() as stack:
        heads = {"layerwise_reranker": None, "lightweight_reranker": "layer"}
        yield {case: stack.enter_context(rerankers.load(case, heads_by=heads[case])) for case in CASES}


@pytest.fixture(scope="module")
def rounded() -> Iterator[dict[str, Engine]]:
    with ExitStack() as stack:
        chosen = {"heads_by": "request", "precision": "bfloat16"}
        yield {case: stack.enter_context(rerankers.load(case, **chosen)) for case in CASES}


@each_call
def test_a_pair_has_the_ids_of_the_library(engines: dict[str, Engine], call: Call) -> None:
    rerankers.assert_same_ids(engines[call.case], call)


@each_call
def test_a_batch_scores_as_the_library_does(engines: dict[str, Engine], call: Call) -> None:
    rerankers.assert_same_scores(engines[call.case], call)


@each_call
def test_a_pair_alone_scores_as_the_library_does(engines: dict[str, Engine], call: Call) -> None:
    rerankers.assert_same_scores_alone(engines[call.case], call)


@each_case
def test_mixed_jobs_score_as_the_library_does(engines: dict[str, Engine], case: str) -> None:
    rerankers.assert_same_scores_in_mixtures(engines[case], read(case), seed=22)


@each_call
def test_bfloat16_stays_close(rounded: dict[str, Engine], call: Call) -> None:
    # The lightweight case has large query and key weights on purpose: rounding them alone moves scores by 0.06.
    rerankers.assert_close_in_bfloat16(rounded[call.case], call)


def test_layers_come_ascending_and_once_each_with_its_own_head(own_heads: dict[str, Engine]) -> None:
    engine = own_heads["layerwise_reranker"]
    sorted_layers = engine.score(PAIRS, cutoff_layers=[2, 4])
    assert np.array_equal(engine.score(PAIRS, cutoff_layers=[4, 2, 4]), sorted_layers)
    alone = [engine.score(PAIRS, cutoff_layers=[layer]) for layer in (2, 4)]
    np.testing.assert_allclose(sorted_layers, alone, atol=1e-5)


def test_a_layerwise_request_in_order_has_own_heads_either_way(
    engines: dict[str, Engine], own_heads: dict[str, Engine]
) -> None:
    both = [one["layerwise_reranker"] for one in (engines, own_heads)]
    in_order = [engine.score(PAIRS, cutoff_layers=[2, 4]) for engine in both]
    np.testing.assert_allclose(in_order[0], in_order[1], atol=1e-5)
    reversed_order = [engine.score(PAIRS, cutoff_layers=[4, 2]) for engine in both]
    assert np.abs(reversed_order[0] - reversed_order[1]).max() > 0.1


def test_lightweight_heads_go_by_the_request_unless_told(
    engines: dict[str, Engine], own_heads: dict[str, Engine]
) -> None:
    by_request, by_layer = (one["lightweight_reranker"] for one in (engines, own_heads))
    all_layers = by_layer.score(PAIRS, cutoff_layers=[1, 2, 3, 4])
    # Here the j-th layer asked is the one the j-th head was trained for.
    np.testing.assert_allclose(by_request.score(PAIRS, cutoff_layers=[1, 2, 3, 4]), all_layers, atol=1e-5)
    np.testing.assert_allclose(by_layer.score(PAIRS, cutoff_layers=[3]), all_layers[2], atol=1e-5)
    assert np.abs(by_request.score(PAIRS, cutoff_layers=[3]) - all_layers[2]).max() > 0.1


@each_case
def test_of_several_layers_the_last_ranks(engines: dict[str, Engine], case: str) -> None:
    passages = [passage for _, passage in PAIRS]
    ranking = engines[case].rerank("ferry", passages, cutoff_layers=[2, 3, 4])
    assert ranking.layer_scores is not None
    assert ranking.layer_scores.shape == (3, len(passages))
    assert np.array_equal(ranking.scores, ranking.layer_scores[-1])
    assert ranking.order[0] == ranking.scores.argmax()
    assert engines[case].rerank("ferry", passages, cutoff_layers=[2]).layer_scores is None


@each_case
@pytest.mark.parametrize("layers", [[0], [5], [2, 9], []], ids=str)
def test_layers_without_a_head_are_refused_and_the_range_named(
    engines: dict[str, Engine], case: str, layers: list[int]
) -> None:
    with pytest.raises(InvalidInput, match=r"cutoff_layers .* model 1 to 4; given (0|5|9|none)$"):
        engines[case].score(PAIRS, cutoff_layers=layers)


def test_a_grid_of_layers_is_named_as_such(tmp_path: Path) -> None:
    drop = ("lm_head.2.linear_head.weight", "lm_head.3.linear_head.weight")
    path = changed_copy("lightweight_reranker", tmp_path, {"start_layer": 2, "layer_sep": 2}, drop)
    with (
        core.load(str(path), device="cpu") as engine,
        pytest.raises(InvalidInput, match="2 to 4 in steps of 2; given 3"),
    ):
        engine.score(PAIRS, cutoff_layers=[3])


@pytest.mark.parametrize("layer", [0, 4, 8])
def test_layers_that_cannot_compress_are_refused(engines: dict[str, Engine], layer: int) -> None:
    with pytest.raises(InvalidInput, match=rf"compress_layers must be 1 to 3 .*; given {layer}"):
        engines["lightweight_reranker"].score(PAIRS, compress_layers=[layer], compress_ratio=2)


def test_compression_is_before_layer_8_unless_told_and_nowhere_in_a_shallower_model(
    engines: dict[str, Engine], tmp_path: Path
) -> None:
    asked = RerankOptions(compress_ratio=4)
    assert engines["lightweight_reranker"].models["model"].wanted(asked).compress_layers == ()
    with core.load(str(deep_copy(tmp_path)), device="cpu", precision="float32") as engine:
        assert engine.models["model"].wanted(asked).compress_layers == (8,)
        assert engine.models["model"].wanted(RerankOptions()).compress_layers == ()
        usual = engine.score(PAIRS, compress_ratio=4)
        assert np.array_equal(usual, engine.score(PAIRS, compress_ratio=4, compress_layers=[8]))
        assert np.abs(usual - engine.score(PAIRS)).max() > 0.01


def deep_copy(target: Path) -> Path:
    """The lightweight case with its four blocks thrice over, and a head behind the last."""
    from safetensors.torch import load_file

    weights = load_file(GOLDEN / "lightweight_reranker" / "model" / "model.safetensors")
    blocks = {
        name.replace(f"layers.{depth}.", f"layers.{depth + 4 * turn}."): weight.clone()
        for turn in (1, 2)
        for name, weight in weights.items()
        for depth in range(4)
        if f"layers.{depth}." in name
    }
    drop = tuple(f"lm_head.{index}.linear_head.weight" for index in (1, 2, 3))
    config = {"num_hidden_layers": 12, "start_layer": 12}
    return changed_copy("lightweight_reranker", target, config, drop, blocks)


def test_ratio_one_is_no_compression_whatever_the_layers(engines: dict[str, Engine]) -> None:
    model = engines["lightweight_reranker"].models["model"]
    plain = model.wanted(RerankOptions())
    assert model.wanted(RerankOptions(compress_layers=(8,))) == plain  # FlagEmbedding's defaults, written out
    assert model.wanted(RerankOptions(compress_layers=(2,), compress_ratio=1)) == plain


@each_case
def test_only_sequences_that_want_the_same_share_a_batch(engines: dict[str, Engine], case: str) -> None:
    model = engines[case].models["model"]
    assert model.wanted(RerankOptions()) == model.wanted(RerankOptions(cutoff_layers=(4,)))
    assert model.wanted(RerankOptions()) != model.wanted(RerankOptions(cutoff_layers=(3,)))


@pytest.mark.parametrize(
    ("case", "option"),
    [
        ("layerwise_reranker", {"compress_layers": [1]}),
        ("layerwise_reranker", {"compress_ratio": 2}),
        ("layerwise_reranker", {"mode": "dense"}),
        ("lightweight_reranker", {"weights": (1, 1, 1)}),
    ],
    ids=str,
)
def test_options_of_other_rerankers_are_refused(engines: dict[str, Engine], case: str, option: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=f"option {next(iter(option))} means nothing"):
        engines[case].score(PAIRS, **option)


@each_case
def test_the_prompt_alone_may_not_exceed_the_positions(engines: dict[str, Engine], case: str) -> None:
    with pytest.raises(InvalidInput, match=r"\d+ of them its prompt, and model model takes 512; .* shorten the prompt"):
        engines[case].score(PAIRS, prompt="is it so? " * 900)


@each_case
def test_a_tokenizer_without_bos_is_refused(tmp_path: Path, case: str) -> None:
    path = changed_copy(case, tmp_path)
    stated = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(stated | {"bos_token": None}))
    with pytest.raises(CannotLoadModel, match="names no bos_token"):
        core.load(str(path), device="cpu")


@each_case
def test_a_warm_up_runs(case: str) -> None:
    with rerankers.load(case) as engine:
        engine.warm_up()


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("layerwise_reranker", "bge-reranker-v2-minicpm-layerwise"),
        ("lightweight_reranker", "bge-reranker-v2.5-gemma2-lightweight"),
    ],
)
def test_name_or_architecture_tells_what_it_is(tmp_path: Path, case: str, name: str) -> None:
    by_files = changed_copy(case, tmp_path / "anything")
    by_name = changed_copy(case, tmp_path / name, {"architectures": None})
    for path in (by_files, by_name):
        assert read_spec("layered", ModelSettings(path=str(path))).family == case
