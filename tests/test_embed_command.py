"""`embedq embed` and `embedq rerank`: rows are lines, jobs are small enough, progress is readable, mistakes are one line."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq import tasks
from embedq.core.errors import InvalidInput
from embedq.tasks import commands
from embedq.tasks.commands import jobs_of, shown_progress
from tests.running import ROOT

PROPERTY = settings(max_examples=100)

#: Five lines with every character at which Python's own `splitlines` cuts.
LINES = ["a\u2028b", "c\x0cd", "e\u0085f\x0bg", "h\x1c\x1d\x1ei\u2029j\rk", ""]


@PROPERTY
@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]))), st.booleans())
def test_lines_are_what_is_between_line_feeds(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], ends: bool
) -> None:
    lines = [line.removesuffix("\r").removeprefix("\ufeff") for line in lines]
    if not ends and lines and not lines[-1]:
        lines[-1] = "not empty"
    path = tmp_path_factory.mktemp("lines") / "texts.txt"
    path.write_bytes(("\n".join(lines) + ("\n" if ends and lines else "")).encode())
    assert commands._lines(path) == [line.removesuffix("\r") for line in lines]


def test_carriage_returns_and_a_byte_order_mark_of_windows_belong_to_no_line(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert commands._lines(tmp_path / "texts.txt") == ["one", "two"]


def test_another_encoding_is_named_with_its_place_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(InvalidInput, match="is not UTF-8: the byte at 3 cannot be read; convert it"):
        commands._lines(tmp_path / "texts.txt")


@PROPERTY
@given(st.lists(st.text(max_size=30)), st.integers(1, 5), st.integers(1, 40))
def test_jobs_hold_all_texts_in_order_within_both_limits(texts: list[str], max_texts: int, max_bytes: int) -> None:
    texts = [text.encode(errors="replace").decode() for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "_TEXTS_PER_JOB", max_texts)
        patch.setitem(tasks.config.wire, "max_bytes_per_job", max_bytes)
        jobs = list(jobs_of(texts))
    assert [text for job in jobs for text in job] == texts
    for job in jobs:
        assert 1 <= len(job) <= max_texts
        assert len(job) == 1 or sum(len(text.encode()) for text in job) <= max_bytes


def test_long_texts_make_jobs_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(job) for job in jobs_of(["x" * 400_000] * 5)] == [2, 2, 1]
    monkeypatch.setitem(tasks.config.wire, "max_texts_per_job", 3)
    assert [len(job) for job in jobs_of(["x"] * 7)] == [3, 3, 1]


def test_a_pipe_gets_a_line_now_and_then_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with shown_progress(1000, "texts") as advance:
        for _ in range(999):
            advance(1)
    assert capsys.readouterr().err == "999 of 1,000 texts\n"
    monkeypatch.setattr(commands, "_LINE_EVERY_S", 0.0)
    with shown_progress(30, "texts") as advance:
        for _ in range(3):
            advance(10)
    assert capsys.readouterr().err.splitlines() == ["10 of 30 texts", "20 of 30 texts", "30 of 30 texts"]


def test_a_terminal_gets_a_bar() -> None:
    code = "from embedq.tasks.commands import shown_progress\nwith shown_progress(2, 'texts') as advance: advance(2)"
    reading, terminal = pty.openpty()
    try:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
        subprocess.run([sys.executable, "-c", code], stderr=terminal, env=environment, timeout=60, check=True)
        shown = re.sub(r"\x1b\[[\d;?]*\w", "", os.read(reading, 65_536).decode())
    finally:
        os.close(reading)
        os.close(terminal)
    assert "\u2501" in shown
    assert "2/2 texts" in shown


def test_a_file_of_odd_lines_has_a_row_for_each(worker: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes(("\n".join(LINES) + "\n").encode())
    command = [sys.executable, "-m", "embedq", "embed", "texts.txt", "vectors.npy", "--model", "minilm"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EMBEDQ_REDIS_URL": worker["EMBEDQ_REDIS_URL"]}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "5 of 5 texts\n")
    vectors = np.load(tmp_path / "vectors.npy")
    assert vectors.shape == (5, 384)
    expected = np.asarray(tasks.embed.delay(LINES, model="minilm").get(timeout=60))
    np.testing.assert_allclose(vectors, expected, atol=1e-5)

    ranked = subprocess.run(
        [*command[:3], "rerank", "a question", "texts.txt", "--model", "minilm"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert len(ranked.stdout.split("\n")) == len(ranked.stdout.splitlines()) + 1 == 6


def test_a_missing_folder_is_noticed_before_a_job_is_sent(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a text\n")
    command = [sys.executable, "-m", "embedq", "embed", "texts.txt", "no/vectors.npy"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EMBEDQ_REDIS_URL": "redis://127.0.0.1:1/0"}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (
        1,
        "embedq: no/vectors.npy cannot be written: there is no folder no\n",
    )
