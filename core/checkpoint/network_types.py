"""Lists transformers' model types by what their tokens see, and reads one network's sizes: width, positions, padding.

Sizes come from transformers' own configuration classes where they know the type: those know the names and the
defaults of each (`n_embd`, `d_model`, positions that `config.json` leaves out). Loads no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedq.core.errors import CannotLoadModel

#: Model types whose attention looks both ways. Pooling over a decoder needs a family of its own.
ENCODER_TYPES = frozenset(
    {
        "albert",
        "bert",
        "camembert",
        "data2vec-text",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
        "eurobert",
        "gte",
        "jina_embeddings_v3",
        "luke",
        "megatron-bert",
        "modernbert",
        "mpnet",
        "nomic_bert",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
    }
)

#: Types of which only the encoder runs, and its class in transformers; weights under "decoder." stay unread.
ENCODER_CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}

#: Model types whose tokens see those before them.
DECODER_TYPES = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt_neox",
        "granite",
        "lfm2",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
)

#: Position ids of these start after the padding index, which takes that many off the limit.
_OFFSET_TYPES = frozenset(
    {
        "camembert",
        "data2vec-text",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
    }
)

#: Types that turn or shift by a token's place instead of looking it up: a text may be as long as its owner says.
_WITHOUT_TABLE = (
    DECODER_TYPES | ENCODER_CLASSES.keys() | {"eurobert", "gte", "jina_embeddings_v3", "modernbert", "nomic_bert"}
)

#: Types that have their sizes under these names, and those names.
_USUAL_NAMES = frozenset({"bert", "camembert", "roberta", "xlm-roberta"})
_USUAL_KEYS = ("hidden_size", "max_position_embeddings", "pad_token_id", "vocab_size")

#: Tokens of a text where nothing limits them; tokenizers state as many or more for "no limit".
UNLIMITED = 1_000_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one network."""

    hidden: int
    #: Tokens of a text that have positions; `UNLIMITED` where it has no table and states none.
    positions: int
    #: Whether a longer text is impossible, and not just longer than the texts of the training.
    has_table: bool
    pad_token_id: int
    num_labels: int
    #: Tokens of the vocabulary.
    num_words: int


def read_sizes(path: Path, config: dict[str, Any]) -> Sizes:
    """Sizes of the network that `config`, the `config.json` of `path`, describes."""
    kind, stated = str(config.get("model_type")), _Stated(path, config)
    pad_token_id = stated.get("pad_token_id")
    if pad_token_id is None:
        pad_token_id = int(kind in _OFFSET_TYPES)  # the one transformers takes for these types
    positions = int(stated.get("max_position_embeddings") or UNLIMITED)
    offset = int(pad_token_id) + 1 if kind in _OFFSET_TYPES else 0
    return Sizes(
        hidden=int(stated.get("hidden_size") or stated.get("dim") or 0),
        positions=positions - offset,
        has_table=not (
            kind in _WITHOUT_TABLE or (kind == "deberta-v2" and config.get("position_biased_input") is False)
        ),
        pad_token_id=int(pad_token_id),
        num_words=int(stated.get("vocab_size") or 0),
        num_labels=len(config.get("id2label") or {0: "", 1: ""}),  # transformers' own default is two
    )


def is_native(model_type: Any) -> bool:
    """Returns True if transformers has code of its own for this type."""
    if model_type in ENCODER_TYPES or model_type in DECODER_TYPES or model_type in ENCODER_CLASSES:
        return True  # known without its imports, which take seconds
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def tokenizer_limit(stated: dict[str, Any]) -> int | None:
    """Tokens of a text that `tokenizer_config.json` allows; None for no limit."""
    limit = stated.get("model_max_length")
    return int(limit) if limit and limit < UNLIMITED else None


class _Stated:
    """`config.json` as transformers understands it; as it is where transformers has no code for its type."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self._config: Any = config
        if config.get("model_type") in _USUAL_NAMES and all(type(config.get(name)) is int for name in _USUAL_KEYS):
            return  # nothing is left to a default, and transformers' imports take seconds
        if is_native(config.get("model_type")):
            from transformers import AutoConfig

            try:
                self._config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
            except Exception as error:  # its classes check what they are given in many ways
                raise CannotLoadModel(
                    f"{path}/config.json is not one of {config.get('model_type')}: {error!s:.300}"
                ) from error

    def get(self, name: str) -> Any:
        if isinstance(self._config, dict):
            return self._config.get(name)
        return getattr(self._config, name, None)
