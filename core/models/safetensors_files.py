"""Reads a checkpoint's safetensors files: which they are, and their weights into a module, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from embedq.core.checkpoint.files import read_json
from embedq.core.errors import CannotLoadModel


def load_weights(module: nn.Module, path: Path, device: str) -> None:
    """Fill `module`, built on the meta device, from the safetensors of `path`, one tensor at a time.

    Converts each weight to the dtype of its parameter. Files are mapped, not read: on a CPU a matrix that needs no
    conversion stays in the file's own pages, which worker processes share. CannotLoadModel names a weight that is
    missing, has another shape, or is not part of the network.
    """
    parameters = dict(module.named_parameters())
    loaded: dict[str, Tensor] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt", device="cpu") as reader:
                for name in reader.keys():  # noqa: SIM118 (a reader is no mapping)
                    if name.endswith("rotary_emb.inv_freq"):
                        continue  # old checkpoints store it, but rope_theta determines it
                    _check_weight(file, name, reader.get_slice(name).get_shape(), parameters)
                    weight = reader.get_tensor(name)
                    # A norm that stays in the file would keep the whole file mapped, even if no other weight does.
                    is_vector = weight.numel() == max(weight.shape)
                    loaded[name] = weight.to(device, parameters[name].dtype, copy=is_vector)
        except (OSError, SafetensorError) as error:
            raise CannotLoadModel(f"{file} cannot be read as safetensors: {error}") from None
    missing = sorted(parameters.keys() - loaded.keys())
    if missing:
        raise CannotLoadModel(f"{path} lacks {len(missing)} weights the model needs, among them {missing[0]}")
    module.load_state_dict(loaded, assign=True)
    module.requires_grad_(False).eval()


def _check_weight(file: Path, name: str, shape: list[int], parameters: Mapping[str, Tensor]) -> None:
    if name not in parameters:
        raise CannotLoadModel(f"{file} has a weight {name} that the model described by config.json does not use")
    needed = list(parameters[name].shape)
    if shape != needed:
        raise CannotLoadModel(f"{file} has {name} of shape {shape}; config.json describes {needed}")


def weight_files(path: Path) -> list[Path]:
    """Return `model.safetensors`, or the files that its index names. CannotLoadModel for names outside `path`."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single]
    names = set(read_json(index).get("weight_map", {}).values())
    if any(Path(name).name != name for name in names):
        raise CannotLoadModel(f"{index} names files outside its own directory")
    return [path / name for name in sorted(names)]
