"""A part's object: Parquet with the kept columns, the vectors, and the receipt in its own metadata."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from embedq.core.errors import BadSource, StoreFailed
from embedq.tasks.datasets.checking import receipt_in
from embedq.tasks.datasets.columns import Computed
from embedq.tasks.datasets.gathered import Gathered
from embedq.tasks.datasets.manifest import Manifest
from embedq.tasks.datasets.receipts import FOUND, RECEIPT_KEY, Receipt
from embedq.tasks.datasets.stores import Store

if TYPE_CHECKING:
    import pyarrow

#: Rows made into columns and written in one go: bounds what a part takes beside its vectors.
_ROWS_PER_GROUP = 8192


class Hashing:
    """A file that is only written, which counts and hashes what it is given."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Pass on."""
        self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        """Position of the next byte."""
        return self.num_bytes

    def flush(self) -> None:
        """Nothing: whoever opened the file does."""

    def close(self) -> None:
        """Nothing, for the same reason."""

    @property
    def sha256(self) -> str:
        """Of all that was written."""
        return self._hash.hexdigest()


def write_rows(
    kept: pyarrow.Table, computed: Computed, places: np.ndarray, receipt: Receipt
) -> Callable[[IO[bytes]], Hashing]:
    """Returns the function that writes a part of these rows; `places` as in `Computed.columns`."""
    import pyarrow as pa

    def tables() -> Any:
        for start in range(0, max(1, len(places)), _ROWS_PER_GROUP):
            chosen = places[start : start + _ROWS_PER_GROUP]
            columns = computed.columns(chosen)
            table = kept.slice(start, len(chosen))
            for name, column in columns.items():
                table = table.append_column(name, column)
            yield table if columns and table.num_columns > len(columns) else pa.table(columns)

    return _writing(tables, list(kept.schema.names), receipt)


def write_table(table: pyarrow.Table, kept: list[str], receipt: Receipt) -> Callable[[IO[bytes]], Hashing]:
    """Returns the function that writes a part whose rows are all there."""
    return _writing(lambda: [table], kept, receipt)


def _writing(tables: Callable[[], Any], kept: list[str], receipt: Receipt) -> Callable[[IO[bytes]], Hashing]:
    import pyarrow as pa

    def write(file: IO[bytes]) -> Hashing:
        hashing, writer = Hashing(file), None
        sink = pa.PythonFile(hashing, mode="w")
        try:
            for table in tables():
                writer = writer or _writer(sink, table.schema, kept)
                writer.write_table(table, row_group_size=_ROWS_PER_GROUP)
            assert writer is not None, "a part has at least one row"
            writer.add_key_value_metadata({RECEIPT_KEY.decode(): receipt.to_json()})
            writer.close()
        except BaseException:
            if writer is not None:
                with contextlib.suppress(Exception):  # its buffers must be gone before the file is
                    writer.close()
            raise
        return hashing

    return write


def _writer(sink: Any, schema: pyarrow.Schema, kept: list[str]) -> Any:
    """Vectors neither repeat nor compress: to try costs more time than everything else here."""
    import pyarrow.parquet as pq

    leaves = _leaves(schema)
    kept_leaves = [path for path in leaves if path.split(".")[0] in kept]
    return pq.ParquetWriter(
        sink,
        schema,
        compression={path: "zstd" if path in kept_leaves else "none" for path in leaves},
        use_dictionary=kept_leaves,
        write_statistics=kept_leaves,
        write_page_checksum=True,
    )


def _leaves(schema: pyarrow.Schema) -> list[str]:
    """Paths of the columns as Parquet has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema) as writer:
        writer.write_table(schema.empty_table())
    schema = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [schema.column(number).path for number in range(len(schema.names))]


def computed_for(manifest: Manifest, num_rows: int, dimensions: int) -> Computed:
    """Room for the answers of so many rows of a model of so many dimensions."""
    options = manifest.options
    dtype = options.get("dtype") or "float32"
    width = options.get("dimensions") or dimensions
    outputs = tuple(options.get("outputs") or ("dense",))
    return Computed(num_rows, manifest.kind, outputs, dtype, -(-width // 8) if dtype == "ubinary" else width)


def commit(store: Store, manifest: Manifest, gathered: Gathered, receipt: Receipt) -> Receipt:
    """List the failed rows, then write the part's object once; returns the receipt of whoever did.

    StoreFailed if the store refuses a name that is not taken.
    """
    if gathered.failed:
        list_failed(store, manifest, receipt.part, gathered.failed)
    written: list[Hashing] = []
    write, name = (
        write_rows(gathered.kept_table(), gathered.computed, gathered.places(), receipt),
        manifest.name(receipt.part),
    )
    if store.create(name, lambda file: written.append(write(file))):
        if not gathered.failed:  # of an earlier try; another's list stays with its object
            list_failed(store, manifest, receipt.part, [])
        return replace(receipt, bytes=written[0].num_bytes, sha256=written[0].sha256)
    entry = store.entry(name)
    if entry is None:
        raise StoreFailed(f"{store.location}/{name} was refused as taken, and is not there")
    return replace(found_receipt(store, name), outcome=FOUND, bytes=entry.size)


def list_failed(store: Store, manifest: Manifest, part: int, failed: list[bytes]) -> None:
    """Write the list of a part's failed rows, or remove it if there are none any more."""
    name = manifest.failed_name(part)
    if failed:
        store.replace(name, lambda file: file.write(b"".join(failed)))
    elif store.entry(name):
        store.remove(name)


def found_receipt(store: Store, name: str) -> Receipt:
    """The receipt in an object that is there. BadSource if it has none, and so is not one of ours."""
    receipt = receipt_in(store, name)
    if receipt is None:
        raise BadSource(f"{store.location}/{name} cannot be read as a part of embedq's; remove it and resume")
    return receipt
