"""The choice of the server: by our settings alone, checked where they are read; and an embedded one that starts later."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.own_server import OwnServer
from tests.running import ROOT

OURS = "redis://:OURPASSWORD@127.0.0.1:6390/3"

#: Prints what a producer would use, without connecting.
_SHOW = """
from embedq import tasks
conf = tasks.app.conf
print(conf.broker_url, conf.broker_read_url, conf.broker_write_url, conf.result_backend, tasks.app.backend.url)
print(tasks.app.connection_for_write().as_uri(include_password=True), tasks.app.connection_for_read().hostname)
"""


def run(code: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of a producer with these variables and no others of ours."""
    return run_command([sys.executable, "-c", code], directory, **environment)


def run_command(command: list[str], directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"PYTHONPATH": str(ROOT), "EMBEDQ_DATA_DIR": str(directory / "data")}
    variables = {**os.environ, **own, **environment}
    return subprocess.run(
        command, capture_output=True, text=True, env=variables, cwd=directory, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "variable", ["CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND"]
)
def test_celery_s_variables_are_another_application_s(variable: str, tmp_path: Path) -> None:
    theirs = "amqp://user:THEIRPASSWORD@rabbit.example:5673/vhost?ssl_password=KEYPASSWORD"
    ended = run(_SHOW, tmp_path, EMBEDQ_REDIS_URL=OURS, **{variable: theirs})
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("6390") == 6
    assert "rabbit" not in ended.stdout
    (line,) = ended.stderr.splitlines()
    assert variable in line
    assert "amqp://rabbit.example:5673/vhost" in line
    assert "redis://127.0.0.1:6390/3" in line
    assert "PASSWORD" not in line


def test_a_variable_of_celery_that_names_our_server_is_no_conflict(tmp_path: Path) -> None:
    ended = run(_SHOW, tmp_path, EMBEDQ_REDIS_URL=OURS, CELERY_BROKER_URL=OURS, CELERY_RESULT_BACKEND="")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("loader", ["default", "theirs:Loader", "nowhere.loaders:Loader"])
def test_celery_s_loader_and_configuration_module_are_another_application_s(loader: str, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "from celery.loaders.base import BaseLoader\n"
        "broker_url, task_serializer = 'redis://theirs.example:1', 'json'\n"
        "class Loader(BaseLoader):\n"
        "    def config_from_object(self, *_, **__):\n"
        "        self._conf = {'broker_url': broker_url, 'task_serializer': task_serializer}\n"
    )
    code = f"{_SHOW}\nprint(conf.task_serializer)"
    ended = run(code, tmp_path, EMBEDQ_REDIS_URL=OURS, CELERY_LOADER=loader, CELERY_CONFIG_MODULE="theirs")
    assert ended.returncode == 0, ended.stderr
    assert "theirs" not in ended.stdout
    assert ended.stdout.splitlines()[-1] == "embedq"


#: A wrong URL -> what is wrong with it.
WRONG = {
    "127.0.0.1:6379": "does not begin with redis://",
    "localhost": "does not begin with redis://",
    "/x": "does not begin with redis://",
    "http://SECRET@host": "does not begin with redis://",
    "amqp://user:SECRET@host": "does not begin with redis://",
    "REDIS://localhost": "does not begin with redis://",
    "redis:/host": "does not begin with redis://",
    " redis://localhost": "white space",
    "redis://localhost ": "white space",
    "redis://local host": "white space",
    "redis://localhost\n": "white space",
    "redis://": "names no host",
    "redis:///1": "names no host",
    "redis://localhost/x": "database",
    "redis://localhost/1/2": "database",
    "redis://localhost/-1": "database",
    "redis://:SECRET#1@localhost": "%23",
    "redis://:SEC/RET@localhost": "%2F",
    "redis://localhost:70000": "port",
    "redis://localhost:x": "port",
    "redis://localhost?socket_timeout=5": "query",
    "redis://localhost/0?ssl_cert_reqs=none": "query",
    "rediss://localhost?socket_timeout=SECRET": "query",
    "rediss://localhost?ssl_verify=SECRET": "query",
    "rediss://localhost?ssl_ca_certs=/no/SECRET.pem": "names a file by ssl_ca_certs that is not there",
    "rediss://localhost?ssl_keyfile=": "names a file by ssl_keyfile that is not there",
    "redis+socket://": "names no socket",
    "redis://one;redis://two": "database",
    "sentinel://one:26379;two:26379": "does not begin with",
    "sentinel://one:26379;sentinel://two:26379/x": "database",
}


