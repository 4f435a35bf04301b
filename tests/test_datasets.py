"""Datasets through real workers: every row once and in order, whatever ends; and what is said where it cannot be."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedq import tasks
from embedq.core.errors import InvalidInput, StoreFailed, UnknownModel, WorkerError
from embedq.tasks.datasets.manifest import MANIFEST
from embedq.tasks.datasets.part_task import WINDOW_PARTS, embed_part
from embedq.tasks.datasets.run import Run
from tests.chaos.fleet import Fleet
from tests.chaos.light_worker import ALIAS, DEADLY
from tests.checkpoints import expected_rows
from tests.dataset_files import FORMATS, jsonl, parquet, read_back
from tests.light_fleets import light_fleet

TIMEOUT_S = 60.0

#: Texts longer than the light model's limit would be cut, and in the workers' notes a text is one word.
SHORT = "row{:06d}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that workers may open."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def fleet(server: str, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two workers over a model that costs nothing."""
    with light_fleet(server, tmp_path_factory.mktemp("fleet"), 2, EMBEDQ_DATA_ROOTS=str(root)) as fleet:
        yield fleet


@pytest.fixture
def folder(root: Path, request: pytest.FixtureRequest) -> Path:
    """A test's own folder below the root."""
    made = root / "".join(char if char.isalnum() else "-" for char in request.node.name)
    made.mkdir()
    return made


def short_table(num_rows: int) -> pa.Table:
    return pa.table({"id": range(num_rows), "body": [SHORT.format(row) for row in range(num_rows)]})


def start(source: Path, target: Path, **options: Any) -> Run:
    given: dict[str, Any] = {"text": "body", "keep": ["id"], "model": ALIAS, "rows_per_part": 500}
    return tasks.datasets.embed(str(source), str(target), **given | options)


def check(target: Path, texts: list[str | None]) -> None:
    """Every row once, in order, with its own vector."""
    rows = read_back(target)
    assert [row["id"] for row in rows] == list(range(len(texts)))
    right = expected_rows([text or "" for text in texts]).tolist()
    assert [row["dense"] for row in rows] == [
        None if text is None else vector for text, vector in zip(texts, right, strict=True)
    ]


