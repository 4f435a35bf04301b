"""A LoRA adapter of a tiny BERT, as the two files that peft saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny_models import write

RANK, ALPHA = 3, 5
LAYERS = ["encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"]


def adapter(path: Path, names: list[str] = LAYERS, prefix: str = "base_model.model.", **stated: Any) -> dict[str, Any]:
    """Write an adapter's two files into `path`; returns what it adds to each layer's weight."""
    path.mkdir(exist_ok=True)
    draw = torch.Generator().manual_seed(3)
    state: dict[str, Any] = {}
    added: dict[str, Any] = {}
    for name in names:
        outputs, inputs = (32, 64) if name.endswith("output.dense") and "attention" not in name else (32, 32)
        down, up = torch.randn(RANK, inputs, generator=draw), torch.randn(outputs, RANK, generator=draw) * 0.2
        state |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
        added[name] = up @ down
    save_file(state, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["query"], "bias": "none"}
    write(
        path / "adapter_config.json", config | {"base_model_name_or_path": "nowhere/at-all", "use_dora": False} | stated
    )
    return added
