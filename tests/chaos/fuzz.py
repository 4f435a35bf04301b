"""Messages that are no jobs among good ones: no worker ends, every good job is answered, nothing vanishes.

A message that cannot become a job must end as a dead letter, where an operator finds it, or as a failure
under the id that it names, where its producer does. One that is a job all the same is answered.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import redis
from celery import chain, states

from embedq import tasks
from tests.bench.report import Figure
from tests.chaos.fleet import Fleet
from tests.chaos.light_worker import ALIAS
from tests.chaos.load import Answers, Load, wait_for_answers
from tests.chaos.mutations import Mutations
from tests.consuming import dead_letters
from tests.own_server import OwnServer

#: Bad messages of a run.
FULL, QUICK = 10_000, 400

#: Where they are put: lists that workers take from.
_LISTS = ("embed", "embed", "embed:9", "rerank", "embed.light")

#: Bytes of texts that a job may have: small, so that a message above the limit is no burden.
_MAX_BYTES_PER_JOB = 256 * 1024

#: One message in so many is too large to be looked at.
_TOO_LARGE_EVERY = 500

#: Bad messages in one write.
_PER_WRITE = 100

#: Seconds that all may take to be answered or buried.
_PATIENCE_S = 15.0


def run(num_bad: int, seed: int, say: Callable[[str], None]) -> list[Figure]:
    """Put `num_bad` messages into the queues while jobs are sent; returns what became of all of them."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embedq-chaos-")))
        server = stack.enter_context(OwnServer(directory, appendfsync="no"))
        tasks.app.conf.update(broker_url=server.url, result_backend=server.url)
        stack.callback(tasks.app.close)
        settings = {"EMBEDQ_MAX_BYTES_PER_JOB": str(_MAX_BYTES_PER_JOB), "EMBEDQ_DEFAULT_RERANK": ALIAS}
        fleet = stack.enter_context(Fleet(server.url, directory, 2, **settings))
        fleet.wait_until_serving(2)
        answers = Answers(server.url)
        stack.callback(answers.close)
        client = stack.enter_context(redis.Redis.from_url(server.url))
        mutations = Mutations(_samples(client), seed)
        with Load(answers, num_threads=1) as load:
            bad = _send_bad(client, mutations, num_bad, say)
        lost = wait_for_answers(answers, load.sent, _PATIENCE_S)
        say("waiting for the last to be answered or buried")
        _settle(client)
        failed = [state for state in _states(client, load.sent) if state != states.SUCCESS]
        ended = _endings(client, bad)
        fleet.look()
        num_exits = len(fleet.ended)
        held = client.hlen("unacked")
        return [
            Figure("good", "good jobs sent among them", len(load.sent), "jobs"),
            Figure("good_lost", "  without a result", len(lost), "jobs", 0, is_limit=True),
            Figure("good_failed", "  with a failure", len(failed), "jobs", 0, is_limit=True),
            Figure("bad", "bad messages", len(bad), "messages"),
            *_by_kind(ended),
            Figure("bad_lost", "bad messages that vanished", _count(ended, "vanished"), "messages", 0, is_limit=True),
            Figure("bad_held", "messages still in flight", held, "messages", 0, is_limit=True),
            Figure("fuzz_exits", "workers that ended", num_exits, "workers", 0, is_limit=True),
        ]


def _samples(client: redis.Redis) -> list[bytes]:
    """Messages as our producers send them, of every form that a job of ours may have."""
    queue = "samples"
    embed, rerank = tasks.embed, tasks.rerank
    embed.apply_async((["a text"],), queue=queue)
    embed.apply_async((["one", "two"],), {"input_type": "query", "dtype": "float16"}, queue=queue, priority=9)
    embed.apply_async((["a text"],), queue=queue, countdown=0.1, expires=3600)
    embed.apply_async((["a text"],), queue=queue, link=embed.si(["another"]), ignore_result=False)
    embed.apply_async((["x" * 70_000],), queue=queue)
    chain(embed.si(["first"]), embed.si(["second"])).apply_async(queue=queue)
    rerank.apply_async(("a query", ["a passage"]), queue=queue)
    keys = [f"{queue}{step}" for step in ("", ":3", ":6", ":9")]
    samples = [raw for key in keys for raw in client.lrange(key, 0, -1)]
    client.delete(*keys)
    return [raw for raw in samples if "compression" not in json.loads(raw)["headers"]]


