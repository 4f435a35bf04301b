"""Datasets into databases: every row once, whatever breaks off the load; and readable by whoever reads Parquet."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedq import tasks
from embedq.core.errors import BadSource, InvalidInput, StoreFailed
from embedq.tasks.datasets import into_postgresql
from embedq.tasks.datasets.loading import load
from embedq.tasks.datasets.run import Run
from tests.chaos.fleet import Fleet
from tests.chaos.light_worker import ALIAS
from tests.checkpoints import expected_rows
from tests.light_fleets import light_fleet
from tests.postgresql import PostgreSQLServer
from tests.running import ROOT

TIMEOUT_S = 60.0

NUM_ROWS = 2_000

TEXTS = [f"row{row:06d}" for row in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def fleet(server: str, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with light_fleet(server, tmp_path_factory.mktemp("fleet"), 1, EMBEDQ_DATA_ROOTS=str(root)) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def source(root: Path) -> Path:
    texts = [None if row == 5 else text for row, text in enumerate(TEXTS)]
    table = pa.table({"id": range(NUM_ROWS), "body": texts, "word": [f"w{row % 7}" for row in range(NUM_ROWS)]})
    pq.write_table(table, root / "rows.parquet", row_group_size=250)
    return root / "rows.parquet"


@pytest.fixture(scope="module")
def run(fleet: Fleet, source: Path, root: Path) -> Run:
    """A finished dataset of eight parts in float16."""
    made = tasks.datasets.embed(str(source), str(root / "half"), text="body", keep=["id", "word"], model=ALIAS,
                                dtype="float16", rows_per_part=250)  # fmt: skip
    made.wait(TIMEOUT_S)
    return made


@pytest.fixture(autouse=True)
def _checkout_of_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest names the checkout's root by its folder, and LanceDB looks for a module called `datasets`."""
    monkeypatch.delitem(sys.modules, ROOT.name, raising=False)


@pytest.fixture(scope="module")
def database() -> Iterator[PostgreSQLServer]:
    with PostgreSQLServer() as server:
        yield server


def right_vector(row: int) -> list[float]:
    return [float(value) for value in expected_rows([TEXTS[row]])[0].astype(np.float16)]


def test_a_dataset_is_loaded_into_postgresql_once(run: Run, database: PostgreSQLServer) -> None:
    done = load(run, f"{database.url}/docs", "id")
    assert (done.parts, done.rows, done.skipped) == (8, NUM_ROWS, 0)
    assert database.query("SELECT count(*), count(DISTINCT id), count(dense) FROM docs") == [(2000, 2000, 1999)]
    assert vector_of(database, "docs", 1234) == right_vector(1234)
    assert database.query("SELECT word FROM docs WHERE id = 1234") == [("w2",)]
    assert database.query("SELECT indexdef FROM pg_indexes WHERE indexname = 'docs_dense_hnsw'")[0][0].endswith(
        "USING hnsw (dense halfvec_cosine_ops)"
    )
    assert database.query("SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attname = 'dense'")[0] == (
        "halfvec(2)",
    )
    again = load(run, f"{database.url}/docs", "id")
    assert (again.parts, again.skipped) == (0, 8)


