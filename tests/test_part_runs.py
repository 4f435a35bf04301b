"""One part's job without a worker: what it opens, what it writes beside another, and what it queues after itself."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest
import redis

from embedq.core.batching.job import Job
from embedq.core.engine import Engine
from embedq.core.errors import BadSource, InvalidInput, WorkerError
from embedq.tasks.datasets import manifest as manifests
from embedq.tasks.datasets.gathered import Gathered
from embedq.tasks.datasets.manifest import FAILED, MANIFEST, Columns, Manifest, Part, from_bytes
from embedq.tasks.datasets.objects import commit, computed_for
from embedq.tasks.datasets.part_task import message_of
from embedq.tasks.datasets.receipts import FOUND, WRITTEN, Receipt
from embedq.tasks.datasets.roots import Roots
from embedq.tasks.datasets.rows import BadRow, Rows
from embedq.tasks.datasets.schemas import schema_to_text
from embedq.tasks.datasets.sources import Input
from embedq.tasks.datasets.stores import TEMPORARY, Store, locate
from embedq.workers.parts.part_feed import Feed
from embedq.workers.parts.part_run import PartRun, PartsContext
from embedq.workers.parts.part_threads import PartThreads

TIMEOUT_S = 10.0


@pytest.fixture
def manifest() -> Manifest:
    """Three parts of two rows."""
    inputs = (Input("/rows.parquet", 1, "v", "parquet", None, [0, 2, 4, 6]),)
    schema = schema_to_text(pa.schema([]))
    return Manifest("embed", ("/",), {"alias": "m"}, {}, Columns(text="body"), 2, schema, "0", inputs).with_id()


@pytest.fixture
def store(manifest: Manifest, tmp_path: Path) -> Store:
    """A target below the only root."""
    store = Store(locate(str(tmp_path / "root" / "target")))
    store.replace(MANIFEST, lambda file: file.write(manifest.to_bytes()))
    return store


def written(store: Store, manifest: Manifest, failed: dict[int, BadRow]) -> Receipt:
    """Commit the first part, whose rows have no vectors; `failed` are listed."""
    gathered = Gathered(manifest, computed_for(manifest, 2, 2), pa.schema([]))
    nothing = pa.RecordBatch.from_arrays([], names=[])
    assert not list(gathered.take(Rows(0, ["a", "b"], nothing, nothing), None))
    gathered.fail(failed)
    return commit(store, manifest, gathered, Receipt(WRITTEN, manifest.id, 0, 2, len(gathered.failed)))


def answer_of(store: Store, manifest: Manifest, root: Path, follow: Callable[..., None]) -> Future[Receipt]:
    """The answer of the first part's job, of a worker without an engine."""
    state: Any = SimpleNamespace(known=dict, record=lambda _: None, release=lambda *_: None, now_s=lambda: 0.0)
    context = PartsContext(cast(Engine, None), Roots((str(root),)), lambda _: state, "w", follow)
    message = message_of(manifest, store.location.path, manifest.parts[0], 1)
    run = PartRun(context, message, "job", lambda _: False)
    run.run()
    return run.answer


class Panic(BaseException):
    """As the Rust code of a library raises it."""


