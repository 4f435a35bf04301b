"""Flower as an operator sees it: real server, worker, Flower and browser.

Run with FLOWER_SCREENSHOT=docs/flower.png to take the documentation's picture of the tasks page.
"""

from __future__ import annotations

import base64
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from celery.exceptions import TaskRevokedError
from playwright.sync_api import Page
from playwright.sync_api import TimeoutError as NotShown

from embedq import tasks
from embedq.deploy import flower
from tests import bulk
from tests.browser import find_browser, open_page
from tests.events import Events
from tests.running import Running, require

#: An event takes milliseconds to its page; a busy machine takes longer.
TIMEOUT_S = 30

#: Never to be seen outside the job.
SECRET = "a very private sentence"

#: The session's worker, which serves both models.
WORKER = f"minilm+reranker.cpu0@{socket.gethostname()}"


@pytest.fixture(scope="module")
def program() -> str:
    """The installed browser; without one these tests have nothing to look with."""
    found = find_browser()
    require(found is not None, "no Chromium is installed, so Flower's pages cannot be looked at")
    return str(found)


@pytest.fixture(scope="module")
def address(worker: dict[str, str]) -> Iterator[str]:
    """Where a real Flower of this run listens."""
    environment = {"EMBEDQ_REDIS_URL": worker["EMBEDQ_REDIS_URL"], **flower.OPEN}
    with Running(flower.command(port=0), environment) as running:
        yield running.wait_for(flower.READY)[0].rpartition(" ")[2]
        running.stop(flower.STOP_TIMEOUT_S)


@pytest.fixture(scope="module")
def page(program: str, address: str) -> Iterator[Page]:
    """A page of the browser, once Flower has heard of the worker and so will hear of its jobs."""
    with open_page(program) as page:
        wait_for(page, f"{address}/workers", WORKER)
        yield page


