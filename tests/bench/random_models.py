"""Models of real sizes with random weights: what a device makes of a shape, without a download."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.bench.real_texts import MAX_TOKENS
from tests.conftest import GOLDEN

#: By name: the golden case whose tokenizer and configuration are taken, and the sizes that replace its own.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": (
        "flagmodel_mean",
        {
            "vocab_size": 30_522,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3_072,
            "max_position_embeddings": 512,
        },
    ),
    "bge-m3": (
        "bge_m3",
        {
            "vocab_size": 250_002,
            "hidden_size": 1_024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4_096,
            "max_position_embeddings": 8_194,
        },
    ),
}


def save(shape: str, directory: Path) -> Path:
    """Write a checkpoint of that shape, weights as transformers draws them; returns `directory`."""
    import torch
    from transformers import AutoConfig, AutoModel

    case, sizes = SHAPES[shape]
    golden = GOLDEN / case / "model"
    config = AutoConfig.from_pretrained(golden)
    for name, value in sizes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModel.from_config(config, dtype=torch.float32).save_pretrained(directory)
    for file in golden.glob("*token*.json"):
        shutil.copy(file, directory)
    stated = directory / "tokenizer_config.json"  # of the golden case, whose model reads little
    words = json.loads(stated.read_text(encoding="utf-8")) | {"model_max_length": MAX_TOKENS}
    stated.write_text(json.dumps(words), encoding="utf-8")
    width = config.hidden_size
    for name, num_outputs in {"colbert_linear": width, "sparse_linear": 1}.items():
        if (golden / f"{name}.pt").is_file():  # the heads by which BGE-M3 is recognised
            torch.save(torch.nn.Linear(width, num_outputs).state_dict(), directory / f"{name}.pt")
    return directory
