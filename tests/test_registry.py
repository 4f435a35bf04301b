"""Announced models: one revision of an alias and one default at a time, whoever starts when. Real server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from embedq import core
from embedq.core.checkpoint import revision
from embedq.core.checkpoint.content_hash import content_hash
from embedq.core.codec import pack, unpack
from embedq.core.errors import InvalidSettings, UnknownModel
from embedq.core.results import Embeddings, Ranking
from embedq.core.settings import ModelSettings
from embedq.tasks.models import EXPIRES_S, KEY, RENEWS_AFTER_S, Registry, Served
from embedq.tasks.speeds import MAX_AGE_S, WORKERS_KEY, Speed, Speeds
from tests.checkpoints import as_sentence_transformer, change_weights, save_cross_encoder, save_encoder

OLD = Served(
    "m", "/models/old", ["embed", "rerank"], 384, 256, ["dense"], [], "0.2.0", "v1", content="a" * 32, reading="1" * 8
)
NEW = replace(OLD, source="/models/new", revision="v2", content="b" * 32)
LARGER = replace(NEW, dimensions=1024)


@pytest.fixture
def client(server: str) -> Iterator[redis.Redis]:
    """A database of its own."""
    with redis.Redis.from_url(server.removesuffix("/0") + "/2") as found:
        found.delete(KEY, WORKERS_KEY)
        yield found
        found.delete(KEY, WORKERS_KEY)


def test_an_announcement_says_revision_content_and_dimensions(client: redis.Redis) -> None:
    Registry(client).announce([OLD], "one@host")
    assert Registry(client).all() == {"m": OLD}
    assert list(Speeds(client).present()) == ["one@host"]


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (NEW, "EMBEDQ_REPLACE_REVISION=true"),
        (replace(OLD, reading="2" * 8), "EMBEDQ_REPLACE_REVISION=true"),
        (LARGER, "cannot be a rolling revision"),
        (replace(OLD, content="", dimensions=1024), "cannot be a rolling revision"),
        (replace(OLD, outputs=["dense", "sparse"]), "cannot be a rolling revision"),
    ],
)
def test_another_model_under_an_alias_that_is_served_is_refused_with_both_named(
    client: redis.Redis, other: Served, why: str
) -> None:
    Registry(client).announce([OLD], "one@host")
    with pytest.raises(InvalidSettings, match=why) as refused:
        Registry(client).announce([other], "two@host")
    assert f"is {other}, but worker one@host serves {OLD}" in str(refused.value)
    assert Registry(client).all() == {"m": OLD}
    assert list(Speeds(client).present()) == ["one@host"]


def test_the_same_revision_is_announced_by_any_number_of_workers(client: redis.Redis) -> None:
    for worker in ("one@host", "two@host", "one@host"):
        Registry(client).announce([replace(OLD, source=f"/copies/{worker}")], worker)
    assert sorted(Speeds(client).present()) == ["one@host", "two@host"]


def test_once_its_workers_are_gone_an_alias_may_stand_for_another_model(client: redis.Redis) -> None:
    Registry(client).announce([OLD], "one@host")
    Speeds(client).withdraw("one@host")
    Registry(client).announce([LARGER], "two@host")
    # Killed, and not heard of since.
    report = json.loads(client.hget(WORKERS_KEY, "two@host"))
    client.hset(WORKERS_KEY, "two@host", json.dumps(report | {"told_s": report["told_s"] - MAX_AGE_S}))
    Registry(client).announce([OLD], "three@host")
    assert Registry(client).all() == {"m": OLD}


def test_a_worker_that_was_killed_is_not_refused_for_its_own_report(client: redis.Redis) -> None:
    Registry(client).announce([OLD], "one@host")
    Registry(client).announce([NEW], "one@host")
    assert Registry(client).all() == {"m": NEW}


def test_workers_that_serve_other_models_are_no_hindrance(client: redis.Redis) -> None:
    Registry(client).announce([OLD])
    Speeds(client).publish("other@host", {"n": Speed(1.0)})
    Registry(client).announce([NEW], "one@host")


def test_a_rolling_revision_replaces_one_of_the_same_form_and_does_not_fall_back(client: redis.Redis) -> None:
    Registry(client).announce([OLD], "one@host")
    Registry(client).announce([NEW], "two@host", may_replace=True)
    assert Registry(client).all() == {"m": NEW}
    with pytest.raises(InvalidSettings, match="worker two@host serves /models/new at revision v2"):
        Registry(client).announce([OLD], "one@host")
    with pytest.raises(InvalidSettings, match="cannot be a rolling revision"):
        Registry(client).announce([LARGER], "three@host", may_replace=True)


BFLOAT16 = replace(OLD, precision="bfloat16", is_auto=True)
FLOAT32 = replace(BFLOAT16, precision="float32")


def test_a_device_that_chose_another_precision_than_those_present_is_refused(client: redis.Redis) -> None:
    Registry(client).announce([BFLOAT16], "one@host")
    with pytest.raises(
        InvalidSettings, match="precision=auto is float32 on this device, but worker one@host serves model 'm'"
    ):
        Registry(client).announce([FLOAT32], "two@host")
    assert Registry(client).all() == {"m": BFLOAT16}
    Registry(client).announce([BFLOAT16], "two@host")


def test_a_precision_that_somebody_named_may_be_mixed_and_whoever_was_there_goes_on(client: redis.Redis) -> None:
    Registry(client).announce([BFLOAT16], "one@host")
    Registry(client).announce([replace(FLOAT32, is_auto=False)], "two@host")
    Registry(client).announce([BFLOAT16], "one@host")  # it renews
    Registry(client).announce([replace(BFLOAT16, precision="")], "old@host")  # of a version that does not tell


def pass_time(client: redis.Redis, seconds: float) -> None:
    """Let every announcement and report be so much older."""
    for key, field in ((KEY, "renewed_s"), (WORKERS_KEY, "told_s")):
        for name, value in client.hgetall(key).items():
            record = json.loads(value)
            client.hset(key, name, json.dumps(record | {field: record[field] - seconds}))


def test_an_alias_that_no_worker_serves_any_more_expires_whoever_serves_others(client: redis.Redis) -> None:
    """As after SIGHUP with a model less: the launcher's workers go on, and renew what they serve."""
    dropped = replace(OLD, alias="dropped", default_for=["embed"])
    Registry(client).announce([OLD, dropped], "one@host")
    for _ in range(2):
        pass_time(client, EXPIRES_S - 60)
        assert "m" in Registry(client).all()
        Registry(client).renew([OLD], "one@host")
    assert Registry(client).all() == {"m": OLD}
    with pytest.raises(UnknownModel, match="unknown model 'dropped'; workers have announced m"):
        Registry(client).check("embed", "dropped")
    Registry(client).announce([replace(OLD, alias="new", default_for=["embed"])], "two@host")  # the default is free


