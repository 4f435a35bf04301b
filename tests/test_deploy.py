"""`deploy/compose`, `deploy/docker`, `deploy/systemd`: valid for those who read them, pinned, and fitting our code."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import redis
import yaml

from embedq import __version__
from embedq.core.settings import Settings
from embedq.workers.embedded import _free_port, find_program
from tests.running import ROOT, Running
from tests.told_commands import misfit

DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
UNIT = DEPLOY / "systemd" / "embedq-worker@.service"

#: An image's version: never "latest", never a branch.
PINNED = re.compile(r":v?\d+\.\d+[\w.-]*$")


def instructions(file: Path) -> list[tuple[str, str]]:
    """(name, rest) of each line of a Dockerfile, continued lines joined, comments out."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser


def test_the_compose_file_is_one() -> None:
    """Against the schema of the Compose specification, as `check-jsonschema` carries it."""
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(COMPOSE)] == []
    wrong = json.loads(json.dumps(COMPOSE))
    wrong["services"]["server"]["stop_grace"] = "60s"
    assert list(validator.iter_errors(wrong))


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_pinned_and_weak(name: str) -> None:
    service = SERVICES[name]
    assert PINNED.search(service["image"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "build" in service or not service["user"].startswith("0"), "images of others would run as root"
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_files_and_secrets_that_compose_names_are_there() -> None:
    text = (DEPLOY / "compose" / "compose.yaml").read_text(encoding="utf-8")
    told = (DEPLOY / "compose" / "example.env").read_text(encoding="utf-8")
    passed_on = {name for name, value in COMPOSE["x-worker-environment"].items() if value is None}
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    optional = set(re.findall(r"(?<!\$)\$\{(\w+):-\}", text)) | passed_on
    assert used - optional == set(re.findall(r"^(\w+)=", told, re.MULTILINE))
    assert optional == set(re.findall(r"^#(\w+)=", told, re.MULTILINE))
    for service in SERVICES.values():
        mounted = [one.split(":")[0] for one in service.get("volumes", []) if one.startswith(".")]
        assert all((DEPLOY / "compose" / path).exists() for path in mounted)
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert set(COMPOSE["volumes"]) == {
        one.split(":")[0] for service in SERVICES.values() for one in service.get("volumes", []) if one[0].isalpha()
    }


def test_each_profile_has_its_workers_and_all_else_is_in_both() -> None:
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert profiles == {"worker-cpu": ["cpu"], "worker-cuda": ["cuda"]}


def seconds(text: str) -> float:
    assert text.endswith("s")
    return float(text[:-1])


@pytest.mark.parametrize("name", ["worker-cpu", "worker-cuda"])
def test_a_worker_has_longer_to_end_than_to_drain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = SERVICES[name]
    for variable, value in service["environment"].items():
        if variable.startswith("EMBEDQ_") and variable != "EMBEDQ_MODELS":
            monkeypatch.setenv(variable, str(value))
    assert seconds(service["stop_grace_period"]) >= 1.5 * Settings().drain_timeout_s


def test_the_server_of_compose_starts_with_its_own_command_and_keeps_jobs(tmp_path: Path) -> None:
    """The service's shell line and settings file with a real server; paths and port are the test's."""
    port = _free_port()
    text = (DEPLOY / "compose" / "valkey.conf").read_text(encoding="utf-8").replace("dir /data", f"dir {tmp_path}")
    file = tmp_path / "valkey.conf"
    file.write_text(f"{text}\nbind 127.0.0.1\nport {port}\n")
    shell, flag, line = SERVICES["server"]["command"]
    line = (
        line.replace("$$", "$").replace("/etc/valkey/valkey.conf", str(file)).replace("valkey-server", find_program())
    )
    with Running([shell, flag, line], {"VALKEY_PASSWORD": "secret"}) as server:
        server.wait_for("Ready to accept connections")
        with redis.Redis(port=port, password="secret") as client:
            told = {name: client.config_get(name)[name] for name in ("appendonly", "maxmemory-policy")}
        with redis.Redis(port=port) as nobody, pytest.raises(redis.AuthenticationError):
            nobody.ping()
        arguments = Path(f"/proc/{server.process.pid}/cmdline").read_text()
        assert server.stop(10) == 0, "it ends in order: the signal reached it"
    assert told == {"appendonly": "yes", "maxmemory-policy": "noeviction"}
    assert "secret" not in arguments


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_a_dockerfile_is_pinned_and_ends_without_root(file: Path) -> None:
    steps = instructions(file)
    bases = [rest for name, rest in steps if name == "FROM"]
    assert bases
    assert all(PINNED.search(base) for base in bases)
    users = [rest for name, rest in steps if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    after = [name for name, _ in steps[[name for name, _ in steps].index("USER") :]]
    assert "RUN" not in after
    assert "COPY" not in after
    assert all("-c constraints.txt" in rest or "${TORCH}" in rest for name, rest in steps if "pip install" in rest)


def copied(file: Path) -> list[str]:
    """What a Dockerfile copies from the repository's root."""
    return [part for name, rest in instructions(file) if name == "COPY" for part in rest.split()[:-1]]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_a_dockerfile_copies_what_exists_and_what_is_not_kept_from_it(file: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for source in copied(file):
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored


#: Of the build backend as pip calls it, in the folder that holds pyproject.toml.
_BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('wheels'))"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of the wheel that the checkout makes."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    tops = sorted({name.partition("/")[0] for name in listed if name and (ROOT / name).exists()})
    return wheel_of(tops, tmp_path_factory.mktemp("whole"))


def wheel_of(sources: list[str], directory: Path) -> set[str]:
    """The files of the wheel that is built from these of the checkout and from nothing else."""
    for source in sources:
        path = ROOT / source
        if path.is_dir():
            shutil.copytree(path, directory / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, directory)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", _BUILD], cwd=directory, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = (directory / "wheels").glob("*.whl")
    assert wheel.name == f"embedq-{__version__}-py3-none-any.whl"
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_what_a_dockerfile_copies_makes_the_whole_wheel(file: Path, whole: set[str], tmp_path: Path) -> None:
    found = wheel_of(copied(file), tmp_path)
    assert found == whole
    assert {"embedq/__main__.py", "embedq/py.typed", "embedq/workers/broker/transport.lua"} <= found


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_a_dockerfile_runs_a_command_that_exists_and_receives_signals_itself(file: Path) -> None:
    (command,) = [rest for name, rest in instructions(file) if name == "CMD"]
    program, *words = json.loads(command)  # the form without a shell, which would keep SIGTERM to itself
    assert program == "embedq"
    assert words
    assert misfit(words) == ""
    entry = [json.loads(rest)[2] for name, rest in instructions(file) if name == "ENTRYPOINT"]
    assert all('exec "$@"' in line for line in entry)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_an_image_runs_what_it_installed_and_not_what_it_copied(file: Path) -> None:
    """In the folder of the sources `core` and `tasks` would be names of their own."""
    folders = [rest for name, rest in instructions(file) if name == "WORKDIR"]
    assert folders[0] == "/src"
    assert folders[-1] == "/embedq"
    assert not any(" -e " in rest for name, rest in instructions(file) if name == "RUN")


def test_every_version_of_ours_in_deploy_is_the_codes() -> None:
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".json")]
    tag = re.compile(r"embedq(?:-(?:cpu|cuda|npu|tools))?[:-](\d+\.\d+\.\d+)|newTag: (\S+)|\[embedq==(\S+)\]")
    found = [(path.name, *filter(None, match)) for path in files for match in tag.findall(path.read_text())]
    assert {version for _, version in found} == {__version__}
    assert {"compose.yaml", "kustomization.yaml", "cpu.Dockerfile", "tools.Dockerfile"} <= {name for name, _ in found}


def test_images_have_the_torch_that_is_tested_but_where_its_vendor_lags() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    tested = re.search(r"^TORCH\s+\?= (\S+)", makefile, re.MULTILINE)
    assert tested
    for name in ("cpu", "cuda"):
        text = (DEPLOY / "docker" / f"{name}.Dockerfile").read_text(encoding="utf-8")
        assert f'ARG TORCH="{tested[1]}"' in text
    npu = re.search(r'ARG TORCH="torch==(\S+) torch-npu==(\S+)"', (DEPLOY / "docker" / "npu.Dockerfile").read_text())
    assert npu
    assert npu[1] == npu[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least = next(one for one in project["optional-dependencies"]["worker"] if one.startswith("torch>="))
    assert [int(part) for part in npu[1].split(".")] >= [int(part) for part in least[len("torch>=") :].split(".")]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify`, with a program, a user and an environment file that this machine has."""
    text = UNIT.read_text(encoding="utf-8").replace("/opt/embedq/.venv/bin/embedq", sys.executable)
    instance = tmp_path / UNIT.name
    instance.write_text(text)
    assert _complaints(instance) == ""
    instance.write_text(text.replace("TimeoutStopSec", "TimeoutStopSecs"))
    assert "TimeoutStopSecs" in _complaints(instance)


def _complaints(file: Path) -> str:
    command = ["systemd-analyze", "verify", "--man=no", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_finds_the_unit_little_exposed() -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(UNIT)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stdout[-500:]


def test_the_unit_gives_a_worker_longer_to_end_than_to_drain() -> None:
    told = tomllib.loads((DEPLOY / "systemd" / "embedq.toml").read_text(encoding="utf-8"))
    service = unit()["Service"]
    assert float(service["TimeoutStopSec"]) >= 1.5 * told["drain_timeout_s"]
    assert service["KillMode"] == "mixed"  # SIGTERM for the launcher alone, which drains its worker


def test_what_a_reload_of_the_unit_promises_is_in_a_file_that_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process keeps the variables of its start: a setting among them would never change by SIGHUP."""
    from embedq.core.settings import Settings, read_settings

    service, directory = unit()["Service"], DEPLOY / "systemd"
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert "EMBEDQ_CONFIG=/etc/embedq/embedq.toml" in service["Environment"].split()
    variables = re.findall(r"^(\w+)=", (directory / "worker.env").read_text(encoding="utf-8"), re.MULTILINE)
    assert "EMBEDQ_REDIS_URL" in variables
    assert not {f"EMBEDQ_{name.upper()}" for name in Settings.model_fields} & set(variables)
    monkeypatch.setenv("EMBEDQ_CONFIG", str(directory / "embedq.toml"))
    assert list(read_settings().models) == ["minilm"]


def test_the_unit_runs_a_command_that_exists() -> None:
    program, *words = unit()["Service"]["ExecStart"].split()
    assert program == "/opt/embedq/.venv/bin/embedq"
    assert misfit(words) == ""
    assert words == ["workers", "--devices", "%i"]


def test_the_unit_does_not_start_again_what_cannot_start() -> None:
    from embedq.workers.exit_codes import EXIT_CANNOT_START

    service = unit()["Service"]
    assert service["Restart"] == "always"
    assert service["RestartPreventExitStatus"] == str(EXIT_CANNOT_START)
    assert service["User"] != "root"
