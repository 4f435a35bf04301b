"""From a finished or growing target into a database: part by part, in order, each once.

What was loaded is noted in the database itself, with the object's version: a load that is broken off goes on where it
ended, and a part that was rewritten since is loaded again. Rows are one by their key, so that nothing is there twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from embedq.core.errors import BadSource, InvalidInput
from embedq.tasks.datasets.status import FINAL
from embedq.tasks.datasets.stores import Entry, Store, locate

if TYPE_CHECKING:
    import pyarrow

    from embedq.tasks.datasets.run import Run

#: Seconds between two looks for new parts.
_LOOK_S = 2.0

Tell = Callable[[int, int, float], None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The parts and rows that a load has written."""

    parts: int
    rows: int
    #: Parts that were loaded before.
    skipped: int
    rows_per_s: float


class Sink(Protocol):
    """A table of a database that takes parts. A context manager."""

    def prepare(self, schema: pyarrow.Schema, key: str) -> None:
        """Make the table if it is not there. InvalidInput for a column that it cannot hold."""

    def versions(self, dataset: str) -> dict[int, str]:
        """By part of a dataset, the version of the object that was loaded."""

    def load(self, dataset: str, part: int, version: str, table: pyarrow.Table) -> None:
        """Put a part's rows in, over those of equal key, and note it."""

    def finish(self) -> None:
        """Build the index of the vectors."""

    def __enter__(self) -> Sink: ...

    def __exit__(self, *_: object) -> None: ...


def load(
    run: Run,
    url: str,
    key: str,
    columns: tuple[str, ...] = (),
    is_following: bool = False,
    has_index: bool = True,
    tell: Tell | None = None,
) -> Loaded:
    """Load a dataset's parts into the table that `url` names; returns what was done.

    `key` is a kept column whose values name the rows. With `is_following` new parts are loaded until the run ends.
    """
    store, dataset = Store(locate(run.target)), run.manifest.id
    begun_s, rows, parts, skipped = time.monotonic(), 0, 0, 0
    versions: dict[int, str] | None = None
    with sink_of(url) as sink:
        for number, entry in _as_they_come(run, store, is_following):
            if versions is None:
                sink.prepare(_schema(store, entry.name, key, columns), key)
                versions = sink.versions(dataset)
            if versions.get(number) == entry.version:
                skipped += 1
                continue
            table = _read(store, entry.name, columns, key)
            sink.load(dataset, number, entry.version, table)
            rows, parts = rows + table.num_rows, parts + 1
            if tell:
                tell(rows, run.manifest.num_rows, rows / (time.monotonic() - begun_s))
        if versions is not None and has_index:
            sink.finish()
    return Loaded(parts, rows, skipped, rows / max(time.monotonic() - begun_s, 1e-6))


def sink_of(url: str) -> Sink:
    """The sink that a URL names. InvalidInput for one of no known kind, or whose extra is not installed."""
    scheme = url.partition("://")[0]
    try:
        if scheme in ("postgresql", "postgres"):
            from embedq.tasks.datasets.into_postgresql import PostgreSQL

            return PostgreSQL(url)
        if scheme.partition("+")[0] == "lancedb":
            from embedq.tasks.datasets.into_lancedb import LanceDB

            return LanceDB(url)
        if scheme in ("qdrant", "qdrants"):
            from embedq.tasks.datasets.into_qdrant import Qdrant

            return Qdrant(url)
    except ModuleNotFoundError as error:
        extra = {"psycopg": "postgres", "lancedb": "lancedb", "qdrant_client": "qdrant"}.get(
            str(error.name), error.name
        )
        raise InvalidInput(f"loading into {scheme} needs the extra embedq[{extra}]: {error}") from None
    raise InvalidInput(f"a store is named by a postgresql://, lancedb:// or qdrant:// URL; given {scheme!r:.40}")


def _as_they_come(run: Run, store: Store, is_following: bool) -> Iterator[tuple[int, Entry]]:
    """(number, object) of every part, each once; of those that are there, in order."""
    seen: set[int] = set()
    while True:
        is_over = not is_following or run.status().state in FINAL  # asked first: what ends meanwhile is found then
        numbers = {run.manifest.number_of(name): entry for name, entry in store.entries().items()}
        for number in sorted(one for one in numbers if one is not None and one not in seen):
            seen.add(number)
            yield number, numbers[number]
        if is_over:
            return
        time.sleep(_LOOK_S)


def _schema(store: Store, name: str, key: str, columns: tuple[str, ...]) -> pyarrow.Schema:
    import pyarrow.parquet as pq

    with store.open(name) as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
        schema = file.schema_arrow
    wanted = [*dict.fromkeys((key, *(columns or schema.names)))]
    if missing := next((one for one in wanted if one not in schema.names), None):
        raise InvalidInput(f"the dataset has no column {missing!r:.60}; it has {', '.join(schema.names)[:300]}")
    import pyarrow as pa

    return pa.schema([schema.field(one) for one in wanted])


def _read(store: Store, name: str, columns: tuple[str, ...], key: str) -> pyarrow.Table:
    import pyarrow.parquet as pq

    with store.open(name) as opened:
        table: Any = pq.read_table(opened, columns=[*dict.fromkeys((key, *columns))] if columns else None)
    if columns == ():
        table = table.select([key, *(one for one in table.column_names if one != key)])
    if table[key].null_count:
        raise BadSource(f"{name}: column {key!r:.60} is null in {table[key].null_count:,} rows, which then have no key")
    return table