def wait_for(page: Page, url: str, text: str, count: int = 1) -> str:
    """Load `url` until `count` elements hold exactly `text`; returns all that the page holds."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        page.goto(url)
        try:
            page.get_by_text(text, exact=True).nth(count - 1).wait_for(state="attached", timeout=1000)
            return page.content()
        except NotShown:
            assert time.monotonic() < deadline_s, f"{text!r} is not on {url}:\n{page.inner_text('body')}"


def row(page: Page, job_id: str) -> list[str]:
    """The cells of one job on the tasks page, in the order of `tasks_columns`."""
    line = page.locator("#tasks-table tbody tr").filter(has=page.locator(f"[title='{job_id}']"))
    return [cell.strip() for cell in line.locator("td").all_inner_texts()]


def test_workers_are_listed_by_name(page: Page, address: str) -> None:
    wait_for(page, f"{address}/workers", WORKER)
    assert "Online" in page.locator("tr", has_text=WORKER).inner_text()


def test_jobs_show_counts_and_shapes_and_never_a_text(page: Page, address: str) -> None:
    texts = [f"{SECRET} number {index:03}" for index in range(128)]
    jobs = [
        tasks.embed.delay(texts),
        tasks.embed.apply_async((texts[:64],), {"dimensions": 256, "dtype": "float16"}, priority=9),
        tasks.rerank.delay(SECRET, texts[:50], top_k=10),
        tasks.rerank.delay(SECRET, texts[:20], model="reranker", normalize=True),
        tasks.embed.delay([SECRET], outputs=["dense", "colbert"]),
        tasks.app.send_task("tasks.embed", args=[[SECRET]], queue="embed"),
        tasks.embed.delay(texts, dimensions=1000),  # the worker's model refuses it
    ]
    for job in jobs:
        job.get(timeout=TIMEOUT_S, propagate=False)
    wait_for(page, f"{address}/tasks", "FAILURE")
    contents = [wait_for(page, f"{address}/tasks", "SUCCESS", count=len(jobs) - 1)]
    save_screenshot(page)
    assert [row(page, job.id)[1:5] for job in jobs] == [
        ["SUCCESS", "128 texts, 4,352 characters", "{}", "128 × 384 float32"],
        ["SUCCESS", "64 texts, 2,176 characters", "dimensions=256, dtype=float16", "64 × 256 float16"],
        ["SUCCESS", "50 passages, 1,700 characters", "top_k=10", "best 10 of 50 passages"],
        ["SUCCESS", "20 passages, 680 characters", "model=reranker, normalize=True", "best 20 of 20 passages"],
        ["SUCCESS", "1 text, 23 characters", "outputs=['dense', 'colbert']", "1 × 384 float32 + colbert"],
        ["SUCCESS", "1 text, 23 characters", "{}", "1 × 384 float32"],
        ["FAILURE", "128 texts, 4,352 characters", "dimensions=1000", ""],
    ]
    contents += [wait_for(page, f"{address}/task/{job.id}", job.id) for job in jobs]
    contents.append(wait_for(page, f"{address}/worker/{WORKER}", "Worker pool options"))
    assert all(SECRET not in content for content in contents)


def test_the_broker_page_counts_waiting_jobs_and_hides_the_password(page: Page, address: str, server: str) -> None:
    content = wait_for(page, f"{address}/broker", "embed.minilm")
    assert str(urlsplit(server).password) not in content


def test_whoever_reaches_it_can_look_and_not_touch(page: Page, address: str) -> None:
    content = wait_for(page, f"{address}/worker/{WORKER}", "Worker pool options")
    assert "worker-pool-shrink" not in content
    request = urllib.request.Request(f"{address}/api/worker/shutdown/{WORKER}", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="HTTP Error 40"):
        urllib.request.urlopen(request)


@pytest.mark.parametrize("given", [None, "somebody:secret-word"])
def test_it_asks_for_a_password_unless_told_not_to(worker: dict[str, str], given: str | None) -> None:
    environment = {"EMBEDQ_REDIS_URL": worker["EMBEDQ_REDIS_URL"]} | ({"FLOWER_BASIC_AUTH": given} if given else {})
    with Running(flower.command(port=0), environment) as running:
        address = running.wait_for(flower.READY)[0].rpartition(" ")[2]
        for path in ("/workers", "/api/tasks"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(address + path)
        made_up = [line.partition("asks for ")[2].partition(";")[0] for line in running.lines if "asks for" in line]
        assert len(made_up) == (0 if given else 1)
        token = base64.b64encode((given or made_up[0]).encode()).decode()
        request = urllib.request.Request(f"{address}/workers", headers={"Authorization": f"Basic {token}"})
        assert urllib.request.urlopen(request).status == 200
        running.stop(flower.STOP_TIMEOUT_S)


@pytest.mark.timing
def test_its_buttons_free_a_waiting_and_a_running_job(worker: dict[str, str]) -> None:
    """As the page does it: Revoke for a job that waits, Terminate for one that runs."""
    environment = {"EMBEDQ_REDIS_URL": worker["EMBEDQ_REDIS_URL"], "FLOWER_BASIC_AUTH": "somebody:secret-word"}
    with Running(flower.command(0, "--read_only=False"), environment) as running, Events() as events:
        address = running.wait_for(flower.READY)[0].rpartition(" ")[2]
        with bulk.busy(10_000, events) as job:
            waiting = tasks.embed.apply_async((bulk.texts(10_000, seed=2),), priority=0)
            events.wait_for("received", waiting.id)
            for pressed, button in ((waiting, ""), (job, "?terminate=true")):
                started_s = time.monotonic()
                ask(f"{address}/api/task/revoke/{pressed.id}{button}")
                with pytest.raises(TaskRevokedError):
                    pressed.get(timeout=TIMEOUT_S)
                assert time.monotonic() - started_s < 0.5
                events.wait_for("revoked", pressed.id)
        running.stop(flower.STOP_TIMEOUT_S)


def ask(url: str) -> None:
    token = base64.b64encode(b"somebody:secret-word").decode()
    request = urllib.request.Request(url, method="POST", headers={"Authorization": f"Basic {token}"})
    assert urllib.request.urlopen(request).status == 200


def test_a_job_for_later_shows_no_text_on_its_workers_page(page: Page, address: str) -> None:
    job = tasks.embed.apply_async(([SECRET],), countdown=3600)
    try:
        content = wait_for(page, f"{address}/worker/{WORKER}", job.id)
    finally:
        tasks.app.control.revoke(job.id)
    assert SECRET not in content


def test_the_workers_page_holds_no_password(page: Page, address: str, server: str) -> None:
    content = wait_for(page, f"{address}/worker/{WORKER}", "Worker pool options")
    assert "broker_url" in content
    assert str(urlsplit(server).password) not in content


def save_screenshot(page: Page) -> None:
    path = os.environ.get("FLOWER_SCREENSHOT")
    if path:
        page.screenshot(path=path)