def failed_of(target: Path) -> list[dict[str, Any]]:
    files = sorted((target / "_embedq" / "failed").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize("write", FORMATS, ids=lambda one: one.__name__)
def test_every_format_becomes_the_same_vectors(write: Callable[[pa.Table, Path], Path], folder: Path) -> None:
    table = short_table(1700)
    run = start(write(table, folder / "rows"), folder / "out")
    status = run.wait(TIMEOUT_S)
    assert (status.state, status.rows.completed, status.failed_rows) == ("completed", 1700, 0)
    check(folder / "out", table["body"].to_pylist())
    findings = run.verify()
    assert (findings.is_whole, findings.rows, findings.leftovers) == (True, 1700, [])


@pytest.mark.usefixtures("fleet")
def test_a_second_start_goes_on_and_any_difference_is_refused_by_name(folder: Path) -> None:
    source = parquet(short_table(1000), folder / "rows")
    first = start(source, folder / "out")
    first.wait(TIMEOUT_S)
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*.parquet")}
    second = start(source, folder / "out")
    assert second.manifest.id == first.manifest.id
    assert second.status().state == "completed"
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*.parquet")} == before
    differing: dict[str, dict[str, Any]] = {
        "options.normalize": {"normalize": True},
        "columns.keep": {"keep": []},
        "rows_per_part": {"rows_per_part": 400},
        "columns.text": {"text": "{body}!"},
    }
    for name, options in differing.items():
        with pytest.raises(InvalidInput, match=f"holds another dataset: .*{name} was"):
            start(source, folder / "out", **options)
    parquet(short_table(1001), folder / "rows")
    with pytest.raises(InvalidInput, match=r"rows\.parquet was .* bytes, mtime .*, and is now"):
        start(source, folder / "out")


@pytest.mark.usefixtures("fleet")
def test_new_files_are_added_and_nothing_else(folder: Path) -> None:
    (folder / "in").mkdir()
    table = short_table(1500)
    parquet(table.slice(0, 1000), folder / "in" / "a")
    start(folder / "in", folder / "out").wait(TIMEOUT_S)
    parquet(table.slice(1000), folder / "in" / "b")
    with pytest.raises(InvalidInput, match=r"b\.parquet is new"):
        start(folder / "in", folder / "out")
    with pytest.raises(InvalidInput, match=r"--add takes new files.*options\.normalize"):
        start(folder / "in", folder / "out", add=True, normalize=True)
    run = start(folder / "in", folder / "out", add=True)
    assert run.wait(TIMEOUT_S).rows.completed == 1500
    check(folder / "out", table["body"].to_pylist())


@pytest.mark.usefixtures("fleet")
def test_rows_that_cannot_be_computed_are_null_and_listed(folder: Path) -> None:
    texts: list[Any] = [SHORT.format(row) for row in range(1200)]
    texts[7], texts[600] = None, None
    source = parquet(pa.table({"id": range(1200), "body": texts}), folder / "rows")
    run = start(source, folder / "out", key=["id"])
    assert run.wait(TIMEOUT_S).failed_rows == 2
    check(folder / "out", texts)
    listed = failed_of(folder / "out")
    assert listed == [
        {"row": row, "key": {"id": row}, "error": "InvalidInput", "message": "the value is null"} for row in (7, 600)
    ]
    assert run.verify().is_whole


@pytest.mark.usefixtures("fleet")
def test_values_of_lines_that_are_no_texts_are_listed_and_stop_nobody(folder: Path) -> None:
    lines = [
        {"id": 0, "body": "a"},
        {"id": 1, "body": 7},
        {"id": 2},
        {"id": 3, "body": "\ud800"},
        {"id": 4, "body": "b"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = start(folder / "rows.jsonl", folder / "out")
    assert run.wait(TIMEOUT_S).failed_rows == 3
    check(folder / "out", ["a", None, None, None, "b"])
    assert [one["message"] for one in failed_of(folder / "out")] == [
        "the value is a int, not a text",
        "the value is null",
        "broken UTF-8 at byte 0 of the value",
    ]


@pytest.mark.usefixtures("fleet")
def test_failed_rows_alone_are_computed_again(folder: Path, fleet: Fleet) -> None:
    table = short_table(1000)
    run = start(parquet(table, folder / "rows"), folder / "out", key=["id"])
    run.wait(TIMEOUT_S)
    # As a run leaves it in which two rows failed for a reason that is gone.
    name = run.manifest.name(1)
    with pq.ParquetFile(folder / "out" / name) as part:
        receipt = json.loads(part.metadata.metadata[b"embedq"]) | {"failed": 2}
        rows, schema = part.read().to_pylist(), part.schema_arrow
    rows[3]["dense"] = rows[299]["dense"] = None
    broken = pa.Table.from_pylist(rows, schema)
    with pq.ParquetWriter(folder / "out" / name, broken.schema) as writer:
        writer.write_table(broken)
        writer.add_key_value_metadata({"embedq": json.dumps(receipt)})
    listed = folder / "out" / run.manifest.failed_name(1)
    listed.parent.mkdir(exist_ok=True)
    listed.write_text('{"row": 303}\n{"row": 599}\n')
    assert run.wait(TIMEOUT_S).state == "completed"
    num_computed = fleet_computed(fleet)
    assert run.retry_failed() == 1
    wait_until(lambda: not listed.exists())
    check(folder / "out", table["body"].to_pylist())
    assert fleet_computed(fleet) - num_computed == 2
    assert run.verify().is_whole


def fleet_computed(fleet: Fleet) -> int:
    from tests.chaos.notes import read

    return sum(read(fleet.notes).num_computed.values())


def wait_until(is_so: Callable[[], bool]) -> None:
    until_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < until_s
        time.sleep(0.05)


@pytest.mark.usefixtures("fleet")
def test_equal_texts_of_a_part_are_computed_once(folder: Path, fleet: Fleet) -> None:
    texts = [f"same{row % 10}{folder.name[-8:]}" for row in range(1000)]
    source = parquet(pa.table({"id": range(1000), "body": texts}), folder / "rows")
    before = fleet_computed(fleet)
    start(source, folder / "out", rows_per_part=1000).wait(TIMEOUT_S)
    check(folder / "out", list(texts))
    assert fleet_computed(fleet) - before == 10


@pytest.mark.usefixtures("fleet")
def test_a_template_joins_columns_and_colbert_and_float16_keep_their_types(folder: Path) -> None:
    table = short_table(50).append_column("url", pa.array([f"/{row}" for row in range(50)]))
    source = parquet(table, folder / "rows")
    run = start(source, folder / "out", text="{body}: {url}", outputs=["dense", "colbert"], dtype="float16")
    run.wait(TIMEOUT_S)
    table = pq.read_table(folder / "out")
    assert str(table.schema.field("dense").type) == "fixed_size_list<element: halffloat>[2]"
    texts = [f"{SHORT.format(row)}: /{row}" for row in range(50)]
    assert [len(row) for row in table["colbert"].to_pylist()] == [len(text) for text in texts]
    assert [row[0] for row in table["dense"].to_pylist()] == pytest.approx(expected_rows(texts)[:, 0], rel=1e-3)


@pytest.mark.usefixtures("fleet")
def test_pairs_are_scored(folder: Path) -> None:
    source = parquet(short_table(700), folder / "rows")
    run = tasks.datasets.rerank(
        str(source), str(folder / "out"), query="body", passage="body", keep=["id"], model=ALIAS
    )
    run.wait(TIMEOUT_S)
    rows = read_back(folder / "out")
    assert [row["id"] for row in rows] == list(range(700))
    assert all(row["score"] == pytest.approx(1.0, abs=1e-5) for row in rows)


@pytest.mark.usefixtures("fleet")
def test_a_worker_takes_two_parts_at_a_time_and_answers_jobs_meanwhile(folder: Path) -> None:
    client = tasks.app.backend.client
    run = start(parquet(short_table(60_000), folder / "rows"), folder / "out")
    wait_until(lambda: run.status().parts.running > 0)
    held = []
    for priority in (0, 9) * 10:
        if not run.status().parts.waiting:
            break
        job = tasks.embed.apply_async(([f"text{priority}"],), {"model": ALIAS}, priority=priority)
        held.append(sum(record.state == "running" for record in run.records().values()))
        assert len(job.get(timeout=TIMEOUT_S)) == 1
    assert len(held) > 2, "the run was over before anything was seen beside it"
    assert 1 <= max(held) <= 4  # of two workers
    run.cancel()
    wait_until(lambda: client.llen(f"embed_parts.{ALIAS}:9") == 0)


def test_a_killed_workers_parts_go_to_another(folder: Path, fleet: Fleet) -> None:
    table = short_table(20_000)
    run = start(parquet(table, folder / "rows"), folder / "out")
    wait_until(lambda: run.status().parts.completed > 2)
    os.kill(sorted(fleet.look())[0], signal.SIGKILL)
    run.wait(TIMEOUT_S)
    check(folder / "out", table["body"].to_pylist())
    assert run.verify().is_whole
    fleet.wait_until_serving(2)


@pytest.mark.usefixtures("fleet")
def test_two_starters_at_once_make_one_run(folder: Path) -> None:
    table = short_table(5_000)
    source, runs = parquet(table, folder / "rows"), []
    threads = [
        threading.Thread(target=lambda: runs.append(start(source, folder / "out", rows_per_part=100))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 2
    assert len({run.manifest.id for run in runs}) == 1
    runs[0].wait(TIMEOUT_S)
    check(folder / "out", table["body"].to_pylist())


@pytest.mark.usefixtures("fleet")
def test_a_run_of_more_parts_than_are_queued_at_once_queues_them_as_it_goes(folder: Path) -> None:
    table = short_table(WINDOW_PARTS + 60)
    run = start(parquet(table, folder / "rows"), folder / "out", rows_per_part=1)
    assert tasks.app.backend.client.llen(f"embed_parts.{ALIAS}:9") <= WINDOW_PARTS
    run.wait(TIMEOUT_S)
    check(folder / "out", table["body"].to_pylist())


@pytest.mark.usefixtures("fleet")
def test_a_cancelled_run_stops_keeps_what_is_done_and_can_be_resumed(folder: Path) -> None:
    table = short_table(30_000)
    run = start(parquet(table, folder / "rows"), folder / "out", rows_per_part=100)
    wait_until(lambda: run.status().parts.completed > 3)
    run.cancel()
    wait_until(lambda: run.status().state == "cancelled")
    wait_until(lambda: tasks.app.backend.client.llen(f"embed_parts.{ALIAS}:9") == 0)
    done = run.status().parts.completed
    assert 3 < done < 300
    assert tasks.datasets.open(str(folder / "out")).resume() == 300 - done
    assert run.wait(TIMEOUT_S).state == "completed"
    check(folder / "out", table["body"].to_pylist())
    assert run.verify().leftovers == []


@pytest.mark.usefixtures("fleet")
def test_a_run_of_which_the_server_lost_everything_is_expired_and_resumed(folder: Path) -> None:
    table = short_table(2_000)
    run = start(parquet(table, folder / "rows"), folder / "out", rows_per_part=100)
    run.wait(TIMEOUT_S)
    for number in (3, 11):
        (folder / "out" / run.manifest.name(number)).unlink()
    client = tasks.app.backend.client
    client.delete(*client.keys("embedq:dataset:*"))
    status = run.status()
    assert (status.state, status.parts.completed) == ("expired", 18)
    assert start(folder / "rows.parquet", folder / "out", rows_per_part=100).manifest.id == run.manifest.id
    assert run.wait(TIMEOUT_S).parts.completed == 20
    check(folder / "out", table["body"].to_pylist())


@pytest.mark.usefixtures("fleet")
def test_a_part_that_kills_its_workers_becomes_a_dead_letter_that_status_shows(folder: Path) -> None:
    texts = [SHORT.format(row) for row in range(30)]
    texts[15] = DEADLY
    source = parquet(pa.table({"id": range(30), "body": texts}), folder / "rows")
    run = start(source, folder / "out", rows_per_part=10)
    with pytest.raises(WorkerError, match="1 parts failed; the first is part 1: Poisoned: 3 workers died"):
        run.wait(TIMEOUT_S)
    assert run.status().parts.completed == 2


@pytest.mark.usefixtures("fleet")
def test_a_source_that_changes_under_way_fails_its_parts_and_nothing_half_written_is_left(folder: Path) -> None:
    source = jsonl(short_table(3000), folder / "rows")
    run = start(source, folder / "out")
    run.wait(TIMEOUT_S)
    (folder / "out" / run.manifest.name(2)).unlink()
    jsonl(short_table(2999), folder / "rows")
    run.resume()
    with pytest.raises(WorkerError, match=r"part 2: BadSource: .*rows\.jsonl has changed"):
        run.wait(TIMEOUT_S)
    assert (len(list((folder / "out").glob("*.parquet"))), run.verify().leftovers) == (5, [])
    assert run.verify().missing == [2]


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize("how", ["plain", "dots", "link"])
def test_a_path_outside_the_roots_is_refused_by_workers(how: str, folder: Path, tmp_path: Path, root: Path) -> None:
    outside = parquet(short_table(10), tmp_path / "rows")
    source: str = str(outside)
    if how == "dots":
        source = f"{folder}/../../{outside.relative_to(root.parent)}"
    if how == "link":
        (folder / "link").symlink_to(tmp_path)
        source = str(folder / "link" / "rows.parquet")
    run = tasks.datasets.embed(source, str(folder / "out"), text="body", model=ALIAS)
    with pytest.raises(WorkerError, match=r"this worker does not open .*EMBEDQ_DATA_ROOTS"):
        run.wait(TIMEOUT_S)


@pytest.mark.usefixtures("fleet")
def test_a_folder_that_becomes_a_link_out_of_the_roots_is_refused_by_workers(folder: Path, tmp_path: Path) -> None:
    (folder / "in").mkdir()
    run = start(parquet(short_table(1000), folder / "in" / "rows"), folder / "out")
    run.wait(TIMEOUT_S)
    (folder / "out" / run.manifest.name(1)).unlink()
    (folder / "in").rename(tmp_path / "in")
    (folder / "in").symlink_to(tmp_path / "in")
    run.resume()
    with pytest.raises(WorkerError, match=r"part 1: InvalidInput: this worker does not open .*EMBEDQ_DATA_ROOTS"):
        run.wait(TIMEOUT_S)


@pytest.mark.usefixtures("fleet")
def test_a_message_that_names_another_path_than_its_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    message = {
        "target": f"filecache::file://{tmp_path}", "manifest": "a" * 32, "edition": 1, "round": 1, "model": ALIAS,
        "part": 0, "file": "x", "first_row": 0, "end_row": 1, "mode": "all",
    }  # fmt: skip
    with pytest.raises(InvalidInput, match="chained URL"):
        embed_part.apply_async((), message).get(timeout=TIMEOUT_S)
    with pytest.raises(InvalidInput, match="does not open"):
        embed_part.apply_async((), message | {"target": "/etc"}).get(timeout=TIMEOUT_S)
    with pytest.raises(InvalidInput, match="part of a part must be a whole number from 0; given str"):
        embed_part.apply_async((), message | {"part": "0"}).get(timeout=TIMEOUT_S)
    with pytest.raises(InvalidInput, match="end_row of a part must be a whole number from 0; given -1"):
        embed_part.apply_async((), message | {"end_row": -1}).get(timeout=TIMEOUT_S)
    with pytest.raises(InvalidInput, match="mode of a part must be 'all' or 'failed'; given 'some'"):
        embed_part.apply_async((), message | {"mode": "some"}).get(timeout=TIMEOUT_S)


@pytest.mark.usefixtures("fleet")
def test_an_unknown_model_a_wrong_option_and_a_filled_target_are_refused_at_the_call(folder: Path) -> None:
    source = parquet(short_table(10), folder / "rows")
    with pytest.raises(UnknownModel, match="unknown model 'other'"):
        start(source, folder / "out", model="other")
    with pytest.raises(InvalidInput, match="int8 vectors of a dataset could not be compared"):
        start(source, folder / "out", dtype="int8")
    with pytest.raises(InvalidInput, match=r"column 'id' of .* holds int64, not texts"):
        start(source, folder / "out", text="id")
    with pytest.raises(InvalidInput, match="holds 1 objects and no manifest"):
        start(source, folder)
    assert not (folder / "out" / MANIFEST).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_target_is_refused_at_the_call(folder: Path) -> None:
    source = parquet(short_table(10), folder / "rows")
    (folder / "out").mkdir(mode=0o500)
    with pytest.raises(StoreFailed, match="cannot be written: Permission denied"):
        start(source, folder / "out")


@pytest.mark.usefixtures("fleet")
def test_flower_sees_rows_of_a_file_and_shapes(folder: Path) -> None:
    seen: list[tuple[str, str]] = []

    def listen() -> None:
        with tasks.app.connection_for_read() as connection:

            def on_event(event: dict[str, Any]) -> None:
                ready.set()  # a worker's heartbeat, at the latest
                if event["type"] in ("task-received", "task-succeeded"):
                    seen.append((event.get("args") or "", event.get("result") or ""))

            receiver = tasks.app.events.Receiver(connection, handlers={"*": on_event})
            for _ in receiver.itercapture(limit=None, timeout=TIMEOUT_S, wakeup=False):
                if any(result for _, result in seen):
                    return

    ready = threading.Event()
    listening = threading.Thread(target=listen, daemon=True)
    listening.start()
    assert ready.wait(TIMEOUT_S)
    run = start(parquet(short_table(100), folder / "rows"), folder / "out")
    run.wait(TIMEOUT_S)
    listening.join(TIMEOUT_S)
    assert any(args.endswith("/rows.parquet") and args.startswith("rows 0–99 of ") for args, _ in seen)
    assert any(result == "100 × 2 float32" for _, result in seen)
