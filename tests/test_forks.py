"""Programs that fork after they have loaded a model or waited for results: an error at once, or the same as before."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.own_server import OwnServer
from tests.running import Running

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process with threads")


def found(name: str, **environment: str) -> Any:
    with Running([sys.executable, "-m", "tests.forking", name], environment) as running:
        (line,) = running.wait_for("found ", timeout_s=100)
    return json.loads(line.partition(" ")[2])


def test_an_engine_used_after_a_fork_says_so_at_once_and_its_parent_goes_on() -> None:
    seen = found("engine")
    for call in ("embed", "await"):
        assert seen[call].startswith("DeviceFailure: this engine was made by process")
        assert "Load the model after the fork" in seen[call]
    assert seen["is_alive"] is False
    assert seen["close"] == "closed"
    assert seen["parent"] == 1


@pytest.mark.timing
def test_a_forked_producer_waits_by_itself_and_takes_nothing_from_its_parent(own: OwnServer) -> None:
    own.client.flushall()
    seen = found("producer", EMBEDQ_REDIS_URL=own.url)
    for waiter in ("child", "async", "parent"):
        assert seen[waiter]["right"] == 20, seen
        assert seen[waiter]["seconds"] < 2 * 20 * 0.2 + 2, seen  # each is stored 0.2 s after the one before it
    assert seen["held"]
