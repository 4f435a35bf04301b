"""MiniCPM with a head per layer: the numbers of the original, and what is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedq.core.errors import CannotLoadModel
from embedq.core.models.decoders import minicpm
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
from tests.running import ROOT

CASE = "layerwise_reranker"
CALLS = golden_cases.read(CASE)
each_call = pytest.mark.parametrize("call", CALLS, ids=[call.id for call in CALLS])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The networks here are so small that a second thread costs more than it does, on a busy machine tenfold."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def network() -> minicpm.MiniCpm:
    return minicpm.load(GOLDEN / CASE / "model", "cpu", "float32")


def score(network: minicpm.MiniCpm, call: Call, rows: list[list[int]], side: str = "right") -> torch.Tensor:
    """(num_layers, num_rows), as the library gives them for a request that may be unsorted."""
    asked = tuple(call.kwargs.get("cutoff_layers", [4]))
    return finish(call, network(*pad(rows, side), tuple(sorted(asked)), head_layers=asked))


@pytest.mark.parametrize("side", ["right", "left"])
@each_call
def test_a_batch_scores_as_the_library_does(network: minicpm.MiniCpm, call: Call, side: str) -> None:
    assert difference(score(network, call, call.token_ids["input_ids"], side), scores_of(call).numpy()) <= 1


@each_call
def test_a_sequence_alone_scores_as_the_library_does(network: minicpm.MiniCpm, call: Call) -> None:
    alone = torch.cat([score(network, call, [row]) for row in call.token_ids["input_ids"]], dim=1)
    assert difference(alone, scores_of(call).numpy()) <= 1


@each_call
def test_bfloat16_stays_close(call: Call) -> None:
    network = minicpm.load(GOLDEN / CASE / "model", "cpu", "bfloat16")
    assert_close_in_bfloat16(
        score(network, call, call.token_ids["input_ids"]), scores_of(call), within=0.15, min_cosine=0.999
    )


def test_neighbours_and_width_of_the_batch_do_not_matter(network: minicpm.MiniCpm) -> None:
    rows = CALLS[0].token_ids["input_ids"]
    alone = torch.cat([network(torch.tensor([row]), None, (1, 3, 4)) for row in rows], dim=1)
    draw = random.Random(5)
    for _ in range(5):
        chosen = draw.sample(range(len(rows)), draw.randint(2, len(rows)))
        ids, mask = pad([rows[i] for i in chosen], draw.choice(["left", "right"]), extra=draw.randint(0, 20))
        assert difference(network(ids, mask, (1, 3, 4)), alone[:, chosen].numpy()) <= 1


def test_each_layer_is_read_by_its_own_head_unless_told(network: minicpm.MiniCpm) -> None:
    ids, mask = pad(CALLS[0].token_ids["input_ids"])
    both = network(ids, mask, (2, 4))
    torch.testing.assert_close(both[0], network(ids, mask, (2,))[0])
    torch.testing.assert_close(both[1], network(ids, mask, (4,))[0])
    swapped = network(ids, mask, (2, 4), head_layers=(4, 2))
    assert (swapped - both).abs().max() > 0.1


def test_blocks_after_the_last_layer_asked_do_not_run(network: minicpm.MiniCpm) -> None:
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, depth=depth: ran.append(depth))
        for depth, block in enumerate(network.model.layers)
    ]
    network(*pad(CALLS[0].token_ids["input_ids"]), (1, 2))
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1]


def test_shared_keys_and_plain_scales_make_it_a_llama(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(11)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
    }
    llama = LlamaModel(LlamaConfig(**sizes, initializer_range=0.2)).eval()
    config = sizes | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "start_layer": 3}
    config |= {"scale_emb": 1, "scale_depth": 3**0.5, "head_type": "simple", "head_multi": True}
    network = minicpm.load(write_checkpoint(tmp_path, config, llama, num_heads=1), "cpu", "float32")
    rows = random_rows(1, 9, 30)
    with torch.inference_mode():
        states = [llama(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    expected = network.lm_head[0](torch.stack(states))
    assert difference(network(*pad(rows), (3,))[0], expected.numpy()) <= 1


def test_our_decoders_need_no_transformers() -> None:
    code = "import sys, embedq.core.models.decoders.minicpm, embedq.core.models.decoders.gemma2_lightweight; print('transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "False"


def test_sharded_weights_give_the_same_scores(network: minicpm.MiniCpm, tmp_path: Path) -> None:
    path = changed_copy(CASE, tmp_path)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(weights))}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sharded = minicpm.load(path, "cpu", "float32")
    assert torch.equal(
        score(sharded, CALLS[0], CALLS[0].token_ids["input_ids"]),
        score(network, CALLS[0], CALLS[0].token_ids["input_ids"]),
    )
    (path / "model-1.safetensors").unlink()
    with pytest.raises(CannotLoadModel, match=r"model-1\.safetensors cannot be read"):
        minicpm.load(path, "cpu", "float32")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the kernel's list of mapped files")
def test_matrices_that_need_no_conversion_are_the_mapped_file_itself(network: minicpm.MiniCpm) -> None:
    for name, weight in network.named_parameters():
        is_matrix = min(weight.shape) > 1 and weight.dim() > 1
        assert is_mapped(weight) == is_matrix, name
    converted = minicpm.load(GOLDEN / CASE / "model", "cpu", "bfloat16")
    assert not any(map(is_mapped, converted.parameters()))


def is_mapped(weight: torch.Tensor) -> bool:
    """Returns True if the weight lies in a mapping of the checkpoint's file."""
    regions = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(f"{CASE}/model/model.safetensors")
    ]
    return any(start <= weight.data_ptr() < end for start, end in regions)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"head_type": "raw"}, "head_type = 'raw'; supported is 'simple' only"),
        ({"head_multi": False}, "head_multi = False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rotary positions of type 'dynamic'"),
        ({"hidden_size": 64}, r"shape \[.*\]; config.json describes"),
        ({"num_hidden_layers": 3}, "does not use"),
        ({"num_hidden_layers": 5}, r"lacks 10 weights .* lm_head\.4\.linear_head\.weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_it_cannot_follow_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CannotLoadModel, match=message):
        minicpm.load(changed_copy(CASE, tmp_path, config), "cpu", "float32")


@pytest.mark.parametrize("name", ["head_type", "scale_emb", "scale_depth", "start_layer", "rms_norm_eps"])
def test_a_setting_that_is_absent_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CannotLoadModel, match=name):
        minicpm.load(changed_copy(CASE, tmp_path, drop=(name,)), "cpu", "float32")


def test_weights_missing_or_left_over_are_named(tmp_path: Path) -> None:
    missing = "model.layers.2.mlp.up_proj.weight"
    with pytest.raises(CannotLoadModel, match=missing):
        minicpm.load(changed_copy(CASE, tmp_path / "missing", drop=(missing,)), "cpu", "float32")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}
    with pytest.raises(CannotLoadModel, match=r"q_proj\.bias .* does not use"):
        minicpm.load(changed_copy(CASE, tmp_path / "bias", add=bias), "cpu", "float32")
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    minicpm.load(changed_copy(CASE, tmp_path / "buffer", add=harmless), "cpu", "float32")


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    path = changed_copy(CASE, tmp_path)
    (path / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(CannotLoadModel, match=r"model\.safetensors cannot be read as safetensors"):
        minicpm.load(path, "cpu", "float32")
