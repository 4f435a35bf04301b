"""Checks that a target holds what its manifest promises: every part whole, and nothing else."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from embedq.core.errors import StoreFailed
from embedq.tasks.datasets.manifest import FAILED, Manifest
from embedq.tasks.datasets.receipts import RECEIPT_KEY, Receipt
from embedq.tasks.datasets.stores import META, Store

_NUM_THREADS = 4


@dataclass(frozen=True, slots=True)
class Findings:
    """The result of reading every part."""

    parts: int = 0
    rows: int = 0
    failed_rows: int = 0
    tokens: int = 0
    bytes: int = 0
    #: Numbers of parts that are not there.
    missing: list[int] = field(default_factory=list)
    #: Part -> what is wrong with its object.
    wrong: dict[int, str] = field(default_factory=dict)
    #: Objects that are nobody's, and uploads that nobody ended.
    leftovers: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Returns True if every part is there and right."""
        return not self.missing and not self.wrong


def verify(manifest: Manifest, store: Store) -> Findings:
    """Read all pages of all parts, with their checksums, and compare rows, columns and receipts with the manifest."""
    entries = store.entries()
    there = {number: entry for entry in entries.values() if (number := manifest.number_of(entry.name)) is not None}
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        looks = dict(zip(there, threads.map(lambda number: _look(manifest, store, number), there), strict=True))
    wrong = {number: what for number, (_, what) in looks.items() if what}
    receipts = [receipt for receipt, _ in looks.values() if receipt]
    strangers = [name for name in entries if manifest.number_of(name) is None and not name.startswith(META)]
    return Findings(
        parts=len(there),
        rows=sum(one.rows for one in receipts),
        failed_rows=sum(one.failed for one in receipts),
        tokens=sum(one.tokens for one in receipts),
        bytes=sum(entry.size for entry in there.values()),
        missing=[part.number for part in manifest.parts if part.number not in there],
        wrong=wrong,
        leftovers=strangers + _left(manifest, store),
    )


def receipt_in(store: Store, name: str) -> Receipt | None:
    """The receipt in a part's object; None if the object cannot be read, or has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with store.open(name) as opened, contextlib.closing(pq.ParquetFile(opened, pre_buffer=False)) as file:
            return _receipt_of(file)
    except (pa.ArrowException, OSError, StoreFailed):
        return None


def _receipt_of(file: Any) -> Receipt | None:
    return Receipt.from_json((file.metadata.metadata or {}).get(RECEIPT_KEY))


def _left(manifest: Manifest, store: Store) -> list[str]:
    known = {manifest.failed_name(part.number) for part in manifest.parts}
    listed = [name for name in store.entries(FAILED) if name not in known]
    return listed + store.leftovers(0.0) + [f"upload {key}" for key, _ in store.broken_uploads()]


def _look(manifest: Manifest, store: Store, number: int) -> tuple[Receipt | None, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = manifest.parts[number]
    try:
        with store.open(manifest.name(number)) as opened:
            file: Any = pq.ParquetFile(opened, pre_buffer=False, page_checksum_verification=True)
            with contextlib.closing(file):
                receipt = _receipt_of(file)
                rows = sum(batch.num_rows for batch in file.iter_batches(4096))
    except (pa.ArrowException, OSError, StoreFailed) as error:
        return None, f"cannot be read: {str(error).splitlines()[0]:.200}"
    if receipt is None:
        return None, "holds no receipt of embedq's"
    if (receipt.manifest, receipt.part) != (manifest.id, number):
        return receipt, f"is part {receipt.part:,} of dataset {receipt.manifest[:8]}"
    if not rows == receipt.rows == part.num_rows:
        return receipt, f"has {rows:,} rows; its receipt says {receipt.rows:,}, the manifest {part.num_rows:,}"
    if receipt.failed and store.entry(manifest.failed_name(number)) is None:
        return receipt, f"has {receipt.failed:,} failed rows and no list of them"
    return receipt, ""
