"""The measurements run, on few texts: every figure is there. What they are, a shared machine cannot promise."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import backlog, real_texts, usage
from tests.bench.report import Figure
from tests.benches import figures_of
from tests.running import ROOT, Running

#: What a busy machine may need for a quick run.
TIMEOUT_S = 110

#: Figures that a worker need not give; they are told once it counts its batches.
COUNTED = ("_padding", "_fill", "_batch_sequences", "_computing", "_batch_ms", "_batches")


@pytest.mark.timing
def test_the_engine_is_measured_and_every_figure_is_told(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.bench", "engine", "--quick", "--json", str(file)]
    with Running(command) as running:
        assert running.wait(TIMEOUT_S) == 0, running.output
    told = json.loads(file.read_text())
    assert "device=cpu" in told["worker"]
    figures = {figure["key"]: figure for figure in told["figures"]}
    assert len(figures) == len(told["figures"])
    measured = {key: figure["value"] for key, figure in figures.items() if not key.endswith(COUNTED)}
    assert all(value is not None and math.isfinite(value) for value in measured.values())
    shares = {key: value for key, value in measured.items() if key.endswith(("_python", "_idle"))}
    assert len(shares) == 8
    assert all(0 <= value < 2 for value in shares.values())  # 0 where a few jobs take less than the clock's steps
    # Differences may be below 0 where other programs took the cores in one of the two measurements.
    whole = {
        key: value
        for key, value in measured.items()
        if not key.startswith(("overhead", "bulk_loss", "bulk_interference", "interactive_share")) and key not in shares
    }
    assert all(value > 0 for value in whole.values())
    assert measured["mixed_ratio"] == pytest.approx(
        measured["mixed_one_text_jobs_texts_per_s"] / measured["mixed_large_jobs_texts_per_s"]
    )
    for figure in figures.values():
        assert figure["what"].strip() in running.output


def test_a_start_is_measured_by_its_phases_and_against_another_checkout(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, "start", "--quick", "--against", str(ROOT))
    for name in ("this", "other"):
        phases = [figures[f"{name}_{phase}_s"] for phase in ("imports", "warm", "ready", "answered")]
        assert phases[0] > 0
        assert phases == sorted(phases)
        assert figures[f"{name}_imports_s"] + figures[f"{name}_loading_s"] == pytest.approx(figures[f"{name}_warm_s"])
        assert figures[f"{name}_cpu_s"] > 0.5  # torch alone
    assert figures["cpu_ratio"] == pytest.approx(figures["this_cpu_s"] / figures["other_cpu_s"])


def test_an_idle_worker_is_measured_after_its_job(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, "idle", "--quick")
    assert 100 < figures["warm_mib"] < 1.1 * figures["job_1_most_mib"] < 4_400
    assert figures["growth_mib"] == pytest.approx(figures["job_1_idle_mib"] - figures["warm_mib"])
    assert figures["job_1_cpu_s"] > 0


def test_a_command_that_does_not_exist_is_told_what_does() -> None:
    with Running([sys.executable, "-m", "tests.bench", "nothing"]) as running:
        assert running.wait(TIMEOUT_S) == 2
    assert "engine    batching across jobs" in running.output


@pytest.mark.timing
def test_memory_is_the_most_that_a_process_and_those_it_started_ever_had() -> None:
    child = "block = b'x' * 100_000_000; del block; print('freed', flush=True); input()"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"freed\n"
        peak = usage.peak_bytes(process.pid)
        process.stdin.write(b"\n")
    assert 100_000_000 < peak < 200_000_000
    assert usage.peak_bytes(process.pid) == 0  # it has ended


def test_the_texts_are_different_and_the_short_ones_short(minilm: Path) -> None:
    found = real_texts.read(200, minilm)
    assert len(set(found.mixed)) == len(set(found.short)) == 200
    assert found.mean_short_tokens <= real_texts.MAX_SHORT_TOKENS < found.mean_mixed_tokens
    assert found == real_texts.read(200, minilm)


def test_jobs_hold_all_texts_in_their_order() -> None:
    assert backlog.jobs_of(["a", "b", "c"], 2) == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("value", "is_limit", "is_met"),
    [(0.9, False, True), (0.8, False, False), (0.9, True, True), (1.0, True, False), (None, True, None)],
)
def test_a_figure_knows_whether_its_promise_is_kept(value: float | None, is_limit: bool, is_met: bool | None) -> None:
    assert Figure("key", "what", value, "", 0.9, is_limit).is_met is is_met
