"""Datasets on an S3 server: parts are committed once by a conditional create, and nothing is left over."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedq import tasks
from embedq.core.errors import StoreFailed, WorkerError
from embedq.tasks.datasets.stores import Store, locate
from tests.chaos.fleet import Fleet
from tests.chaos.light_worker import ALIAS
from tests.checkpoints import expected_rows
from tests.dataset_files import create_at_once
from tests.light_fleets import light_fleet
from tests.object_store import ObjectStore

TIMEOUT_S = 90.0


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with ObjectStore(tmp_path_factory.mktemp("s3")) as store:
        yield store


@pytest.fixture(scope="module")
def bucket(objects: ObjectStore) -> str:
    return objects.bucket("corpus")


@pytest.fixture(scope="module")
def fleet(server: str, objects: ObjectStore, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    given = objects.environment | {"EMBEDQ_DATA_ROOTS": f"{bucket}/docs,{bucket}/vectors"}
    with light_fleet(server, tmp_path_factory.mktemp("fleet"), 2, **given) as fleet:
        yield fleet


def write(url: str, num_rows: int) -> list[str]:
    """Put rows into a bucket as one Parquet file; their texts."""
    texts = [f"row{row:06d}" for row in range(num_rows)]
    table = pa.table({"id": range(num_rows), "body": texts})
    folder, _, name = url.rpartition("/")
    Store(locate(folder)).replace(name, lambda file: pq.write_table(table, file, row_group_size=500))
    return texts


def check(url: str, texts: list[str]) -> None:
    """Every row once, in order, with its own vector."""
    store = Store(locate(url))
    tables = [pq.read_table(store.open(name)) for name in sorted(store.entries()) if name.endswith(".parquet")]
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["id"] for row in rows] == list(range(len(texts)))
    assert [row["dense"] for row in rows] == expected_rows(texts).tolist()


def test_a_run_from_bucket_to_bucket_survives_a_killed_worker(bucket: str, fleet: Fleet) -> None:
    texts = write(f"{bucket}/docs/rows.parquet", 10_000)
    run = tasks.datasets.embed(f"{bucket}/docs/", f"{bucket}/vectors/one/", text="body", keep=["id"], model=ALIAS,
                               rows_per_part=500)  # fmt: skip
    until_s = time.monotonic() + TIMEOUT_S
    while run.status().parts.completed < 3:
        assert time.monotonic() < until_s
        time.sleep(0.1)
    os.kill(sorted(fleet.look())[0], signal.SIGKILL)
    assert run.wait(TIMEOUT_S).state == "completed"
    check(f"{bucket}/vectors/one", texts)
    findings = run.verify()
    assert (findings.is_whole, findings.leftovers) == (True, [])
    assert tasks.datasets.open(f"{bucket}/vectors/one").manifest.inputs[0].version.startswith("etag ")
    fleet.wait_until_serving(2)


@pytest.mark.usefixtures("fleet")
def test_a_bucket_outside_the_roots_is_refused(bucket: str) -> None:
    write(f"{bucket}/docs/few.parquet", 10)
    run = tasks.datasets.embed(f"{bucket}/docs/few.parquet", f"{bucket}/other/", text="body", model=ALIAS)
    with pytest.raises(WorkerError, match=r"does not open s3://corpus/other: EMBEDQ_DATA_ROOTS"):
        run.wait(TIMEOUT_S)


def test_of_many_that_create_an_object_one_does(bucket: str) -> None:
    stores = [Store(locate(f"{bucket}/race")) for _ in range(8)]
    won = create_at_once(stores, "one")
    assert len(won) == 1
    assert stores[0].read("one") == b"%d" % won[0]


def test_a_broken_upload_is_found_and_aborted(bucket: str) -> None:
    store = Store(locate(f"{bucket}/broken"))
    store._files.call_s3("create_multipart_upload", Bucket="corpus", Key="broken/part-000000-x.parquet")
    assert [name for name, _ in store.broken_uploads()] == ["broken/part-000000-x.parquet"]
    assert store.abort_uploads() == 1
    assert store.broken_uploads() == []


def test_a_store_that_ignores_the_condition_is_found_out(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(locate(f"{bucket}/ignoring"))
    put = store._files.pipe_file
    monkeypatch.setattr(store._files, "pipe_file", lambda path, data, mode, **how: put(path, data, **how))
    with pytest.raises(StoreFailed, match="ignores the condition that a name must be free"):
        store.check()


def test_a_bucket_without_rights_is_a_clear_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    store = Store(locate(f"{bucket}/docs"))
    reader = s3fs.S3FileSystem(key="reader", secret="not-a-secret", use_listings_cache=False, skip_instance_cache=True)
    monkeypatch.setattr(store, "_files", reader)
    with pytest.raises(StoreFailed, match=r"s3://corpus/docs/new cannot be written: .*(Access|Forbidden|denied)"):
        store.create("new", lambda file: file.write(b"x"))
