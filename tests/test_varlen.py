"""CUDA's way without padding. Where there is no CUDA, torch's kernel alone is replaced, by a slow and plain one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModel, BertConfig, RobertaConfig, XLMRobertaConfig

from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.models import token_layout as layout_module
from embedq.core.models.encoders import network
from embedq.core.models.encoders.attention import ByLength, Varlen, cpu_scale, grouped_layout, varlen_layout
from embedq.core.models.encoders.network import Padded
from embedq.core.models.encoders.packed import PackedEncoder
from embedq.core.models.token_layout import TokenLayout
from embedq.core.sequence import Sequence, Tokens
from embedq.core.settings import ModelSettings
from tests import tiny_models
from tests.test_transfer import DEVICES

KERNEL = "torch.nn.attention.varlen.varlen_attn"

#: Where the device is a CPU, what is compared is exact; the kernel itself knows half precisions only.
TYPES = {"cpu": torch.float32, "cuda:0": torch.bfloat16}
TOLERANCE = {"cpu": 1e-5, "cuda:0": 2e-2}

LENGTHS = (1, 2, 16, 17, 33, 64, 64, 5)

#: As tests.test_packed; heads of 32 and of 64, the widths of the encoders that people use.
SIZES = {"vocab_size": 500, "max_position_embeddings": 80, "num_hidden_layers": 3, "intermediate_size": 128}
CONFIGS = {
    "bert": (BertConfig, "flagmodel_mean"),
    "roberta": (RobertaConfig, "bge_m3"),
    "xlm-roberta": (XLMRobertaConfig, "bge_m3"),
}


def plainly(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, key_starts: torch.Tensor,
    max_queries: int, max_keys: int,
) -> torch.Tensor:  # fmt: skip
    """Stands for torch's kernel as documented, with the refusals of the real one."""
    for one in (queries, keys, values):
        assert one.dim() == 3
        assert one.stride(-1) == 1
    for each in (starts, key_starts):
        assert each.dtype == torch.int32
        assert each.is_contiguous()
    lengths = starts.diff().tolist()
    assert sum(lengths) == len(queries)
    assert (type(max_queries), type(max_keys)) == (int, int)
    assert max_queries == max_keys == max(lengths)
    found = []
    for start, length in zip(starts.tolist(), lengths, strict=False):
        q, k, v = (one[start : start + length].transpose(0, 1) for one in (queries, keys, values))
        found.append(functional.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(found)


@pytest.fixture
def plain_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KERNEL, plainly)


@pytest.fixture
def as_if_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps here what would be copied to a device."""
    monkeypatch.setattr(layout_module, "to_device", lambda tensor, device: tensor)


def kernel_of(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one on CUDA."""
    if device == "cpu":
        monkeypatch.setattr(KERNEL, plainly)


def batch_of() -> list[Sequence]:
    draw = np.random.default_rng(7)
    return [Sequence(Tokens(draw.integers(5, 400, length).astype(np.int32))) for length in LENGTHS]


def module_of(kind: str, num_heads: int = 2, hidden_size: int = 64) -> Any:
    config, _ = CONFIGS[kind]
    more = {"pad_token_id": 1} if kind != "bert" else {}
    torch.manual_seed(3)
    module = AutoModel.from_config(config(**SIZES, **more, hidden_size=hidden_size, num_attention_heads=num_heads))
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    return module.eval()


def saved(directory: Path) -> ModelSpec:
    config, case = CONFIGS["bert"]
    path = tiny_models.save(directory, config(**SIZES, hidden_size=64, num_attention_heads=2), case)
    return read_spec("model", ModelSettings(path=str(tiny_models.add_modules(path, "mean_tokens"))))


