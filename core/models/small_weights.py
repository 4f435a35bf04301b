"""Reads the weights of a single layer from a file of its own, beside those of the network."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from embedq.core.errors import CannotLoadModel


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a small `.safetensors` or pickled file; a pickle with anything but tensors is refused."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch refuses a pickle with that module's own errors
        raise CannotLoadModel(f"{file} cannot be read as weights: {type(error).__name__}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CannotLoadModel(f"{file} holds {type(state).__name__}, not the weights of one layer by name")
    return state


def read_linear(state: dict[str, torch.Tensor], file: Path, in_features: int, prefix: str = "") -> torch.nn.Linear:
    """Build the linear layer of `state`, with its own output width. CannotLoadModel unless it takes `in_features`."""
    weight, bias = state.get(f"{prefix}weight"), state.get(f"{prefix}bias")
    num_known = 1 if bias is None else 2
    if weight is None or len(state) != num_known or weight.shape[1:] != (in_features,):
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        raise CannotLoadModel(f"{file} must hold {prefix}weight of shape (any, {in_features}); it has {shapes!s:.200}")
    # Without initial values: drawing them would change the host's random numbers.
    linear: torch.nn.Linear = torch.nn.utils.skip_init(  # type: ignore[no-untyped-call]
        torch.nn.Linear, in_features, len(weight), bias=bias is not None
    )
    linear.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()})
    return linear
