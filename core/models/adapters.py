"""Adds a LoRA adapter's matrices to a network's weights, in float32, when it is loaded."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from embedq.core.checkpoint.adapter import Adapter
from embedq.core.errors import CannotLoadModel

_NAME = re.compile(r"^(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<side>A|B)(?:\.default)?\.weight$")

#: Files that would let transformers apply the adapter by itself, if the package peft is installed.
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@contextmanager
def base_alone(base: Path) -> Iterator[Path]:
    """The directory without the adapter that may lie in it, which transformers would apply if it could."""
    if not (base / _ADAPTER_FILES[0]).is_file():
        yield base
        return
    with tempfile.TemporaryDirectory(prefix="embedq-base-") as folder:
        for file in base.iterdir():
            if file.name not in _ADAPTER_FILES:
                (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


def merge(module: nn.Module, adapter: Adapter) -> None:
    """Add the adapter to the weights of `module`. CannotLoadModel for a tensor that does not belong to one."""
    weights = dict(module.named_parameters())
    for layer, (down, up) in _pairs(adapter).items():
        # Trained under a head, the network's names begin with that of its place below it.
        name = next((one for one in (f"{layer}.weight", f"{layer.partition('.')[2]}.weight") if one in weights), None)
        if name is None or weights[name].shape != (up.shape[0], down.shape[1]):
            raise CannotLoadModel(
                f"{adapter.file} changes {layer}, and {adapter.base} has no such weight of that shape"
            )
        weight = weights[name]
        added = adapter.scale * (up.float() @ down.float())
        weight.data = (weight.detach().float() + added).to(weight.dtype)  # never in place: it may be the mapped file


def _pairs(adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(down (rank, in), up (out, rank)) by the layer they belong to."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(adapter.file).items():
        found = _NAME.match(name)
        if found is None:
            raise CannotLoadModel(f"{adapter.file} has {name}, which is no matrix of a plain LoRA adapter")
        sides.setdefault(found["layer"], {})[found["side"]] = tensor
    lonely = [layer for layer, pair in sides.items() if len(pair) != 2]
    if lonely or not sides:
        raise CannotLoadModel(f"{adapter.file} lacks a matrix of {lonely[0] if lonely else 'every layer'}")
    return {layer: (pair["A"], pair["B"]) for layer, pair in sides.items()}
