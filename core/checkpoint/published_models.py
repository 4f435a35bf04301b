"""Defaults of published models by name and of families: pooling, instruction formats.

The key is the last part of a path or hub name, exact and case-sensitive; a directory named `checkpoint-…` counts as
its parent. The tables hold FlagEmbedding's AUTO tables (1.4.2) without organisation prefixes, and the models its users
move on to. A model's settings override them; a directory that is not listed is recognised by its own files.
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
class ModelDefaults:
    """Defaults of a model; None leaves the choice to the directory's own files."""

    family: str
    pooling: str | None = None
    query_format: str = PLAIN
    #: Whether it was published with code of its own, which embedq never runs.
    has_own_code: bool = False


def _each(pattern: str, *values: str) -> list[str]:
    return [pattern.format(value) for value in values]


_SIZES = ("large", "base", "small")

_GROUPS: list[tuple[list[str], ModelDefaults]] = [
    (["bge-reasoner-embed-qwen3-8b-0923"], ModelDefaults("decoder", "last_token", _INSTRUCT)),
    (["bge-code-v1"], ModelDefaults("decoder", "last_token", _TAGS, has_own_code=True)),
    (["bge-multilingual-gemma2"], ModelDefaults("decoder", "last_token", _TAGS)),
    (["bge-en-icl"], ModelDefaults("icl", "last_token", _TAGS)),
    (["bge-m3"], ModelDefaults("m3", "cls")),
    (
        [name for size in _SIZES for name in _each(f"bge-{size}-{{}}", "en-v1.5", "zh-v1.5", "en", "zh")],
        ModelDefaults("encoder", "cls"),
    ),
    (_each("Qwen3-Embedding-{}", "0.6B", "4B", "8B"), ModelDefaults("decoder", "last_token", _INSTRUCT_TIGHT)),
    (
        [
            "e5-mistral-7b-instruct",
            "SFR-Embedding-2_R",
            "SFR-Embedding-Mistral",
            "Linq-Embed-Mistral",
        ],
        ModelDefaults("decoder", "last_token", _INSTRUCT),
    ),
    (
        _each("gte-{}-instruct", "Qwen2-7B", "Qwen2-1.5B", "Qwen1.5-7B"),
        ModelDefaults("decoder", "last_token", _INSTRUCT, has_own_code=True),
    ),
    (
        _each("e5-{}-v2", *_SIZES) + _each("e5-{}", *_SIZES) + _each("multilingual-e5-{}", *_SIZES),
        ModelDefaults("encoder", "mean"),
    ),
    (["multilingual-e5-large-instruct"], ModelDefaults("encoder", "mean", _INSTRUCT)),
    (
        ["gte-multilingual-base", "gte-large-en-v1.5", "gte-base-en-v1.5"],
        ModelDefaults("encoder", "cls", has_own_code=True),
    ),
    (_each("gte-{}", *_SIZES), ModelDefaults("encoder", "mean")),
    (_each("gte-{}-zh", *_SIZES), ModelDefaults("encoder", "cls")),
    (["bce-embedding-base_v1"], ModelDefaults("encoder", "cls")),
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
        ModelDefaults("cross_encoder"),
    ),
    (["bge-reranker-v2-gemma"], ModelDefaults("llm_reranker")),
    (["bge-reranker-v2-minicpm-layerwise"], ModelDefaults("layerwise_reranker")),
    (["bge-reranker-v2.5-gemma2-lightweight"], ModelDefaults("lightweight_reranker")),
    (_each("Qwen3-Reranker-{}", "0.6B", "4B", "8B"), ModelDefaults("qwen3_reranker")),
]

#: Defaults of a family, for directories that are not listed.
BY_FAMILY = {"icl": ModelDefaults("icl", "last_token", _TAGS)}

_LETTERED = {"query_instruction": "A: ", "passage_instruction": "B: "}

#: Instructions that rerankers were trained with, by family: fields of `ModelSpec`.
RERANKER_PROMPTS: dict[str, dict[str, str]] = {
    "llm_reranker": _LETTERED,
    "layerwise_reranker": _LETTERED,
    "lightweight_reranker": _LETTERED,
    "qwen3_reranker": {
        "query_instruction": "Given a web search query, retrieve relevant passages that answer the query",
        "query_format": "<Instruct>: {}\n<Query>: {}",
        "passage_instruction": "",
        "passage_format": "\n<Document>: {}{}",
    },
}

#: Defaults by name.
BY_NAME = {name: known for names, known in _GROUPS for name in names}


def defaults_of(path_or_name: str) -> ModelDefaults | None:
    """The defaults of a directory or hub name; None if it is not listed."""
    path = PurePosixPath(path_or_name)
    name = path.parent.name if path.name.startswith("checkpoint-") else path.name
    return BY_NAME.get(name)
