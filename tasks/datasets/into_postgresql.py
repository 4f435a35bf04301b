"""Into PostgreSQL with pgvector: COPY in binary into a temporary table, then one INSERT … ON CONFLICT per part.

Rows, and the note that they are loaded, are one transaction: a part is there whole with its note, or not at all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg
from psycopg import sql

from embedq.core.errors import InvalidInput, StoreFailed
from embedq.tasks.datasets.store_urls import last_of_path

if TYPE_CHECKING:
    import pyarrow

#: Dimensions that pgvector's HNSW index takes, by type.
_MAX_INDEXED = {"vector": 2_000, "halfvec": 4_000, "bit": 64_000}

#: How nearness is measured by an index.
_OPERATORS = {"vector": "vector_cosine_ops", "halfvec": "halfvec_cosine_ops", "bit": "bit_hamming_ops"}

#: PostgreSQL's types of Arrow's plain ones.
_PLAIN = {
    "int8": "smallint", "int16": "smallint", "int32": "integer", "int64": "bigint", "uint8": "integer",
    "uint16": "integer", "uint32": "bigint", "string": "text", "large_string": "text", "string_view": "text",
    "bool": "boolean", "float": "real", "double": "double precision", "halffloat": "real", "date32[day]": "date",
    "list<element: int32>": "integer[]", "list<element: float>": "real[]", "binary": "bytea",
}  # fmt: skip


class PostgreSQL:
    """One table of one database."""

    def __init__(self, url: str) -> None:
        server, table = last_of_path(url)
        self._table, self._key = sql.Identifier(*table.split(".")), ""
        self._name = table
        self._types: dict[str, str] = {}
        with _failing("the database cannot be reached"):
            self._connection = psycopg.connect(server, autocommit=True)

    def __enter__(self) -> PostgreSQL:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def prepare(self, schema: pyarrow.Schema, key: str) -> None:
        """Make the table, if it is not there, with the key as its primary key."""
        self._key, self._types = key, {field.name: _type_of(field) for field in schema}
        columns = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind)) for name, kind in self._types.items()
        )
        self._run("CREATE EXTENSION IF NOT EXISTS vector")
        self._run(
            sql.SQL("CREATE TABLE IF NOT EXISTS {} ({}, PRIMARY KEY ({}))").format(
                self._table, columns, sql.Identifier(key)
            )
        )
        self._run(
            "CREATE TABLE IF NOT EXISTS embedq_loads (target text, dataset text, part bigint, version text, "
            "PRIMARY KEY (target, dataset, part))"
        )

    def versions(self, dataset: str) -> dict[int, str]:
        """By part of a dataset, the version of the object that was loaded."""
        found = self._run(
            "SELECT part, version FROM embedq_loads WHERE target = %s AND dataset = %s", (self._name, dataset)
        )
        return {int(part): str(version) for part, version in found}

    def load(self, dataset: str, part: int, version: str, table: pyarrow.Table) -> None:
        """Rows and note in one transaction."""
        names = list(self._types)
        columns = [sql.Identifier(name) for name in names]
        listed = sql.SQL(", ").join(columns)  # by name: a table made by somebody else may have another order
        with (
            _failing(f"part {part:,} cannot be loaded"),
            self._connection.transaction(),
            self._connection.cursor() as cursor,
        ):
            cursor.execute(sql.SQL("CREATE TEMPORARY TABLE arriving (LIKE {}) ON COMMIT DROP").format(self._table))
            with cursor.copy(sql.SQL("COPY arriving ({}) FROM STDIN (FORMAT BINARY)").format(listed)) as copy:
                copy.set_types([_copied_as(self._types[name]) for name in names])
                for row in _rows(table, names, self._types):
                    copy.write_row(row)
            # One statement cannot touch a row twice, so of equal keys in a part the first is taken.
            cursor.execute(
                sql.SQL(
                    "INSERT INTO {t} ({c}) SELECT DISTINCT ON ({k}) {c} FROM arriving ORDER BY {k}, ctid "
                    "ON CONFLICT ({k}) {do}"
                ).format(
                    t=self._table,
                    c=listed,
                    k=sql.Identifier(self._key),
                    do=_on_conflict(names, columns, self._key),
                )
            )
            cursor.execute(
                "INSERT INTO embedq_loads VALUES (%s, %s, %s, %s) ON CONFLICT (target, dataset, part) "
                "DO UPDATE SET version = excluded.version",
                (self._name, dataset, part, version),
            )

    def finish(self) -> None:
        """Index each vector column, after the load because that is faster."""
        for name, kind in self._types.items():
            base, _, size = kind.rstrip(")").partition("(")
            if base in _OPERATORS and int(size) <= _MAX_INDEXED[base]:
                index = sql.Identifier(f"{self._name.rpartition('.')[2]}_{name}_hnsw"[:63])
                self._run(
                    sql.SQL("CREATE INDEX IF NOT EXISTS {} ON {} USING hnsw ({} {})").format(
                        index, self._table, sql.Identifier(name), sql.SQL(_OPERATORS[base])
                    )
                )

    def _run(self, statement: Any, values: tuple[Any, ...] = ()) -> list[Any]:
        with _failing("the database refuses"), self._connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turn the database's errors into StoreFailed, without the values it may quote in further lines."""
    try:
        yield
    except psycopg.Error as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise StoreFailed(f"{what}: {first:.300}") from None


