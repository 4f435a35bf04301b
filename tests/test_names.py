"""Every setting, metric, key and command that the README and `deploy/` name exists."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.backends.base import KeyValueStoreBackend
from celery.worker.control import Panel
from kombu.transport.redis import Transport

from embedq import tasks
from embedq.core.settings import Settings
from embedq.workers.monitoring import remote_commands
from tests.prometheus.exposed import EXPORTER, WORKER
from tests.running import ROOT

#: What people are told, by path. Python files in `deploy/` are held to their names by the type checker.
TOLD = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "deploy").rglob("*"))]
    if path.is_file() and path.suffix not in (".py", ".pyc")
}

#: The source that reads settings and writes keys.
SOURCE = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("core", "tasks", "workers")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".lua")
) + (ROOT / "celeryconfig.py").read_text(encoding="utf-8")

#: `python -m module …` up to the end of a line, a code span or a comment; and the same as a list in YAML or JSON.
COMMAND = re.compile(r"python3? -m ([\w.]+)([^`#\n;&|)]*)")
LISTED = re.compile(r"\[\"?python\"?, ?\"?-m\"?, ?([^\]]*)\]")

#: Names that come with the metrics, with the launcher that scales and with the server's users; nothing is expected to
#: fail once they are there.
waits_for_metrics = pytest.mark.xfail(
    importlib.util.find_spec("embedq.tasks.metrics") is None, reason="comes with the metrics", strict=True
)
waits_for_launcher = pytest.mark.xfail(
    importlib.util.find_spec("embedq.workers.launcher.fleet") is None, reason="comes with the launcher", strict=True
)
waits_for_users = pytest.mark.xfail(
    not (ROOT / "deploy" / "acl" / "users.acl").exists(), reason="comes with the server's users", strict=True
)

#: What a person makes by copying an example.
MADE = {"deploy/compose/.env"}


def named(pattern: str) -> dict[str, set[str]]:
    """Where each name that fits `pattern` stands."""
    found: dict[str, set[str]] = {}
    for path, text in TOLD.items():
        for name in re.findall(pattern, text):
            found.setdefault(name, set()).add(path)
    return found


def unknown(found: dict[str, set[str]], known: set[str]) -> dict[str, set[str]]:
    return {name: places for name, places in found.items() if name not in known}


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """(where, module, the words behind it) of each command that people are told."""
    for path, text in TOLD.items():
        for module, rest in COMMAND.findall(text):
            yield path, module, rest.split()
        for listed in LISTED.findall(text):
            module, *rest = (word.strip(' "') for word in listed.split(","))
            yield path, module, rest


def words_of(parser: argparse.ArgumentParser) -> set[str]:
    """Every option and every subcommand, of subcommands too."""
    words: set[str] = set()
    for action in parser._actions:
        words.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                words |= {name} | words_of(below)
        elif action.choices:
            words.update(map(str, action.choices))
    return words


def test_the_texts_are_read() -> None:
    assert {"README.md", "deploy/README.md", "deploy/kubernetes/worker/worker.yaml", "deploy/acl/cluster.acl"} <= set(
        TOLD
    )
    assert len(named(r"\bEMBEDQ_[A-Z_]+")) > 15
    assert len(list(commands())) > 15


@waits_for_metrics
def test_every_setting_exists() -> None:
    known = {f"EMBEDQ_{name.upper()}" for name in (*Settings.model_fields, *tasks.config.WIRE)}
    known |= set(re.findall(r"\"(EMBEDQ_[A-Z_]+)\"", SOURCE))  # read from the environment where they are used
    known.add("EMBEDQ_")
    assert unknown(named(r"\bEMBEDQ_[A-Z_]*"), known) == {}


def test_every_metric_exists() -> None:
    """Against names that `tests/test_prometheus.py` holds against the code's."""
    assert remote_commands.embedq_stats
    series = {f"{name}{end}" for name in (*WORKER, *EXPORTER) for end in ("", "_bucket", "_sum", "_count")}
    assert unknown(named(r"\bembedq_[a-z_]+"), series | set(Panel.data)) == {}


def test_every_key_exists() -> None:
    known = set(re.findall(r"\bembedq:[a-z]+", SOURCE))
    assert unknown(named(r"(?<![\w/.-])embedq:[a-z]+"), known) == {}
    prefix = KeyValueStoreBackend.task_keyprefix
    assert set(named(r"celery-task-meta-")) == {prefix}
    channel = Transport.Channel
    assert (
        unknown(
            named(r"(?<!\w)unacked\w*"), {channel.unacked_key, channel.unacked_index_key, channel.unacked_mutex_key}
        )
        == {}
    )


def test_every_module_that_is_run_exists() -> None:
    for path, module, _ in commands():
        spec = importlib.util.find_spec(module)
        assert spec, f"{path}: python -m {module}"
        if spec.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{module}.__main__"), f"{path}: python -m {module}"


@pytest.mark.parametrize(
    "module",
    [pytest.param("embedq.tasks", marks=waits_for_metrics), pytest.param("embedq.workers", marks=waits_for_launcher)],
)
def test_every_command_and_every_option_exists(module: str) -> None:
    known = words_of(importlib.import_module(f"{module}.__main__")._parser())
    checked = 0
    for path, run, words in commands():
        if run != module:
            continue
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        # The first word, where there is one, is the command; of "list|show" each is.
        subcommands = {one for word in words[:1] if re.fullmatch(r"[a-z|]+", word) for one in word.split("|")}
        assert (options | subcommands) <= known, f"{path}: python -m {module} {' '.join(words)}"
        checked += 1
    assert checked >= 3


def test_every_measurement_exists() -> None:
    from tests.bench.__main__ import COMMANDS

    assert all(words[0] in COMMANDS for _, module, words in commands() if module == "tests.bench" and words)


@waits_for_users
def test_every_file_of_ours_exists() -> None:
    # A path in a text, not one that follows another directory (/opt/embedq/deploy/…).
    found = named(r"(?<![\w./-])((?:deploy|docs|tests|core|tasks|workers)/[\w./@-]*\w)")
    missing = {name: places for name, places in found.items() if not (ROOT / name).exists() and name not in MADE}
    assert missing == {}


def test_a_name_that_does_not_exist_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "`EMBEDQ_NONSENSE`, embedq_nonsense_total, embedq:nonsense, `python -m embedq.tasks nonsense --nonsense`, docs/nonsense.md"
    monkeypatch.setitem(TOLD, "nonsense.md", wrong)
    for test in (
        test_every_setting_exists,
        test_every_metric_exists,
        test_every_key_exists,
        test_every_file_of_ours_exists,
    ):
        with pytest.raises(AssertionError):
            test()
    with pytest.raises(AssertionError):
        test_every_command_and_every_option_exists("embedq.tasks")
    assert Path(__file__).is_file()