@pytest.mark.parametrize("url", WRONG)
@pytest.mark.parametrize("variable", ["EMBEDQ_REDIS_URL", "REDIS_URL"])
def test_a_wrong_url_is_refused_with_the_form_that_is_wanted(
    url: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedq import celeryconfig
    from embedq.core.errors import InvalidSettings

    monkeypatch.setitem(celeryconfig.wire, "redis_url", "")
    monkeypatch.setenv(variable, url)
    monkeypatch.setitem(celeryconfig.wire, "redis_url", os.environ.get("EMBEDQ_REDIS_URL", ""))
    with pytest.raises(InvalidSettings, match=WRONG[url]) as caught:
        celeryconfig.redis_url()
    message = str(caught.value)
    assert message.startswith(variable)
    assert "redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]" in message
    assert "SEC" not in message


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://localhost:6379/0",
        "redis://user:pass%2Fword@server.example/15",
        "redis://[::1]:6379/1",
        "redis+socket:///run/valkey.sock?virtual_host=2",
        "sentinel://:p@one:26379/1;sentinel://two:26379/1",
    ],
)
def test_a_url_of_the_right_form_is_used_as_it_is(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedq import celeryconfig

    monkeypatch.setitem(celeryconfig.wire, "redis_url", url)
    assert celeryconfig.redis_url() == url


@pytest.mark.parametrize("command", ["status", "workers", "models", "dead list"])
def test_a_command_refuses_a_wrong_url_in_one_line(command: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "embedq", *command.split()]
    ended = run_command(words, tmp_path, EMBEDQ_REDIS_URL="127.0.0.1:6379")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "EMBEDQ_REDIS_URL does not begin with redis://" in line


#: How the processes of embedq are started beside `embedq` itself -> what their line begins with.
_STARTS = {
    "-m embedq.workers.worker": "python -m embedq.workers.worker",
    "-m embedq.workers": "python -m embedq.workers",
    "-m embedq.tasks models": "python -m embedq.tasks",
    "-m embedq.deploy.demo": "python -m embedq.deploy.demo",
    "-m embedq.deploy.flower": "python -m embedq.deploy.flower",
    "-m celery -A embedq.tasks worker": "celery",
    "-m celery --app=embedq.tasks status": "celery",
}


@pytest.mark.parametrize("start", _STARTS)
def test_every_process_of_ours_refuses_a_wrong_url_in_one_line(start: str, tmp_path: Path) -> None:
    ended = run_command([sys.executable, *start.split()], tmp_path, EMBEDQ_REDIS_URL="127.0.0.1:6379")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"{_STARTS[start]}: EMBEDQ_REDIS_URL does not begin with redis://")


def test_celery_s_program_refuses_a_wrong_url_of_our_application_in_one_line(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("celery")
    ended = run_command([sys.executable, str(program), "-A", "embedq.tasks", "report"], tmp_path, REDIS_URL="localhost")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("celery: REDIS_URL does not begin with redis://")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"EMBEDQ_CONFIG": "gone.toml"}, "EMBEDQ_CONFIG is 'gone.toml'"),
        ({"EMBEDQ_LEASE_S": "0"}, "EMBEDQ_LEASE_S must be a whole number from 1 to 86,400; given '0'"),
        ({"EMBEDQ_REDIS_URL": "sentinel://localhost:26379"}, "needs EMBEDQ_SENTINEL_MASTER"),
        ({"EMBEDQ_LOG_LEVEL": "loud"}, "EMBEDQ_LOG_LEVEL must be one of"),
        ({"EMBEDQ_MODELS": "minilm"}, "EMBEDQ_MODELS"),
        ({"EMBEDQ_MODELS": "m=/nowhere", "EMBEDQ_HANG_TIMEOUT_S": "inf"}, "EMBEDQ_HANG_TIMEOUT_S"),
        ({"EMBEDQ_MODELS": "m=/nowhere", "EMBEDQ_DEFAULT_EMBED": "x"}, "EMBEDQ_DEFAULT_EMBED"),
        ({"EMBEDQ_MODELS": "m=/nowhere", "EMBEDQ_METRICS_PORT": "70000"}, "EMBEDQ_METRICS_PORT"),
    ],
    ids=str,
)
def test_a_worker_refuses_each_wrong_setting_in_one_line(variables: dict[str, str], named: str, tmp_path: Path) -> None:
    ended = run_command([sys.executable, "-m", "embedq.workers.worker"], tmp_path, **variables)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert named in line


