"""Every setting, metric, key, file and command that the README, CONTRIBUTING, `docs/` and `deploy/` name exists."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator

import click
import pytest
from celery.backends.base import KeyValueStoreBackend
from celery.worker.control import Panel
from kombu.transport.redis import Transport

from docs.generate import ENVIRONMENT_ONLY
from embedq import tasks
from embedq.core.settings import Settings
from embedq.tasks.__main__ import producer
from embedq.testing import fixtures
from embedq.workers import commands as of_workers
from embedq.workers.__main__ import COMMANDS as OF_WORKERS
from embedq.workers.monitoring import remote_commands
from tests.doc_blocks import PAGES
from tests.layout import production_source
from tests.prometheus.exposed import EXPORTER, WORKER
from tests.running import ROOT
from tests.told_commands import misfit, told

#: What people are told, by path: the pages, and the files of `deploy/`, of which the type checker reads those in Python. The
#: history of measurements has the names of its time.
TOLD = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in dict.fromkeys([*PAGES, *sorted((ROOT / "deploy").rglob("*"))])
    if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != "measurements-history.md"
}

SOURCE = production_source()

#: The commands of `python -m embedq.workers`, by their names there.
FACES: dict[str, click.Command] = {
    name: getattr(of_workers, place.partition(":")[2]) for name, place in OF_WORKERS.items()
}

#: `python -m module …` up to the end of a line, a code span or a comment; and the same as a list in YAML or JSON.
COMMAND = re.compile(r"python3? -m ([\w.]+)([^`#\n;&|)]*)")
LISTED = re.compile(r"\[\"?python\"?, ?\"?-m\"?, ?([^\]]*)\]")

#: What a person makes by copying an example.
MADE = {"deploy/compose/.env"}


def named(pattern: str) -> dict[str, set[str]]:
    """Each name that fits `pattern` -> the paths of the texts that hold it."""
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


def test_the_texts_are_read() -> None:
    assert {"README.md", "deploy/README.md", "deploy/kubernetes/worker/worker.yaml", "deploy/acl/cluster.acl"} <= set(
        TOLD
    )
    assert len(named(r"\bEMBEDQ_[A-Z_]+")) > 15
    assert len(list(commands())) > 5


def test_every_setting_exists() -> None:
    known = {f"EMBEDQ_{name.upper()}" for name in (*Settings.model_fields, *tasks.config.WIRE)}
    known |= {"EMBEDQ_", *ENVIRONMENT_ONLY}
    assert unknown(named(r"\bEMBEDQ_[A-Z_]*"), known) == {}


def test_every_metric_exists() -> None:
    """Against names that `tests/test_prometheus.py` holds against the code's."""
    assert remote_commands.embedq_stats
    commands_of_workers = set(re.findall(r'inspect_command\(name="(embedq_\w+)"', SOURCE))
    assert "embedq_status" in commands_of_workers
    of_tests = {name for name in vars(fixtures) if name.startswith("embedq_")}
    series = {f"{name}{end}" for name in (*WORKER, *EXPORTER) for end in ("", "_bucket", "_sum", "_count")}
    assert unknown(named(r"\bembedq_[a-z_]+"), series | of_tests | set(Panel.data) | commands_of_workers) == {}


def test_every_key_exists() -> None:
    known = set(re.findall(r"\bembedq:[a-z_]+", SOURCE))
    assert unknown(named(r"(?<![\w/.-])embedq:[a-z_]+"), known) == {}
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


def test_every_command_and_every_option_exists() -> None:
    lines = [(path, words) for path, text in TOLD.items() for words in told(text)]
    assert {path: words for path, words in lines if misfit(words)} == {}
    assert len(lines) > 15


@pytest.mark.parametrize(("module", "faces"), [("embedq.tasks", {}), ("embedq.workers", FACES)])
def test_the_modules_that_were_run_take_every_command_and_option_that_is_told(
    module: str, faces: dict[str, click.Command]
) -> None:
    for path, run, words in commands():
        if run == module:
            first = words[0] if words else ""
            command = faces.get(first, of_workers.workers if faces else producer)
            assert not misfit(words[1:] if first in faces else words, command), f"{path}: python -m {module} {words}"


def test_every_measurement_exists() -> None:
    from tests.bench.__main__ import COMMANDS

    told_of = [words[0] for _, module, words in commands() if module == "tests.bench" and words]
    assert len(told_of) > 15
    assert set(told_of) - {"…"} <= set(COMMANDS)


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
        test_the_modules_that_were_run_take_every_command_and_option_that_is_told("embedq.tasks", {})


@pytest.mark.parametrize(
    "wrong",
    [
        "`embedq nonsense`",
        "`embedq workers --nonsense`",
        "`embedq dead list|nonsense`",
        "```sh\nEMBEDQ_LEASE_S=1 embedq scale --nonsense=3\n```",
        "command: [embedq, exporter, --nonsense]",
        'CMD ["embedq", "nonsense"]',
        "ExecStart=/opt/embedq/.venv/bin/embedq workers --nonsense %i",
    ],
)
def test_a_command_that_does_not_exist_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOLD, "nonsense", wrong)
    with pytest.raises(AssertionError):
        test_every_command_and_every_option_exists()