def test_an_announcement_is_renewed_by_workers_of_its_revision_alone(client: redis.Redis) -> None:
    Registry(client).announce([OLD], "one@host")
    Registry(client).announce([NEW], "two@host", may_replace=True)
    pass_time(client, RENEWS_AFTER_S)
    announced = client.hgetall(KEY)
    Registry(client).renew([OLD], "one@host", may_replace=True)
    assert client.hgetall(KEY) == announced
    Registry(client).renew([NEW], "two@host")
    assert client.hgetall(KEY) != announced
    pass_time(client, EXPIRES_S + 60)  # its last worker is gone, one of the old revision is left
    Registry(client).renew([OLD], "one@host")
    assert Registry(client).all() == {"m": OLD}


def test_each_worker_writes_its_announcements_once_an_hour(client: redis.Redis) -> None:
    Registry(client).announce([OLD], "one@host")
    pass_time(client, RENEWS_AFTER_S - 60)
    for changes in (False, True):
        announced = client.hgetall(KEY)
        Registry(client).renew([OLD], "one@host")
        assert (client.hgetall(KEY) != announced) == changes
        pass_time(client, 120)


def test_announcements_of_workers_that_do_not_renew_them_stay(client: redis.Redis) -> None:
    of_it = {name: value for name, value in asdict(OLD).items() if name != "renewed_s"}
    client.hset(KEY, "m", json.dumps(of_it))
    Registry(client).renew([replace(OLD, alias="n")], "two@host")
    assert Registry(client).all().keys() == {"m", "n"}


