"""Gemma-2 with token compression: the numbers of the original, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from embedq.core.errors import CannotLoadModel
from embedq.core.models.decoders import gemma2_lightweight
from embedq.core.models.decoders.blocks import Product
from embedq.core.models.decoders.gemma2_lightweight import (
    LightweightGemma2,
    compress,
    product_in_parts,
    unrounded_product,
)
from tests import golden_cases
from tests.conftest import GOLDEN
from tests.decoders import (
    assert_close_in_bfloat16,
    changed_copy,
    finish,
    pad,
    random_rows,
    scores_of,
    write_checkpoint,
)
from tests.golden_cases import Call, difference

CASE = "lightweight_reranker"
CALLS = golden_cases.read(CASE)
PROMPT = "Predict whether passage B contains an answer to query A."
TOKENIZER = Tokenizer.from_file(str(GOLDEN / CASE / "model" / "tokenizer.json"))
each_call = pytest.mark.parametrize("call", CALLS, ids=[call.id for call in CALLS])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The networks here are so small that a second thread costs more than it does, on a busy machine tenfold."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def network() -> LightweightGemma2:
    return gemma2_lightweight.load(GOLDEN / CASE / "model", "cpu", "float32")


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return ids


def parts(call: Call) -> tuple[list[int], list[int]]:
    """(query length, prompt length) per row; the row itself confirms what is counted."""
    longest = call.kwargs.get("max_length", 64)
    separator = encode("\n")
    prompt = separator + encode(call.kwargs.get("prompt", PROMPT))
    queries = []
    for (query, _), row in zip(call.inputs, call.token_ids["input_ids"], strict=True):
        start = [2, *encode("A: " + query)[: call.kwargs.get("query_max_length", longest * 3 // 4)], *separator]
        assert row[: len(start)] == start
        assert row[-len(prompt) :] == prompt
        queries.append(len(start))
    return queries, [len(prompt)] * len(queries)


def score(network: LightweightGemma2, call: Call, chosen: list[int], side: str = "right", extra: int = 0) -> Tensor:
    """(num_layers, num_chosen) for the chosen rows of the call."""
    queries, prompts = parts(call)
    scores = network(
        *pad([call.token_ids["input_ids"][i] for i in chosen], side, extra),
        tuple(call.kwargs.get("cutoff_layers", [4])),
        query_lengths=torch.tensor([queries[i] for i in chosen]),
        prompt_lengths=torch.tensor([prompts[i] for i in chosen]),
        compress_layers=tuple(call.kwargs.get("compress_layers", [8])),
        compress_ratio=call.kwargs.get("compress_ratio", 1),
    )
    return finish(call, scores)


@pytest.mark.parametrize("side", ["right", "left"])
@each_call
def test_a_batch_scores_as_the_library_does(network: LightweightGemma2, call: Call, side: str) -> None:
    assert (
        difference(score(network, call, [*range(len(call.token_ids["input_ids"]))], side), scores_of(call).numpy()) <= 1
    )


@each_call
def test_a_sequence_alone_scores_as_the_library_does(network: LightweightGemma2, call: Call) -> None:
    alone = torch.cat([score(network, call, [i]) for i in range(len(call.token_ids["input_ids"]))], dim=1)
    assert difference(alone, scores_of(call).numpy()) <= 1


@each_call
@pytest.mark.parametrize("product", [unrounded_product, product_in_parts])
def test_bfloat16_stays_close_with_either_product(call: Call, product: Product) -> None:
    network: Any = gemma2_lightweight.load(GOLDEN / CASE / "model", "cpu", "bfloat16")
    for block in network.model.layers:
        block.self_attn.product = product
    scores = score(network, call, [*range(len(call.token_ids["input_ids"]))])
    # The case's query and key weights are large on purpose: rounding the weights alone moves scores by 0.06.
    assert_close_in_bfloat16(scores, scores_of(call), within=0.15, min_cosine=0.999)


def test_a_product_in_parts_keeps_what_rounding_loses() -> None:
    draw = torch.Generator().manual_seed(7)
    states = torch.randn((3, 5, 64), generator=draw)
    weight = torch.randn((32, 64), generator=draw).to(torch.bfloat16)
    exact = states.double() @ weight.double().T
    found = product_in_parts(states, weight)
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 2e-5 * exact.norm()
    assert (states.to(torch.bfloat16) @ weight.T - exact).norm() > 1e-3 * exact.norm()


def test_neighbours_and_width_of_the_batch_do_not_matter(network: LightweightGemma2) -> None:
    call = next(call for call in CALLS if call.id == "compress_4_twice_several_layers")
    alone = torch.cat([score(network, call, [i]) for i in range(len(call.token_ids["input_ids"]))], dim=1)
    draw = random.Random(6)
    for _ in range(3):
        chosen = draw.sample(range(len(call.token_ids["input_ids"])), draw.randint(1, len(call.token_ids["input_ids"])))
        together = score(network, call, chosen, draw.choice(["left", "right"]), extra=draw.randint(0, 20))
        assert difference(together, alone[:, chosen].numpy()) <= 1


def one_by_one(states: Tensor, query: int, prompt: int, ratio: int) -> Tensor:
    """The definition: (num_tokens, hidden) of one sequence without padding -> its compressed states."""
    passage = states[query : len(states) - prompt]
    means = [passage[start : start + ratio].mean(dim=0) for start in range(0, len(passage), ratio)]
    return torch.stack([*states[:query], *means, *states[len(states) - prompt :]])


@pytest.mark.parametrize("ratio", [2, 3, 4, 8])
def test_compression_of_a_batch_is_that_of_each_sequence(ratio: int) -> None:
    draw = random.Random(ratio)
    torch.manual_seed(ratio)
    for passages in ([0, 0], [0, 1, 17], [draw.randint(0, 40) for _ in range(9)]):
        queries = torch.tensor([draw.randint(1, 9) for _ in passages])
        prompts = torch.tensor([draw.randint(1, 5) for _ in passages])
        lengths = queries + torch.tensor(passages) + prompts
        states = torch.randn(len(passages), int(lengths.max()) + draw.randint(0, 4), 6)
        states[torch.arange(states.shape[1]) >= lengths[:, None]] = torch.nan  # padding must not leak
        single = [row[:length] for row, length in zip(states, lengths, strict=True)]
        for _ in range(2):  # again on what is already compressed
            states, lengths = compress(states, lengths, queries, prompts, ratio)
            single = [
                one_by_one(row, int(q), int(p), ratio) for row, q, p in zip(single, queries, prompts, strict=True)
            ]
            assert lengths.tolist() == [len(row) for row in single]
            assert states.shape[1] == max(lengths)
            for row, length, expected in zip(states, lengths, single, strict=True):
                torch.testing.assert_close(row[:length], expected)


def test_ratio_one_and_block_zero_compress_nothing(network: LightweightGemma2) -> None:
    (ids, mask), (queries, prompts) = pad(CALLS[0].token_ids["input_ids"]), map(torch.tensor, parts(CALLS[0]))
    plain = network(ids, mask, (4,), query_lengths=queries, prompt_lengths=prompts)
    for layers, ratio in (((1, 2), 1), ((0,), 4), ((4,), 4)):
        same = network(
            ids,
            mask,
            (4,),
            query_lengths=queries,
            prompt_lengths=prompts,
            compress_layers=layers,
            compress_ratio=ratio,
        )
        assert torch.equal(same, plain)


def test_heads_in_order_are_the_default_and_own_heads_can_be_asked_for(network: LightweightGemma2) -> None:
    (ids, mask), (queries, prompts) = pad(CALLS[0].token_ids["input_ids"]), map(torch.tensor, parts(CALLS[0]))
    lengths = {"query_lengths": queries, "prompt_lengths": prompts}
    all_layers = network(ids, mask, (1, 2, 3, 4), **lengths)  # here the j-th layer is the one of head j
    torch.testing.assert_close(network(ids, mask, (2, 3), heads="own", **lengths), all_layers[1:3])
    assert (network(ids, mask, (2, 3), **lengths) - all_layers[1:3]).abs().max() > 0.1


def test_heads_lie_on_the_grid_the_config_states(tmp_path: Path) -> None:
    grid = {"start_layer": 2, "layer_sep": 2}
    drop = ("lm_head.2.linear_head.weight", "lm_head.3.linear_head.weight")
    network = gemma2_lightweight.load(changed_copy(CASE, tmp_path, grid, drop), "cpu", "float32")
    assert network.layers == (2, 4)


def test_every_second_block_looks_back_over_the_window_only(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(12)
    config: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "query_pre_attn_scalar": 10,
        "sliding_window": 5,
        "rms_norm_eps": 1e-6,
    }
    # Eager attention applies a soft-cap where there is one; without one it is the plain formula.
    gemma = Gemma2Model(Gemma2Config(**config, attn_logit_softcapping=None, attn_implementation="eager")).eval()
    for weight in gemma.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    config |= {"layer_wise": True, "start_layer": 3, "layer_sep": 1, "final_logit_softcapping": None}
    network = gemma2_lightweight.load(write_checkpoint(tmp_path, config, gemma, num_heads=1), "cpu", "float32")
    rows = random_rows(2, 5, 6, 30)
    with torch.inference_mode():
        states = [gemma(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    expected = network.lm_head[0](torch.stack(states))
    ones = torch.ones(len(rows), dtype=torch.int64)
    assert difference(network(*pad(rows), (3,), query_lengths=ones, prompt_lengths=ones)[0], expected.numpy()) <= 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_wise": False}, "layer_wise = False; supported is True only"),
        ({"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary positions of type 'yarn'"),
        ({"num_hidden_layers": 5}, r"lacks 12 weights .* lm_head\.4\.linear_head\.weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_it_cannot_follow_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CannotLoadModel, match=message):
        gemma2_lightweight.load(changed_copy(CASE, tmp_path, config), "cpu", "float32")


@pytest.mark.parametrize(
    "name", ["layer_wise", "query_pre_attn_scalar", "sliding_window", "final_logit_softcapping", "layer_sep"]
)
def test_a_setting_that_is_absent_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CannotLoadModel, match=name):
        gemma2_lightweight.load(changed_copy(CASE, tmp_path, drop=(name,)), "cpu", "float32")


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    missing = "model.layers.1.post_feedforward_layernorm.weight"
    with pytest.raises(CannotLoadModel, match=missing):
        gemma2_lightweight.load(changed_copy(CASE, tmp_path, drop=(missing,)), "cpu", "float32")
