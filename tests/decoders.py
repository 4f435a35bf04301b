"""Shared by the tests of our own decoders: golden scores, padding, small checkpoints on disk."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import GOLDEN
from tests.golden_cases import Call


def scores_of(call: Call) -> Tensor:
    """The library's scores, (num_layers, num_pairs)."""
    return torch.from_numpy(call.expected[""]).view(-1, len(call.inputs))


def finish(call: Call, scores: Tensor) -> Tensor:
    """The scores that the library returns for the network's logits."""
    return scores.sigmoid() if call.kwargs.get("normalize") else scores


def pad(rows: list[list[int]], side: str = "right", extra: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask, (num_rows, longest + extra) int64 each; the padding is an ordinary token's id."""
    longest = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), longest), 7), torch.zeros((len(rows), longest), dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids, mask


def random_rows(*lengths: int) -> list[list[int]]:
    """Rows of these lengths of different tokens, ids 0 to 49."""
    draw = random.Random(9)
    return [[draw.randrange(50) for _ in range(length)] for length in lengths]


def assert_close_in_bfloat16(scores: Tensor, expected: Tensor, within: float, min_cosine: float) -> None:
    """Each score within `within` and 1 %, and the scores of a layer together in the same direction."""
    assert scores.dtype == torch.float32
    assert ((scores - expected).abs() <= within + 0.01 * expected.abs()).all()
    if scores.shape[1] > 1:  # a single score has no direction
        assert torch.cosine_similarity(scores, expected, dim=1).min() >= min_cosine


def changed_copy(
    case: str,
    target: Path,
    config: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    add: dict[str, Tensor] | None = None,
) -> Path:
    """A copy of the case's checkpoint in which `config.json` or the weights differ."""
    shutil.copytree(GOLDEN / case / "model", target, dirs_exist_ok=True)
    stated = json.loads((target / "config.json").read_text())
    changed = {name: value for name, value in (stated | (config or {})).items() if name not in drop}
    (target / "config.json").write_text(json.dumps(changed))
    weights = load_file(target / "model.safetensors") | (add or {})
    save_file({name: weight for name, weight in weights.items() if name not in drop}, target / "model.safetensors")
    return target


def write_checkpoint(path: Path, config: dict[str, Any], decoder: torch.nn.Module, num_heads: int) -> Path:
    """Save another implementation's decoder as one of our checkpoints, with random scoring heads."""
    hidden = int(config["hidden_size"])
    weights = {f"model.{name}": weight.contiguous() for name, weight in decoder.state_dict().items()}
    heads = {f"lm_head.{i}.linear_head.weight": torch.randn(1, hidden) * hidden**-0.5 for i in range(num_heads)}
    save_file(weights | heads, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path
