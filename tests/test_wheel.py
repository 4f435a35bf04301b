"""The wheel: what is in it, and that it works in folders where every one of our old names is taken."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embedq.workers.embedded import _free_port
from tests.doc_blocks import code_of
from tests.own_server import OwnServer
from tests.running import ROOT, Running
from tests.wheels import Installed, build, copy_of_checkout, run

EXAMPLES = Path(__file__).parent / "examples"

#: Names that users' own projects have at their top.
TAKEN = ("tasks", "core", "workers", "testing", "deploy", "celeryconfig", "tests")

#: A module of theirs, which nothing of ours may import.
OWN = 'raise RuntimeError("the user\'s own {} was imported")\n'

#: Packages that are shipped whole, and modules at the top.
PACKAGES, MODULES = (
    ("core", "tasks", "testing", "workers", "deploy/demo", "deploy/flower"),
    ("__init__", "__main__", "celeryconfig"),
)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_checkout(tmp_path_factory.mktemp("source") / "embedq")


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("environment"))


def names_in(wheel: Path) -> set[str]:
    """The files of a wheel, but for what describes it."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def shipped() -> set[str]:
    """The files that should be in a wheel, read off the tree."""
    files = [ROOT / f"{name}.py" for name in MODULES] + [ROOT / "py.typed", ROOT / "deploy/__init__.py"]
    for package in PACKAGES:
        files += [path for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".lua")]
    return {f"embedq/{path.relative_to(ROOT).as_posix()}" for path in files}


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    assert names_in(wheel) == shipped()


def test_one_name_lies_at_the_top(wheel: Path, installed: Installed) -> None:
    (name,) = (one for one in zipfile.ZipFile(wheel).namelist() if one.endswith("/top_level.txt"))
    assert zipfile.ZipFile(wheel).read(name).decode().split() == ["embedq"]
    assert {one for one in installed.names if not one.endswith(".dist-info")} == {"embedq"}


