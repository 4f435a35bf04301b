"""Finds or downloads a checkpoint's directory, verifies its weights, and reads its JSON files. Knows no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedq.core.errors import CannotLoadModel

if TYPE_CHECKING:
    from embedq.core.settings import ModelSettings

#: The only files that weights are read from; `pytorch_model.bin` is a pickle.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

#: Weights of other programs, and whose they are.
_OTHER_FORMATS = {
    "*.onnx": "ONNX",
    "onnx/*.onnx": "ONNX",
    "openvino*": "OpenVINO",
    "*.gguf": "llama.cpp (GGUF)",
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
}

#: Files of a checkpoint that may be read, and the only ones to download from the hub: weights as safetensors, and the
#: small files that describe them.
PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*_linear.pt"]
#: A module behind the network may store its few weights as a pickle, of which only tensors are read.
PATTERNS += [f"*_{module}/pytorch_model.bin" for module in ("Dense", "LayerNorm")]


def find(path_or_name: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """Return a local directory as it is; download any other name from the hub into its cache.

    CannotLoadModel if there is no such directory or the download fails.
    """
    if directory := local_directory(path_or_name):
        return directory
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_name, revision=revision, cache_dir=cache_dir, allow_patterns=PATTERNS))
    except Exception as error:  # the client raises dozens of classes: absent, private, offline, disk full
        raise CannotLoadModel(
            f"{path_or_name!r} is no local directory and cannot be fetched from the hub: {type(error).__name__}"
        ) from error


def local_directory(path_or_name: str) -> Path | None:
    """The directory that is meant; None for a name on the hub. CannotLoadModel if it is neither, in no time."""
    path = Path(path_or_name).expanduser()
    if path_or_name and path.is_dir():
        return path
    if path.is_absolute() or path_or_name.startswith((".", "~")) or path_or_name.count("/") != 1:
        raise CannotLoadModel(f"there is no model directory {path_or_name!r:.300}; a hub name is written owner/name")
    return None


def refuse_absent(models: Mapping[str, ModelSettings]) -> None:
    """CannotLoadModel for a model whose directory is not there. To be called before torch is imported, which takes seconds."""
    for alias, model in models.items():
        try:
            local_directory(model.path)
        except CannotLoadModel as error:
            raise CannotLoadModel(f"model {alias!r}: {error}") from None


def has_weights(path: Path) -> bool:
    """Returns True if the directory holds safetensors of a network."""
    return any((path / name).is_file() for name in _WEIGHTS)


def check_weights(path: Path, sha256: str | None) -> None:
    """CannotLoadModel unless `path` holds safetensors, and those have the expected SHA-256 if one is given."""
    if not has_weights(path):
        raise CannotLoadModel(
            f"{path} has no weights as safetensors: looked for {' and '.join(_WEIGHTS)}. {_other_weights(path)}"
        )
    if sha256 is None:
        return
    if not (path / _WEIGHTS[0]).is_file():
        raise CannotLoadModel(
            f"{path} has its weights in several files; sha256 can only verify a single file, {_WEIGHTS[0]}"
        )
    with (path / _WEIGHTS[0]).open("rb") as weights:
        found = hashlib.file_digest(weights, "sha256").hexdigest()
    if found != sha256:
        raise CannotLoadModel(f"{path / _WEIGHTS[0]} has SHA-256 {found}, not the expected {sha256}")


def _other_weights(path: Path) -> str:
    """Names the weights that the directory has instead of safetensors, and the cure for it."""
    if not path.is_dir():
        return "There is no such directory"
    if (path / "pytorch_model.bin").is_file():
        return (
            f"A pickle (pytorch_model.bin) is never served; turn it into safetensors once with `embedq convert {path}`"
        )
    if (path / "pytorch_model.bin.index.json").is_file():
        return (
            "It has a pickle in several files (pytorch_model.bin.index.json), and a pickle is never served; save it as "
            f"safetensors once: {_saved_again(path)}"
        )
    for pattern, name in _OTHER_FORMATS.items():
        if next(path.glob(pattern), None) is not None:
            return f"It has weights for {name}, which embedq does not run; the model's page may have safetensors, too"
    return "It has no other weights either: was the download complete?"


def _saved_again(path: Path) -> str:
    return (
        f"python -c \"from transformers import AutoModel as M; M.from_pretrained('{path}').save_pretrained('{path}')\""
    )


def read_json(path: Path, form: type = dict) -> Any:
    """The content of a JSON file; None if there is no such file. CannotLoadModel unless it is of type `form`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CannotLoadModel(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, form):
        raise CannotLoadModel(f"{path} holds a {type(content).__name__} where a {form.__name__} is expected")
    return content