@DEVICES
@pytest.mark.parametrize("width", [32, 64])
def test_each_token_sees_its_own_sequence_alone(width: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_of(device, monkeypatch)
    num_heads, lengths = 3, list(LENGTHS)
    states = torch.randn(sum(lengths), 3 * num_heads * width, generator=torch.Generator().manual_seed(1))
    expected = []
    for own in states.split(lengths):  # type: ignore[no-untyped-call]
        q, k, v = own.view(len(own), 3, num_heads, width).permute(1, 2, 0, 3).double()
        weights = torch.softmax(q @ k.transpose(1, 2) / width**0.5, -1)
        expected.append((weights @ v).transpose(0, 1).flatten(1))
    there = TokenLayout(batch_of(), device)
    found = Varlen(num_heads)(states.to(device, TYPES[device]), varlen_layout(there))
    assert found.shape == (sum(lengths), num_heads * width)
    assert found.is_contiguous()
    within = TOLERANCE[device]
    torch.testing.assert_close(found.cpu().double(), torch.cat(expected), rtol=within, atol=within)
    states = functional.pad(states, (0, 0, 0, 1))  # a row that is nobody's
    states[:, : num_heads * width] *= cpu_scale(width)  # what the weights do for a CPU
    by_length = ByLength(num_heads)(states, grouped_layout(TokenLayout(batch_of(), "cpu"), len(states)))
    torch.testing.assert_close(found.cpu().float(), by_length[:-1], rtol=within, atol=within)


@DEVICES
@pytest.mark.parametrize("kind", CONFIGS)
def test_states_are_those_of_the_padded_way(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_of(device, monkeypatch)
    module = module_of(kind).to(device, TYPES[device])
    with torch.inference_mode():
        there = TokenLayout(batch_of(), device)
        packed = PackedEncoder(module, "cuda:0")
        found, first = packed(there).float().cpu(), packed.first(there).float().cpu()
        expected = Padded(module, pad_token_id=0 if kind == "bert" else 1)(there).float().cpu()
    if device == "cpu":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float(functional.cosine_similarity(found, expected).min()) > 0.998
    starts = torch.from_numpy(there.starts)
    torch.testing.assert_close(first, found[starts], rtol=TOLERANCE[device], atol=TOLERANCE[device])


@pytest.mark.parametrize("num_heads", [1, 2])
def test_the_whole_pass_is_queued_without_asking_the_device_anything(num_heads: int) -> None:
    """On tensors that have shapes and no numbers: to read one is an error. torch's own kernel checks its arguments."""
    module = module_of("roberta", num_heads).to("meta", torch.bfloat16)
    there = TokenLayout(batch_of(), "meta")
    with torch.inference_mode():
        found = PackedEncoder(module, "cuda:0")(there)
        pooled = there.first(found), there.last(found)
    assert found.shape == (sum(LENGTHS), 64)
    assert [one.shape for one in pooled] == [(len(LENGTHS), 64)] * 2


def test_what_a_pass_needs_is_copied_twice_however_many_layers_there_are(
    plain_kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[torch.Tensor] = []
    monkeypatch.setattr(layout_module, "to_device", lambda tensor, device: copied.append(tensor) or tensor)
    there = TokenLayout(batch_of(), "cuda:0")
    with torch.inference_mode():
        states = PackedEncoder(module_of("roberta"), "cuda:0")(there)
        for pool in (there.first, there.last, there.mean):
            assert pool(states).shape == (len(LENGTHS), 64)
    assert [one.shape[0] for one in copied] == [3 * sum(LENGTHS), len(LENGTHS) + 1]


def test_poolings_are_of_each_sequence_alone() -> None:
    there = TokenLayout(batch_of(), "cpu")
    rows = torch.randn(sum(LENGTHS), 4, generator=torch.Generator().manual_seed(2))
    each = rows.split(list(LENGTHS))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(there.first(rows), torch.stack([one[0] for one in each]))
    torch.testing.assert_close(there.last(rows), torch.stack([one[-1] for one in each]))
    torch.testing.assert_close(there.mean(rows), torch.stack([one.mean(0) for one in each]))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_on_cuda_in_half_precisions_nothing_is_padded(
    precision: str, tmp_path: Path, plain_kernel: None, as_if_cuda: None
) -> None:
    spec = saved(tmp_path)
    module = AutoModel.from_pretrained(spec.path).to(getattr(torch, precision)).eval()
    found = network.build(module, spec, "cuda:0", precision)
    assert isinstance(found, PackedEncoder)
    assert len(module.encoder.layer) == 0  # no weight is kept twice
    assert isinstance(network.build(AutoModel.from_pretrained(spec.path).eval(), spec, "cuda:0", "float32"), Padded)


def _raises(*args: Any, **given: Any) -> torch.Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def _is_wrong(queries: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
    return torch.zeros_like(queries)


@pytest.mark.parametrize(
    ("kernel", "told"), [(_raises, "RuntimeError: FlashAttention only supports"), (_is_wrong, "have a cosine of")]
)
def test_a_device_whose_kernel_fails_runs_padded_and_says_so(
    kernel: Any, told: str, tmp_path: Path, as_if_cuda: None, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(KERNEL, kernel)
    spec = saved(tmp_path)
    module = AutoModel.from_pretrained(spec.path).bfloat16().eval()
    there = TokenLayout(batch_of(), "cpu")
    with torch.inference_mode():
        expected = Padded(module, spec.pad_token_id)(there)
        with caplog.at_level(logging.WARNING):
            found = network.build(module, spec, "cuda:0", "bfloat16")
        assert isinstance(found, Padded)
        torch.testing.assert_close(found(there), expected)
    (record,) = caplog.records
    assert vars(record)["action"] == "padded"
    assert told in record.getMessage()
