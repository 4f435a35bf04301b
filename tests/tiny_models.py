"""Tiny random embedders on disk: any transformers configuration with the tokenizer of a golden case."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PretrainedConfig

from tests.conftest import GOLDEN

#: Width of a weight matrix: at 0.02, the usual one, all texts look alike.
_STANDARD_DEVIATION = 0.15


def save(
    directory: Path, config: PretrainedConfig, case: str, seed: int = 0, auto_class: str = "AutoModel", **stated: Any
) -> Path:
    """Weights drawn by `seed` and the tokenizer of `case`; `stated` goes into config.json as it is."""
    torch.manual_seed(seed)
    module = getattr(transformers, auto_class).from_config(config, dtype=torch.float32)
    for weight in module.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=_STANDARD_DEVIATION)
    module.save_pretrained(directory)
    for file in (GOLDEN / case / "model").glob("*token*.json"):
        shutil.copy(file, directory)
    change(directory / "config.json", **stated)
    return directory


def change(file: Path, **stated: Any) -> None:
    """Set keys of a JSON file, which need not exist; None removes one."""
    content = (read(file) if file.is_file() else {}) | stated
    write(file, {name: value for name, value in content.items() if value is not None})


def add_modules(directory: Path, pooling: str, dense: Sequence[tuple[int, int, str]] = (), seed: int = 0) -> Path:
    """Make a sentence-transformers directory of it: pooling, `dense` (in, out, activation), Normalize."""
    torch.manual_seed(seed)
    names = ["Transformer", "Pooling", *("Dense" for _ in dense), "Normalize"]
    modules = []
    for index, name in enumerate(names):
        path = f"{index}_{name}" if index else ""
        modules.append({"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"})
        (directory / path).mkdir(exist_ok=True)
    write(directory / "modules.json", modules)
    config = read(directory / "config.json")
    pooled = {"word_embedding_dimension": config["hidden_size"], f"pooling_mode_{pooling}": True}
    write(directory / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": False} | pooled)
    for index, (in_features, out_features, activation) in enumerate(dense, start=2):
        layer = torch.nn.Linear(in_features, out_features, bias=activation.endswith("Tanh"))
        torch.nn.init.normal_(layer.weight, std=_STANDARD_DEVIATION)
        stated = {
            "in_features": in_features,
            "out_features": out_features,
            "bias": layer.bias is not None,
            "activation_function": activation,
        }
        write(directory / f"{index}_Dense" / "config.json", stated)
        state = {f"linear.{name}": value.detach().contiguous() for name, value in layer.named_parameters()}
        save_file(state, directory / f"{index}_Dense" / "model.safetensors")
    return directory


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
