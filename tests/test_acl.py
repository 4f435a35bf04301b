"""The users of deploy/acl: the whole path works under them, and each is refused what it does not need."""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from embedq.deploy import flower
from embedq.tasks.queue_cap import RIGHTS
from embedq.workers.embedded import _free_port, find_program
from tests.producing import Failed, Producing
from tests.running import ROOT, Running, require, start_workers
from tests.scraping import Scrape

USERS = ROOT / "deploy" / "acl" / "users.acl"

#: Seconds for a job, an event or a page on a busy machine.
TIMEOUT_S = 60


@dataclass
class Guarded:
    """A server with these users, and one more that may do everything, for the test itself."""

    port: int
    passwords: dict[str, str]

    def url(self, user: str) -> str:
        return f"redis://{user}:{self.passwords[user]}@127.0.0.1:{self.port}/0"

    def client(self, user: str) -> redis.Redis:
        return redis.Redis.from_url(self.url(user), decode_responses=True)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    text = USERS.read_text(encoding="utf-8")
    users = re.findall(r"^user (\w+) on >(\S+) ", text, re.MULTILINE)
    passwords = {user: secrets.token_hex(16) for user, _ in users} | {"admin": secrets.token_hex(16)}
    for user, placeholder in users:
        text = text.replace(f">{placeholder} ", f">{passwords[user]} ")
    file = tmp_path_factory.mktemp("acl") / "users.acl"
    file.write_text(text + f"user admin on >{passwords['admin']} ~* &* +@all\n")
    port = _free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--aclfile", str(file)]
    with Running([find_program(), *options]) as running:
        running.wait_for("Ready to accept connections")
        yield Guarded(port, passwords)


@pytest.fixture(scope="module")
def admin(guarded: Guarded) -> Iterator[redis.Redis]:
    """Whoever may do everything."""
    with guarded.client("admin") as client:
        yield client


@pytest.fixture
def nothing_refused(admin: redis.Redis) -> Iterator[None]:
    """Nothing was refused up to the end of the test: a refusal may be swallowed, and cost a feature in silence."""
    yield
    assert refused(admin) == []


def refused(admin: redis.Redis) -> list[tuple[str, str, str]]:
    """User, reason and object of everything the server refused."""
    return [(entry["username"], entry["reason"], entry["object"]) for entry in admin.acl_log()]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of datasets that the worker may open."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def worker(guarded: Guarded, admin: redis.Redis, minilm: Path, files: Path) -> Iterator[Running]:
    environment = {"EMBEDQ_REDIS_URL": guarded.url("worker"), "EMBEDQ_MODELS": f"minilm={minilm}"}
    environment["EMBEDQ_DATA_ROOTS"] = str(files)
    admin.acl_log_reset()
    with start_workers(environment | {"EMBEDQ_LEASE_S": "4"}, "--cpu-workers", "1") as running:
        yield running
        admin.acl_log_reset()
    # As it ended; what it did as it started is looked at by the first test below.
    assert refused(admin) == []


@pytest.fixture(scope="module")
def producer(guarded: Guarded, worker: Running) -> Iterator[Producing]:
    with Producing({"EMBEDQ_REDIS_URL": guarded.url("producer")}) as producing:
        yield producing


@pytest.mark.usefixtures("nothing_refused")
@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("tasks.embed.delay(['a', 'b']).get(timeout=60).dense.shape", (2, 384)),
        ("tasks.embed.apply_async((['a'],), priority=9).get(timeout=60).dense.shape", (1, 384)),
        ("len(tasks.rerank.delay('q', ['a', 'b', 'c'], mode='dense').get(timeout=60))", 3),
        ("[job.get(timeout=60).dense.shape for job in tasks.embed_many([['a'], ['b']], model='minilm')]", [(1, 384)] * 2),
        ("asyncio.run(tasks.aget(tasks.embed.delay(['c'] * 500), timeout=60)).dense.shape", (500, 384)),
        ("(tasks.embed.si(['a']) | tasks.embed.si(['b', 'c']))().get(timeout=60).dense.shape", (2, 384)),
        ("len(celery.group(tasks.embed.s([word]) for word in 'ab')().get(timeout=60))", 2),
        ("celery.chord(tasks.embed.s([word]) for word in 'ab')(tasks.embed.si(['c'])).get(timeout=60).dense.shape", (1, 384)),
        ("jobs.update(one=tasks.embed.delay(['a'])) or jobs['one'].get(timeout=60).dense.shape", (1, 384)),
        ("jobs['one'].forget() or app.backend.client.get('celery-task-meta-' + jobs['one'].id)", None),
    ],
)  # fmt: skip
def test_a_producer_sends_waits_and_forgets(producer: Producing, expression: str, value: Any) -> None:
    assert producer.do(expression) == value