def test_a_load_that_is_broken_off_goes_on_without_losing_or_repeating_a_row(
    run: Run, database: PostgreSQLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, calls = into_postgresql._rows, []

    def break_off(*given: object) -> Iterator[tuple]:
        calls.append(1)
        for number, row in enumerate(rows(*given)):  # type: ignore[arg-type]
            if len(calls) == 4 and number == 100:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(into_postgresql, "_rows", break_off)
    with pytest.raises(KeyboardInterrupt):
        load(run, f"{database.url}/broken", "id")
    assert database.query("SELECT count(*) FROM broken") == [(750,)]
    done = load(run, f"{database.url}/broken", "id")
    assert (done.parts, done.skipped) == (5, 3)
    assert database.query("SELECT count(*), sum(id) FROM broken") == [(2000, sum(range(2000)))]


def test_a_server_that_dies_under_the_load_is_a_clear_error_and_the_next_load_completes_it(
    run: Run, database: PostgreSQLServer
) -> None:
    def die(num_rows: int, total: int, speed: float) -> None:
        if num_rows == 500:
            database.kill()

    with pytest.raises(StoreFailed, match="part 2 cannot be loaded"):
        load(run, f"{database.url}/dying", "id", tell=die)
    database.start()
    load(run, f"{database.url}/dying", "id")
    assert database.query("SELECT count(*), count(DISTINCT id) FROM dying") == [(2000, 2000)]


def test_rows_of_equal_key_are_one_and_the_last_load_wins(root: Path, fleet: Fleet, database: PostgreSQLServer) -> None:
    pq.write_table(pa.table({"id": [1, 2, 2, 3], "body": ["a", "b", "c", "d"]}), root / "twice.parquet")
    run = tasks.datasets.embed(str(root / "twice.parquet"), str(root / "twice"), text="body", keep=["id"], model=ALIAS)
    run.wait(TIMEOUT_S)
    load(run, f"{database.url}/twice", "id")
    assert database.query("SELECT id FROM twice ORDER BY id") == [(1,), (2,), (3,)]
    assert vector_of(database, "twice", 2) == pytest.approx(expected_rows(["b"])[0])  # the first of a part
    pq.write_table(pa.table({"id": [2], "body": ["z"]}), root / "later.parquet")
    run = tasks.datasets.embed(str(root / "later.parquet"), str(root / "later"), text="body", keep=["id"], model=ALIAS)
    run.wait(TIMEOUT_S)
    load(run, f"{database.url}/twice", "id")
    assert vector_of(database, "twice", 2) == pytest.approx(expected_rows(["z"])[0])


def vector_of(database: PostgreSQLServer, table: str, row: int) -> list[float]:
    ((vector,),) = database.query(f"SELECT dense::text FROM {table} WHERE id = {row}")
    return [float(one) for one in vector.strip("[]").split(",")]


def test_columns_are_loaded_by_name_whatever_the_tables_order(
    root: Path, fleet: Fleet, database: PostgreSQLServer
) -> None:
    pq.write_table(pa.table({"id": [1, 2], "body": ["a", "b"], "word": ["c", "d"]}), root / "ordered.parquet")
    for name, columns in (("one", ("body", "word")), ("other", ("word", "body"))):
        run = tasks.datasets.embed(str(root / "ordered.parquet"), str(root / f"ordered-{name}"), text="body",
                                   keep=["id", *columns], model=ALIAS)  # fmt: skip
        run.wait(TIMEOUT_S)
        load(run, f"{database.url}/ordered", "id", columns)
        assert database.query("SELECT id, body, word FROM ordered ORDER BY id") == [(1, "a", "c"), (2, "b", "d")]


def test_a_growing_dataset_is_followed_to_its_end(
    root: Path, source: Path, fleet: Fleet, database: PostgreSQLServer
) -> None:
    run = tasks.datasets.embed(
        str(source), str(root / "growing"), text="body", keep=["id"], model=ALIAS, rows_per_part=50
    )
    done = load(run, f"{database.url}/growing", "id", is_following=True)
    assert done.rows == NUM_ROWS
    assert database.query("SELECT count(*) FROM growing") == [(2000,)]


def test_a_key_that_is_no_column_or_null_and_an_unknown_store_are_refused(run: Run, root: Path, fleet: Fleet,
                                                                         database: PostgreSQLServer) -> None:  # fmt: skip
    with pytest.raises(InvalidInput, match="no column 'uid'; it has id, word, dense"):
        load(run, f"{database.url}/none", "uid")
    with pytest.raises(InvalidInput, match="postgresql://, lancedb:// or qdrant:// URL; given 'mysql'"):
        load(run, "mysql://host/base/table", "id")
    pq.write_table(pa.table({"id": [1, None], "body": ["a", "b"]}), root / "null.parquet")
    nulls = tasks.datasets.embed(str(root / "null.parquet"), str(root / "null"), text="body", keep=["id"], model=ALIAS)
    nulls.wait(TIMEOUT_S)
    with pytest.raises(BadSource, match="'id' is null in 1 rows"):
        load(nulls, f"{database.url}/null", "id")


@pytest.mark.filterwarnings("ignore")
def test_a_dataset_is_loaded_into_lancedb_once(run: Run, tmp_path: Path) -> None:
    import lancedb

    assert load(run, f"lancedb://{tmp_path}/base/docs", "id").rows == NUM_ROWS
    assert load(run, f"lancedb://{tmp_path}/base/docs", "id").skipped == 8
    table = lancedb.connect(tmp_path / "base").open_table("docs")
    rows = table.to_arrow().sort_by("id").to_pylist()
    assert [row["id"] for row in rows] == list(range(NUM_ROWS))
    assert rows[1234]["dense"] == right_vector(1234)
    assert rows[5]["dense"] is None


@pytest.mark.filterwarnings("ignore")
def test_two_loads_into_one_lancedb_table_at_once_are_refused(run: Run, tmp_path: Path) -> None:
    inside, over = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        inside.set()
        over.wait(TIMEOUT_S)

    first = threading.Thread(target=lambda: load(run, f"lancedb://{tmp_path}/base/docs", "id", tell=hold))
    first.start()
    try:
        assert inside.wait(TIMEOUT_S)
        with pytest.raises(StoreFailed, match="another process loads into docs"):
            load(run, f"lancedb://{tmp_path}/base/docs", "id")
    finally:
        over.set()
        first.join(TIMEOUT_S)


@pytest.mark.filterwarnings("ignore")
def test_a_dataset_is_loaded_into_qdrants_local_mode_once(run: Run, tmp_path: Path) -> None:
    """Its local mode has the server's semantics and no HTTP: no Qdrant server can be installed here."""
    from qdrant_client import QdrantClient

    done = load(run, f"qdrant://{tmp_path}/base/docs", "id")
    assert (done.parts, done.rows) == (8, NUM_ROWS)
    assert load(run, f"qdrant://{tmp_path}/base/docs", "id").skipped == 8
    client = QdrantClient(path=str(tmp_path / "base"))
    assert client.count("docs").count == NUM_ROWS - 1  # a point needs a vector
    client.close()


def test_duckdb_polars_and_pandas_read_a_target(run: Run, root: Path) -> None:
    import duckdb
    import polars

    files = f"{root / 'half'}/*.parquet"
    found = duckdb.sql(f"SELECT id, dense FROM '{files}' ORDER BY id")
    assert found
    rows = found.fetchall()
    assert [row[0] for row in rows] == list(range(NUM_ROWS))
    assert list(rows[1234][1]) == right_vector(1234)
    assert polars.read_parquet(files)["id"].to_list() == list(range(NUM_ROWS))
    assert len(pq.read_table(root / "half").to_pandas()) == NUM_ROWS