def test_a_program_that_celery_runs_for_another_application_may_do_without_ours(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "from celery import Celery\n"
        "from embedq.core.errors import InvalidSettings\n"
        "app = Celery('theirs')\n"
        "try:\n    from embedq import tasks\nexcept InvalidSettings:\n    print('without')\n"
    )
    command = [sys.executable, "-m", "celery", "-A", "theirs", "report"]
    ended = run_command(command, tmp_path, EMBEDQ_REDIS_URL="127.0.0.1:6379")
    assert (ended.returncode, ended.stdout.splitlines()[0]) == (0, "without"), ended.stderr


def test_a_producer_gets_invalid_settings(tmp_path: Path) -> None:
    code = """
from embedq.core.errors import InvalidSettings
try:
    from embedq import tasks
except InvalidSettings as error:
    print(error)
"""
    for start in ("", "import sys\nsys.argv = []\n"):  # as within uWSGI
        ended = run(start + code, tmp_path, EMBEDQ_REDIS_URL="127.0.0.1:6379")
        assert ended.stdout.startswith("EMBEDQ_REDIS_URL does not begin with"), ended.stderr


@pytest.mark.parametrize(
    ("variables", "file", "named"),
    [
        ({"EMBEDQ_CONFIG": "gone.toml"}, "", "EMBEDQ_CONFIG"),
        ({"EMBEDQ_LEASE_S": "100000"}, "", "EMBEDQ_LEASE_S must be a whole number from 1 to 86,400"),
        ({"EMBEDQ_RESULT_EXPIRES_S": "10000000000000"}, "", "EMBEDQ_RESULT_EXPIRES_S"),
        ({"EMBEDQ_MAX_BYTES_PER_JOB": str(2**30)}, "", "EMBEDQ_MAX_BYTES_PER_JOB"),
        ({}, "[wire]\nmax_texts_per_job = 2.7", "EMBEDQ_MAX_TEXTS_PER_JOB"),
        ({}, "[wire]\nmax_texts_per_job = true", "EMBEDQ_MAX_TEXTS_PER_JOB"),
        ({}, "[wire]\nredis_url = 5", "EMBEDQ_REDIS_URL must be a string"),
        ({}, 'wire = ["redis://:SECRET@host"]', "must be a table"),
        ({}, 'wire = "SECRET"', "must be a table"),
    ],
)
def test_every_other_wrong_setting_of_a_producer_is_refused_where_it_is_read(
    variables: dict[str, str], file: str, named: str, tmp_path: Path
) -> None:
    (tmp_path / "embedq.toml").write_text(file)
    ended = run_command([sys.executable, "-m", "embedq", "models"], tmp_path, **variables)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert named in line
    assert "SECRET" not in line


_LATE = """
import sys, threading, time
from embedq import tasks
from embedq.tasks import application

def sent():
    tasks.embed.check_model(None)
    return tasks.embed.delay(["a text"]).backend.url

try:
    sent()
except Exception as error:
    print("none yet", type(error).__name__, flush=True)
for line in sys.stdin:
    time.sleep(application._LOOK_S)  # until it looks again
    urls = [sent()]
    thread = threading.Thread(target=lambda: urls.append(sent()))
    thread.start()
    thread.join()
    print(*urls, flush=True)
"""


def test_a_producer_finds_an_embedded_server_that_started_after_its_import(tmp_path: Path, own: OwnServer) -> None:
    own.client.flushall()
    data = tmp_path / "data"
    data.mkdir()
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT), "EMBEDQ_DATA_DIR": str(data)}
    # The embedded server before this one: its URL is there, and nobody answers.
    (data / "url").write_text("redis://127.0.0.1:1/0")
    with subprocess.Popen(
        [sys.executable, "-c", _LATE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as producer:
        assert producer.stdin
        assert producer.stdout
        try:
            assert producer.stdout.readline().startswith("none yet")
            for database in (0, 1):
                url = f"redis://127.0.0.1:{own.port}/{database}"
                (data / "url").write_text(url)
                producer.stdin.write("go\n")
                producer.stdin.flush()
                assert producer.stdout.readline().split() == [url, url]
            producer.stdin.close()
            assert producer.wait(30) == 0
        finally:
            producer.kill()
    assert own.client.llen("embed") == 2
