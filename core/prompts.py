"""Instructions and formats: what is written around a text before it is tokenized.

A format holds two `{}`: the first stands for the instruction, the second for the text. They are
filled by position and never interpreted, because formats come from callers: Python's own `format`
would let "{0.__class__}" read attributes.
"""

from __future__ import annotations

from core.errors import InvalidInput

#: Instruction and text side by side.
PLAIN = "{}{}"

_LETTERS = {"query_instruction": "A: ", "passage_instruction": "B: "}

#: What rerankers were trained to find around query and passage, by family: fields of `ModelSpec`.
OF_RERANKERS: dict[str, dict[str, str]] = {
    "llm_reranker": _LETTERS,
    "layerwise_reranker": _LETTERS,
    "lightweight_reranker": _LETTERS,
    "qwen3_reranker": {
        "query_instruction": "Given a web search query, retrieve relevant passages that answer the query",
        "query_format": "<Instruct>: {}\n<Query>: {}",
        "passage_instruction": "",
        "passage_format": "\n<Document>: {}{}",
    },
}


def write(texts: list[str], instruction: str | None, format: str = PLAIN) -> list[str]:
    """Fill `format` with `instruction` and each text; without an instruction texts stay as they are.

    A backslash followed by n in the format means a newline (FlagEmbedding's convention, since
    formats often pass through shells and configuration files). InvalidInput for a wrong format.
    """
    if instruction is None:
        return texts
    parts = format.replace("\\n", "\n").split("{}")
    if len(parts) != 3:
        raise InvalidInput(f"a format holds {{}} twice, for instruction and text; given {len(parts) - 1} times")
    before, between, after = parts
    return [f"{before}{instruction}{between}{text}{after}" for text in texts]