def test_a_worker_of_an_older_release_does_not_say_its_content(client: redis.Redis) -> None:
    """So that a pool can be upgraded one by one; other dimensions are refused all the same."""
    of_it = {name: value for name, value in asdict(OLD).items() if name not in ("content", "reading", "revision")}
    client.hset(KEY, "m", json.dumps(of_it))
    Speeds(client).publish("older@host", {"m": Speed(1.0)})
    with pytest.raises(InvalidSettings, match="content unknown"):
        Registry(client).announce([LARGER], "two@host")
    Registry(client).announce([NEW], "two@host")


@pytest.mark.parametrize("broken", [b"{", b"[]", b'"x"', b"\xff", b"{}", b'{"default_for": 3, "told_s": "x"}'])
def test_records_that_cannot_be_read_are_passed_over(client: redis.Redis, broken: bytes) -> None:
    client.hset(KEY, "x", broken)
    client.hset(WORKERS_KEY, "x@host", broken)
    Registry(client).announce([replace(OLD, default_for=["embed"])], "one@host")
    assert list(Registry(client).all()) == ["m"]


@pytest.mark.parametrize(
    "rivals",
    [
        [replace(OLD, content=f"{number:032}") for number in range(8)],
        [replace(OLD, alias=f"m{number}", default_for=["embed"]) for number in range(8)],
    ],
    ids=["revisions", "defaults"],
)
def test_of_workers_that_start_together_one_wins(server: str, client: redis.Redis, rivals: list[Served]) -> None:
    for _ in range(20):
        client.delete(KEY, WORKERS_KEY)
        barrier = threading.Barrier(len(rivals))
        refused: list[int] = []

        def start(number: int, barrier: threading.Barrier = barrier, refused: list[int] = refused) -> None:
            with redis.Redis.from_url(server.removesuffix("/0") + "/2") as own:
                own.ping()
                barrier.wait(30)
                try:
                    Registry(own).announce([rivals[number]], f"{number}@host")
                except InvalidSettings:
                    refused.append(number)

        threads = [threading.Thread(target=start, args=(number,)) for number in range(len(rivals))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        (winner,) = set(range(len(rivals))) - set(refused)
        assert [*Registry(client).all().values()] == [rivals[winner]]


def test_a_result_names_the_revision_that_made_it(tmp_path: Path) -> None:
    directory = save_encoder(tmp_path / "e")

    def made_by(**model: Any) -> str:
        with core.load(str(directory), device="cpu", model=model) as engine:
            made: Embeddings = engine.embed(["the ferry"])
            assert engine.rerank("the ferry", ["a map"]).revision == made.revision
        return made.revision

    first = made_by()
    assert first.startswith(content_hash(directory) + ".")
    assert made_by() == first == made_by(precision="float32")
    assert made_by(pooling="cls").partition(".")[0] == first.partition(".")[0]
    assert made_by(pooling="cls") != first
    change_weights(directory, lambda tensors: tensors["embeddings.word_embeddings.weight"].add_(0.5))
    assert made_by().partition(".")[0] != first.partition(".")[0]
    as_sentence_transformer(directory, modules=["Transformer", "Pooling"])
    assert made_by(normalize=True) != made_by(normalize=False)
    with core.load(str(save_cross_encoder(tmp_path / "r")), device="cpu") as engine:
        assert len(engine.rerank("the ferry", ["a map"]).revision) == 41


def test_every_setting_of_a_model_that_may_change_its_numbers_is_part_of_its_made_by() -> None:
    """A new one is, unless it is listed here with what it decides instead."""
    others = {"path", "revision", "cache_dir", "sha256"}  # which files, whose content is hashed
    others |= {"layout"}  # which modules there are
    others |= {"precision"}  # by device
    assert set(ModelSettings.model_fields) - others <= set(revision._READING)


@pytest.mark.parametrize(
    "result",
    [
        Embeddings(np.ones((1, 2), np.float32), model="m", revision="r"),
        Ranking(np.ones(1, np.float32), np.zeros(1, np.int32), "m", revision="r"),
    ],
    ids=["embeddings", "ranking"],
)
def test_the_revision_travels_and_results_without_it_are_read(result: Embeddings | Ranking) -> None:
    assert unpack(pack(result)).revision == "r"
    fields = result.to_map()
    del fields["revision"]
    assert type(result).from_map(fields).revision == ""
    assert "revision" not in type(result).from_map(fields).to_map()
    with pytest.raises(ValueError, match="revision"):
        type(result).from_map(fields | {"revision": 3})