@pytest.mark.usefixtures("nothing_refused")
def test_a_producer_starts_watches_cancels_and_resumes_a_dataset(producer: Producing, files: Path) -> None:
    (files / "rows.txt").write_text("one\ntwo\nthree\n")
    start = (
        f"tasks.datasets.embed({str(files / 'rows.txt')!r}, {str(files / 'out')!r}, model='minilm', rows_per_part=1)"
    )
    assert producer.do(f"jobs.update(run={start}) or jobs['run'].wait(60).rows.completed") == 3
    again = ("jobs['run'].cancel()", "jobs['run'].resume()", "jobs['run'].retry_failed()", "jobs['run'].status().state")
    assert [producer.do(call) for call in again] == [[], 0, 0, "completed"]


@pytest.mark.usefixtures("nothing_refused", "worker")
def test_a_program_in_another_language_sends_and_waits_as_a_producer(guarded: Guarded) -> None:
    require(shutil.which("node") is not None, "node is not there")
    program = ROOT / "tests" / "examples" / "wire" / "embed.js"
    command = ["node", str(program), guarded.url("producer"), "a text"]
    assert subprocess.check_output(command, text=True, timeout=TIMEOUT_S).startswith("1 384 ")


@pytest.mark.usefixtures("nothing_refused")
@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("tasks.embed.delay('no list')", "InvalidInput"),
        ("tasks.embed.delay(['a'], model='nobodys')", "UnknownModel"),
        ("tasks.embed.delay(['a'], dimensions=1000).get(timeout=60)", "InvalidInput"),
    ],
)
def test_a_producer_gets_its_errors(producer: Producing, expression: str, error: str) -> None:
    with pytest.raises(Failed) as caught:
        producer.do(expression)
    assert caught.value.name == error


def test_a_producer_that_is_allowed_to_cancels_and_others_are_told_that_they_may_not(
    guarded: Guarded, producer: Producing, admin: redis.Redis
) -> None:
    """The rights stand in deploy/acl/README.md, to be added."""
    calls = [
        "jobs.update(late=tasks.embed.apply_async((['a'],), countdown=600)) or tasks.cancel(jobs['late'])[jobs['late'].id]",
        "jobs.update(late=tasks.embed.apply_async((['a'],), countdown=600)) or asyncio.run(tasks.acancel(jobs['late'])).popitem()[1]",
    ]
    for call in calls:
        with pytest.raises(Failed, match="cannot be cancelled"):
            producer.do(call)
    admin.acl_log_reset()
    described = (ROOT / "deploy" / "acl" / "README.md").read_text(encoding="utf-8")
    (selectors,) = re.findall(r"`(\(\+eval .*?\))`", described)
    for selector in re.findall(r"\(.*?\)", selectors):
        admin.execute_command("ACL", "SETUSER", "producer", selector)
    assert [producer.do(call) for call in calls] == ["waiting", "waiting"]
    assert refused(admin) == []
    users = USERS.read_text(encoding="utf-8")
    assert selectors in users.partition("user operator")[2]
    (own,) = re.findall(r"^user producer on \S+ (.*)$", users, re.MULTILINE)
    admin.execute_command("ACL", "SETUSER", "producer", "clearselectors", *re.findall(r"\(.*?\)", own))


@pytest.mark.usefixtures("nothing_refused")
def test_jobs_of_a_killed_worker_are_done_by_the_next(guarded: Guarded, producer: Producing, worker: Running) -> None:
    (child,) = (int(line.rpartition("pid=")[2].split()[0]) for line in worker.wait_for("action=worker_ready"))
    producer.do("jobs.update(many=tasks.embed_many([['some text ' * 50] * 20] * 30))")
    subprocess.run(["kill", "-9", str(child)], check=True)
    assert producer.do("[len(job.get(timeout=60)) for job in jobs['many']]") == [20] * 30
    worker.wait_for("action=worker_ready", count=2)


