"""int8: what it computes, what of it depends on what, and everything that has not got it and must say so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from embedq import core
from embedq.core import devices
from embedq.core.devices import around_products, choose_precision
from embedq.core.engine import Engine
from embedq.core.errors import CannotLoadModel, InvalidSettings
from embedq.core.models.encoders import linear
from tests.bench import quality
from tests.checkpoints import change_config, change_weights, save_cross_encoder, save_encoder
from tests.conftest import GOLDEN

needs_int8 = pytest.mark.skipif(
    not (devices.cpu_flags() & devices.INT8_FLAGS and linear.is_int8_available()),
    reason="this CPU has no products of 8-bit integers",
)

#: None of them is in the sample by which steps are chosen.
TEXTS = [
    "The ferry leaves at seven.",
    "a lighthouse",
    "",
    "Brot und Butter " * 30,
    "Give the number of items, or None where nobody has counted them; see also the notes on speed.",
    "雨が降る前に帰りましょう。",
]


def load(directory: Path, precision: str = "int8", **settings: Any) -> Engine:
    return core.load(str(directory), device="cpu", precision=precision, **settings)  # type: ignore[arg-type]


def cosines(one: Any, other: Any) -> np.ndarray:
    """Of rows (num_texts, dim) of any length: (num_texts,)."""
    one, other = np.asarray(one), np.asarray(other)
    return (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@pytest.fixture(scope="module")
def engine(minilm: Path) -> Iterator[Engine]:
    """The real MiniLM in int8."""
    with load(minilm) as engine:
        yield engine


@needs_int8
def test_vectors_are_close_to_those_in_float32(engine: Engine, minilm: Path) -> None:
    assert engine.models["model"].precision == "int8"
    with load(minilm, "float32") as exact:
        found = cosines(engine.embed(TEXTS), exact.embed(TEXTS))
    print(f"\nint8 against float32: cosines {np.round(found, 4)}")
    assert found.min() > 0.96
    assert found.mean() > 0.985


@needs_int8
def test_a_vector_does_not_depend_on_what_shares_its_batch(engine: Engine) -> None:
    together = np.asarray(engine.embed([*TEXTS, *(f"{number} " * number for number in range(1, 60))]))
    alone = np.concatenate([np.asarray(engine.embed([text])) for text in TEXTS])
    # Not the same to the last digit: bfloat16 is rounded elsewhere in attention, and a value between two steps falls
    # on either.
    assert cosines(alone, together[: len(TEXTS)]).min() > 0.999


@needs_int8
def test_loading_twice_gives_the_same_vectors(engine: Engine, minilm: Path) -> None:
    with load(minilm) as again:
        np.testing.assert_array_equal(np.asarray(again.embed(TEXTS[:1])), np.asarray(engine.embed(TEXTS[:1])))


@needs_int8
def test_search_finds_as_much_as_in_float32(minilm: Path) -> None:
    questions, answers = quality.read_pairs(1_000)
    short = [pair for pair in zip(questions, answers, strict=True) if len(pair[1]) <= 250][:200]
    assert len(short) == 200
    qualities = quality.measure(minilm, tuple(map(list, zip(*short, strict=True))), ["int8"])  # type: ignore[arg-type]
    exact, found = qualities["float32"], qualities["int8"]
    print(f"\n200 docstrings: {exact}, in int8 {found}")
    assert 0.2 < exact.recall_at_1 < 0.95  # neither hopeless nor a gift
    assert found.recall_at_1 > exact.recall_at_1 - 0.025  # 5 of 200; half a point of 3,000: tests.bench quality
    assert found.mean_cosine > 0.99


@needs_int8
@pytest.mark.parametrize("case", ["bge_m3", "flagmodel_cls", "flagmodel_mean", "st_mean_pooling"])
def test_all_outputs_of_other_checkpoints_stay_close(case: str) -> None:
    directory = GOLDEN / case / "model"
    outputs = ["dense", "colbert", "sparse"] if case == "bge_m3" else ["dense", "colbert"]
    with load(directory, "float32") as exact, load(directory) as rounded:
        wanted, found = exact.embed(TEXTS[:2], outputs=outputs), rounded.embed(TEXTS[:2], outputs=outputs)
    assert cosines(found.dense, wanted.dense).min() > 0.98
    for one, other in zip(found.colbert or [], wanted.colbert or [], strict=True):
        assert cosines(one, other).min() > 0.95


@needs_int8
@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "camembert"])
def test_scores_of_cross_encoders_stay_close(model_type: str, tmp_path: Path) -> None:
    passages = ["a garden", "the ferry", "rain on the island", "bread", "a compass and a map", "the boat " * 12]
    save_cross_encoder(tmp_path, model_type)
    with load(tmp_path, "float32") as exact, load(tmp_path) as rounded:
        wanted, found = exact.rerank("the ferry", passages).scores, rounded.rerank("the ferry", passages).scores
    print(f"\n{model_type}: {wanted} in int8 {found}")
    # Weights are random, and wide: a published reranker's scores move less.
    np.testing.assert_allclose(found, wanted, atol=0.3)
    assert np.corrcoef(found, wanted)[0, 1] > 0.97


def test_int8_on_an_accelerator_is_refused() -> None:
    with pytest.raises(InvalidSettings, match=r"precision int8 is for CPUs; the device is cuda:0"):
        choose_precision("cuda:0", "int8")


def test_int8_on_a_cpu_that_has_it_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_flags", lambda: frozenset({"avx2", "avx512_bf16"}))
    with pytest.raises(InvalidSettings, match="amx_int8, avx512_vnni, avx_vnni, which this one does not list"):
        choose_precision("cpu", "int8")


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni", "amx_int8"])
def test_int8_is_taken_where_it_is_asked_for_and_never_else(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_flags", lambda: frozenset({flag}))
    assert choose_precision("cpu", "int8") == ("int8", "asked for")
    assert choose_precision("cpu", "auto")[0] == "float32"
    assert around_products("cpu", "int8") == "float32"
    assert [device.precisions for device in devices.cpu_devices(1)] == [("float32", "int8")]


@needs_int8
def test_a_family_without_it_is_refused() -> None:
    directory = GOLDEN / "flagllmmodel_last_token" / "model"
    with pytest.raises(
        InvalidSettings, match=r"int8 is for the families cross_encoder, encoder, m3; .* is of family decoder"
    ):
        load(directory, model={"family": "decoder"})


@needs_int8
@pytest.mark.parametrize("model_type", ["mpnet", "distilbert", "modernbert", "albert"])
def test_a_type_without_it_is_refused(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=f"of type {model_type} with .*; use auto"):
        load(save_encoder(tmp_path, model_type))


@needs_int8
def test_another_activation_is_refused(tmp_path: Path) -> None:
    save_cross_encoder(tmp_path)
    change_config(tmp_path, hidden_act="relu")
    with pytest.raises(InvalidSettings, match="of type bert with relu"):
        load(tmp_path)


@needs_int8
def test_a_torch_without_the_operations_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "is_int8_available", lambda: False)
    with pytest.raises(InvalidSettings, match=r"torch .* lacks the operations"):
        load(save_encoder(tmp_path))


@needs_int8
def test_a_checkpoint_that_loses_too_much_is_refused_with_its_cosine(tmp_path: Path) -> None:
    """One unit that gives 1,000,000 for every token, and that hardly counts, leaves all others no steps."""

    def change(tensors: dict[str, Any]) -> None:
        tensors["encoder.layer.0.intermediate.dense.bias"][0] = 1e6
        tensors["encoder.layer.0.output.dense.weight"][:, 0] = 0

    change_weights(save_encoder(tmp_path), change)
    with load(tmp_path, "bfloat16") as rounded:
        assert np.isfinite(np.asarray(rounded.embed(TEXTS[:1]))).all()
    with pytest.raises(
        CannotLoadModel, match=r"loses too much in int8: .* mean cosine of 0\.\d+ .* below the limit of 0.97"
    ):
        load(tmp_path)


@needs_int8
def test_weights_that_are_nan_are_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["embeddings.word_embeddings.weight"][7, 3] = torch.nan

    change_weights(save_encoder(tmp_path), change)
    with pytest.raises(CannotLoadModel, match="NaN or infinite"):
        load(tmp_path)


def steps_of(lowest: float, highest: float, width: int) -> linear.Steps:
    scale = (highest - lowest) / 255
    return linear.Steps(scale, round(-lowest / scale), torch.ones(width))


def test_bytes_are_the_nearest_steps_and_cut_at_the_ends() -> None:
    steps = linear.Steps(0.5, 10, torch.tensor([1.0, 1.0, 1.0, 2.0]))
    written = steps.write(torch.tensor([[0.0, 0.24, 0.26, 3.0], [-4.8, -400.0, 400.0, -1.1]]))
    assert written.tolist() == [[10, 10, 11, 13], [0, 0, 255, 9]]


def test_what_is_no_number_becomes_some_byte() -> None:
    written = steps_of(-1.0, 1.0, 3).write(torch.tensor([[torch.nan, torch.inf, -torch.inf]]))
    assert written.dtype == torch.uint8


@needs_int8
@pytest.mark.parametrize("num_rows", [1, 16, 100])
def test_products_are_those_in_float32_within_their_steps(num_rows: int) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(96, 64, generator=draw), torch.randn(96, generator=draw)
    rows, other = torch.rand(num_rows, 64, generator=draw) * 8 - 3, torch.randn(num_rows, 96, generator=draw)
    expected = functional.linear(rows, weight, bias)
    # Of 64 terms each is off by a fifth of a step of rows or weights, at random.
    tolerance = 6 * 64**0.5 * (8 / 255 / 12**0.5 + 3 * 4 / 127 / 12**0.5)
    wide = linear.Quantized(
        weight, bias, steps_of(-3, 5, 64), torch.bfloat16, steps_of(-0.2, float(expected.max()), 96)
    )
    np.testing.assert_allclose(wide(rows).float(), expected, atol=tolerance)
    assert wide(rows).dtype == torch.bfloat16
    np.testing.assert_allclose(wide.plus(rows, other), expected + other, atol=tolerance)
    following = steps_of(-0.2, float(expected.max()), 96)
    written = wide.gelu(rows)
    assert written.dtype == torch.uint8
    read = (written.float() - following.zero) * following.scale
    np.testing.assert_allclose(read, functional.gelu(expected), atol=tolerance + following.scale)


@needs_int8
def test_a_row_that_is_nan_spoils_itself_alone_and_is_seen() -> None:
    draw = torch.Generator().manual_seed(0)
    product = linear.Quantized(
        torch.randn(32, 32, generator=draw), torch.zeros(32), steps_of(-3, 3, 32), torch.bfloat16, None
    )
    rows = torch.randn(4, 32, generator=draw)
    rows[1, 5] = torch.nan
    found = product.plus(rows, rows)
    assert torch.isnan(found[1]).any()
    assert torch.isfinite(found[[0, 2, 3]]).all()
