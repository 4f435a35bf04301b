"""`embedq dataset …` and `embedq embed`, as a user types them, over a real worker."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest

from embedq import tasks
from embedq.__main__ import main
from embedq.tasks.datasets.showing import Progress, duration
from tests.chaos.fleet import Fleet
from tests.chaos.light_worker import ALIAS
from tests.checkpoints import expected_rows
from tests.dataset_files import jsonl, parquet, read_back, table_of
from tests.light_fleets import light_fleet

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module", autouse=True)
def fleet(server: str, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with light_fleet(server, tmp_path_factory.mktemp("fleet"), 1, EMBEDQ_DATA_ROOTS=str(root)) as fleet:
        yield fleet


class Typed(NamedTuple):
    """The exit code of a command, and the text that it printed."""

    exit_code: int
    output: str


def typed(*arguments: object, command: str = "dataset") -> Typed:
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        code = main([command, *map(str, arguments)])
    return Typed(code, printed.getvalue())


def test_a_dataset_from_dry_run_to_verified(root: Path) -> None:
    source, target = parquet(table_of(900), root / "rows"), root / "out"
    asked = ("embed", source, target, "--text", "url", "--keep", "id,url", "--model", ALIAS, "--rows-per-part", 300)
    dry = typed(*asked, "--dry-run")
    assert (dry.exit_code, dry.output.splitlines()[0]) == (0, "900 rows in 3 parts, about 7,200 bytes of vectors")
    assert not target.exists()
    started = typed(*asked, "--wait")
    assert started.exit_code == 0, started.output
    assert "completed" in started.output
    assert "3 of 3 done" in typed("status", target).output
    assert json.loads(typed("status", target, "--json").output)["rows"]["completed"] == 900
    whole = typed("verify", target)
    assert (whole.exit_code, whole.output.split(" parts")[0]) == (0, "3")
    next(target.glob("part-000001-*")).unlink()
    broken = typed("verify", target)
    assert (broken.exit_code, "part 1 is missing" in broken.output) == (1, True)
    assert typed("cancel", target).output.startswith("cancelled")
    assert typed("status", target).output.startswith("cancelled")
    assert typed("resume", target, "--wait").output.startswith("1 parts are queued")
    assert typed("retry-failed", target).output == "0 parts are queued\n"
    assert typed("verify", target).exit_code == 0


def test_pairs_are_reranked(root: Path) -> None:
    source = jsonl(table_of(20), root / "pairs")
    done = typed("rerank", source, root / "scored", "--query", "url", "--passage", "url", "--model", ALIAS, "--wait")
    assert done.exit_code == 0, done.output
    assert pq.read_table(root / "scored").column_names == ["score"]


def test_a_mistake_is_one_line_and_code_1(root: Path) -> None:
    source = parquet(table_of(5), root / "few")
    wrong = typed("embed", source, root / "none", "--text", "absent", "--model", ALIAS)
    assert (wrong.exit_code, wrong.output) == (1, f"embedq: {source} has no column 'absent'; it has id, body, url\n")
    assert typed("status", root / "none").output == f"embedq: {root / 'none'} holds no dataset\n"


def test_files_that_workers_cannot_reach_travel_as_texts_and_resume(root: Path, tmp_path: Path) -> None:
    texts = [f"line {row}" for row in range(700)]
    (tmp_path / "lines.txt").write_text("\n".join(texts))
    asked = [
        str(tmp_path / "lines.txt"),
        str(tmp_path / "out"),
        "--keep",
        "text",
        "--model",
        ALIAS,
        "--rows-per-part",
        "200",
    ]
    first = typed(*asked, command="embed")
    assert (first.exit_code, first.output.splitlines()[-1]) == (0, f"700 rows in 4 parts of {tmp_path / 'out'}")
    rows = read_back(tmp_path / "out")
    assert [row["text"] for row in rows] == texts
    assert [row["dense"] for row in rows] == expected_rows(texts).tolist()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    removed = sorted(times)[2]
    removed.unlink()
    assert typed(*asked, command="embed").exit_code == 0
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    assert [path for path in after if after[path] != times[path]] == [removed]
    assert tasks.datasets.open(str(tmp_path / "out")).verify().is_whole


def test_texts_that_are_too_large_for_one_job_together_are_sent_as_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"line {row}" for row in range(300)]
    (tmp_path / "lines.txt").write_text("\n".join(texts))
    monkeypatch.setitem(tasks.config.wire, "max_bytes_per_job", 500)
    done = typed(tmp_path / "lines.txt", tmp_path / "out", "--model", ALIAS, command="embed")
    assert done.exit_code == 0, done.output
    assert [row["dense"] for row in read_back(tmp_path / "out")] == expected_rows(texts).tolist()


def test_progress_is_a_line_a_minute_where_no_terminal_is() -> None:
    written = io.StringIO()
    with Progress(written, every_s=3600) as progress:
        for row in range(0, 1000, 100):
            progress.loaded(row, 1000, 12345.6)
    assert written.getvalue() == "0 of 1,000 rows, 12,346 rows/s\n"


def test_progress_is_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    written = Terminal()
    with Progress(written) as progress:
        progress.loaded(500, 1000, 10.0)
    assert "500/1000" in written.getvalue()


def test_durations_read_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (5, 65, 7_260)] == ["5 s", "1 min 05 s", "2 h 01 min"]
