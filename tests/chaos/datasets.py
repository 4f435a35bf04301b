"""Datasets under every attack: workers, broker and store are killed, two starters race and are gone at once.

What a user may expect, and is counted here: every row once, in order, with its own vector, and nothing left over, on a
folder and on S3; the same of a load into PostgreSQL whose loader and server are killed.

`max_attempts` is out of reach, as in `storm`: kills at random would call innocent parts poisoned. Where parts fail
because their store is away for longer than their retries last, whoever runs the dataset resumes it; how often is told.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedq import tasks
from embedq.core.errors import EmbedqError
from embedq.tasks.datasets.run import Run
from embedq.tasks.datasets.status import done_parts
from embedq.tasks.datasets.stores import Store, locate
from tests.bench.report import Figure
from tests.chaos.fleet import Fleet
from tests.chaos.notes import read
from tests.checkpoints import expected_rows
from tests.object_store import ObjectStore
from tests.own_server import OwnServer
from tests.postgresql import PostgreSQLServer
from tests.running import ROOT, Running

_NUM_WORKERS = 4

#: Seconds in which everything must be over.
_TIMEOUT_S = 1800.0

_NUM_FILES = 7


@dataclass(frozen=True)
class Size:
    """The rows to compute, and the number of attacks of each kind on each kind of store."""

    num_rows: int = 300_000
    rows_per_part: int = 1_000
    num_kills: int = 60
    num_server_kills: int = 5
    num_store_kills: int = 5
    num_loader_kills: int = 5
    num_database_kills: int = 2


QUICK = Size(
    num_rows=12_000, rows_per_part=200, num_kills=4, num_server_kills=1, num_store_kills=1, num_loader_kills=1,
    num_database_kills=1,
)  # fmt: skip


def run(size: Size, seed: int, say: Callable[[str], None], stores: tuple[str, ...] = ("folder", "s3")) -> list[Figure]:
    """Make a dataset on each kind of store under attack, then load the last; returns what was counted."""
    figures: list[Figure] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embedq-chaos-")))
        server = stack.enter_context(OwnServer(directory, appendfsync="always"))
        tasks.app.conf.update(broker_url=server.url, result_backend=server.url)
        stack.callback(tasks.app.close)
        objects = stack.enter_context(ObjectStore(directory / "s3")) if "s3" in stores else None
        roots = {"folder": str(directory), "s3": objects.bucket("chaos") if objects else ""}
        given = {"EMBEDQ_MAX_ATTEMPTS": "1000", "EMBEDQ_MAX_BATCH_TOKENS": "8192"}
        given |= {"EMBEDQ_DATA_ROOTS": ",".join(roots[store] for store in stores)}
        for store in stores:
            with Fleet(server.url, _folder(directory / f"fleet-{store}"), _NUM_WORKERS, **given,
                       **(objects.environment if objects else {})) as fleet:  # fmt: skip
                fleet.wait_until_serving(_NUM_WORKERS)
                attacked = _Attacked(size, random.Random(seed), fleet, server, objects if store == "s3" else None)
                dataset = _make(size, roots[store], server.url, attacked, say)
                figures += _check(store, size, dataset, attacked)
        figures += _load(size, dataset, say)
    return figures


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


class _Attacked:
    """Attacks workers, broker and store, each time at a share of done parts that spreads the attacks over the run."""

    def __init__(
        self, size: Size, random_: random.Random, fleet: Fleet, server: OwnServer, objects: ObjectStore | None
    ) -> None:
        self.fleet, self._server, self._objects, self._random = fleet, server, objects, random_
        self.done = {"worker": 0, "broker": 0, "store": 0}
        self.num_resumed = 0
        attacks = ["worker"] * size.num_kills + ["broker"] * size.num_server_kills
        attacks += ["store"] * (size.num_store_kills if objects else 0)
        random_.shuffle(attacks)
        #: (share of the parts that are done, what is then attacked), the first last.
        self.plan = sorted(((random_.uniform(0.02, 0.9), what) for what in attacks), reverse=True)

    def next(self, share: float) -> str | None:
        """Make the next attack that is due; its name, or None."""
        if not self.plan or self.plan[-1][0] > share:
            return None
        if self.plan[-1][1] == "worker" and not self.fleet.look():
            return None  # all are starting
        what = self.plan.pop()[1]
        if what == "worker":
            self.fleet.send_signal(self._random.choice(sorted(self.fleet.serving)), signal.SIGKILL)
        elif what == "broker":
            self._server.kill()
            self._server.start()
        else:
            assert self._objects is not None
            self._objects.kill()
            self._objects.start()
        self.done[what] += 1
        return what


def _make(size: Size, root: str, url: str, attacked: _Attacked, say: Callable[[str], None]) -> Run:
    """Two starters, gone at once; then attacks until all is done."""
    _write_source(size, root)
    begun_s = time.monotonic()
    command = [sys.executable, "-m", "tests.chaos.start_dataset", f"{root}/in", f"{root}/out", str(size.rows_per_part)]
    starters = [Running(command, {"EMBEDQ_REDIS_URL": url, "EMBEDQ_CONFIG": ""}) for _ in range(2)]
    for starter in starters:
        starter.wait_for("started")
        starter.stop()
    dataset, store = tasks.datasets.open(f"{root}/out"), Store(locate(f"{root}/out"))
    total, next_look_s = len(dataset.manifest.parts), 0.0
    say(f"{total} parts are queued")
    while time.monotonic() - begun_s < _TIMEOUT_S:
        with _whatever_is_down():
            share = len(done_parts(dataset.manifest, store)) / total
            if what := attacked.next(share):
                say(f"{share:.0%} done; {what} killed")
                continue
            if share == 1:
                break
            if time.monotonic() > next_look_s:
                next_look_s = time.monotonic() + 5
                if dataset.status().state in ("failed", "expired"):
                    attacked.num_resumed += 1
                    say(f"resumed after {dataset.status().errors}")
                    dataset.resume()
        time.sleep(0.05)
    say(f"over after {time.monotonic() - begun_s:.0f} s")
    return dataset


@contextmanager
def _whatever_is_down() -> Iterator[None]:
    """Pass over the errors of a server that was killed a moment ago; look again."""
    try:
        yield
    except Exception as error:
        of_clients = type(error).__module__.split(".")[0] in ("redis", "kombu", "botocore", "aiohttp")
        if not of_clients and not isinstance(error, EmbedqError | OSError):
            raise


def _write_source(size: Size, root: str) -> None:
    store, per_file = Store(locate(f"{root}/in")), -(-size.num_rows // _NUM_FILES)
    for number in range(_NUM_FILES):
        rows = range(number * per_file, min((number + 1) * per_file, size.num_rows))
        table = pa.table({"id": list(rows), "body": [_text(row) for row in rows]})
        _replace(store, f"{number}.parquet", table, size.rows_per_part)


def _replace(store: Store, name: str, table: pa.Table, rows_per_part: int) -> None:
    store.replace(name, lambda file: pq.write_table(table, file, row_group_size=rows_per_part))


def _text(row: int) -> str:
    return f"r{row:07d}"


def _check(store: str, size: Size, dataset: Run, attacked: _Attacked) -> list[Figure]:
    time.sleep(2.5)  # a part that lost its race removes what it wrote
    findings = dataset.verify()
    target = Store(locate(dataset.target))
    tables = [pq.read_table(target.open(name)) for name in sorted(target.entries()) if name.endswith(".parquet")]
    ids = np.concatenate([table["id"].to_numpy() for table in tables])
    vectors = np.concatenate([np.stack(table["dense"].to_numpy(zero_copy_only=False)) for table in tables])
    num_wrong = int((vectors != expected_rows([_text(row) for row in ids])).any(axis=1).sum())
    is_in_order = bool((ids == np.arange(len(ids))).all())
    repeated, explained = _repetitions(size, dataset, attacked.fleet)
    limit: dict[str, Any] = {"is_limit": True}
    return [
        Figure(f"{store}.rows", f"{store}: rows", len(ids), "rows"),
        Figure(f"{store}.workers", f"{store}: workers killed", attacked.done["worker"], "times"),
        Figure(f"{store}.brokers", f"{store}: broker killed", attacked.done["broker"], "times"),
        Figure(f"{store}.stores", f"{store}: store killed", attacked.done["store"], "times"),
        Figure(f"{store}.resumed", f"{store}: resumed, its store having been away too long", attacked.num_resumed, "times"),
        Figure(f"{store}.lost", f"{store}: rows lost", size.num_rows - len(np.unique(ids)), "rows", 0, **limit),
        Figure(f"{store}.twice", f"{store}: rows twice", len(ids) - len(np.unique(ids)), "rows", 0, **limit),
        Figure(f"{store}.order", f"{store}: rows out of order", int(not is_in_order), "", 0, **limit),
        Figure(f"{store}.wrong", f"{store}: wrong vectors", num_wrong, "rows", 0, **limit),
        Figure(f"{store}.left", f"{store}: objects left over", len(findings.leftovers), "objects", 0, **limit),
        Figure(f"{store}.whole", f"{store}: parts missing or wrong", len(findings.missing) + len(findings.wrong), "parts", 0, **limit),
        Figure(f"{store}.again", f"{store}: rows computed again", repeated, "rows"),
        Figure(f"{store}.unexplained", f"{store}: of them more than deliveries explain", max(0, repeated - explained), "rows", 0, **limit),
    ]  # fmt: skip


def _repetitions(size: Size, dataset: Run, fleet: Fleet) -> tuple[int, int]:
    """(rows computed beyond once, rows that further deliveries of their parts account for)."""
    done = read(fleet.notes)
    num_deliveries = sum(len(deliveries) for deliveries in done.deliveries.values())
    return done.num_repeated, max(0, num_deliveries - len(dataset.manifest.parts)) * size.rows_per_part


def _load(size: Size, dataset: Run, say: Callable[[str], None]) -> list[Figure]:
    """Load while the loader and the database are killed."""
    num_killed = 0
    with PostgreSQLServer() as database:
        command = [sys.executable, "-m", "tests.chaos.start_dataset", "load", dataset.target, f"{database.url}/rows"]
        shares = [(number + 1) / (size.num_loader_kills + 2) for number in range(size.num_loader_kills)]
        kills = [(share, number < size.num_database_kills) for number, share in enumerate(shares)]
        until_s = time.monotonic() + _TIMEOUT_S
        while True:
            loader = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while loader.poll() is None:
                if kills and _num_loaded(database) >= kills[0][0] * size.num_rows:
                    _, also_database = kills.pop(0)
                    num_killed += 1
                    loader.kill()
                    if also_database:
                        database.kill()
                        database.start()
                time.sleep(0.02)
            say(f"a loader ended with {loader.returncode}; {_num_loaded(database):,} rows are loaded")
            if loader.returncode == 0 or time.monotonic() > until_s:
                break
        ((num_rows, num_ids, total),) = database.query("SELECT count(*), count(DISTINCT id), sum(id) FROM rows")
    return [
        Figure("load.kills", "load: loaders killed, some with the database", num_killed, "times"),
        Figure("load.lost", "load: rows lost", size.num_rows - num_ids, "rows", 0, is_limit=True),
        Figure("load.twice", "load: rows twice", num_rows - num_ids, "rows", 0, is_limit=True),
        Figure("load.sum", "load: ids that are not the dataset's", int(total != sum(range(size.num_rows))), "", 0, is_limit=True),
    ]  # fmt: skip


def _num_loaded(database: PostgreSQLServer) -> int:
    import psycopg

    try:
        return int(database.query("SELECT count(*) FROM rows")[0][0])
    except psycopg.Error:
        return 0
