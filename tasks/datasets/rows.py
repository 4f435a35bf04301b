"""The rows of a part as they are read: texts or pairs for the engine, kept columns, and rows that cannot be computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedq.core.errors import BadSource
from embedq.tasks.application import config
from embedq.tasks.datasets.manifest import Columns
from embedq.tasks.datasets.sources import NOT_TEXT, Input, read_rows

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row without a vector, and why."""

    error: str
    message: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows in a line."""

    #: Number of the first in its file.
    first: int
    #: Each a text, a (query, passage) pair, or why it is none.
    items: list[str | tuple[str, str] | BadRow]
    kept: pyarrow.RecordBatch
    keys: pyarrow.RecordBatch


def rows_of(one: Input, within: int, columns: Columns, typed: pyarrow.Schema) -> Iterator[Rows]:
    """The rows of a file's part, in order. Errors as `read_rows` has them."""
    for first, batch in read_rows(one, within, columns.to_read, typed):
        _check_types(one.path, first, batch, typed)
        values = [_texts(batch.column(name)) for name in columns.of_text]
        items = [_item(columns, row) for row in zip(*values, strict=True)]
        yield Rows(first, items, batch.select(list(columns.keep)), batch.select(list(columns.key)))


def failed_line(row: int, bad: BadRow, keys: dict[str, Any]) -> bytes:
    """A line of the list of failed rows."""
    told = {"row": row, "key": keys, "error": bad.error, "message": bad.message}
    return json.dumps(told, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"


def _check_types(path: str, first: int, batch: Any, typed: Any) -> None:
    for field in typed:
        found = batch.schema.field(field.name).type
        if found != field.type:
            raise BadSource(
                f"{path:.300}, rows from {first:,}: column {field.name!r:.60} holds {found}, and {field.type} was planned"
            )


def _texts(column: Any) -> list[str | BadRow]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not pa.types.is_binary(column.type):
        try:
            return [_checked(value) for value in column.to_pylist()]
        except UnicodeDecodeError:  # one row of thousands: look at each
            column = column.cast(pa.large_binary())
    return [_checked(_decoded(value)) for value in column.to_pylist()]


def _decoded(value: bytes | None) -> Any:
    if value is None:
        return None
    if value.startswith(NOT_TEXT):
        return BadRow("InvalidInput", f"the value is a {value[len(NOT_TEXT) :].decode()}, not a text")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return BadRow("InvalidInput", f"broken UTF-8 at byte {error.start:,} of the value")


def _checked(value: Any) -> str | BadRow:
    if isinstance(value, BadRow):
        return value
    if value is None:
        return BadRow("InvalidInput", "the value is null")
    if not isinstance(value, str):
        return BadRow("InvalidInput", f"the value is a {type(value).__name__}, not a text")
    max_bytes = config.wire["max_bytes_per_job"]
    if len(value) > max_bytes // 4 and (size := len(value.encode())) > max_bytes:
        return BadRow("JobTooLarge", f"the text has {size:,} bytes; at most {max_bytes:,} may be embedded")
    return value


def _item(columns: Columns, values: tuple[Any, ...]) -> Any:
    if bad := next((value for value in values if isinstance(value, BadRow)), None):
        if len(values) == 1:
            return bad
        name = columns.of_text[values.index(bad)]
        return BadRow(bad.error, f"column {name!r:.60}: {bad.message}")
    if columns.text is None:
        return values
    if "{" in columns.text:
        return columns.text.format(**dict(zip(columns.of_text, values, strict=True)))
    return values[0]
