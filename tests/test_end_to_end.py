"""Producer → Redis → worker → result, with nothing replaced: the promises of DESIGN's path of a job."""

from __future__ import annotations

import logging
import random
import signal
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import redis
from celery import group

from embedq import core, tasks
from embedq.core.errors import InvalidInput, JobTooLarge, UnknownModel
from embedq.core.results import Embeddings, Ranking
from tests.running import children_of, start_workers

pytestmark = pytest.mark.usefixtures("worker")

#: Seconds a small job may take on a busy machine.
TIMEOUT_S = 60


def test_vectors_are_those_of_the_core(minilm: Path) -> None:
    texts = ["a text", "", "日本語のテキスト", "a much longer text " * 40]
    vectors = tasks.embed.delay(texts).get(timeout=TIMEOUT_S)
    assert isinstance(vectors, Embeddings)
    assert vectors.dense is not None
    assert (vectors.dense.shape, vectors.dense.dtype, vectors.model) == ((4, 384), np.float32, "minilm")
    with core.load(str(minilm), precision="float32") as engine:
        np.testing.assert_allclose(vectors.dense, np.asarray(engine.embed(texts)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_embeddings_work_where_an_array_is_expected() -> None:
    vectors = tasks.embed.delay(["one", "two", "three"]).get(timeout=TIMEOUT_S)
    assert len(vectors) == 3
    assert vectors[1].shape == (384,)
    assert np.asarray(vectors).shape == (3, 384)
    assert len(list(vectors)) == 3
    assert not vectors.dense.flags.owndata  # a view of the bytes that arrived


@pytest.mark.parametrize(("dtype", "shape"), [("float16", (2, 64)), ("int8", (2, 64)), ("ubinary", (2, 8))])
def test_dimensions_and_types_as_asked(dtype: str, shape: tuple[int, int]) -> None:
    vectors = tasks.embed.delay(["one", "two"], dimensions=64, dtype=dtype).get(timeout=TIMEOUT_S)
    assert vectors.dense.shape == shape
    assert vectors.dense.dtype == np.dtype("uint8" if dtype == "ubinary" else dtype)


def test_rerank_puts_the_best_passage_first() -> None:
    passages = [
        "Stock prices fell sharply.",
        "The cat sleeps on the sofa.",
        "Rain is expected.",
        "The cat sleeps on the sofa.",
    ]
    ranking = tasks.rerank.delay("Where is the cat?", passages, top_k=3).get(timeout=TIMEOUT_S)
    assert isinstance(ranking, Ranking)
    assert len(ranking.scores) == 4
    assert ranking.scores[1] == pytest.approx(ranking.scores[3], abs=1e-6)
    assert set(ranking.order[:2]) == {1, 3}
    assert len(ranking.order) == 3


def test_rerank_by_token_vectors() -> None:
    ranking = tasks.rerank.delay("a cat", ["a dog", "a cat"], mode="colbert").get(timeout=TIMEOUT_S)
    assert ranking.order[0] == 1
    assert 0.9 < ranking.scores[1] <= 1.0001


def test_rerank_with_a_cross_encoder() -> None:
    raw = tasks.rerank.delay("a query", ["one passage", "another passage"], model="reranker").get(timeout=TIMEOUT_S)
    squashed = tasks.rerank.delay("a query", ["one passage", "another passage"], model="reranker", normalize=True).get(
        timeout=TIMEOUT_S
    )
    np.testing.assert_allclose(squashed.scores, 1 / (1 + np.exp(-raw.scores)), atol=1e-6)
    assert raw.model == "reranker"


def test_many_small_jobs_each_get_their_own_vectors(server: str) -> None:
    random.seed(20261121)
    texts = [
        " ".join(random.choices(["cat", "dog", "sun", "rain", "tree", "stone"], k=random.randint(1, 60)))
        for _ in range(300)
    ]
    jobs = [tasks.embed.apply_async(([text],), priority=9) for text in texts]
    together = tasks.embed.delay(texts).get(timeout=TIMEOUT_S)
    for job, expected in zip(jobs, together, strict=True):
        np.testing.assert_allclose(job.get(timeout=TIMEOUT_S)[0], expected, atol=1e-5)


def test_the_blob_is_plain_msgpack_under_the_job_id(server: str) -> None:
    job = tasks.embed.delay(["a text"])
    vectors = job.get(timeout=TIMEOUT_S)
    with redis.Redis.from_url(server) as client:
        blob = msgpack.unpackb(client.get(f"celery-task-meta-{job.id}"))
        seconds = client.ttl(f"celery-task-meta-{job.id}")
    dense = blob["result"]["dense"]
    assert (blob["status"], blob["task_id"]) == ("SUCCESS", job.id)
    np.testing.assert_array_equal(np.frombuffer(dense["data"], dense["dtype"]).reshape(dense["shape"]), vectors.dense)
    assert 0 < seconds <= tasks.app.conf.result_expires


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks.embed.delay("a bare string"), "list of strings; given str"),
        (lambda: tasks.embed.delay({"a": 1}), "given dict"),
        (lambda: tasks.embed.delay(["fine", 7]), "number 1 is int"),
        (
            lambda: tasks.embed.delay(["lone \ud800"]),
            "number 0, cannot be encoded as UTF-8: lone surrogate at character 5",
        ),
        (lambda: tasks.embed.delay(["x"], dtype="float128"), "float32, float16, int8, ubinary; given 'float128'"),
        (
            lambda: tasks.embed.delay(["x"], dimensions=0),
            "whole number from 1; given 0",
        ),
        (lambda: tasks.embed.delay(["x"], outputs=[]), "outputs must be a list of dense, sparse, colbert"),
        (lambda: tasks.embed.delay(["x"], model="No Such"), "model must be an alias"),
        (lambda: tasks.embed.delay(["x"], model="reranker"), "reranker cannot embed; it can rerank"),
        (
            lambda: tasks.rerank.delay("q", ["x"], top_k=-1),
            "top_k must be a whole number from 1; given -1",
        ),
        (lambda: tasks.rerank.delay(None, ["x"]), "query must be a string; given NoneType"),
        (lambda: tasks.rerank.delay("q", "x"), "passages must be a list of strings; given str"),
    ],
)
def test_bad_input_is_refused_at_the_call(call: Any, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        call()
    assert message in str(caught.value)


def test_an_unknown_model_is_refused_at_the_call() -> None:
    with pytest.raises(UnknownModel, match="'nope'; workers have announced minilm, reranker"):
        tasks.embed.delay(["x"], model="nope")


def test_a_job_above_the_limits_is_refused_at_the_call() -> None:
    with pytest.raises(JobTooLarge, match=r"10,000 texts .* given 1,000,000 texts"):
        tasks.embed.delay(["x"] * 1_000_000)
    with pytest.raises(JobTooLarge, match=r"16,777,216 bytes; given .* 17,000,000 bytes"):
        tasks.embed.delay(["x" * 17_000_000])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": 385}, "up to 384 for model minilm; given 385"),
        ({"outputs": ["sparse"]}, "no 'sparse' output; it has colbert, dense"),
        ({"max_length": 257}, "to 256 tokens for model minilm; given 257"),
    ],
)
def test_what_only_the_model_knows_is_refused_from_get(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        tasks.embed.delay(["x"], **options).get(timeout=TIMEOUT_S)
    assert message in str(caught.value)


def test_right_answers_to_odd_but_legal_input() -> None:
    assert tasks.embed.delay([]).get(timeout=TIMEOUT_S).dense.shape == (0, 384)
    assert tasks.embed.delay(("a tuple",)).get(timeout=TIMEOUT_S).dense.shape == (1, 384)
    assert len(tasks.rerank.delay("q", []).get(timeout=TIMEOUT_S)) == 0
    assert list(tasks.rerank.delay("q", ["only one"]).get(timeout=TIMEOUT_S).order) == [0]
    assert len(tasks.rerank.delay("q", ["x"], top_k=50).get(timeout=TIMEOUT_S)) == 1


def test_a_ten_megabyte_text_is_cut_like_any_long_text() -> None:
    start = "the same beginning " * 300
    long, short = tasks.embed.delay([start * 1_800, start]).get(timeout=TIMEOUT_S)
    np.testing.assert_allclose(long, short, atol=1e-5)


def test_bad_jobs_from_a_foreign_producer_fail_alone(server: str) -> None:
    good = [tasks.embed.delay([f"good {index}"]) for index in range(20)]
    bad = [
        tasks.app.send_task("tasks.embed", args=["not a list"]),
        tasks.app.send_task("tasks.embed", args=[["x", None]]),
        tasks.app.send_task("tasks.embed", args=[["x"] * 10_001]),
        tasks.app.send_task("tasks.embed", args=[["x"]], kwargs={"model": "reranker"}),
        tasks.app.send_task("tasks.rerank", args=[["not a string"], ["x"]]),
        tasks.app.send_task("tasks.embed", args=["lone \\ud800"], serializer="json"),
    ]
    for job in bad:
        with pytest.raises((InvalidInput, JobTooLarge)):
            job.get(timeout=TIMEOUT_S)
    assert all(job.get(timeout=TIMEOUT_S).dense.shape == (1, 384) for job in good)


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match=r"unknown option 'dimension'; the options are model, .* dimensions"):
        tasks.embed.delay(["x"], dimension=3)


