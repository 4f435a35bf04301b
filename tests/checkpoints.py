"""Models for the tests: tiny random checkpoints as files, and a fake without any weights.

A tiny checkpoint is complete (configuration, safetensors, fast tokenizer), has a few thousand
weights drawn from a seed, and is written in a tenth of a second.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.models.requested_outputs import of_embedder, refuse
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence, Tokens, Wanted

#: Special tokens first, then letters and digits alone and as continuations, then whole words.
_WORDS = [
    "the",
    "ferry",
    "garden",
    "compass",
    "bread",
    "lighthouse",
    "map",
    "rain",
    "island",
    "boat",
    "query",
    "document",
]
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?-'"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_CHARACTERS, *(f"##{one}" for one in _CHARACTERS), *_WORDS]

#: Longest a test waits for another thread before it fails.
PATIENCE_S = 20.0

#: Sizes under the names that nearly all types share.
_SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # wide enough that texts differ
}

#: What a type names or needs in another way. Types that count positions from the padding need two more.
_OF_TYPE: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "camembert": {"max_position_embeddings": 66},
    "data2vec-text": {"max_position_embeddings": 66},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "electra": {"embedding_size": 16},
    "eurobert": {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "num_key_value_heads": 2},
    "luke": {"max_position_embeddings": 66, "entity_vocab_size": 10, "entity_emb_size": 8},
    "modernbert": {
        "pad_token_id": 0,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "local_attention": 16,
    },
    "mpnet": {"max_position_embeddings": 66},
    "roberta": {"max_position_embeddings": 66},
    "roberta-prelayernorm": {"max_position_embeddings": 66},
    "xlm-roberta": {"max_position_embeddings": 66},
    "xlm-roberta-xl": {"max_position_embeddings": 66},
}


def save_encoder(directory: Path, model_type: str = "bert", seed: int = 0) -> Path:
    """Write an encoder of two layers and 32 dimensions with a WordPiece tokenizer; returns `directory`."""
    return _save(directory, "AutoModel", model_type, seed, {})


def save_cross_encoder(directory: Path, model_type: str = "bert", seed: int = 0, num_labels: int = 1) -> Path:
    """Write a sequence classifier of the same size; returns `directory`."""
    return _save(directory, "AutoModelForSequenceClassification", model_type, seed, {"num_labels": num_labels})


def as_sentence_transformer(
    directory: Path,
    pooling: dict[str, Any] | None = None,
    modules: Iterable[str] = ("Transformer", "Pooling", "Normalize"),
    described: dict[str, Any] | None = None,
    sentence: dict[str, Any] | None = None,
) -> Path:
    """Add the files by which sentence-transformers describes a checkpoint; returns `directory`.

    `pooling` is the content of the pooling module's configuration, `described` holds the prompts.
    """
    listed = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{name}" if index else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for index, name in enumerate(modules)
    ]
    (directory / "1_Pooling").mkdir(exist_ok=True)
    write_json(directory / "modules.json", listed)
    write_json(directory / "1_Pooling" / "config.json", pooling or {"pooling_mode_mean_tokens": True})
    write_json(directory / "config_sentence_transformers.json", described or {})
    write_json(directory / "sentence_bert_config.json", sentence or {})
    return directory


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def change_config(directory: Path, **changes: Any) -> None:
    """Set keys of `config.json`; None removes one."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8")) | changes
    write_json(directory / "config.json", {name: value for name, value in config.items() if value is not None})