@pytest.mark.usefixtures("nothing_refused")
def test_flower_sees_the_worker_its_tasks_and_its_queues(guarded: Guarded, producer: Producing) -> None:
    environment = {"EMBEDQ_REDIS_URL": guarded.url("flower"), **flower.OPEN}
    with Running(flower.command(port=0), environment) as running:
        address = running.wait_for(flower.READY)[0].rpartition(" ")[2]
        until(lambda: "minilm.cpu0@" in page(f"{address}/workers?json=1"))
        producer.do("jobs.update(shown=tasks.embed.delay(['a', 'b', 'c']))")
        job_id = producer.do("jobs['shown'].get(timeout=60) and jobs['shown'].id")
        until(lambda: "3 × 384 float32" in page(f"{address}/task/{job_id}"))
        name = re.findall(r"minilm\.cpu0@[\w.-]+", page(f"{address}/workers?json=1"))[0]
        until(lambda: "Worker pool options" in page(f"{address}/worker/{name}"))  # by asking the worker itself
        assert "embed.minilm" in page(f"{address}/broker")
        running.stop(flower.STOP_TIMEOUT_S)


@pytest.mark.usefixtures("nothing_refused")
def test_an_exporter_counts_what_waits_and_who_works(guarded: Guarded, producer: Producing) -> None:
    environment = {"EMBEDQ_REDIS_URL": guarded.url("exporter")}
    with Running([sys.executable, "-m", "embedq.tasks", "exporter", "--port", "0"], environment) as running:
        address = running.wait_for("metrics of the queues at ")[0].rpartition(" ")[2].removesuffix("/metrics")
        until(lambda: Scrape(address).value("embedq_workers", model="minilm") == 1)
        assert Scrape(address).value("embedq_queue_jobs", queue="embed.minilm") == 0
        assert running.stop() == 0


@pytest.mark.usefixtures("nothing_refused")
def test_an_operator_handles_dead_letters_models_and_workers(
    guarded: Guarded, admin: redis.Redis, worker: Running
) -> None:
    admin.lpush("embed", "rubbish")
    until(lambda: admin.xlen("embedq:dead") == 1)
    assert "not a JSON object" in command(guarded, "embedq.tasks", "dead", "list")
    assert "7 bytes" in command(guarded, "embedq.tasks", "dead", "show", "all")
    assert "sent again to embed" in command(guarded, "embedq.tasks", "dead", "replay", "all")
    until(lambda: admin.xlen("embedq:dead") == 1)
    assert "dropped" in command(guarded, "embedq.tasks", "dead", "drop", "all")
    assert admin.xlen("embedq:dead") == 0
    assert command(guarded, "embedq.tasks", "models").startswith("minilm  embed")
    admin.hset("embedq:models", "gone", admin.hget("embedq:models", "minilm").replace('"minilm"', '"gone"'))
    assert "gone: forgotten" in command(guarded, "embedq.tasks", "forget", "gone")
    admin.set("celery-task-meta-done", '{"status": "SUCCESS", "result": null}')
    arguments = [sys.executable, "-m", "embedq", "cancel", "done", "nobodys"]
    with Running(arguments, {"EMBEDQ_REDIS_URL": guarded.url("operator")}) as running:
        assert running.wait() == 1
    assert running.output.splitlines() == [
        "done: not cancelled: it has its answer",
        "nobodys: not found; it is dropped if a worker meets it",
    ]
    assert "minilm.cpu" in command(guarded, "embedq", "status")
    assert "pong" in command(guarded, "celery", "-A", "embedq.tasks", "inspect", "ping", "-t", "10")


def test_a_worker_with_a_wrong_password_ends_at_once_and_shows_none(guarded: Guarded, admin: redis.Redis) -> None:
    url = f"redis://worker:not-the-password@127.0.0.1:{guarded.port}/0"
    environment = {"EMBEDQ_REDIS_URL": url, "EMBEDQ_MODELS": "m=/"}
    with Running([sys.executable, "-m", "embedq.workers.worker"], environment) as running:
        assert running.wait() == 1
    assert "refuses this worker, or its certificate is not trusted: invalid username-password pair" in running.output
    assert "not-the-password" not in running.output
    assert "server_wait" not in running.output
    admin.acl_log_reset()


def command(guarded: Guarded, *arguments: str) -> str:
    """What `python -m …` prints as the operator."""
    with Running([sys.executable, "-m", *arguments], {"EMBEDQ_REDIS_URL": guarded.url("operator")}) as running:
        assert running.wait() == 0, running.output
        return running.output


def page(url: str) -> str:
    with urllib.request.urlopen(url) as answer:
        return str(answer.read().decode())


def until(holds: Any) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


