"""Into LanceDB, on a folder or an object store: a merge by key per part.

A merge and its note are two commits: after a crash between them the part is merged again, which changes nothing. One
writer at a time: two that merge the same new key would both insert it (lance #2463).
"""

from __future__ import annotations

import contextlib
import fcntl
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lancedb

from embedq.core.errors import InvalidInput, StoreFailed
from embedq.tasks.datasets.store_urls import last_of_path

if TYPE_CHECKING:
    import pyarrow

_NOTES = "embedq_loads"

#: Rows below which an index of vectors finds nothing faster.
_MIN_INDEXED = 5_000


class LanceDB:
    """One table: `lancedb:///folder/table`, or `lancedb+s3://bucket/folder/table`."""

    def __init__(self, url: str) -> None:
        base, self._name = last_of_path(url)
        scheme, _, rest = base.partition("://")
        store = scheme.partition("+")[2]
        self._folder = None if store else Path(rest)
        self._database = lancedb.connect(f"{store}://{rest}" if store else rest)
        self._lock: Any = None
        self._table: Any = None
        self._key = ""

    def __enter__(self) -> LanceDB:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / f".{self._name}.loading").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise StoreFailed(
                    f"another process loads into {self._name}; two writers would write rows twice"
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.close()

    def prepare(self, schema: pyarrow.Schema, key: str) -> None:
        """Make the table if it is not there."""
        import pyarrow as pa

        self._key = key
        self._table = self._opened(self._name, schema.remove_metadata())
        if missing := [name for name in schema.names if name not in self._table.schema.names]:
            raise InvalidInput(f"table {self._name} has no column {missing[0]!r:.60}")
        notes = pa.schema([("note", pa.string()), ("target", pa.string()), ("dataset", pa.string()),
                           ("part", pa.int64()), ("version", pa.string())])  # fmt: skip
        self._notes = self._opened(_NOTES, notes)

    def _opened(self, name: str, schema: pyarrow.Schema) -> Any:
        """The table of that name; made if there is none.

        Opened first: `create_table(exist_ok=True)` compares schemas to the letter, and a table that it has made itself
        is another one then, because lance names the values of lists anew.
        """
        try:
            return self._database.open_table(name)
        except (ValueError, FileNotFoundError):  # there is none; which of them depends on the release
            return self._database.create_table(name, schema=schema, exist_ok=True)

    def versions(self, dataset: str) -> dict[int, str]:
        """By part of a dataset, the version of the object that was loaded."""
        rows = self._notes.to_arrow().to_pylist()
        ours = (row for row in rows if (row["target"], row["dataset"]) == (self._name, dataset))
        return {row["part"]: row["version"] for row in ours}

    def load(self, dataset: str, part: int, version: str, table: pyarrow.Table) -> None:
        """Merge, then note."""
        import pyarrow as pa

        _merge(self._table, self._key, _without_repeats(table, self._key))
        note = {"note": f"{self._name} {dataset} {part}", "target": self._name, "dataset": dataset, "part": part,
                "version": version}  # fmt: skip
        _merge(self._notes, "note", pa.Table.from_pylist([note], self._notes.schema))

    def finish(self) -> None:
        """Index the vectors of a table large enough for it."""
        if "dense" in self._table.schema.names and self._table.count_rows() >= _MIN_INDEXED:
            with contextlib.suppress(RuntimeError, ValueError):  # types that it has no index for
                self._table.create_index(metric="cosine", vector_column_name="dense")


def _merge(into: Any, key: str, table: Any) -> None:
    into.merge_insert(key).when_matched_update_all().when_not_matched_insert_all().execute(table)


def _without_repeats(table: Any, key: str) -> Any:
    """The first row of each key: of two in one merge, both would be inserted."""
    import pyarrow as pa

    first: dict[Any, int] = {}
    for row, value in enumerate(table[key].to_pylist()):
        first.setdefault(value, row)
    return table if len(first) == table.num_rows else table.take(pa.array(list(first.values())))
