"""An adapter beside or apart from its base: `adapter_config.json` -> what to add to which weights. LoRA only.

Never left to the package `peft`, which may or may not be installed: the same directory gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedq.core.checkpoint.files import find, has_weights, read_json
from embedq.core.errors import CannotLoadModel

#: Keys that change no number once an adapter is trained; which weights it changes, their names tell.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """Low-rank matrices to add to a base's weights."""

    #: `adapter_model.safetensors`.
    file: Path
    #: Directory of the base.
    base: Path
    #: What each product of two matrices is multiplied by.
    scale: float


def read_adapter(path: Path, cache_dir: str | None) -> Adapter | None:
    """The adapter in `path` and its base, which is downloaded if it is a hub name; None without an adapter.

    CannotLoadModel for a kind of adapter, or a key of one, that is not merged.
    """
    config = read_json(path / "adapter_config.json")
    if config is None:
        return None
    _check(path, config)
    if not (path / "adapter_model.safetensors").is_file():
        raise CannotLoadModel(
            f"{path} has adapter_config.json without adapter_model.safetensors; a pickled adapter is never read"
        )
    base = (
        path if has_weights(path) else find(str(config["base_model_name_or_path"]), config.get("revision"), cache_dir)
    )
    rank = int(config["r"])
    if rank < 1:
        raise CannotLoadModel(f"{path}/adapter_config.json has r {rank}; it must be 1 or more")
    scale = float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapter(path / "adapter_model.safetensors", base, scale)


def _check(path: Path, config: Mapping[str, Any]) -> None:
    file = path / "adapter_config.json"
    if config.get("peft_type") != "LORA":
        raise CannotLoadModel(
            f"{file} is an adapter of type {config.get('peft_type')!r:.80}; LORA is supported. Merge another once with "
            "peft's merge_and_unload and save_pretrained, and serve that directory"
        )
    others = sorted(name for name, value in config.items() if name not in _HARMLESS and value)
    if config.get("bias", "none") != "none":
        others.append("bias")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        others.append("init_lora_weights")  # it may have changed the base
    if others:
        raise CannotLoadModel(
            f"{file} has {', '.join(others)}, which is not merged here. Merge it once with peft's merge_and_unload and "
            "save_pretrained, and serve that directory"
        )
