"""`deploy/acl/cluster.acl`: the user of KEDA learns how much waits, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from embedq.workers.embedded import _free_port, find_program
from tests.running import ROOT, Running

ACL = ROOT / "deploy" / "acl"
FILE = ACL / "cluster.acl"

#: Every key there is in the test, with a value of its type.
LISTS = ("embed", "embed:9", "embed.minilm:3", "rerank.minilm")

#: What an autoscaler asks of a key, whatever it is: how much is in it.
SIZE = "if redis.call('type', KEYS[1]).ok == 'zset' then return redis.call('zcard', KEYS[1]) end return redis.call('llen', KEYS[1])"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server with this user, and an administrator who filled it."""
    directory, port = tmp_path_factory.mktemp("users"), _free_port()
    users = directory / "users.acl"
    users.write_text(f"user default off\nuser admin on >admin ~* &* +@all\n{FILE.read_text()}")
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


def connected(port: int) -> redis.Redis:
    return redis.Redis(port=port, username="scaler", password="SCALER-PASSWORD")


def test_the_scaler_learns_the_size_of_every_queue_and_of_what_is_in_flight(port: int) -> None:
    with connected(port) as client:
        assert [client.eval(SIZE, 1, key) for key in (*LISTS, "unacked_index", "embed:6")] == [1, 1, 1, 1, 1, 0]


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
def test_it_may_do_nothing_else(port: int, command: tuple[Any, ...]) -> None:
    with connected(port) as client, pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command)


def test_the_scaler_cannot_read_a_message_from_within_a_script(port: int) -> None:
    for command in ("lindex', KEYS[1], 0", "lpop', KEYS[1]", "lrange', KEYS[1], 0, -1"):
        with connected(port) as client, pytest.raises(redis.exceptions.ResponseError, match="permission"):
            client.eval(f"return redis.call('{command})", 1, "embed")


def test_its_password_is_a_placeholder_and_its_name_no_other_users() -> None:
    found = {path.name: re.findall(r"^user (\S+)", path.read_text(), re.MULTILINE) for path in ACL.glob("*.acl")}
    assert re.findall(r"^user (\S+) on >(\S+) ", FILE.read_text(), re.MULTILINE) == [("scaler", "SCALER-PASSWORD")]
    names = [name for users in found.values() for name in users]
    assert len(set(names)) == len(names), "one server reads both files"
