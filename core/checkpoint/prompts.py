"""Writes instructions around texts, by a format, before they are tokenized.

A format contains two `{}`, the first for the instruction, the second for the text; an example's format contains three.
They are filled by position and never interpreted, because formats come from callers: Python's own `format` would let
"{0.__class__}" read attributes.
"""

from __future__ import annotations

from embedq.core.errors import InvalidInput

#: Instruction and text side by side.
PLAIN = "{}{}"


def write(texts: list[str], instruction: str | None, format: str = PLAIN) -> list[str]:
    """Fill `format` with `instruction` and each text; without an instruction return the texts unchanged.

    InvalidInput for a wrong format.
    """
    if instruction is None:
        return texts
    before, between, after = _parts(format, "instruction", "text")
    return [f"{before}{instruction}{between}{text}{after}" for text in texts]


def write_example(format: str, instruction: str, query: str, response: str) -> str:
    """Fill an example's format with its three texts. InvalidInput for a wrong format."""
    before, query_follows, response_follows, after = _parts(format, "instruction", "query", "response")
    return f"{before}{instruction}{query_follows}{query}{response_follows}{response}{after}"


def _parts(format: str, *places: str) -> list[str]:
    """Split a format at its places.

    A backslash followed by n in the format means a newline (FlagEmbedding's convention, since
    formats often pass through shells and configuration files).
    """
    parts = format.replace("\\n", "\n").split("{}")
    if len(parts) - 1 != len(places):
        raise InvalidInput(
            f"a format contains {{}} {len(places)} times, for {', '.join(places)}; given {len(parts) - 1} times"
        )
    return parts