def test_calling_a_task_in_the_producer_says_what_to_do() -> None:
    with pytest.raises(InvalidInput, match=r"\.delay\(\.\.\.\)"):
        tasks.embed(["x"])


def test_group_gathers_results() -> None:
    results = group(tasks.embed.s(["x"]), tasks.embed.s(["y", "z"])).apply_async().get(timeout=TIMEOUT_S)
    assert [len(result) for result in results] == [1, 2]


def test_a_result_can_be_sent_on_as_an_argument(server: str) -> None:
    vectors = tasks.embed.delay(["x", "y"]).get(timeout=TIMEOUT_S)
    tasks.app.send_task("application.store", args=[vectors], queue="tests.unread")
    with tasks.app.connection_for_read() as connection, connection.SimpleQueue("tests.unread") as queue:
        message = queue.get(timeout=TIMEOUT_S)
        message.ack()
    (received,), _, _ = message.decode()
    np.testing.assert_array_equal(received.dense, vectors.dense)


def test_the_message_never_shows_a_text(server: str) -> None:
    secret = "a very private sentence"
    with redis.Redis.from_url(server) as client:
        tasks.embed.apply_async(([secret, "x"],), {"dtype": "float16"}, queue="tests.unread")
        message = client.lrange("tests.unread", 0, -1)[0]
        client.delete("tests.unread")
    assert secret.encode() not in message
    assert b"2 texts, 24 characters" in message
    assert b"dtype=float16" in message


