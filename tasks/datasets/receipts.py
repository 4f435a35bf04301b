"""The result of a part's job: numbers about the object it wrote, never a row of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from embedq import __version__
from embedq.core.codec import register

#: Key of the receipt in the metadata of a part's object.
RECEIPT_KEY = b"embedq"

#: What became of a part's job.
WRITTEN, FOUND, REWRITTEN, CANCELLED, SUPERSEDED, DUPLICATE = (
    "written", "found", "rewritten", "cancelled", "superseded", "duplicate",
)  # fmt: skip


@register
@dataclass(frozen=True, slots=True, repr=False)
class Receipt:
    """One part, as whoever wrote its object counted it."""

    #: "written", "found" (the object was there), "rewritten" (its failed rows), or why nothing was written.
    outcome: str
    #: Of the manifest, and the part's number in it.
    manifest: str
    part: int
    rows: int = 0
    failed: int = 0
    tokens: int = 0
    #: Of the object; the SHA-256 cannot stand in the object itself, and is empty where that was only found.
    bytes: int = 0
    sha256: str = ""
    seconds: float = 0.0
    #: "1024 float16", "score".
    what: str = ""
    #: Of embedq, where it was made; empty where that is unknown.
    version: str = __version__

    def __repr__(self) -> str:
        if not self.what:
            return self.outcome
        failed = f", {self.failed:,} failed" if self.failed else ""
        return f"{self.rows:,} × {self.what}{failed}"

    def to_map(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def to_json(self) -> str:
        """For the object's own metadata."""
        return json.dumps(self.to_map())

    @classmethod
    def from_map(cls, given: dict[str, Any]) -> Receipt:
        """Undo `to_map`. ValueError if it is not what that gives."""
        try:
            made = cls(**{"version": ""} | {one.name: given[one.name] for one in fields(cls) if one.name in given})
        except TypeError:
            raise ValueError("a malformed receipt arrived") from None
        numbers = (made.part, made.rows, made.failed, made.tokens, made.bytes)
        are_numbers = all(type(one) is int for one in numbers) and isinstance(made.seconds, int | float)
        if not are_numbers or not isinstance(made.version, str):
            raise ValueError("a malformed receipt arrived")
        return made

    @classmethod
    def from_json(cls, content: Any) -> Receipt | None:
        """The receipt in an object's metadata, bytes; None if it is none."""
        try:
            return cls.from_map(json.loads(content or b""))
        except (ValueError, TypeError, RecursionError):
            return None
