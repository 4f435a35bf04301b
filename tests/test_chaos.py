"""The shorter run of `python -m tests.chaos`, and the parts of it that could hide what it looks for."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.attacks import Loss, redelivery_s
from tests.chaos.mutations import Mutations
from tests.chaos.notes import Done, Notes, read
from tests.chaos.proxy import Proxy
from tests.running import ROOT
from tests.test_transport import envelope

#: Longest a byte may take through a proxy on this machine before a test fails.
PATIENCE_S = 10.0

#: How long to look for a byte that must not come.
SILENCE_S = 0.3


@pytest.mark.timing
@pytest.mark.timeout(320)
@pytest.mark.parametrize("run", ["storm", "fuzz", "poison", "threads", "forks", "upgrade", "datasets"])
def test_the_shorter_run_keeps_every_promise(run: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.chaos", run, "--quick", "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    if run == "upgrade" and "is not in this checkout" in done.stderr:
        pytest.skip("the history of the previous release is not in this checkout")
    found = {figure["key"]: figure for figure in json.loads(figures.read_text())["figures"]}
    assert [figure["key"] for figure in found.values() if figure["is_met"] is False] == []
    # It did what it is for.
    least = {"storm": {"killed": 12, "sent": 500, "redelivered": 50, "hung": 1, "server_kills": 2, "cut": 4, "freezes": 1},
             "datasets": {"folder.workers": 4, "folder.brokers": 1, "s3.stores": 1, "load.kills": 1},
             "fuzz": {"good": 100, "bad": 400}, "poison": {"deaths": 3, "poisoned": 1},
             "threads": {"threads_sent": 100, "ended": 6, "died": 3, "restarted": 3},
             "forks": {"children": 4, "right": 200, "forks_cut": 1},
             "upgrade": {"by_old": 100, "by_both": 100, "by_ours": 100}}[run]  # fmt: skip
    assert {key: count for key, count in least.items() if found[key]["value"] < count} == {}


def test_a_seed_gives_the_same_messages_again() -> None:
    samples = [envelope(**{"content-type": "application/x-embedq-msgpack", "body": "k5GhYYCA"})]
    first, second, other = (Mutations(samples, seed) for seed in (1, 1, 2))
    drawn = [first() for _ in range(300)]
    assert drawn == [second() for _ in range(300)]
    assert drawn != [other() for _ in range(300)]
    assert len({kind for kind, _ in drawn}) > 10


def test_notes_tell_what_was_computed_again_and_what_was_delivered_twice(tmp_path: Path) -> None:
    notes = Notes(tmp_path, 0)
    for job_id in ("one", "two"):
        notes.received(f"tag of {job_id}".replace(" ", "-"), job_id)
    notes.received("tag-of-one", "one")
    notes.computed(["one", "two"])
    notes.computed(["one"])
    done = read(tmp_path)
    assert done.num_computed == {"one": 2, "two": 1}
    assert done.num_repeated == 1
    assert len(done.deliveries["tag-of-one"]) == 2
    assert done.tags == {"one": {"tag-of-one"}, "two": {"tag-of-two"}}


def test_redelivery_is_counted_to_the_first_other_worker_that_took_the_job() -> None:
    losses = [Loss(1, "a", 10.0, {"x": 9.0, "y": 9.0, "z": 9.0}), Loss(2, "b", 13.0, {"y": 12.5})]
    done = Done(deliveries={"x": [(9.0, 1), (12.0, 3)], "y": [(9.0, 1), (15.0, 3)], "z": [(9.0, 1)]})
    assert redelivery_s(losses, done) == ([2.0, 2.0, 2.5], 1)


def test_a_frozen_connection_stays_open_and_silent_and_a_new_one_works() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, Proxy(server.getsockname()[1]) as proxy:
        near, far = _connect(proxy, server)
        near.sendall(b"before")
        assert far.recv(6) == b"before"
        assert proxy.freeze() == 1
        near.sendall(b"frozen")
        far.settimeout(SILENCE_S)
        with pytest.raises(TimeoutError):
            far.recv(1)
        other_near, other_far = _connect(proxy, server)
        other_far.sendall(b"new")
        assert other_near.recv(3) == b"new"
        proxy.thaw()
        far.settimeout(PATIENCE_S)
        assert far.recv(6) == b"frozen"
        for end in (near, far, other_near, other_far):
            end.close()


def _connect(proxy: Proxy, server: socket.socket) -> tuple[socket.socket, socket.socket]:
    near = socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE_S)
    server.settimeout(PATIENCE_S)
    far, _ = server.accept()
    far.settimeout(PATIENCE_S)
    return near, far