def test_sigterm_drains_and_no_job_is_lost(
    worker: dict[str, str], server: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    # A pool of its own on the same server, serving the model under another name, so that the
    # session's worker cannot help.
    environment = worker | {"EMBEDQ_CONFIG": "", "EMBEDQ_DEFAULT_EMBED": "none", "EMBEDQ_DEFAULT_RERANK": "none"}
    config = Path(worker["EMBEDQ_CONFIG"]).read_text().replace("minilm]", "drained]").split("[models.reranker]")[0]
    own = Path(worker["EMBEDQ_CONFIG"]).with_name("drained.toml")
    own.write_text(config.replace('default_rerank = "minilm"', ""))
    environment["EMBEDQ_CONFIG"] = str(own)
    with start_workers(environment, "--cpu-workers", "1") as running:
        jobs = [tasks.embed.delay([f"text {index} " * 50] * 4, model="drained") for index in range(120)]
        jobs[0].get(timeout=TIMEOUT_S)
        (child,) = children_of(running.process.pid)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 0
        assert not Path(f"/proc/{child}").exists()
    with redis.Redis.from_url(server) as client:
        num_waiting = client.llen("embed.drained")
        assert client.hlen("unacked") == 0
    num_done = sum(job.state == "SUCCESS" for job in jobs)
    assert num_done + num_waiting == len(jobs)
    assert num_done > 0
    assert num_waiting > 0, "all was done before the signal arrived; send more"
    tasks.embed.registry.forget("drained")
