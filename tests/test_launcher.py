"""`python -m embedq.workers` as a whole: bursts, replaced, stalled and drained workers. Real processes, real signals."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from embedq import tasks
from embedq.workers.__main__ import main
from embedq.workers.exit_codes import EXIT_BROKEN
from embedq.workers.launcher.remote_control import ask_all
from tests import bulk
from tests.conftest import GOLDEN
from tests.pools import TIMEOUT_S, TINY, answered, capacities, environment, in_flight, workers_of
from tests.running import Running, is_alive, start_workers
from tests.test_transport import wait_until

HOST = socket.gethostname()


@pytest.fixture
def tiny(server: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables for workers with a model that loads fast."""
    with environment(server, "tiny", TINY, tmp_path) as made:
        yield made


def field(line: str, name: str) -> str:
    """A field of a log line."""
    return line.partition(f" {name}=")[2].split()[0]


def send(texts: list[str], model: str = "tiny") -> Any:
    return tasks.embed.apply_async((texts,), {"model": model})


@pytest.mark.timing
def test_a_burst_brings_a_second_worker_and_its_end_sends_it_away(server: str, minilm: Path, tmp_path: Path) -> None:
    bounds = ["--cpu-workers", "2", "--min", "1", "--max", "2"]
    scaling = [*bounds, "--backlog-s", "1", "--up-delay-s", "0.5", "--down-delay-s", "2"]
    with environment(server, "burst", minilm, tmp_path) as own, start_workers(own, *scaling) as running:
        load_s = float(field(running.wait_for("action=worker_up")[0], "after_s"))
        assert list(workers_of(running)) == ["cpu0"]
        texts = bulk.texts(20, seed=30)
        started_s = time.monotonic()
        assert answered([send(texts, "burst")], 20) == 1
        job_s = time.monotonic() - started_s
        # Half as much again as is done before a second worker can be there.
        jobs = [send(bulk.texts(20, seed=31 + n), "burst") for n in range(int(1.5 * (load_s + 3) / job_s) + 1)]
        up = running.wait_for("action=scaled")[0]
        assert (field(up, "from"), field(up, "to")) == ("1", "2")
        assert "s of loading" in up
        assert float(field(up, "tokens_s_per_worker").removeprefix("burst:")) > 0
        running.wait_for("action=worker_up", count=2)
        assert answered(jobs, 20) == len(jobs)
        down = running.wait_for("from=2 to=1")[0]
        assert "action=scaled" in down
        running.wait_for("action=worker_ended")
        assert list(workers_of(running)) == ["cpu0"]
        assert "action=worker_crashed" not in running.output
        assert answered([send(["after"], "burst")], 1) == 1
        wait_until(lambda: not in_flight(server, "burst"))


def test_a_stopped_worker_is_replaced_and_its_jobs_are_done(tiny: dict[str, str], server: str) -> None:
    with start_workers(tiny, "--cpu-workers", "1") as running:
        stopped = workers_of(running)["cpu0"]
        texts = bulk.texts(50, seed=40)
        jobs = [send(texts[n:] + texts[:n]) for n in range(30)]
        jobs[0].get(timeout=TIMEOUT_S)
        os.kill(stopped, signal.SIGSTOP)
        jobs += [send([f"sent to a stopped worker {n}"] * 50) for n in range(10)]
        stalled = running.wait_for("action=worker_stalled")[0]
        assert "no heartbeat for" in stalled
        assert f"worker=tiny.cpu0@{HOST}" in stalled
        running.wait_for("action=worker_up", count=2)
        assert answered(jobs, 50) == 40
        assert not is_alive(stopped)
        assert workers_of(running)["cpu0"] != stopped
        wait_until(lambda: not in_flight(server, "tiny"))


@pytest.mark.timing
def test_a_killed_workers_jobs_run_elsewhere_before_their_leases_end(server: str, minilm: Path, tmp_path: Path) -> None:
    with (
        environment(server, "killed", minilm, tmp_path) as own,
        start_workers(own | {"EMBEDQ_LEASE_S": "60"}, "--cpu-workers", "2") as running,
        redis.Redis.from_url(server) as client,
    ):
        running.wait_for("action=worker_up", count=2)
        pids = set(workers_of(running).values())
        job = send(bulk.texts(100, seed=50), "killed")

        def holders() -> set[int]:
            """Process ids of the workers that hold the job."""
            lines = [client.hget("embedq:jobs", tag) or b"" for tag in in_flight(server, "killed")]
            return {pid for pid in pids for one in lines if f"/{pid}\t".encode() in one.splitlines()[-1]}

        wait_until(holders)
        (holder,) = holders()
        os.kill(holder, signal.SIGKILL)
        killed_s = time.monotonic()
        wait_until(lambda: holders() == pids - {holder})
        assert time.monotonic() - killed_s < 2
        assert field(running.wait_for("action=jobs_returned")[0], "num_jobs") == "1"
        assert answered([job], 100) == 1


