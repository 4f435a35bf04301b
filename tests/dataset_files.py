"""Files of rows in every format that datasets are read from, with the same content."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from embedq.tasks.datasets.stores import Store


def table_of(num_rows: int, repeat_every: int = 0) -> pa.Table:
    """Rows of a number, a text and a URL; every so many texts are equal if `repeat_every` says so."""
    texts = [
        f'row {row % repeat_every if repeat_every else row:06d} is "quoted", or\nbroken' for row in range(num_rows)
    ]
    return pa.table(
        {"id": range(num_rows), "body": texts, "url": [f"https://x.example/{row}" for row in range(num_rows)]}
    )


def parquet(table: pa.Table, path: Path) -> Path:
    pq.write_table(table, path.with_suffix(".parquet"), row_group_size=300)
    return path.with_suffix(".parquet")


def jsonl(table: pa.Table, path: Path) -> Path:
    path.with_suffix(".jsonl").write_bytes(lines_of(table))
    return path.with_suffix(".jsonl")


def jsonl_gzip(table: pa.Table, path: Path) -> Path:
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(lines_of(table)))
    return path.with_suffix(".jsonl.gz")


def jsonl_zstd(table: pa.Table, path: Path) -> Path:
    with pa.CompressedOutputStream(str(path.with_suffix(".jsonl.zst")), "zstd") as file:
        file.write(lines_of(table))
    return path.with_suffix(".jsonl.zst")


def csv(table: pa.Table, path: Path) -> Path:
    pyarrow.csv.write_csv(table, path.with_suffix(".csv"))
    return path.with_suffix(".csv")


def arrow_file(table: pa.Table, path: Path) -> Path:
    with pa.ipc.new_file(path.with_suffix(".arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=170)
    return path.with_suffix(".arrow")


def arrow_stream(table: pa.Table, path: Path) -> Path:
    with pa.ipc.new_stream(path.with_suffix(".ipc"), table.schema) as file:
        file.write_table(table, max_chunksize=170)
    return path.with_suffix(".ipc")


def saved_by_datasets(table: pa.Table, path: Path) -> Path:
    """A folder as `datasets.Dataset.save_to_disk` leaves it."""
    path.mkdir(exist_ok=True)
    file, saved = parquet(table, path / "unsaved"), path / "saved"
    # In a process of its own: it imports half of the machine learning there is.
    code = "import sys, datasets as d; d.Dataset.from_parquet(sys.argv[1]).save_to_disk(sys.argv[2], num_shards=3)"
    run = [sys.executable, "-c", code, str(file), str(saved)]
    subprocess.run(run, cwd=path, env=os.environ | {"HF_HOME": str(path)}, capture_output=True, check=True)
    return saved


FORMATS: list[Callable[[pa.Table, Path], Path]] = [
    parquet, jsonl, jsonl_gzip, jsonl_zstd, csv, arrow_file, arrow_stream, saved_by_datasets,
]  # fmt: skip


def lines_of(table: pa.Table) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in table.to_pylist())


def create_at_once(stores: list[Store], name: str) -> list[int]:
    """Let a thread for each store create the same object at the same moment, as its number; those that did."""
    barrier, won = threading.Barrier(len(stores)), list[int]()

    def create(number: int) -> None:
        barrier.wait()
        if stores[number].create(name, lambda file: file.write(b"%d" % number)):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


def read_back(target: Path) -> list[dict[str, Any]]:
    """All rows of a target, in order."""
    return pq.read_table(target).to_pylist()
