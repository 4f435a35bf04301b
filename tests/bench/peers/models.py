"""The measured models as directories that every system reads: weights, tokenizer, and how to pool.

They are made once and kept in a git-ignored folder with what the peers export from them.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedq.deploy.demo import minilm
from tests.bench import random_models
from tests.running import ROOT

#: Everything that `make bench-peers` and this measurement leave behind, one folder per peer beside it.
PEERS = ROOT / ".venv" / "peers"

#: Weights beyond this are loaded anew for every turn: a dozen copies of them would not fit into a small machine.
_MAX_KEPT_BYTES = 600 << 20

#: What each can be measured at. MiniLM has real weights, the others the shape only.
TASKS: dict[str, tuple[str, ...]] = {
    "minilm": ("embed", "rerank"),
    "bge-small": ("embed", "rerank"),
    "bge-base": ("embed", "rerank"),
    "bge-m3": ("embed",),
    "bge-reranker-v2-m3": ("rerank",),
}

#: Tokens that a sequence may have; those not named take 512. MiniLM's directory states 256.
_MAX_LENGTHS = {("minilm", "embed"): 256, ("bge-m3", "embed"): 4_096, ("bge-reranker-v2-m3", "rerank"): 4_096}
_MAX_LENGTH = 512


#: How sentence-transformers names what we call the pooling.
_POOLINGS = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "mean_sqrt_len_tokens": "mean_sqrt"}


@dataclass(frozen=True)
class Model:
    """One model for one task."""

    name: str
    task: str
    directory: Path
    pooling: str
    max_length: int

    @property
    def config(self) -> dict[str, Any]:
        """Sizes, as its config.json states them."""
        return dict(json.loads((self.directory / "config.json").read_text(encoding="utf-8")))

    @property
    def weights_bytes(self) -> int:
        """Of their file, in float32."""
        return (self.directory / "model.safetensors").stat().st_size

    @property
    def is_large(self) -> bool:
        """Whether systems that are not at their turn must leave memory."""
        return self.weights_bytes > _MAX_KEPT_BYTES

    @property
    def loading(self) -> dict[str, Any]:
        """What a peer's program is told to load."""
        return {
            "model": str(self.directory),
            "task": self.task,
            "max_length": self.max_length,
            "pooling": self.pooling,
            "is_m3": self.name == "bge-m3",
        }


def prepare(name: str, task: str, folder: Path = PEERS / "models") -> Model:
    """The model's directory below `folder`, made if it is not there."""
    directory = folder / f"{name}-{task}"
    pooling = "mean" if name == "minilm" else "cls"
    model = Model(name, task, directory, pooling, _MAX_LENGTHS.get((name, task), _MAX_LENGTH))
    if directory.is_dir():
        return model
    making = directory.with_name(f"{directory.name}.{os.getpid()}")
    making.mkdir(parents=True)
    try:
        _write(name, task, model, making)
        making.rename(directory)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return model


def _write(name: str, task: str, model: Model, into: Path) -> None:
    if name == "minilm" and task == "embed":
        shutil.copytree(minilm.directory(), into, dirs_exist_ok=True)
        return
    if name == "minilm":
        random_models.save_scored(minilm.directory(), into)
    else:
        random_models.save(name, into, is_scored=task == "rerank")
    if task == "embed":
        _write_modules(model, into)
    file = into / "tokenizer_config.json"
    words = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(words | {"model_max_length": model.max_length}), encoding="utf-8")


def _write_modules(model: Model, into: Path) -> None:
    """The steps that sentence-transformers reads, and Infinity with it."""
    width = json.loads((into / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    pooling = {f"pooling_mode_{name}": model.pooling == word for name, word in _POOLINGS.items()}
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    written: dict[str, Any] = {
        "sentence_bert_config.json": {"max_seq_length": model.max_length, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": width, **pooling},
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(steps)
        ],
    }
    for path, _ in steps[1:]:
        (into / path).mkdir()
    for name, content in written.items():
        (into / name).write_text(json.dumps(content), encoding="utf-8")