FORBIDDEN = [
    # Other people's jobs: what waits, what runs, what died.
    ("producer", "RPOP embed"), ("producer", "LRANGE embed 0 -1"), ("producer", "LINDEX embed 0"),
    ("producer", "BRPOP embed 1"), ("producer", "DEL embed"), ("producer", "LTRIM embed 1 0"), ("producer", "LSET embed 0 x"),
    ("producer", "HGETALL unacked"), ("producer", "HSET unacked a b"), ("producer", "ZADD unacked_index 1 a"),
    ("producer", "HDEL embedq:jobs a"), ("producer", "XRANGE embedq:dead - +"), ("producer", "XADD embedq:dead * a b"),
    ("producer", "LPUSH embedq:dead x"), ("producer", "LPUSH elsewhere x"), ("producer", "LPUSH embedding x"),
    # Other people's results: only of jobs whose ids one knows, and never written.
    ("producer", "SET celery-task-meta-a b"), ("producer", "PUBLISH celery-task-meta-a b"), ("producer", "KEYS *"),
    ("producer", "SCAN 0"), ("producer", "RANDOMKEY"), ("producer", "PSUBSCRIBE celery-task-meta-*"), ("producer", "PUBSUB CHANNELS"),
    ("producer", "LPUSH celery-task-meta-a b"), ("producer", "GETDEL celery-task-meta-a"),
    # Workers: what they announce, what they are told, what they tell.
    ("producer", "HSET embedq:models a b"), ("producer", "HDEL embedq:models a"), ("producer", "PUBLISH /0.celery.pidbox x"),
    ("producer", "PUBLISH /0.celeryev/worker.offline x"), ("producer", "SUBSCRIBE /0.celeryev/worker.online"),
    ("producer", "SADD _kombu.binding.reply.celery.pidbox x"), ("producer", "EVAL return 0"), ("producer", "SCRIPT LOAD return"),
    ("flower", "RPOP embed"), ("flower", "BRPOP embed 1"), ("flower", "LRANGE embed 0 -1"), ("flower", "LPUSH embed x"),
    ("flower", "DEL embed"), ("flower", "HGETALL unacked"), ("flower", "HGET unacked a"), ("flower", "ZREM unacked_index a"),
    ("flower", "GET celery-task-meta-a"), ("flower", "SUBSCRIBE celery-task-meta-a"), ("flower", "XRANGE embedq:dead - +"),
    ("flower", "HGETALL embedq:models"), ("flower", "HGETALL embedq:jobs"), ("flower", "PUBLISH /0.celeryev/worker.offline x"),
    ("flower", "EVAL return 0"), ("flower", "PSUBSCRIBE *"), ("flower", "SET embed x"), ("flower", "EVALSHA sha 1 embed"),
    ("worker", "XRANGE embedq:dead - +"), ("worker", "XDEL embedq:dead 0-1"), ("worker", "DEL embedq:dead"), ("worker", "DEL embed"),
    ("worker", "HDEL embedq:models a"), ("worker", "LPUSH elsewhere x"), ("worker", "GET elsewhere"), ("worker", "KEYS *"),
    ("worker", "PUBLISH /0.celery.pidbox x"), ("worker", "PSUBSCRIBE /0.celeryev/*"), ("worker", "PSUBSCRIBE celery-task-meta-*"),
    ("worker", "DEL celery-task-meta-a"), ("worker", "EVAL return 1 elsewhere"), ("worker", "SADD _kombu.binding.others x"),
    ("worker", "RENAME embed elsewhere"), ("worker", "RPOP x.reply.celery.pidbox"), ("worker", "SELECT 1"),
    ("exporter", "RPOP embed"), ("exporter", "LPUSH embed x"), ("exporter", "DEL embed"), ("exporter", "LRANGE embed 0 -1"),
    ("exporter", "GET celery-task-meta-a"), ("exporter", "HGETALL unacked"), ("exporter", "XRANGE embedq:dead - +"),
    ("exporter", "HSET embedq:workers a b"), ("exporter", "HSET embedq:models a b"), ("exporter", "EVAL return 0"),
    ("exporter", "EVAL return 1 embed"), ("exporter", "SCAN 0"), ("exporter", "DBSIZE"), ("exporter", "PUBLISH /0.celery.pidbox x"),
    ("worker", "DEL embedq:workers"), ("producer", "HSET embedq:workers a b"), ("flower", "HGETALL embedq:workers"),
    ("operator", "RPOP embed"), ("operator", "LRANGE embed 0 -1"), ("operator", "HGETALL unacked"), ("operator", "GET celery-task-meta-a"),
    ("operator", "XADD embedq:dead * a b"), ("operator", "DEL embedq:dead"), ("operator", "DEL embed"), ("operator", "HSET embedq:models a b"),
]  # fmt: skip


