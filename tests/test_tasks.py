"""The producer's side: what it sends, where to, and its command line. Real server, real worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from embedq import __version__, tasks
from embedq.core.errors import InvalidSettings, UnknownModel
from embedq.tasks.__main__ import main
from embedq.tasks.models import EXPIRES_S, FRESH_S, KEY, Registry, Served
from tests.running import ROOT


def model(alias: str, default_for: list[str]) -> Served:
    return Served(alias, f"/models/{alias}", ["embed", "rerank"], 8, 16, ["dense"], default_for)


@pytest.fixture
def registry(server: str) -> Any:
    """A registry in a database of its own."""
    with redis.Redis.from_url(server.removesuffix("/0") + "/1") as client:
        yield Registry(client)
        client.delete(KEY)


@pytest.mark.parametrize(
    ("name", "kwargs", "queue"),
    [
        ("tasks.embed", {}, "embed"),
        ("tasks.rerank", {}, "rerank"),
        ("tasks.embed", {"model": "bge-m3"}, "embed.bge-m3"),
        ("tasks.rerank", {"model": "x"}, "rerank.x"),
        ("application.task", {"model": "x"}, None),
    ],
)
def test_each_job_goes_to_the_queue_of_its_model(name: str, kwargs: dict[str, str], queue: str | None) -> None:
    route = tasks.config.route(name, (), kwargs, {})
    assert (route and route["queue"]) == queue


def test_a_job_is_one_list_entry_in_the_list_of_its_priority(server: str) -> None:
    with redis.Redis.from_url(server) as client:
        for priority, key in [(0, "unread"), (2, "unread"), (3, "unread:3"), (6, "unread:6"), (9, "unread:9")]:
            tasks.embed.apply_async((["x"],), queue="unread", priority=priority)
            assert client.llen(key) == (2 if priority == 2 else 1)
        client.delete("unread", "unread:3", "unread:6", "unread:9")


def test_while_nothing_was_ever_announced_every_name_passes(registry: Registry) -> None:
    registry.check("embed", "any")
    registry.check("rerank", None)


def test_a_typo_in_a_model_name_is_refused_with_what_there_is(registry: Registry) -> None:
    registry.announce([model("one", ["embed"]), model("two", [])])
    registry.check("embed", "two")
    registry.check("embed", None)
    with pytest.raises(UnknownModel, match="'tow'; workers have announced one, two"):
        registry.check("embed", "tow")
    with pytest.raises(UnknownModel, match="rerank needs model=…"):
        registry.check("rerank", None)


def test_a_producer_learns_of_models_announced_later(registry: Registry) -> None:
    registry.announce([model("one", [])])
    with pytest.raises(UnknownModel):
        registry.check("embed", "two")
    Registry(registry._client).announce([model("two", [])])
    registry.check("embed", "two")


def test_a_producer_learns_within_a_minute_of_models_that_were_withdrawn(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.announce([model("one", []), model("two", [])])
    registry.check("embed", "two")
    Registry(registry._client).forget("two")
    registry.check("embed", "two")
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + FRESH_S)
    with pytest.raises(UnknownModel, match="'two'; workers have announced one"):
        registry.check("embed", "two")


def test_a_worker_announces_again_what_the_server_has_lost_and_keeps_the_rest(registry: Registry) -> None:
    announced = [model("one", ["embed"]), model("two", [])]
    registry.announce([model("other", [])])
    registry.renew(announced)
    assert registry.all().keys() == {"one", "two", "other"}
    before = registry._client.hgetall(KEY)
    registry.renew(announced)
    assert registry._client.hgetall(KEY) == before  # nothing was lost
    assert 0 < registry._client.ttl(KEY) <= EXPIRES_S
    for lose in (lambda: registry.forget("two"), lambda: registry._client.delete(KEY)):
        lose()
        registry.renew(announced)
        assert registry.all().keys() >= {"one", "two"}


def test_two_models_cannot_both_be_the_default(registry: Registry) -> None:
    registry.announce([model("one", ["embed"])])
    with pytest.raises(InvalidSettings, match="'two' would become the default for embed, but 'one' is"):
        registry.announce([model("two", ["embed"])])
    registry.announce([model("one", ["embed", "rerank"])])  # the same one may announce again
    assert registry.forget("one")
    assert not registry.forget("one")
    registry.announce([model("two", ["embed"])])


def test_announcements_of_older_and_newer_workers_are_read(registry: Registry) -> None:
    registry.announce([replace(model("ours", []), version=__version__)])
    announced = json.loads(registry._client.hget(KEY, "ours"))
    assert announced.pop("version") == __version__
    older, newer = announced | {"alias": "older"}, announced | {"alias": "newer", "version": "9.0.0", "speed": {"a": 1}}
    wrong = announced | {"alias": "wrong", "version": 2}
    registry._client.hset(KEY, mapping={one["alias"]: json.dumps(one) for one in (older, newer, wrong)})
    found = {alias: one.version for alias, one in registry.all().items()}
    assert found == {"ours": __version__, "older": "", "newer": "9.0.0"}


def test_a_server_that_is_down_is_left_to_the_publish(registry: Registry) -> None:
    registry.announce([model("one", ["embed"])])
    with pytest.raises(UnknownModel):
        registry.check("embed", "any")
    with redis.Redis(port=1, socket_connect_timeout=0.1) as nowhere:
        with pytest.raises(redis.ConnectionError):
            nowhere.ping()
        Registry(nowhere).check("embed", "any")  # raises nothing: the publish says it, with its retries


def test_importing_tasks_leaves_the_applications_own_app_and_config_alone(tmp_path: Path) -> None:
    (tmp_path / "celeryconfig.py").write_text("raise RuntimeError('the application has a config of its own')")
    script = (
        "from celery import Celery, current_app, shared_task\n"
        "own = Celery('own')\n"
        "import tasks\n"
        "assert current_app.main == 'own', current_app\n"
        "@shared_task\n"
        "def mine(): ...\n"
        "assert mine.app.main == 'own'\n"
        "assert tasks.embed.app.main == 'embedq'\n"
    )
    # The application's directory comes first, as it does when a script is run.
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize(
    ("variables", "file", "message"),
    [
        ({"EMBEDQ_LEASE_S": "soon"}, "", "EMBEDQ_LEASE_S must be a whole number from 1 to 86,400; given 'soon'"),
        ({"EMBEDQ_MAX_TEXTS_PER_JOB": "0"}, "", "EMBEDQ_MAX_TEXTS_PER_JOB must be a whole number from 1; given '0'"),
        ({}, "[wire]\nspeed = 3", "unknown [wire] setting 'speed' (known are redis_url, "),
        ({}, "[wire", "cannot be read as TOML"),
    ],
)
def test_a_wrong_wire_setting_is_named_with_its_cure(
    variables: dict[str, str], file: str, message: str, tmp_path: Path
) -> None:
    config = tmp_path / "embedq.toml"
    config.write_text(file)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EMBEDQ_CONFIG": str(config), **variables}
    done = subprocess.run(
        [sys.executable, "-c", "import tasks"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr


def test_the_file_sets_what_the_environment_does_not(tmp_path: Path) -> None:
    config = tmp_path / "embedq.toml"
    config.write_text('[wire]\nredis_url = "redis://file:1/0"\nlease_s = 7\nmax_texts_per_job = 3\n')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EMBEDQ_CONFIG": str(config), "EMBEDQ_MAX_TEXTS_PER_JOB": "4"}
    script = "import json, tasks; print(json.dumps([tasks.app.conf.broker_url, tasks.config.wire]))"
    url, wire = json.loads(subprocess.check_output([sys.executable, "-c", script], env=environment))
    assert url == "redis://file:1/0"
    assert (wire["lease_s"], wire["max_texts_per_job"]) == (7, 4)


@pytest.mark.usefixtures("worker")
class TestCommandLine:
    """`python -m embedq.tasks`, in this process."""

    def test_models_lists_what_is_served(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["models"]) == 0
        printed = capsys.readouterr().out
        assert "minilm  embed and rerank  384 dimensions  256 tokens" in printed
        assert f"default for embed and rerank  embedq {__version__}" in printed
        assert "reranker  rerank  1 dimensions" in printed

    def test_embed_writes_one_row_per_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        lines = [f"text number {index}" for index in range(600)]
        (tmp_path / "texts.txt").write_text("\n".join(lines))
        assert main(["embed", str(tmp_path / "texts.txt"), str(tmp_path / "vectors.npy")]) == 0
        assert "600 of 600 texts" in capsys.readouterr().err
        vectors = np.load(tmp_path / "vectors.npy")
        assert vectors.shape == (600, 384)
        np.testing.assert_allclose(vectors[599], tasks.embed.delay([lines[599]]).get(timeout=60)[0], atol=1e-5)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.txt", "vectors.npy"]

    def test_rerank_prints_the_best_first(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "passages.txt").write_text("Bread needs yeast.\nThe moon circles the earth.\nCats purr.")
        assert main(["rerank", "what does the moon do?", str(tmp_path / "passages.txt"), "--top-k", "2"]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == 2
        assert printed[0].endswith("The moon circles the earth.")

    def test_a_mistake_is_one_line_and_exit_code_1(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["embed", str(tmp_path / "absent.txt"), "x.npy"]) == 1
        assert main(["rerank", "q", str(ROOT / "LICENSE"), "--model", "nope"]) == 1
        assert "unknown model 'nope'" in capsys.readouterr().err