def test_the_sdist_builds_the_same_wheel_and_leaves_the_tests_out(source: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert {"setup.py", "celeryconfig.py", "README.md", "LICENSE"} <= {path.name for path in unpacked.iterdir()}
    assert not (unpacked / "tests").exists()
    assert names_in(build("wheel", unpacked, tmp_path)) == names_in(wheel)


def test_types_are_found_by_type_checkers(installed: Installed) -> None:
    assert (installed.site_packages / "embedq" / "py.typed").is_file()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder in which modules have our old names."""
    folder = tmp_path_factory.mktemp("modules")
    for name in TAKEN:
        (folder / f"{name}.py").write_text(OWN.format(name))
    (folder / "texts.txt").write_text("a cat sits on the mat\nthe stock market fell\n")
    return folder


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Iterator[dict[str, str]]:
    """Of a server on which only the installed wheel works."""
    with OwnServer(tmp_path_factory.mktemp("server")) as server:
        yield {"EMBEDQ_REDIS_URL": server.url, "EMBEDQ_MODELS": f"minilm={minilm}", "EMBEDQ_DEFAULT_RERANK": "minilm"}


@pytest.fixture(scope="module")
def pool(installed: Installed, folder: Path, variables: dict[str, str]) -> Iterator[Running]:
    """A launcher with one worker, started in the user's folder."""
    with installed.start(folder, *WORKERS, **variables) as running:
        running.wait_for("action=worker_ready")
        yield running


#: How workers are started, and scaled by a command.
WORKERS = ("-m", "embedq.workers", "--cpu-workers", "1", "--min", "1", "--max", "1")

#: Commands that end by themselves, and what they print. A new one needs a line here.
COMMANDS = {
    "models": (["-m", "embedq.tasks", "models"], "minilm"),
    "embed": (["-m", "embedq.tasks", "embed", "texts.txt", "vectors.npy"], ""),
    "rerank": (["-m", "embedq.tasks", "rerank", "an animal", "texts.txt"], "a cat sits on the mat"),
    "dead": (["-m", "embedq.tasks", "dead", "list"], ""),
    "forget": (["-m", "embedq.tasks", "forget", "gone"], "no worker had announced it"),
    "devices": (["-m", "embedq.workers", "devices"], "computes in"),
    "status": (["-m", "embedq.workers", "status"], "minilm.cpu"),
    "scale": (["-m", "embedq.workers", "scale", "auto"], ""),
    "drain": (["-m", "embedq.workers", "drain", "--help"], "usage"),
    "convert": (["-c", "from embedq.core import convert; print(convert.__doc__)"], "convert"),
    "demo": (["-m", "embedq.deploy.demo", "--help"], "usage"),
    "inspect": (["-m", "celery", "-A", "embedq.tasks", "inspect", "--timeout", "5", "ping"], "pong"),
}


@pytest.mark.parametrize(("command", "printed"), COMMANDS.values(), ids=COMMANDS)
def test_a_command_works_where_our_old_names_are_taken(
    command: list[str], printed: str, installed: Installed, folder: Path, variables: dict[str, str], pool: Running
) -> None:
    assert printed in installed.run(folder, *command, **variables).lower()


def test_every_command_of_embedq_shows_its_help_where_our_old_names_are_taken(
    installed: Installed, folder: Path
) -> None:
    code = "from embedq import __main__; print(*(name for part in __main__.COMMANDS.values() for name in part))"
    names = installed.run(folder, "-c", code).split()
    assert "workers" in names
    for name in names:
        assert name in installed.run(folder, "-m", "embedq", name, "--help")


def test_a_producer_works_where_our_old_names_are_taken(
    installed: Installed, folder: Path, variables: dict[str, str], pool: Running
) -> None:
    assert (
        installed.says(folder, "tasks.embed.delay(['a', 'b']).get(timeout=60).dense.shape", **variables) == "(2, 384)"
    )
    where = installed.says(folder, "tasks.__file__", **variables)
    assert Path(where).is_relative_to(installed.site_packages)
    assert "the user's own" not in pool.output


def test_a_producer_works_where_our_old_names_are_packages(
    installed: Installed, variables: dict[str, str], pool: Running, tmp_path: Path
) -> None:
    for name in TAKEN:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(OWN.format(name))
    assert installed.says(tmp_path, "len(tasks.embed.delay(['a']).get(timeout=60))", **variables) == "1"
    assert "computes in" in installed.run(tmp_path, "-m", "embedq.workers", "devices", **variables)


def test_the_exporter_works_where_our_old_names_are_taken(
    installed: Installed, folder: Path, variables: dict[str, str]
) -> None:
    with installed.start(folder, "-m", "embedq.tasks", "exporter", "--port", "0", **variables) as running:
        found = re.search(r"http://\S+/metrics", running.wait_for("/metrics")[0])
        assert found
        with urllib.request.urlopen(found[0], timeout=30) as answer:
            assert "embedq_" in answer.read().decode()


def test_flower_works_where_our_old_names_are_taken(
    installed: Installed, folder: Path, variables: dict[str, str], pool: Running
) -> None:
    conf = installed.site_packages / "embedq" / "deploy" / "flower" / "flowerconfig.py"
    command = ["-m", "celery", "-A", "embedq.tasks", "flower", f"--conf={conf}", f"--port={(port := _free_port())}"]
    environment = variables | {"FLOWER_BASIC_AUTH": "none", "FLOWER_UNAUTHENTICATED_API": "true"}
    with installed.start(folder, *command, **environment) as running:
        running.wait_for("Connected to redis://")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/workers?refresh=true", timeout=60) as answer:
            assert "minilm.cpu0" in answer.read().decode()


#: An application of a user's own with a `celeryconfig` of its own, and with none.
APPLICATION = "import celery, embedq.tasks; app = celery.current_app if {} else celery.Celery('mine'); "
SETTINGS = "print(app.conf.task_default_queue, app.conf.task_serializer, app.conf.broker_url, app.conf.result_expires)"


@pytest.mark.parametrize("is_current", [True, False], ids=["the default application", "one of the user's own"])
def test_an_application_without_a_configuration_is_not_configured_by_us(
    is_current: bool, installed: Installed, tmp_path: Path
) -> None:
    printed = installed.run(tmp_path, "-c", APPLICATION.format(is_current) + SETTINGS)
    assert printed.split(maxsplit=3) == ["celery", "json", "None", "1 day, 0:00:00\n"]


def test_an_application_keeps_its_own_celeryconfig(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "celeryconfig.py").write_text("task_default_queue = 'mine'\nbroker_url = 'redis://mine:1/0'\n")
    printed = installed.run(tmp_path, "-c", APPLICATION.format(True) + SETTINGS)
    assert printed.split()[:3] == ["mine", "json", "redis://mine:1/0"]
    assert installed.says(tmp_path, "tasks.app.conf.task_default_queue") == "embed"


@pytest.fixture
def example(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an example, in which it may write."""
    return Path(shutil.copytree(EXAMPLES / request.param, tmp_path / "example"))


@pytest.mark.parametrize("example", ["django_project"], indirect=True)
def test_a_django_project_with_apps_called_core_and_tasks(
    example: Path, installed: Installed, variables: dict[str, str], pool: Running
) -> None:
    assert "no issues" in installed.run(example, "manage.py", "check", **variables)
    installed.run(example, "manage.py", "migrate", "--run-syncdb", **variables)
    worker = ["-m", "celery", "-A", "proj", "worker", "--pool", "solo", "--loglevel", "INFO"]
    server = ["manage.py", "runserver", "--noreload", "--verbosity", "1", str(port := _free_port())]
    with (
        installed.start(example, *worker, **variables) as working,
        installed.start(example, *server, **variables) as web,
    ):
        working.wait_for(" ready.")
        web.wait_for("Quit the server")
        texts = ["The cat sleeps on the sofa.", "Shares fell in early trading."]
        assert answer(f"http://127.0.0.1:{port}/add?wait=1", texts) == {"stored": 2}
        assert answer(f"http://127.0.0.1:{port}/search?q=a+pet")["text"] == texts[0]
        working.wait_for("tasks.tasks.store")


@pytest.mark.parametrize("example", ["fastapi_app"], indirect=True)
def test_a_fastapi_service(example: Path, installed: Installed, variables: dict[str, str], pool: Running) -> None:
    worker = ["-m", "celery", "-A", "app.worker", "worker", "--pool", "solo", "--loglevel", "INFO"]
    server = ["-m", "uvicorn", "app.main:api", "--port", str(port := _free_port())]
    with (
        installed.start(example, *worker, **variables) as working,
        installed.start(example, *server, **variables) as web,
    ):
        working.wait_for(" ready.")
        web.wait_for("Uvicorn running")
        url = f"http://127.0.0.1:{port}"
        assert [len(vector) for vector in answer(f"{url}/embed", ["a", "b"])] == [384, 384]
        passages = ["Shares fell.", "The cat sleeps."]
        assert answer(f"{url}/rank", {"query": "a pet", "passages": passages}) == passages[::-1]
        assert answer(f"{url}/count", ["a", "b", "c"]) == 3
        assert "unknown model 'none'" in answer(f"{url}/embed?model=none", ["a"], status=422)["error"]


def answer(url: str, sent: object = None, status: int = 200) -> Any:
    """A web server's answer, to JSON if something is sent."""
    data = None if sent is None else json.dumps(sent).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            found, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        found, text = error.code, error.read().decode()
    assert found == status, text
    return json.loads(text)


def test_tasks_of_the_checkout_are_the_installed_ones(worker: dict[str, str]) -> None:
    code = """
import tasks, embedq.tasks, tasks.models, embedq.tasks.models
assert tasks is embedq.tasks and tasks.embed is embedq.tasks.embed
print(tasks.embed.delay(["a", "b"]).get(timeout=60).dense.shape)
"""
    assert run([sys.executable, "-c", code], ROOT, **worker) == "(2, 384)\n"


def test_an_application_tests_with_what_is_installed(installed: Installed, tmp_path: Path) -> None:
    page = "docs/how-to/testing.md"
    (tmp_path / "conftest.py").write_text(code_of(page, "testing: conftest"))
    (tmp_path / "test_mine.py").write_text(code_of(page, "testing: fake"))
    for name in TAKEN:
        (tmp_path / f"{name}.py").write_text(OWN.format(name))
    assert "1 passed" in installed.run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider")
