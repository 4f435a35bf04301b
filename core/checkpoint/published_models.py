"""What is known of published models by their name: family, pooling, formats, lengths.

The key is the last part of a path or hub name, exact and case-sensitive; a directory named
`checkpoint-…` counts as its parent. FlagEmbedding's AUTO tables (1.4.2), whose organisation prefixes
are left off, and the models its users move on to. Everything here can be overridden in the
settings of a model; a directory that is not listed is recognised by its own files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from embedq.core.checkpoint.prompts import PLAIN

#: Instruction formats of decoder embedders.
_INSTRUCT = "Instruct: {}\nQuery: {}"
_INSTRUCT_TIGHT = "Instruct: {}\nQuery:{}"  # Qwen3: no space behind the colon
_TAGS = "<instruct>{}\n<query>{}"


@dataclass(frozen=True, slots=True)
class Known:
    """What a name tells. None: what the directory's own files say."""

    family: str
    pooling: str | None = None
    query_format: str = PLAIN
    #: Published with code of its own, which others run and we never do.
    has_own_code: bool = False


def _each(pattern: str, *values: str) -> list[str]:
    return [pattern.format(value) for value in values]


_SIZES = ("large", "base", "small")

_GROUPS: list[tuple[list[str], Known]] = [
    (["bge-reasoner-embed-qwen3-8b-0923"], Known("decoder", "last_token", _INSTRUCT)),
    (["bge-code-v1"], Known("decoder", "last_token", _TAGS, has_own_code=True)),
    (["bge-multilingual-gemma2"], Known("decoder", "last_token", _TAGS)),
    (["bge-en-icl"], Known("icl", "last_token", _TAGS)),
    (["bge-m3"], Known("m3", "cls")),
    (
        [name for size in _SIZES for name in _each(f"bge-{size}-{{}}", "en-v1.5", "zh-v1.5", "en", "zh")],
        Known("encoder", "cls"),
    ),
    (_each("Qwen3-Embedding-{}", "0.6B", "4B", "8B"), Known("decoder", "last_token", _INSTRUCT_TIGHT)),
    (
        [
            "e5-mistral-7b-instruct",
            "SFR-Embedding-2_R",
            "SFR-Embedding-Mistral",
            "Linq-Embed-Mistral",
        ],
        Known("decoder", "last_token", _INSTRUCT),
    ),
    (
        _each("gte-{}-instruct", "Qwen2-7B", "Qwen2-1.5B", "Qwen1.5-7B"),
        Known("decoder", "last_token", _INSTRUCT, has_own_code=True),
    ),
    (
        _each("e5-{}-v2", *_SIZES) + _each("e5-{}", *_SIZES) + _each("multilingual-e5-{}", *_SIZES),
        Known("encoder", "mean"),
    ),
    (["multilingual-e5-large-instruct"], Known("encoder", "mean", _INSTRUCT)),
    (
        ["gte-multilingual-base", "gte-large-en-v1.5", "gte-base-en-v1.5"],
        Known("encoder", "cls", has_own_code=True),
    ),
    (_each("gte-{}", *_SIZES), Known("encoder", "mean")),
    (_each("gte-{}-zh", *_SIZES), Known("encoder", "cls")),
    (["bce-embedding-base_v1"], Known("encoder", "cls")),
    (
        [
            "bge-reranker-base",
            "bge-reranker-large",
            "bge-reranker-v2-m3",
            "bce-reranker-base_v1",
            "jina-reranker-v2-base-multilingual",
            "jina-reranker-v1-turbo-en",
            "gte-multilingual-reranker-base",
        ],
        Known("cross_encoder"),
    ),
    (["bge-reranker-v2-gemma"], Known("llm_reranker")),
    (["bge-reranker-v2-minicpm-layerwise"], Known("layerwise_reranker")),
    (["bge-reranker-v2.5-gemma2-lightweight"], Known("lightweight_reranker")),
    (_each("Qwen3-Reranker-{}", "0.6B", "4B", "8B"), Known("qwen3_reranker")),
]

#: What a family tells of a directory that is not listed; nothing for the others.
OF_FAMILY = {"icl": Known("icl", "last_token", _TAGS)}

#: Name -> what is known of it.
TABLE = {name: known for names, known in _GROUPS for name in names}


def known(path_or_name: str) -> Known | None:
    """What the tables know of a directory or hub name; None for a name that is not listed."""
    path = PurePosixPath(path_or_name)
    name = path.parent.name if path.name.startswith("checkpoint-") else path.name
    return TABLE.get(name)