def asked(admin: redis.Redis, user: str, words: list[str]) -> str:
    """What the server would say if `user` gave this command: OK, or why not."""
    return str(admin.execute_command("ACL", "DRYRUN", user, *words))


@pytest.mark.parametrize(("user", "words"), FORBIDDEN, ids=[f"{user}-{words}" for user, words in FORBIDDEN])
def test_what_a_user_does_not_need_is_refused(admin: redis.Redis, user: str, words: str) -> None:
    parts = words.split()
    if parts[:2] == ["EVAL", "return"]:  # the script, the number of its keys, its keys
        parts = ["EVAL", "return 1", parts[2], *parts[3:]]
    answer = asked(admin, user, parts)
    assert "has no permissions" in answer, answer


def test_a_refusal_is_one_and_not_only_said_to_be(guarded: Guarded) -> None:
    for user, words in [("producer", "RPOP embed"), ("flower", "BRPOP embed 1"), ("worker", "FLUSHALL")]:
        with guarded.client(user) as client, pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*words.split())
    once = Retry(NoBackoff(), 0)
    with redis.Redis(port=guarded.port, retry=once) as nobody, pytest.raises(redis.AuthenticationError):
        nobody.ping()


def test_nobody_has_a_dangerous_command_beyond_those_named(admin: redis.Redis) -> None:
    named = {"keys", "scan", "select", "fcall", "function|load", "monitor", "swapdb", "client|kill", "config|get"}
    dangerous = named | set(admin.acl_cat("dangerous")) | set(admin.acl_cat("admin"))
    assert len(dangerous) > 80
    for user, allowed in {
        "producer": set(),
        "worker": {"info"},
        "flower": set(),
        "exporter": set(),
        "operator": set(),
    }.items():
        assert {name for name in dangerous if may_run(admin, user, name)} == allowed, user


def may_run(admin: redis.Redis, user: str, name: str) -> bool:
    """Whether `user` has this command at all, on whatever keys."""
    words = name.split("|")
    (described,) = admin.execute_command("COMMAND", "INFO", name).values()
    num_missing = max(0, abs(described["arity"]) - len(words))
    return "has no permissions to run" not in asked(admin, user, [*words, *["0"] * num_missing])


def test_a_chain_leads_to_a_queue_of_yours_with_the_selectors_of_the_page(
    guarded: Guarded, admin: redis.Redis, producer: Producing
) -> None:
    page = (USERS.parent / "README.md").read_text(encoding="utf-8")
    selectors = re.findall(r"\([^()]*\byours\b[^()]*\)", page)
    assert len(selectors) == 2
    try:
        for user in ("worker", "producer"):
            admin.execute_command("ACL", "SETUSER", user, *selectors)
        admin.acl_log_reset()
        for priority, key in ((0, "yours"), (9, "yours:9")):
            yours = f"app.signature('yours.note', queue='yours', priority={priority})"
            producer.do(f"(tasks.embed.si(['a']) | {yours}).apply_async().id")
            until(lambda key=key: admin.llen(key) == 1)
        assert refused(admin) == []
    finally:
        admin.delete("yours", "yours:9")
        admin.acl_load()


def test_a_producer_with_a_cap_needs_a_selector_and_is_told_so(
    guarded: Guarded, admin: redis.Redis, worker: Running
) -> None:
    environment = {"EMBEDQ_REDIS_URL": guarded.url("producer"), "EMBEDQ_MAX_QUEUED_JOBS": "5"}
    with Producing(environment | {"EMBEDQ_MAX_QUEUED_BYTES": "1000000"}) as producing:
        with pytest.raises(Failed, match="give it " + re.escape(RIGHTS)):
            producing.do("tasks.embed.delay(['a']).get(timeout=60).dense.shape")
        admin.execute_command("ACL", "SETUSER", "producer", RIGHTS)
        admin.acl_log_reset()
        try:
            assert producing.do("tasks.embed.delay(['a']).get(timeout=60).dense.shape") == (1, 384)
            many = "[len(job.get(timeout=60)) for job in tasks.embed_many([['a'], ['b']], {'block_s': 60})]"
            assert producing.do(many) == [1, 1]
        finally:
            admin.acl_load()
    assert refused(admin) == []