def _type_of(field: Any) -> str:
    import pyarrow as pa

    kind = field.type
    if pa.types.is_fixed_size_list(kind):
        base = {"float": "vector", "halffloat": "halfvec", "uint8": "bit"}.get(str(kind.value_type))
        if base:
            return f"{base}({kind.list_size * (8 if base == 'bit' else 1)})"
    if pa.types.is_timestamp(kind):
        return "timestamptz" if kind.tz else "timestamp"
    found = _PLAIN.get(str(kind).replace("item:", "element:"))
    if found is None:
        raise InvalidInput(
            f"column {field.name!r:.60} holds {kind}, which has no form here; choose others with --columns"
        )
    return found


def _copied_as(kind: str) -> str:
    """The type whose binary form is written: a vector's is its own, written as plain bytes."""
    return (
        "bytea"
        if kind.partition("(")[0] in _OPERATORS
        else {"double precision": "float8", "real": "float4"}.get(kind, kind)
    )


def _on_conflict(names: list[str], columns: list[Any], key: str) -> Any:
    if names == [key]:
        return sql.SQL("DO NOTHING")
    others = [one for name, one in zip(names, columns, strict=True) if name != key]
    return sql.SQL("DO UPDATE SET {}").format(
        sql.SQL(", ").join(sql.SQL("{0} = excluded.{0}").format(one) for one in others)
    )


def _rows(table: Any, names: list[str], types: dict[str, str]) -> Iterator[tuple[Any, ...]]:
    """Row after row, as the columns' binary forms."""
    for batch in table.select(names).to_batches(4096):
        yield from zip(*(_values(batch.column(name), types[name]) for name in names), strict=True)


def _values(column: Any, kind: str) -> list[Any]:
    base = kind.partition("(")[0]
    if base not in _OPERATORS:
        values: list[Any] = column.to_pylist()
        return values
    width = column.type.list_size
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    flat = column.values.to_numpy(zero_copy_only=False)[column.offset * width : (column.offset + len(column)) * width]
    head, as_type = _form(base, width)
    rows = np.ascontiguousarray(flat.reshape(len(column), width), as_type)
    return [head + row.tobytes() if is_valid else None for row, is_valid in zip(rows, valid, strict=True)]


def _form(base: str, width: int) -> tuple[bytes, str]:
    """(what stands before a value's elements, their type), as pgvector and PostgreSQL send them."""
    if base == "bit":
        return struct.pack(">i", width * 8), "u1"
    return struct.pack(">HH", width, 0), ">f4" if base == "vector" else ">f2"
