"""The command `embedq` as people run it: help, exit codes, missing extras, completion, versions. Real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import pytest

from embedq import __version__
from embedq.__main__ import _SHELLS, COMMANDS, embedq
from embedq.core.command_line import EXIT_CODES, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, EXTRAS
from embedq.workers import exit_codes
from tests.own_server import OwnServer
from tests.running import ROOT, Running, require
from tests.told_commands import misfit, options

#: An environment with a producer's dependencies only; `make test` builds it.
PRODUCER = Path(sys.prefix) / "producer" / "bin" / "python"

NAMES = [name for section in COMMANDS.values() for name in section] + ["completion"]

HEAVY = ("torch", "transformers", "tokenizers", "pydantic", "safetensors")

TIMEOUT_S = 60

#: Nobody listens there.
NOWHERE = "redis://127.0.0.1:1/0"


def run(
    *words: str, python: str | Path = sys.executable, directory: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m embedq …`, with its output."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(python), "-m", "embedq", *words],
        cwd=directory,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def all_commands(command: click.Command = embedq, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    """Every command by its words, groups included."""
    found = {path: command}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below
            found |= all_commands(below, (*path, name))
    return found


def test_these_are_the_commands() -> None:
    names = "workers status drain scale devices models forget embed rerank cancel dataset dead exporter flower check convert demo completion"
    assert set(NAMES) == set(names.split())
    below = {
        one: {words[1] for words in all_commands() if len(words) == 2 and words[0] == one} for one in names.split()
    }
    assert below["dead"] == {"list", "show", "replay", "drop"}
    assert below["dataset"] == {
        "embed",
        "rerank",
        "status",
        "watch",
        "cancel",
        "resume",
        "retry-failed",
        "verify",
        "load",
    }


def test_every_command_has_help_with_an_example_where_only_a_producer_is_installed() -> None:
    require(PRODUCER.exists(), "the producer's environment is not there: run `make test`")
    lines = [[*words, flag] for words in all_commands() for flag in ("--help", "-h")]
    script = (
        "import contextlib, io, json, sys\n"
        "from embedq.__main__ import main\n"
        "def shown(words):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as output:\n"
        "        code = main(words)\n"
        "    return [code, output.getvalue()]\n"
        "print(json.dumps([shown(words) for words in json.loads(sys.argv[1])]))"
    )
    printed = subprocess.check_output([str(PRODUCER), "-c", script, json.dumps(lines)], text=True)
    for (*words, _), (code, text) in zip(lines, json.loads(printed), strict=True):
        assert code == 0
        assert text.startswith(" ".join(["Usage: embedq", *words]))
        assert "-h, --help" in text
        assert "Examples:" in text or words == ["dead", "list"]


def test_every_example_in_the_help_is_a_command_line_that_fits() -> None:
    examples = [line for one in all_commands().values() for line in re.findall(r"(embedq [^#\n)]*)", one.epilog or "")]
    assert len(examples) > 20
    assert {line: word for line in examples if (word := misfit(line.replace(">", " ").split()[1:]))} == {}


def test_the_table_of_commands_says_what_their_own_help_says() -> None:
    for section in COMMANDS.values():
        for name, (_, text) in section.items():
            command = all_commands()[name,]
            assert (command.name, (command.help or "").partition("\n")[0]) == (name, text)


def test_no_help_loads_torch_or_what_else_only_workers_have() -> None:
    script = (
        "import sys\n"
        "from embedq.__main__ import main\n"
        f"for name in ['', *{NAMES}]:\n"
        "    assert main([*name.split(), '--help']) == 0\n"
        "assert main(['models']) == 1\n"
        f"print(*sorted(set(sys.modules) & set({HEAVY})), file=sys.stderr)"
    )
    environment = {**os.environ, "EMBEDQ_REDIS_URL": NOWHERE}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == ""


def test_the_help_of_the_whole_loads_no_part() -> None:
    script = (
        "import sys; from embedq.__main__ import main; main(['--help'])\n"
        "assert not {name for name in sys.modules if name.startswith(('celery', 'embedq.tasks', 'embedq.workers', 'numpy'))}"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["workers", "status", "devices", "exporter", "flower", "check", "convert", "demo"])
def test_a_command_whose_extra_is_missing_names_it(name: str) -> None:
    require(PRODUCER.exists(), "the producer's environment is not there: run `make test`")
    done = run(name, *(["x"] if name in ("check", "convert") else []), python=PRODUCER, EMBEDQ_REDIS_URL=NOWHERE)
    extra = name if name in EXTRAS else "worker"
    assert done.returncode == EXIT_FAILED
    assert done.stderr.startswith(
        f"embedq {name} needs the extra '{extra}': pip install \"embedq[{extra}]\" (no module "
    )
    assert done.stderr.count("\n") == 1


def test_each_extra_installs_what_its_commands_import() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def modules(extra: str) -> set[str]:
        found: set[str] = set()
        for one in extras[extra]:
            own = re.match(r"embedq\[(.*)\]", one)
            below = own[1].split(",") if own else []
            found |= (
                {name for part in below for name in modules(part)}
                if own
                else {re.split("[>;=<]", one)[0].replace("-", "_")}
            )
        return found

    assert EXTRAS.keys() <= extras.keys()
    for extra, needed in EXTRAS.items():
        assert set(needed) <= modules(extra)
    assert modules("worker") - set(EXTRAS["worker"]) == {"backports.zstd"}  # of older Pythons only


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), EXIT_USAGE, "Usage: embedq"),
        (("nonsense",), EXIT_USAGE, "No such command 'nonsense'"),
        (("drain",), EXIT_USAGE, "Missing argument 'WORKER'"),
        (("embed", "absent.txt", "vectors.npy"), EXIT_FAILED, "embedq: [Errno 2] No such file or directory: 'absent.txt'"),
        (("embed", "latin.txt", "vectors.npy"), EXIT_FAILED, "embedq: latin.txt is not UTF-8: the byte at 3 cannot be read"),
        (("embed", ".", "vectors.npy"), EXIT_FAILED, "embedq: [Errno 21] Is a directory: '.'"),
        (("embed", "texts.txt", "no/vectors.npy"), EXIT_FAILED, "embedq: no/vectors.npy cannot be written: there is no folder no"),
        (("embed", "texts.txt", "vectors.npy"), EXIT_FAILED, "embedq: the server does not answer; is EMBEDQ_REDIS_URL right?"),
        (("rerank", "a question", "texts.txt"), EXIT_FAILED, "embedq: the server does not answer"),
        (("models",), EXIT_FAILED, "embedq: the server does not answer"),
        (("dead", "list"), EXIT_FAILED, "embedq: the server does not answer"),
        (("scale", "many"), EXIT_FAILED, "embedq: scale needs a number of workers, or auto; given 'many'"),
        (("workers", "--model", "x=/", "--cpu-workers", "1", "--per-device", "0"), EXIT_FAILED, "embedq: --per-device must be"),
        (("convert", "."), EXIT_FAILED, "embedq: . has no pytorch_model.bin to convert"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_mistake_has_its_exit_code_and_is_said_without_a_traceback(
    words: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("a text\nanother")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    done = run(*words, directory=tmp_path, EMBEDQ_REDIS_URL=NOWHERE)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert code == EXIT_USAGE or done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.part"))


def test_a_wrong_setting_is_one_line_and_keeps_nobody_from_the_help() -> None:
    wrong: dict[str, Any] = {"EMBEDQ_LEASE_S": "soon"}
    done = run("models", **wrong)
    assert (done.returncode, done.stderr) == (
        EXIT_FAILED,
        "embedq: EMBEDQ_LEASE_S must be a whole number from 1 to 86,400; given 'soon'\n",
    )
    assert run("--help", **wrong).returncode == 0


def test_ctrl_c_is_one_line_and_leaves_no_half_a_file(own: OwnServer, tmp_path: Path) -> None:
    own.client.flushall()
    (tmp_path / "texts.txt").write_text("a text")
    words = ["embed", str(tmp_path / "texts.txt"), str(tmp_path / "vectors.npy")]
    with Running([sys.executable, "-m", "embedq", *words], {"EMBEDQ_REDIS_URL": own.url}) as running:
        assert own.client.brpop("embed:9", TIMEOUT_S), "the job was sent"  # and no worker will take it
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == EXIT_INTERRUPTED
    assert running.lines[-1] == "embedq: interrupted"
    assert "Traceback" not in running.output
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_an_empty_pool_is_said_to_be_one(own: OwnServer) -> None:
    own.client.flushall()
    status = run("status", EMBEDQ_REDIS_URL=own.url)
    assert (status.returncode, status.stdout) == (EXIT_FAILED, "no worker answers; `embedq workers` starts one\n")
    models = run("models", EMBEDQ_REDIS_URL=own.url)
    assert (models.returncode, models.stdout) == (0, "")
    assert models.stderr == "no worker has announced a model; `embedq workers` starts one\n"
    letters = run("dead", "list", EMBEDQ_REDIS_URL=own.url)
    assert (letters.returncode, letters.stdout, letters.stderr) == (0, "", "there are no dead letters\n")


def test_every_exit_code_is_in_the_help() -> None:
    codes = [value for name, value in vars(exit_codes).items() if name.startswith("EXIT_")]
    assert {0, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, *codes} <= EXIT_CODES.keys()
    printed = run("--help").stdout
    for code, meaning in EXIT_CODES.items():
        assert re.search(rf"^    {code} +{re.escape(meaning)}$", printed, re.MULTILINE)


def test_the_version_is_printed() -> None:
    assert run("--version").stdout == f"embedq {__version__}\n"


def test_pip_makes_a_script_of_this_very_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert list(scripts) == ["embedq"]
    main = EntryPoint("embedq", scripts["embedq"], "console_scripts").load()
    assert main(["completion", "bash"]) == 0


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A folder with a program `embedq`, as pip makes one."""
    program = tmp_path / "embedq"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m embedq "$@"\n')
    program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("embedq wor", "workers"),
        ("embedq dead re", "replay"),
        ("embedq rerank --to", "--top-k"),
        ("embedq completion f", "fish"),
        ("embedq d", "drain devices dataset dead demo"),
    ],
)
def test_bash_completes_commands_options_and_choices(line: str, found: str, script: Path) -> None:
    words = line.split()
    commands = (
        'eval "$(embedq completion bash)"',
        f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}",
        "_embedq_completion embedq",
        'echo "${COMPREPLY[@]}"',
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(commands)],
        env={**os.environ, "PATH": f"{script}:{os.environ['PATH']}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(done.stdout.split()) == sorted(found.split())


@pytest.mark.parametrize("shell", _SHELLS)
def test_each_shell_has_a_script(shell: str) -> None:
    done = run("completion", shell)
    assert done.returncode == 0
    assert f"_EMBEDQ_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.parametrize(
    ("module", "words", "usage"),
    [
        ("embedq.tasks", ["--help"], "Usage: python -m embedq.tasks [OPTIONS] COMMAND"),
        ("embedq.tasks", ["dead", "list", "--help"], "Usage: python -m embedq.tasks dead list"),
        ("tasks", ["rerank", "--help"], "Usage: python -m embedq.tasks rerank"),
        ("embedq.workers", ["--help"], "Usage: python -m embedq.workers [OPTIONS]"),
        ("embedq.workers", ["start", "--help"], "Usage: python -m embedq.workers start [OPTIONS]"),
        ("workers", ["scale", "--help"], "Usage: python -m embedq.workers scale"),
        ("embedq.deploy.demo", ["--help"], "Usage: python -m embedq.deploy.demo"),
        ("embedq.deploy.flower", ["--help"], "Usage: python -m embedq.deploy.flower"),
    ],
)
def test_the_modules_that_were_run_before_run_the_same_commands(module: str, words: list[str], usage: str) -> None:
    """In the checkout's root, where `python -m tasks` and `python -m workers` are found as well."""
    done = subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(usage)


