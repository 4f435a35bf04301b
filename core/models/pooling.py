"""Pools a text's hidden states into its vector, and applies the projections behind the pooling. Shared by the families.

Computes in float32 whatever the network's precision: a sum of hundreds of half-precision values loses its last digits,
and a row per text costs next to nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from embedq.core.checkpoint.spec import DenseModule, ModelSpec
from embedq.core.errors import CannotLoadModel
from embedq.core.models.token_layout import TokenLayout

#: Files of a Dense module's weights, in the order of search; both name them "linear.weight" and "linear.bias".
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Pooling:
    """Applies `spec.pooling`, then `spec.dense_modules` in order."""

    def __init__(self, spec: ModelSpec, device: str) -> None:
        self._how = spec.pooling
        width = int(spec.config["hidden_size"] if "hidden_size" in spec.config else spec.config["dim"])
        for module in spec.dense_modules:
            if module.in_features != width:
                raise CannotLoadModel(
                    f"{module.path} takes {module.in_features} values, but the layer before it returns {width}"
                )
            width = module.out_features
        self._dense = torch.nn.Sequential(*(_load_dense(module) for module in spec.dense_modules)).to(device).eval()

    def __call__(self, states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Pool hidden states of all tokens (num_tokens, hidden_dim) into float32 (num_sequences, dim)."""
        how = {"cls": layout.first, "last_token": layout.last}.get(str(self._how), layout.mean)
        return self._project(how(states))

    def alone(self, network: Any, layout: TokenLayout) -> torch.Tensor:
        """Like `__call__`, for batches that need only the pooled vector; the network may skip states nobody reads."""
        if self._how == "cls":
            return self._project(network.first(layout))
        if self._how == "mean":
            return self._project(network.mean(layout))
        return self(network(layout), layout)

    def _project(self, pooled: torch.Tensor) -> torch.Tensor:
        """(num_sequences, hidden_dim) -> float32 (num_sequences, dim)."""
        projected: torch.Tensor = self._dense(pooled.float())
        return projected


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


def _load_dense(module: DenseModule) -> torch.nn.Sequential:
    file = next((module.path / name for name in _WEIGHTS if (module.path / name).is_file()), None)
    if file is None:
        raise CannotLoadModel(f"{module.path} has no weights; looked for {' and '.join(_WEIGHTS)}")
    linear = read_linear(read_state(file), file, module.in_features, "linear.")
    if (linear.out_features, linear.bias is not None) != (module.out_features, module.has_bias):
        raise CannotLoadModel(
            f"{file} has {linear.out_features} outputs with{'' if linear.bias is not None else 'out'} bias; "
            f"its config.json states {module.out_features} with{'' if module.has_bias else 'out'}"
        )
    return torch.nn.Sequential(linear.float(), _activation(module))


def _activation(module: DenseModule) -> torch.nn.Module:
    """Build the activation by its full name. Only torch's own: a name must not run code from the directory."""
    package, _, name = module.activation.rpartition(".")
    found = getattr(torch.nn, name, None) if package.startswith("torch.nn") else None
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise CannotLoadModel(
            f"{module.path} names the activation {module.activation!r:.80}, which is no class of torch.nn"
        )
    try:
        return found()
    except TypeError:
        raise CannotLoadModel(f"{module.path} names the activation {name}, which needs arguments") from None