def _send_bad(
    client: redis.Redis, mutations: Mutations, num_bad: int, say: Callable[[str], None]
) -> list[tuple[str, bytes]]:
    bad: list[tuple[str, bytes]] = []
    while len(bad) < num_bad:
        with client.pipeline(transaction=False) as pipe:
            for _ in range(min(_PER_WRITE, num_bad - len(bad))):
                kind, raw = mutations()
                if len(bad) % _TOO_LARGE_EVERY == 0:
                    kind, raw = "too large", json.dumps(mutations.fresh() | {"body": "x" * 2_000_000}).encode()
                pipe.lpush(_LISTS[len(bad) % len(_LISTS)], raw)
                bad.append((kind, raw))
            pipe.execute()
        while client.llen("embed") > 5 * _PER_WRITE:  # deep enough a queue: good jobs are to be among them
            time.sleep(0.01)
        if len(bad) % 2000 == 0:
            say(f"{len(bad):,} bad messages sent")
    return bad


def _settle(client: redis.Redis) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while (client.hlen("unacked") or any(map(client.llen, _LISTS))) and time.monotonic() < deadline_s:
        time.sleep(0.05)


def _states(client: redis.Redis, ids: list[str]) -> list[str | None]:
    blobs = client.mget([f"celery-task-meta-{job_id}" for job_id in ids])
    return [blob and tasks.app.backend.decode(blob)["status"] for blob in blobs]


def _endings(client: redis.Redis, bad: list[tuple[str, bytes]]) -> Counter[tuple[str, str]]:
    """How often messages of each kind ended in each way."""
    buried = Counter(letter["message"] for letter in dead_letters(client))
    num_too_large = sum(letter["reason"].startswith("larger than") for letter in dead_letters(client))
    named = [_job_id(raw) for _, raw in bad]
    answered = dict(zip(named, _states(client, [job_id or "-" for job_id in named]), strict=True))
    ended: Counter[tuple[str, str]] = Counter()
    for (kind, raw), job_id in zip(bad, named, strict=True):
        state = answered[job_id] if job_id else None
        kept = raw.decode(errors="replace")
        if kind == "too large" and num_too_large:
            num_too_large -= 1
            ended[kind, "dead letters"] += 1
        elif buried[kept]:
            buried[kept] -= 1
            ended[kind, "dead letters"] += 1
        elif state:
            ended[kind, "answered" if state == states.SUCCESS else "failures"] += 1
        elif _wants_no_answer(raw):
            ended[kind, "done"] += 1
        else:
            ended[kind, "vanished"] += 1
            print(f"vanished: {kind}: {raw[:2000]!r}", file=sys.stderr)
    return ended


def _job_id(raw: bytes) -> str | None:
    """The id under which a producer would look for the answer."""
    try:
        job_id = json.loads(raw)["headers"]["id"]
        return job_id if isinstance(job_id, str) and job_id.encode() else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _wants_no_answer(raw: bytes) -> bool:
    """A job whose result is to be ignored: nobody can tell from outside what became of it."""
    try:
        return json.loads(raw)["headers"]["ignore_result"] is True
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _by_kind(ended: Counter[tuple[str, str]]) -> list[Figure]:
    figures = []
    for kind in sorted({kind for kind, _ in ended}):
        ways = {way: count for (of, way), count in ended.items() if of == kind}
        said = ", ".join(f"{count:,} {way}" for way, count in sorted(ways.items()))
        figures.append(Figure(f"bad: {kind}", f"  {kind}: {said}", sum(ways.values()), "messages"))
    return figures


def _count(ended: Counter[tuple[str, str]], way: str) -> int:
    return sum(count for (_, found), count in ended.items() if found == way)
