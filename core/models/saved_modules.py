"""sentence-transformers' modules Dense, LayerNorm and Normalize -> torch modules, their weights checked and read.

All in float32, whatever the network computes in: a row per text or token costs next to nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from embedq.core.checkpoint.saved_modules import SavedModule
from embedq.core.errors import CannotLoadModel
from embedq.core.models.small_weights import read_linear, read_state

#: A module's weights, in the order they are looked for; both by the same names.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

#: sentence-transformers' own where a Dense module names none.
_DEFAULT_ACTIVATION = "torch.nn.modules.activation.Tanh"


def load_modules(modules: Sequence[SavedModule], width: int, device: str) -> nn.Sequential:
    """`modules` one after the other, the first of which reads `width` values. CannotLoadModel if one does not fit."""
    loaded: list[nn.Module] = []
    for module in modules:
        if module.name == "Normalize":
            loaded.append(_Normalize())
        elif module.name == "LayerNorm":
            loaded.append(_layer_norm(module, width))
        else:
            loaded.append(_Dense(module, width))
            width = int(module.config["out_features"])
    return nn.Sequential(*loaded).to(device).eval()


class _Normalize(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.normalize(rows, p=2, dim=-1)


class _Dense(nn.Module):
    """A linear layer, its activation, and what came in added to that where the module says so."""

    def __init__(self, module: SavedModule, width: int) -> None:
        super().__init__()
        config = module.config
        _check_width(module, int(config["in_features"]), width)
        state, file = _state(module)
        residual = {name: state.pop(name) for name in list(state) if name.startswith("residual.")}
        self.linear = read_linear(state, file, width, "linear.").float()
        _check_shape(module, file, self.linear)
        self.activation = _activation(module)
        self.has_residual = bool(config.get("use_residual"))
        self.residual: nn.Module = nn.Identity()
        if self.has_residual and self.linear.out_features != width:
            self.residual = read_linear(residual, file, width, "residual.").float()
        elif residual:
            raise CannotLoadModel(f"{file} has {min(residual)}, which its config.json does not use (use_residual)")

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)"""
        projected: torch.Tensor = self.activation(self.linear(rows))
        return projected + self.residual(rows) if self.has_residual else projected


def _layer_norm(module: SavedModule, width: int) -> nn.LayerNorm:
    _check_width(module, int(module.config["dimension"]), width)
    state, file = _state(module)
    norm = nn.LayerNorm(width)
    try:
        norm.load_state_dict({name.removeprefix("norm."): value.float() for name, value in state.items()})
    except RuntimeError as error:
        raise CannotLoadModel(
            f"{file} does not hold the weights of a LayerNorm of {width} values: {error!s:.200}"
        ) from None
    return norm


def _check_width(module: SavedModule, reads: int, width: int) -> None:
    if reads != width:
        raise CannotLoadModel(f"{module.path} takes {reads} values, but the layer before it returns {width}")


def _check_shape(module: SavedModule, file: Path, linear: nn.Linear) -> None:
    out_features, has_bias = int(module.config["out_features"]), bool(module.config.get("bias", True))
    if (linear.out_features, linear.bias is not None) != (out_features, has_bias):
        raise CannotLoadModel(
            f"{file} has {linear.out_features} outputs with{'' if linear.bias is not None else 'out'} bias; "
            f"its config.json states {out_features} with{'' if has_bias else 'out'}"
        )


def _state(module: SavedModule) -> tuple[dict[str, torch.Tensor], Path]:
    file = next((module.path / name for name in _WEIGHTS if (module.path / name).is_file()), None)
    if file is None:
        raise CannotLoadModel(f"{module.path} has no weights; looked for {' and '.join(_WEIGHTS)}")
    return read_state(file), file


def _activation(module: SavedModule) -> nn.Module:
    """The function by its full name. Only torch's own: a name must not run what a directory brings."""
    stated = str(module.config.get("activation_function", _DEFAULT_ACTIVATION))
    package, _, name = stated.rpartition(".")
    found = getattr(torch.nn, name, None) if package.startswith("torch.nn") else None
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise CannotLoadModel(f"{module.path} names the activation {stated!r:.80}, which is no class of torch.nn")
    try:
        activation: nn.Module = found()
    except TypeError:
        raise CannotLoadModel(f"{module.path} names the activation {name}, which needs arguments") from None
    return activation
