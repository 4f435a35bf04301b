"""The rows of one part between reading and writing: which answer each has, what is kept of it, and which failed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from embedq.tasks.datasets.columns import Computed
from embedq.tasks.datasets.manifest import Manifest
from embedq.tasks.datasets.rows import BadRow, failed_line

#: Different texts of one of the engine's jobs: what it encodes in one go.
SLICE_ROWS = 256


class Gathered:
    """The rows of one part: which place each row's answer has, what is kept of it, and which failed."""

    def __init__(self, manifest: Manifest, computed: Computed, typed: Any) -> None:
        self.computed = computed
        #: Lines of the list of failed rows, in the order of the rows; complete after `fail`.
        self.failed: list[bytes] = []
        self._columns, self._typed = manifest.columns, typed
        self._place_of: dict[bytes, int] = {}
        self._places: list[int] = []
        #: By number: rows with an error, and the keys of every row.
        self._bad: dict[int, BadRow] = {}
        self._numbers: list[int] = []
        self._keys: list[Any] = []
        self._kept: list[Any] = []
        self._waiting: tuple[list[int], list[Any]] = ([], [])

    def take(self, read: Any, wanted: set[int] | None) -> Iterator[tuple[list[int], list[Any]]]:
        """Take rows that were read; yields whole slices of what is to be computed."""
        self._kept.append(read.kept)
        if read.keys.num_columns:
            self._keys.append((read.first, read.keys))
        for row, item in enumerate(read.items, read.first):
            if wanted is not None and row not in wanted:
                continue
            self._numbers.append(row)
            if isinstance(item, BadRow):
                self._bad[row] = item
                self._places.append(-1)
                continue
            digest = _digest(item)
            place = self._place_of.get(digest)
            if place is None:
                place = self._place_of[digest] = len(self._place_of)
                self._waiting[0].append(place)
                self._waiting[1].append(item)
            self._places.append(place)
            if len(self._waiting[0]) == SLICE_ROWS:
                yield from self.rest()

    def rest(self) -> Iterator[tuple[list[int], list[Any]]]:
        """Yield the items of a slice that is not full."""
        if self._waiting[0]:
            waiting, self._waiting = self._waiting, ([], [])
            yield waiting

    def fail(self, failed: dict[int, BadRow]) -> None:
        """Add the rows whose texts could not be computed, and list all that failed."""
        for index, place in enumerate(self._places):
            if place in failed:
                self._bad[self._numbers[index]] = failed[place]
                self._places[index] = -1
        for row in sorted(self._bad):
            self.failed.append(failed_line(row, self._bad[row], self._key_of(row)))

    def places(self) -> np.ndarray:
        """(num_rows,) the place of each row's answer; -1 for none."""
        return np.array(self._places, np.int64)

    def kept_table(self) -> Any:
        """The kept columns of all rows."""
        import pyarrow as pa

        keep = pa.schema([self._typed.field(name) for name in self._columns.keep])
        return pa.Table.from_batches(self._kept, keep) if self._columns.keep else pa.table({})

    def _key_of(self, row: int) -> dict[str, Any]:
        for first, keys in self._keys:
            if first <= row < first + keys.num_rows:
                found: dict[str, Any] = keys.slice(row - first, 1).to_pylist()[0]
                return found
        return {}


def _digest(item: Any) -> bytes:
    if isinstance(item, str):
        return hashlib.blake2b(item.encode(), digest_size=16).digest()
    query, passage = (side.encode() for side in item)
    return hashlib.blake2b(b"%d %s%s" % (len(query), query, passage), digest_size=16).digest()