def test_an_option_that_was_taken_is_taken_still() -> None:
    workers = options(all_commands()["workers",])
    kept = (
        "--model --devices --per-device --cpu-workers --min --max --backlog-s --up-delay-s --down-delay-s --drain-first"
    )
    assert set(kept.split()) <= workers
    assert {"--port", "--host"} <= options(all_commands()["exporter",])
    assert {"--keep", "--texts"} <= options(all_commands()["demo",])


@pytest.mark.parametrize(
    "words",
    [["models"], ["embed", "texts.txt", "vectors.npy"], ["dead", "list"], ["status"], ["exporter", "--port", "0"]],
    ids=" ".join,
)
def test_a_server_that_refuses_the_user_is_not_said_to_be_away(
    words: list[str], own: OwnServer, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("a text")
    own.client.execute_command("ACL", "SETUSER", "nobody", "on", ">secret", "-@all")
    done = run(*words, directory=tmp_path, EMBEDQ_REDIS_URL=own.url.replace("redis://", "redis://nobody:secret@"))
    assert (done.returncode, done.stdout) == (EXIT_FAILED, "")
    assert done.stderr.startswith("embedq: the server refuses us, or its certificate is not trusted; has the user of ")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


@pytest.mark.parametrize("module", ["embedq.workers", "embedq.workers.worker", "embedq.deploy.flower"])
def test_a_setting_that_producers_read_is_told_in_one_line_by_every_module_that_is_run(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *(["status"] if module == "embedq.workers" else [])],
        cwd=ROOT,
        env={**os.environ, "EMBEDQ_LEASE_S": "soon"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (EXIT_FAILED, "", 1)
    assert "EMBEDQ_LEASE_S must be a whole number from 1 to 86,400; given 'soon'" in done.stderr


def test_ctrl_c_ends_a_worker_that_takes_no_jobs_yet_with_one_line() -> None:
    environment = {"EMBEDQ_REDIS_URL": NOWHERE, "EMBEDQ_MODELS": "x=/"}
    with Running([sys.executable, "-m", "embedq.workers.worker"], environment) as running:
        running.wait_for("action=server_wait")
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == EXIT_INTERRUPTED
    assert "interrupted action=interrupted" in running.lines[-1]
    assert "Traceback" not in running.output
