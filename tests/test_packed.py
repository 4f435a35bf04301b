"""Encoders without padding: the numbers of transformers' own module, or else that module itself."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, CamembertConfig, RobertaConfig, XLMRobertaConfig

from embedq import core
from embedq.core.engine import Engine
from embedq.core.models.encoders import linear, network
from embedq.core.models.encoders.network import Padded
from embedq.core.models.encoders.packed import PackedEncoder
from embedq.core.models.encoders.padding_probe import random_sequences
from embedq.core.models.token_layout import TokenLayout
from embedq.core.sequence import Sequence, Tokens
from embedq.core.settings import Precision
from tests import tiny_models
from tests.conftest import GOLDEN

if not linear.is_available():
    pytest.skip("this CPU has no products in bfloat16", allow_module_level=True)

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}

#: Types, each with a golden case that has its tokenizer.
TYPES: dict[str, tuple[Any, str]] = {
    "bert": (BertConfig, "flagmodel_mean"),
    "roberta": (RobertaConfig, "bge_m3"),
    "camembert": (CamembertConfig, "bge_m3"),
    "xlm-roberta": (XLMRobertaConfig, "bge_m3"),
}

LENGTHS = (1, 2, 3, 16, 17, 30, 30, 60)

#: Least cosine of a token's states in bfloat16 with those in float32, of tiny networks with large weights.
MIN_COSINE = 0.998


def save(directory: Path, kind: str = "bert", **more: Any) -> Path:
    config, case = TYPES[kind]
    pad = {"pad_token_id": 1} if kind != "bert" else {}
    sizes = SIZES | {"vocab_size": 500, "max_position_embeddings": 80} | pad | more
    return tiny_models.add_modules(tiny_models.save(directory, config(**sizes), case), "mean_tokens")


def load(directory: Path, precision: Precision = "bfloat16") -> Engine:
    return core.load(str(directory), device="cpu", precision=precision)


def network_of(engine: Engine) -> Any:
    return next(iter(engine.models.values()))._network  # type: ignore[attr-defined]


def layout(lengths: tuple[int, ...] = LENGTHS, also: int | None = None) -> TokenLayout:
    """Sequences of random tokens; `also` is put in the middle of each."""
    draw = np.random.default_rng(5)
    ids = [draw.integers(5, 400, length).astype(np.int32) for length in lengths]
    for one in ids:
        if also is not None:
            one[len(one) // 2] = also
    return TokenLayout([Sequence(Tokens(one)) for one in ids], "cpu")


def cosines(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(found.float(), expected.float())


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("also", [None, 0, 1], ids=["words", "token 0", "token 1"])
def test_states_are_those_of_transformers(kind: str, also: int | None, tmp_path: Path) -> None:
    """Also for the padding token in a text, which RoBERTa counts no position for."""
    directory = save(tmp_path, kind)
    with load(directory) as engine, load(directory, "float32") as exact, torch.inference_mode():
        assert isinstance(network_of(engine), PackedEncoder)
        assert isinstance(network_of(exact), Padded)
        each = [network_of(exact)(TokenLayout([one], "cpu")) for one in layout(also=also).batch]
        found = network_of(engine)(layout(also=also))
    assert float(cosines(found, torch.cat(each)).min()) > MIN_COSINE


@pytest.mark.parametrize("lengths", [LENGTHS, (5,), (16,) * 3, (16,) * 20])
@pytest.mark.parametrize("how", ["first", "mean"])
def test_what_is_pooled_within_a_pass_is_what_is_pooled_behind_it(
    how: str, lengths: tuple[int, ...], tmp_path: Path
) -> None:
    with load(save(tmp_path)) as engine, torch.inference_mode():
        packed, batch = network_of(engine), layout(lengths)
        found, expected = getattr(packed, how)(batch), getattr(batch, how)(packed(batch))
    assert found.shape == expected.shape
    assert float(cosines(found, expected).min()) > 0.9995  # products of fewer rows are rounded elsewhere


def test_the_last_layer_computes_first_tokens_alone_where_no_others_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gelu, num_rows = linear.LaidOut.gelu, []

    def counted(product: linear.LaidOut, rows: torch.Tensor) -> torch.Tensor:
        num_rows.append(len(rows))
        return gelu(product, rows)

    monkeypatch.setattr(torch.jit, "script", _fails)
    monkeypatch.setattr(linear.LaidOut, "gelu", counted)
    with load(save(tmp_path)) as engine, torch.inference_mode():
        num_rows.clear()
        network_of(engine).first(layout())
        network_of(engine)(layout())
    assert num_rows == [160, 160, 16] + [160] * 3  # of 159 tokens and 8 sequences


def test_a_sequence_has_the_same_states_whatever_is_beside_it(tmp_path: Path) -> None:
    with load(save(tmp_path)) as engine, torch.inference_mode():
        packed = network_of(engine)
        together = packed(layout()).float().split(list(LENGTHS))
        for one, found in zip(layout().batch, together, strict=True):
            alone = packed(TokenLayout([one], "cpu")).float()
            assert float(cosines(alone, found).min()) > 0.9995  # the last bits of bfloat16


def test_a_text_that_breaks_the_network_breaks_no_neighbour(tmp_path: Path) -> None:
    with load(save(tmp_path)) as engine, torch.inference_mode():
        packed = network_of(engine)
        whole = packed(layout()).float().split(list(LENGTHS))
        broken = layout()
        broken.batch[4].tokens.ids[:] = 7
        packed._pass._embeddings.words.weight[7] = torch.nan
        found = packed(broken).float().split(list(LENGTHS))
    assert [bool(one.isnan().any()) for one in found] == [7 in one.tokens.ids for one in broken.batch]
    for index, (one, other) in enumerate(zip(found, whole, strict=True)):
        if 7 not in broken.batch[index].tokens.ids:
            assert float(cosines(one, other).min()) > 0.9995


@pytest.mark.parametrize("more", [{"hidden_act": "relu"}, {"is_decoder": True}])
def test_other_layers_than_known_ones_run_as_transformers_has_them(more: dict[str, Any], tmp_path: Path) -> None:
    with load(save(tmp_path, **more)) as engine:
        assert isinstance(network_of(engine), Padded)


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_a_machine_whose_kernels_fail_runs_padded_and_says_so(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make = linear.LaidOut.__init__

    def broken(self: Any, weight: torch.Tensor, bias: torch.Tensor) -> None:
        if fault == "raises":
            raise RuntimeError("no kernel for this CPU")
        make(self, -weight, bias)

    directory = save(tmp_path)
    texts = ["a ferry", "a boat and a garden in the rain"]
    with load(directory) as engine:
        expected = np.asarray(engine.embed(texts))
    monkeypatch.setattr(linear.LaidOut, "__init__", broken)
    with caplog.at_level(logging.WARNING), load(directory) as engine:
        assert isinstance(network_of(engine), Padded)
        found = np.asarray(engine.embed(texts))
    assert np.sum(found * expected, axis=1).min() > MIN_COSINE
    (record,) = [record for record in caplog.records if getattr(record, "action", "") == "padded"]
    assert ("no kernel for this CPU" if fault == "raises" else "cosine") in record.getMessage()


def test_a_pass_is_one_call_and_elsewhere_says_that_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = save(tmp_path)
    with load(directory) as engine, torch.inference_mode():
        assert isinstance(network_of(engine)._pass, torch.jit.ScriptModule)
        expected = network_of(engine)(layout())
    monkeypatch.setattr(torch.jit, "script", _fails)
    with caplog.at_level(logging.WARNING), load(directory) as engine, torch.inference_mode():
        assert isinstance(network_of(engine), PackedEncoder)
        torch.testing.assert_close(network_of(engine)(layout()), expected, rtol=0, atol=0)
    (record,) = caplog.records
    assert vars(record)["action"] == "unscripted"
    assert "no TorchScript on this Python" in record.getMessage()


@pytest.mark.timing
def test_a_pass_goes_on_while_another_thread_has_the_interpreter(minilm: Path) -> None:
    with load(minilm) as engine:
        batch = layout((60,) * 150)  # a second on one core
        alone, beside = threading.Thread(target=_run_on_one_core, args=(network_of(engine), batch)), ctypes.PyDLL(None)
        alone.start()
        clock = time.pthread_getcpuclockid(alone.ident or 0)
        while time.clock_gettime(clock) < 0.1:  # it is in the midst of the pass
            time.sleep(0.002)
        before_s = time.clock_gettime(clock)
        beside.usleep(900_000)  # a call of PyDLL keeps the interpreter's lock
        computed_s = time.clock_gettime(clock) - before_s
        alone.join()
    assert computed_s > 0.1  # and no more than one operation, 30 ms, where each asks for the lock


def _run_on_one_core(packed: Any, batch: TokenLayout) -> None:
    torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread's operations
    with torch.inference_mode():
        packed(batch)


def _fails(module: Any) -> Any:
    raise RuntimeError("no TorchScript on this Python")


def test_weights_are_not_kept_twice() -> None:
    """A cross-encoder keeps transformers' module for its head."""
    with core.load(str(GOLDEN / "flagreranker_bert" / "model"), device="cpu", precision="bfloat16") as engine:
        (model,) = engine.models.values()
        assert isinstance(model._network, PackedEncoder)  # type: ignore[attr-defined]
        kept = [name for name, _ in model._module.named_parameters()]  # type: ignore[attr-defined]
    assert "classifier.weight" in kept
    assert not [name for name in kept if ".layer." in name]


def test_products_are_those_of_torch() -> None:
    draw = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(48, 32, generator=draw).bfloat16() / 6, torch.randn(48, generator=draw).bfloat16()
    laid_out, plain = linear.LaidOut(weight, bias), linear.Plain(weight, bias)
    for num_rows in (1, 16, 100):
        rows = torch.randn(num_rows, 32, generator=draw).bfloat16()
        other = torch.randn(num_rows, 48, generator=draw).bfloat16()
        for found, expected in (
            (laid_out(rows), plain(rows)),
            (laid_out.gelu(rows), plain.gelu(rows)),
            (laid_out.plus(rows, other), plain.plus(rows, other)),
        ):
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_the_probe_is_of_tokens_that_every_model_of_its_size_has(tmp_path: Path) -> None:
    with load(save(tmp_path, max_position_embeddings=40)) as engine:
        (model,) = engine.models.values()
        probe = random_sequences(model.spec, network._PROBE_LENGTHS)
    assert max(one.length for one in probe) == 40
    assert all((one.tokens.ids != model.spec.pad_token_id).all() for one in probe)
