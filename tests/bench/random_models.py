"""Models of real sizes with random weights: what a device makes of a shape, without a download."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedq.deploy.demo import minilm
from tests.bench.real_texts import MAX_TOKENS
from tests.conftest import GOLDEN

#: Where the tokenizer is the real one of BERT: the demo's model, not a golden case.
_DEMO = "minilm"

_XLMR_LARGE = {
    "vocab_size": 250_002,
    "hidden_size": 1_024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4_096,
    "max_position_embeddings": 8_194,
}


def _bert(width: int, inner: int) -> dict[str, Any]:
    return {
        "vocab_size": 30_522,
        "hidden_size": width,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": inner,
        "max_position_embeddings": 512,
    }


#: By name: the golden case whose tokenizer and configuration are taken, and the sizes that replace its own.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("flagmodel_mean", _bert(768, 3_072)),
    "bge-small": (_DEMO, _bert(384, 1_536)),
    "bge-base": (_DEMO, _bert(768, 3_072)),
    "bge-m3": ("bge_m3", _XLMR_LARGE),
    "bge-reranker-v2-m3": ("flagreranker_xlmr", _XLMR_LARGE),
}


@contextmanager
def chosen(shape: str | None, directory: Path | None) -> Iterator[Path]:
    """A model's directory: of random weights, there meanwhile, if a shape is named; else the one given, else MiniLM's."""
    if not shape:
        yield directory or minilm.directory()
        return
    with tempfile.TemporaryDirectory(prefix="embedq-bench-") as made:
        yield save(shape, Path(made) / shape)


def save(shape: str, directory: Path, is_scored: bool = False) -> Path:
    """Write a checkpoint of that shape, weights as transformers draws them; returns `directory`.

    `is_scored` makes it a cross-encoder with one score.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    case, sizes = SHAPES[shape]
    golden = minilm.directory() if case == _DEMO else GOLDEN / case / "model"
    config = AutoConfig.from_pretrained(golden)
    for name, value in (sizes | ({"num_labels": 1} if is_scored else {})).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if is_scored else AutoModel
    kind.from_config(config, dtype=torch.float32).save_pretrained(directory)
    _copy_tokenizer(golden, directory)
    width = config.hidden_size
    for name, num_outputs in {"colbert_linear": width, "sparse_linear": 1}.items():
        if (golden / f"{name}.pt").is_file():  # the heads by which BGE-M3 is recognised
            torch.save(torch.nn.Linear(width, num_outputs).state_dict(), directory / f"{name}.pt")
    return directory


def save_scored(embedder: Path, directory: Path) -> Path:
    """Write a cross-encoder: the weights of an embedder below a head with random ones; returns `directory`."""
    import torch
    from transformers import AutoModelForSequenceClassification, logging

    torch.manual_seed(0)
    logging.set_verbosity_error()  # that there is no head is the point
    AutoModelForSequenceClassification.from_pretrained(embedder, num_labels=1).save_pretrained(directory)
    _copy_tokenizer(embedder, directory)
    return directory


def _copy_tokenizer(model: Path, directory: Path) -> None:
    for file in model.glob("*token*.json"):
        shutil.copy(file, directory)
    stated = directory / "tokenizer_config.json"  # of a golden case, whose model reads little
    words = json.loads(stated.read_text(encoding="utf-8")) | {"model_max_length": MAX_TOKENS}
    stated.write_text(json.dumps(words), encoding="utf-8")