class Stream:
    """Sends a job now and then, from entering to leaving; a thread."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(TIMEOUT_S)

    def _run(self) -> None:
        while not self._is_over.wait(0.05):
            self.jobs.append(send([f"text {len(self.jobs)}"]))


def config(path: Path, model: Path) -> None:
    path.write_text(f'[models.tiny]\npath = "{model}"\nprecision = "float32"\n', encoding="utf-8")


def test_replacing_brings_a_new_model_and_capacity_is_never_zero(tiny: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "embedq.toml"
    config(file, TINY)
    del tiny["EMBEDQ_MODELS"]
    with start_workers(tiny | {"EMBEDQ_CONFIG": str(file)}, "--cpu-workers", "1") as running:
        before = send(["a text"]).get(timeout=TIMEOUT_S).dense
        config(file, GOLDEN / "flagmodel_mean" / "model")
        with Stream() as stream:
            running.process.send_signal(signal.SIGHUP)
            running.wait_for("action=replaced_all")
        assert answered(stream.jobs, 1) == len(stream.jobs) > 0
        assert min(capacities(running)) == 1
        assert list(workers_of(running)) == ["cpu0-2"]
        after = send(["a text"]).get(timeout=TIMEOUT_S).dense
        assert abs(after - before).max() > 0.01


def test_a_successor_that_cannot_start_changes_nothing_and_a_worker_that_never_can_ends_the_launcher(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "embedq.toml"
    config(file, TINY)
    del tiny["EMBEDQ_MODELS"]
    with start_workers(tiny | {"EMBEDQ_CONFIG": str(file)}, "--cpu-workers", "1") as running:
        first = workers_of(running)
        file.write_text("not a setting", encoding="utf-8")
        running.process.send_signal(signal.SIGHUP)
        assert "cannot be read as TOML" in running.wait_for("action=replace_failed")[0]

        config(file, tmp_path)  # no model there
        running.process.send_signal(signal.SIGHUP)
        assert "the workers stay as they are" in running.wait_for("action=replace_failed", count=2)[1]
        assert "action=worker_crashed" not in running.output  # nobody starts it again
        assert workers_of(running) == first
        assert answered([send(["still served"])], 1) == 1

        os.kill(first["cpu0"], signal.SIGKILL)
        assert running.wait() == 1
        assert running.output.count("action=cannot_start") == 1 + 3
        assert "action=launch_failed" in running.output


def test_sighup_takes_every_setting_that_it_checks_and_names_what_needs_a_new_start(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "embedq.toml"
    config(file, TINY)
    models = file.read_text()
    del tiny["EMBEDQ_MODELS"]
    with start_workers(tiny | {"EMBEDQ_CONFIG": str(file)}, "--cpu-workers", "1") as running:
        first = workers_of(running)
        assert f"launcher.tiny@{HOST}" in ask_all()

        file.write_text(f"{models}\n[wire]\nmax_attempts = 7\nresult_expires_s = 60\n", encoding="utf-8")
        running.process.send_signal(signal.SIGHUP)
        refused = running.wait_for("action=replace_failed")[0]
        assert "EMBEDQ_RESULT_EXPIRES_S, EMBEDQ_MAX_ATTEMPTS changed" in refused
        file.write_text("", encoding="utf-8")
        running.process.send_signal(signal.SIGHUP)
        assert "no model is configured" in running.wait_for("action=replace_failed", count=2)[1]
        assert "action=replacing" not in running.output

        # So short that no successor can load in it: the limit that counts is the new one, and the worker there stays.
        file.write_text(
            f"load_timeout_s = 0.1\ndrain_timeout_s = 7\n{models}".replace("tiny]", "other]"), encoding="utf-8"
        )
        running.process.send_signal(signal.SIGHUP)
        assert field(running.wait_for("action=reloaded")[0], "changed") == "models,load_timeout_s,drain_timeout_s"
        running.wait_for("not loaded in 0 s")
        assert "the workers stay as they are" in running.wait_for("action=replace_failed", count=3)[2]
        assert workers_of(running) == first
        wait_until(
            lambda: f"launcher.tiny@{HOST}" not in ask_all()
        )  # the thread that answers by it ends within a second
        answers = ask_all()
        assert [row["model"] for row in answers[f"launcher.other@{HOST}"]["workers"]] == ["tiny"]
        assert answered([send(["still served"])], 1) == 1


def test_a_launcher_at_zero_starts_a_worker_for_a_job_of_a_model_that_sighup_brought(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    """Without workers nobody reports queues: those that count are of the settings that were read last."""
    file = tmp_path / "embedq.toml"
    config(file, TINY)
    del tiny["EMBEDQ_MODELS"]
    scaling = ["--min", "0", "--max", "1", "--backlog-s", "0.001", "--up-delay-s", "0"]
    command = [sys.executable, "-m", "embedq.workers", "--cpu-workers", "1", *scaling]
    with Running(command, tiny | {"EMBEDQ_CONFIG": str(file)}) as running:
        running.wait_for("action=launching")
        file.write_text(file.read_text().replace("tiny]", "brought]"), encoding="utf-8")
        running.process.send_signal(signal.SIGHUP)
        running.wait_for("action=reloaded")
        # By name: no worker has announced it yet, and a producer of ours would refuse it.
        job = tasks.app.send_task("tasks.embed", args=[["a text"]], kwargs={"model": "brought"})
        assert len(job.get(timeout=TIMEOUT_S)) == 1
        assert (field(running.wait_for("action=scaled")[0], "from"), running.stop()) == ("0", 0)
    tasks.embed.registry.forget("brought")


def test_a_model_that_hangs_while_it_loads_ends_the_launcher_with_a_code_that_a_service_manager_restarts(
    tiny: dict[str, str],
) -> None:
    command = [sys.executable, "-m", "embedq.workers", "--cpu-workers", "1"]
    with Running(command, tiny | {"EMBEDQ_LOAD_TIMEOUT_S": "0.1"}) as running:
        assert running.wait() == EXIT_BROKEN
        assert running.output.count("not loaded in 0 s") == 3
        assert "action=launch_failed" in running.output


def test_where_memory_holds_one_worker_each_drains_before_its_successor_starts(tiny: dict[str, str]) -> None:
    with start_workers(tiny, "--cpu-workers", "2", "--drain-first") as running:
        first = workers_of(running)
        with Stream() as stream:
            running.process.send_signal(signal.SIGHUP)
            running.wait_for("action=replaced_all")
        assert answered(stream.jobs, 1) == len(stream.jobs) > 0
        assert set(workers_of(running)) == {"cpu0", "cpu1"}
        assert not set(workers_of(running).values()) & set(first.values())
        assert min(capacities(running)[1:]) == 1
        assert max(capacities(running)) == 2


def test_other_shells_see_and_scale_and_drain(tiny: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    tiny["EMBEDQ_DRAIN_TIMEOUT_S"] = "3"
    with start_workers(tiny, "--cpu-workers", "1", "--per-device", "2") as running:
        assert set(workers_of(running)) == {"cpu0", "cpu0-2"}
        assert main(["status"]) == 0
        shown = capsys.readouterr().out
        assert f"tiny.cpu0@{HOST}" in shown
        assert f"tiny.cpu0-2@{HOST}" in shown
        assert f"launcher.tiny@{HOST}: 0 jobs in the queues" in shown

        assert main(["drain", f"tiny.cpu0@{HOST}"]) == 0
        assert field(running.wait_for("action=worker_ended")[0], "code") == "0"
        assert list(workers_of(running)) == ["cpu0-2"]

        launcher = ("--launcher", f"launcher.tiny@{HOST}")
        assert main(["scale", "2", *launcher]) == 0
        assert "1 worker becomes 2" in capsys.readouterr().out
        running.wait_for("action=worker_up", count=3)

        os.kill(workers_of(running)["cpu0"], signal.SIGSTOP)
        assert main(["scale", "1", *launcher]) == 0
        running.wait_for("action=worker_drain_timeout")
        running.wait_for("action=worker_ended", count=2)
        assert list(workers_of(running)) == ["cpu0-2"]
        assert answered([send(["still served"])], 1) == 1
        (own,) = tasks.app.control.broadcast(
            "embedq_status", destination=[f"tiny.cpu0-2@{HOST}"], reply=True, limit=1, timeout=TIMEOUT_S
        )
        assert own[f"tiny.cpu0-2@{HOST}"]["workers"][0]["state"] == "ready"

        os.kill(workers_of(running)["cpu0-2"], signal.SIGSTOP)
        assert running.stop() == 0, "a worker that cannot drain outlives the bound"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["drain", "nobody@nowhere"], "nobody named 'nobody@nowhere' answers"),
        (["scale", "many"], "scale needs a number of workers, or auto; given 'many'"),
        (["--model", "x=/", "--cpu-workers", "1", "--max", "2"], "up to 2 workers were asked for and 1 fit"),
        (["--model", "x=/", "--cpu-workers", "1", "--min", "2"], "no fewer; given 2 and 1"),
        (["--model", "x=/", "--cpu-workers", "1", "--per-device", "0"], "--per-device must be at least 1, given 0"),
    ],
)
def test_a_wrong_command_is_refused_with_one_line(
    server: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDQ_MODELS", "")  # set by main, restored afterwards
    monkeypatch.setenv("REDIS_URL", server)
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_no_launcher_starts_workers_beside_those_of_another_that_lives_or_was_killed(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    tiny["EMBEDQ_DRAIN_TIMEOUT_S"] = "2"
    command = [sys.executable, "-m", "embedq.workers", "--cpu-workers", "1"]
    first = start_workers(tiny, "--cpu-workers", "1")
    worker = workers_of(first)["cpu0"]
    with Running(command, tiny) as second:
        assert second.wait() == 1
    assert f"device cpu0 belongs to the launcher with process id {first.process.pid}" in second.output

    os.kill(worker, signal.SIGSTOP)  # so that it cannot drain as it should
    first.process.kill()
    first.process.wait()
    assert is_alive(worker)
    with start_workers(tiny, "--cpu-workers", "1") as third:
        assert f"pids=[{worker}]" in third.wait_for("action=device_wait")[0]
        assert f"pid={worker}" in third.wait_for("action=orphan_killed")[0]
        assert not is_alive(worker)
        assert answered([send(["taken over"])], 1) == 1
    first.wait()
