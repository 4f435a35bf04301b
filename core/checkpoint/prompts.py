"""Instructions and formats: what is written around a text before it is tokenized.

A format holds two `{}`: the first stands for the instruction, the second for the text; that of an
example holds three. They are filled by position and never interpreted, because formats come from
callers: Python's own `format` would let "{0.__class__}" read attributes.
"""

from __future__ import annotations

from embedq.core.errors import InvalidInput

#: Instruction and text side by side.
PLAIN = "{}{}"


def write(texts: list[str], instruction: str | None, format: str = PLAIN) -> list[str]:
    """Fill `format` with `instruction` and each text; without an instruction texts stay as they are.

    InvalidInput for a wrong format.
    """
    if instruction is None:
        return texts
    before, between, after = _parts(format, "instruction", "text")
    return [f"{before}{instruction}{between}{text}{after}" for text in texts]


def write_example(format: str, instruction: str, query: str, response: str) -> str:
    """Fill the three places of an example's format. InvalidInput for a wrong format."""
    before, query_follows, response_follows, after = _parts(format, "instruction", "query", "response")
    return f"{before}{instruction}{query_follows}{query}{response_follows}{response}{after}"


def _parts(format: str, *places: str) -> list[str]:
    """What is before, between and after the places of a format.

    A backslash followed by n in the format means a newline (FlagEmbedding's convention, since
    formats often pass through shells and configuration files).
    """
    parts = format.replace("\\n", "\n").split("{}")
    if len(parts) - 1 != len(places):
        raise InvalidInput(
            f"a format holds {{}} {len(places)} times, for {', '.join(places)}; given {len(parts) - 1} times"
        )
    return parts