def test_a_part_thread_that_ends_answers_its_part_and_goes_on_or_ends_the_worker(
    engine: Engine, manifest: Manifest, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, reasons, is_broken = PartThreads(engine, "w"), list[str](), threading.Event()
    threads.on_broken = lambda reason: (reasons.append(reason), is_broken.set())[0]
    outcomes: list[Receipt | None] = [None, Receipt(WRITTEN, manifest.id, 0, 2, 0)]

    def receipt(run: PartRun) -> Receipt:
        if outcomes and (found := outcomes.pop(0)):
            return found
        raise Panic("a text")

    monkeypatch.setattr(PartRun, "_receipt", receipt)

    def answer() -> Receipt:
        message = asdict(message_of(manifest, store.location.path, manifest.parts[0], 1))
        return threads.take(message, "job", 3, lambda: None).answer.result(TIMEOUT_S)

    with pytest.raises(WorkerError, match="a part failed unexpectedly with Panic"):
        answer()
    assert answer().outcome == WRITTEN
    assert threads.num_held == 0
    for _ in range(2 * 4):  # two threads, each started four times
        if not is_broken.is_set():
            with pytest.raises(WorkerError):
                answer()
    assert is_broken.wait(TIMEOUT_S)
    assert re.fullmatch(r"the thread part-\d ended unexpectedly with Panic", reasons[0])


def test_another_thread_never_sees_some_of_the_parts(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    parts_of, first = manifests._parts_of, threading.current_thread()
    seen: list[int] = []

    def slow(inputs: tuple[Input, ...]) -> Iterator[Part]:
        for part in parts_of(inputs):
            yield part
            if threading.current_thread() is first and not seen:
                other = threading.Thread(target=lambda: seen.append(len(manifest.parts)))
                other.start()
                other.join(TIMEOUT_S)

    monkeypatch.setattr(manifests, "_parts_of", slow)
    assert [part.number for part in manifest.parts] == [0, 1, 2]
    assert seen == [3]


@pytest.mark.parametrize("wrong", ["", "a" * 31, "A" * 32, "/../../a" + "b" * 24, 7])
def test_a_manifest_whose_id_could_lead_out_of_the_target_is_refused(manifest: Manifest, wrong: Any) -> None:
    assert from_bytes(manifest.to_bytes(), "here").id == manifest.id
    content = json.dumps(json.loads(manifest.to_bytes()) | {"id": wrong}).encode()
    with pytest.raises(BadSource, match="its id must be 32 hexadecimal digits"):
        from_bytes(content, "here")


def test_whoever_loses_a_part_leaves_the_winners_list_of_failed_rows(manifest: Manifest, store: Store) -> None:
    assert written(store, manifest, {0: BadRow("InvalidInput", "wrong")}).outcome == WRITTEN
    assert written(store, manifest, {}).outcome == FOUND
    assert (store.read(manifest.failed_name(0)) or b"").startswith(b'{"row": 0,')


def test_the_list_that_a_broken_try_left_goes_with_the_part(manifest: Manifest, store: Store) -> None:
    store.replace(manifest.failed_name(0), lambda file: file.write(b'{"row": 0}\n'))
    assert written(store, manifest, {}).outcome == WRITTEN
    assert store.read(manifest.failed_name(0)) is None


def test_the_part_that_follows_is_queued_once_the_server_answers(
    manifest: Manifest, store: Store, tmp_path: Path
) -> None:
    written(store, manifest, {})
    left = [redis.ConnectionError(), None]

    def follow(*_: object) -> None:
        if error := left.pop(0):
            raise error

    assert answer_of(store, manifest, tmp_path / "root", follow).result().outcome == FOUND
    assert left == []


def test_a_part_whose_follower_cannot_be_queued_is_tried_again(
    manifest: Manifest, store: Store, tmp_path: Path
) -> None:
    written(store, manifest, {})

    def follow(*_: object) -> None:
        raise redis.ConnectionError

    with pytest.raises(WorkerError, match="the part that follows this one is not queued"):
        answer_of(store, manifest, tmp_path / "root", follow).result()


@pytest.mark.parametrize("name", ["part", FAILED, TEMPORARY, MANIFEST])
def test_a_link_in_the_target_that_leads_out_of_the_roots_is_refused(
    name: str, manifest: Manifest, store: Store, tmp_path: Path
) -> None:
    written(store, manifest, {})
    path = Path(store.path(manifest.name(0) if name == "part" else name))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidInput, match=r"this worker does not open .*outside.*EMBEDQ_DATA_ROOTS"):
        answer_of(store, manifest, tmp_path / "root", lambda *_: None).result()


@pytest.mark.parametrize(("items", "num_bytes"), [(["ab", "ü"], 4), ([("ab", "ü"), ("", "€")], 7)])
def test_a_slice_is_submitted_with_the_bytes_of_its_texts(items: list[Any], num_bytes: int) -> None:
    given: list[int] = []

    def submit(_: object, __: int, size: int) -> Any:
        given.append(size)
        return Job(cast(Any, list), True)

    engine: Any = SimpleNamespace(submit=submit)
    Feed(engine, list, cast(Any, None), lambda: False).put([0, 1], items)
    assert given == [num_bytes]
