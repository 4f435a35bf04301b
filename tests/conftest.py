"""Fixtures that the tests share: one real server and one real worker for the whole run."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from celery import Celery
    from redis import Redis

    from embedq.core.engine import Engine
    from tests.checkpoints import FakeModel
    from tests.encoders import Encoder
    from tests.kustomizing import Object
    from tests.own_server import OwnServer

# Before anything of ours is imported: a developer's own settings must not leak into the tests, and
# the default server of this process must not be the developer's.
for _name in [name for name in os.environ if name.startswith("EMBEDQ_")] + ["REDIS_URL"]:
    os.environ.pop(_name, None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["EMBEDQ_DATA_DIR"] = os.devnull
# Side by side with other tests (`pytest -n`) each process has its share of the cores: torch's threads, two for each core,
# would wait for each other longer than they compute.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
# Under nohup launchers rightly take no notice of SIGHUP, nor programs that a shell put into the background of SIGINT,
# which the tests send them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, and none refused for the time it takes: the machine may be busy.
hypothesis.settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")

#: The fixtures that applications test with, as they load them.
pytest_plugins = ["embedq.testing"]

GOLDEN = Path(__file__).parent / "golden"

#: Files that take longest. Side by side, a file is one process's: begun last, one of them would keep the others waiting.
LONGEST_FIRST = [
    "test_saved_keys",
    "test_saved_forms",
    "test_stock_workers",
    "test_launcher",
    "test_workers",
    "test_bench_peers",
    "test_transport",
    "test_bench",
    "test_minilm",
    "test_bench_jobs",
    "test_demo",
    "test_quantized",
    "test_acl",
    "test_failover",
    "test_tls",
    "test_metrics_server",
    "test_wheel",
    "test_datasets",
    "test_connect",
    "test_bench_accelerator",
    "test_end_to_end",
]

#: Kinds of devices that have an overlay in `deploy/kubernetes`.
OVERLAYS = sorted(path.name for path in (Path(__file__).parents[1] / "deploy" / "kubernetes" / "overlays").iterdir())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, in the same order in every process."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    if unstable := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"tests named by an address differ between processes; give ids: {unstable}")
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """Exclude libraries and tests from garbage collection.

    When memory runs out, a device's cache is emptied after a full collection, which took half a second of each try.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _jobs_are_sent() -> Iterator[None]:
    """Undo `task_always_eager`, which a page of the documentation sets: later tests of the process would send nothing."""
    yield
    application = sys.modules.get("embedq.tasks.application")
    if application and application.app.configured:
        application.app.conf.task_always_eager = False


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of the real all-MiniLM-L6-v2."""
    from embedq.deploy.demo import minilm

    return minilm.directory()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real server of this run, with the producer side of this process pointed at it."""
    from embedq import tasks
    from embedq.workers import embedded

    tasks.config.wire["data_dir"] = str(tmp_path_factory.mktemp("server"))
    with embedded.server() as url:
        tasks.app.move_to(url)
        yield url
        tasks.app.close()


@pytest.fixture(scope="session")
def delivery_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server that only the tests of delivery use: they count its calls and empty it."""
    from tests.consuming import own_server
    from tests.echo_worker import app

    with own_server(tmp_path_factory.mktemp("delivery")) as url:
        app.conf.update(broker_url=url, result_backend=url)
        yield url
        app.close()


@pytest.fixture
def url(delivery_url: str) -> str:
    return delivery_url


@pytest.fixture
def client(url: str) -> Iterator[Redis]:
    """A client of the server of delivery, emptied, its counters at zero."""
    from redis import Redis

    with Redis.from_url(url) as client:
        client.flushall()
        client.config_resetstat()
        yield client


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    """Each overlay of `deploy/kubernetes`."""
    return str(request.param)


@pytest.fixture
def objects(overlay: str) -> list[Object]:
    """The objects of an overlay."""
    from tests.kustomizing import rendered
    from tests.manifests import DIRECTORY

    return rendered(DIRECTORY / "overlays" / overlay)


@pytest.fixture
def model() -> FakeModel:
    from tests.checkpoints import FakeModel

    return FakeModel()


@pytest.fixture
def encoder() -> Encoder:
    """Jobs whose encoding a test sees and holds."""
    from tests.encoders import Encoder

    return Encoder()


@pytest.fixture
def engine(model: FakeModel) -> Iterator[Engine]:
    """An engine with one embedding model, and nothing else configured."""
    from tests.engines import running

    with running(model) as engine:
        yield engine


@pytest.fixture(scope="session")
def worker(server: str, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One real worker with MiniLM in float32 (the default) and a tiny cross-encoder, `reranker`.

    Yields the environment it was started with.
    """
    from tests.running import start_workers

    config = tmp_path_factory.mktemp("worker") / "embedq.toml"
    config.write_text(
        f"""
default_rerank = "minilm"

[models.minilm]
path = "{minilm}"
precision = "float32"

[models.reranker]
path = "{GOLDEN / "flagreranker_bert" / "model"}"
precision = "float32"
"""
    )
    environment = {"EMBEDQ_REDIS_URL": server, "EMBEDQ_CONFIG": str(config)}
    with start_workers(environment, "--cpu-workers", "1"):
        yield environment


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    """A server that only the test talks to, so that its commands can be counted and it can be made to fail."""
    from tests.own_server import OwnServer

    with OwnServer(tmp_path_factory.mktemp("own")) as server:
        yield server


@pytest.fixture
def app(own: OwnServer) -> Iterator[Celery]:
    """An application with a worker's backend on an empty `own`; jobs run in it by `tests.traced_jobs.run`."""
    from tests.traced_jobs import application

    own.client.flushall()
    with application(own.url) as made:
        yield made


@pytest.fixture
def producer(own: OwnServer, app: Celery) -> Iterator[Celery]:
    """Another application on the same server, with a producer's backend."""
    from tests.traced_jobs import application

    with application(own.url, is_worker=False) as made:
        yield made