def change_weights(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let `change` edit the tensors of the checkpoint in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def save_tokenizer(directory: Path, vocabulary: list[str] | None = None) -> None:
    """Write a lower-casing WordPiece tokenizer over `VOCABULARY`, with BERT's pair template."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = {token: index for index, token in enumerate(vocabulary or VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", words["[SEP]"]), ("[CLS]", words["[CLS]"]))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.save(str(directory / "tokenizer.json"))


def _save(directory: Path, auto_class: str, model_type: str, seed: int, changes: dict[str, Any]) -> Path:
    import torch
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    config = transformers.AutoConfig.for_model(model_type, **(_SIZES | _OF_TYPE.get(model_type, {}) | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        getattr(transformers, auto_class).from_config(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


class FakeModel:
    """A model whose rows follow from the token ids alone: no weights, no torch.

    Token ids are the bytes of the text. `gate` holds the device thread inside a pass while it is
    closed; `begun` counts the passes that have started. On a `device` of CUDA's a pass is under way
    once `launch` has returned, as it is there: only what fetches its rows waits for the gate.
    """

    def __init__(self, alias: str = "fake", family: str = "encoder", max_length: int = 64) -> None:
        self.spec = ModelSpec(
            alias=alias,
            path=Path("/nowhere"),
            family=family,
            pooling="mean",
            normalize=False,
            max_length=max_length,
            dimensions=2 if family == "encoder" else 1,
            pad_token_id=0,
        )
        self.outputs = frozenset({"dense", "colbert"} if family == "encoder" else {"score"})
        self.device, self.precision, self.reason = "cpu", "float32", "asked for"
        self.is_padded = True
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)
        self.batches: list[list[Sequence]] = []
        #: ("launch" or "collect", number of the batch), in the order of what happened.
        self.steps: list[tuple[str, int]] = []
        #: Called before a pass starts; may raise.
        self.before_launch: Callable[[list[Sequence]], None] = lambda batch: None
        #: Called in each pass before its rows are made; may raise.
        self.before_rows: Callable[[list[Sequence]], None] = lambda batch: None
        #: What to make of the right rows before they are returned.
        self.after_rows: Callable[[Any], Any] = lambda rows: rows

    def encode_texts(self, texts: list[str], options: EmbedOptions) -> list[Tokens]:
        return [self._tokens(text) for text in self.spec.write(texts, options)]

    def encode_pairs(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[Tokens]:
        return [self._tokens(f"{query}|{passage}") for query, passage in pairs]

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        if self.spec.is_embedder:
            return of_embedder(self.spec, self.outputs, options)
        assert isinstance(options, RerankOptions)
        refuse(self.spec, options, ("mode", "weights"))
        return Wanted(self.outputs)

    def launch(self, batch: list[Sequence], wanted: Wanted) -> Callable[[], Any]:
        number = len(self.batches)
        self.batches.append(list(batch))
        self.steps.append(("launch", number))
        self.begun.release()
        self.before_launch(batch)
        rows = None if self.device.startswith("cuda") else self._rows(batch, wanted)

        def collect() -> Any:
            self.steps.append(("collect", number))
            return self._rows(batch, wanted) if self.device.startswith("cuda") else rows

        return collect

    def _rows(self, batch: list[Sequence], wanted: Wanted) -> Any:
        assert self.gate.wait(PATIENCE_S)
        self.before_rows(batch)
        rows: dict[str, Any] = {}
        if "dense" in wanted.outputs:
            rows["dense"] = np.array([row_of(one.tokens.ids) for one in batch], np.float32)
        if "score" in wanted.outputs:
            rows["score"] = np.array([row_of(one.tokens.ids)[:1] for one in batch], np.float32)
        if "colbert" in wanted.outputs:
            rows["colbert"] = [
                np.stack([one.tokens.ids, one.tokens.ids + 1], axis=1).astype(np.float32) for one in batch
            ]
        return self.after_rows(rows)

    def _tokens(self, text: str) -> Tokens:
        ids = np.frombuffer(text.encode() or b"\0", np.uint8)[: self.spec.max_length].astype(np.int32)
        return Tokens(ids, np.zeros_like(ids))


def row_of(token_ids: np.ndarray) -> tuple[float, float]:
    """The vector that `FakeModel` gives to these tokens: different for every text of the tests."""
    return float(token_ids @ np.arange(1, len(token_ids) + 1)), float(len(token_ids))


def expected_rows(texts: list[str]) -> np.ndarray:
    """(num_texts, 2): the vectors that `FakeModel` gives to `texts`."""
    return np.array(
        [row_of(np.frombuffer(text.encode() or b"\0", np.uint8).astype(np.int32)) for text in texts], np.float32
    )
