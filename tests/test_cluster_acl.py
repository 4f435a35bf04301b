"""`deploy/acl/cluster.acl`: the users of KEDA and of the exporter learn sizes and ages, and change nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.running import ROOT, Running
from workers.embedded import _free_port, find_program

#: Every key there is in the test, with a value of its type.
LISTS = ("embed", "embed:9", "embed.minilm:3", "rerank.minilm")

#: What an autoscaler asks of a key, whatever it is: how much is in it.
SIZE = "if redis.call('type', KEYS[1]).ok == 'zset' then return redis.call('zcard', KEYS[1]) end return redis.call('llen', KEYS[1])"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server with these users, and an administrator who filled it."""
    directory, port = tmp_path_factory.mktemp("users"), _free_port()
    users = directory / "users.acl"
    text = (ROOT / "deploy" / "acl" / "cluster.acl").read_text(encoding="utf-8")
    users.write_text(f"user default off\nuser admin on >admin ~* &* +@all\n{text}")
    command = [find_program(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--aclfile", str(users)]
    with Running([*command, "--dir", str(directory)]) as server:
        server.wait_for("Ready to accept connections")
        with redis.Redis(port=port, username="admin", password="admin") as admin:
            for key in LISTS:
                admin.lpush(key, '{"body": "secret"}')
            admin.zadd("unacked_index", {"tag": 1.0})
            admin.hset("unacked", "tag", "secret")
            admin.hset("embedq:models", "minilm", "{}")
            admin.xadd("embedq:dead", {"message": "secret"})
            admin.set("celery-task-meta-1", "secret")
        yield port


def connected(port: int, user: str) -> redis.Redis:
    return redis.Redis(port=port, username=user, password=f"{user.upper()}-PASSWORD")


def test_the_scaler_learns_the_size_of_every_queue_and_of_what_is_in_flight(port: int) -> None:
    with connected(port, "scaler") as client:
        assert [client.eval(SIZE, 1, key) for key in (*LISTS, "unacked_index", "embed:6")] == [1, 1, 1, 1, 1, 0]


def test_the_exporter_reads_what_it_counts(port: int) -> None:
    with connected(port, "exporter") as client:
        script = client.register_script(
            "return {redis.call('LLEN', KEYS[1]), redis.call('LINDEX', KEYS[1], -1):sub(-2)}"
        )
        assert script(keys=["embed"]) == [1, b'"}']
        assert client.zcard("unacked_index") == 1
        assert client.xlen("embedq:dead") == client.xinfo_stream("embedq:dead")["entries-added"] == 1
        assert client.hgetall("embedq:models") == {b"minilm": b"{}"}
        assert client.hgetall("embedq:workers") == client.hgetall("embedq:speeds") == {}
        assert client.time()[0] > 0


FORBIDDEN: list[tuple[Any, ...]] = [
    ("LRANGE", "embed", 0, -1),
    ("RPOP", "embed"),
    ("LPUSH", "embed", "forged"),
    ("DEL", "embed"),
    ("HGETALL", "unacked"),
    ("ZREM", "unacked_index", "tag"),
    ("GET", "celery-task-meta-1"),
    ("XRANGE", "embedq:dead", "-", "+"),
    ("HSET", "embedq:models", "minilm", "forged"),
    ("PUBLISH", "/0.celery.pidbox", "shutdown"),
    ("SUBSCRIBE", "celery-task-meta-1"),
    ("KEYS", "*"),
    ("SCAN", 0),
    ("CONFIG", "GET", "*"),
    ("ACL", "LIST"),
    ("SHUTDOWN",),
    ("FLUSHALL",),
]


@pytest.mark.parametrize("command", FORBIDDEN, ids=lambda command: " ".join(map(str, command[:2])))
@pytest.mark.parametrize("user", ["scaler", "exporter"])
def test_neither_may_do_anything_else(port: int, user: str, command: tuple[Any, ...]) -> None:
    with connected(port, user) as client, pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command)


def test_the_scaler_cannot_read_a_message_from_within_a_script(port: int) -> None:
    for command in ("lindex', KEYS[1], 0", "lpop', KEYS[1]", "lrange', KEYS[1], 0, -1"):
        with connected(port, "scaler") as client, pytest.raises(redis.exceptions.ResponseError, match="permission"):
            client.eval(f"return redis.call('{command})", 1, "embed")


def test_the_passwords_are_placeholders_and_every_user_has_one() -> None:
    text = (ROOT / "deploy" / "acl" / "cluster.acl").read_text(encoding="utf-8")
    assert re.findall(r"^user (\S+) on >(\S+) ", text, re.MULTILINE) == [
        ("exporter", "EXPORTER-PASSWORD"),
        ("scaler", "SCALER-PASSWORD"),
    ]
    assert Path(find_program()).is_file()
