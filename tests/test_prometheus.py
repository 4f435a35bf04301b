"""`deploy/prometheus` and `deploy/grafana`: checked by promtool, and every expression asked of a real Prometheus."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedq.workers.embedded import _free_port
from tests.browser import find_browser, open_page
from tests.kustomizing import rendered
from tests.prometheus.exposed import EXPORTER, WORKER, Exposed, served
from tests.running import ROOT, Running

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
ALERT_TESTS = ROOT / "tests" / "prometheus" / "alerts.test.yml"

PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]]

#: Two scrapes, so that rates have something to be taken over.
SCRAPES_TIMEOUT_S = 30.0

needs_prometheus = pytest.mark.skipif(
    not shutil.which("promtool") or not shutil.which("prometheus"), reason="prometheus and promtool are not installed"
)


class Asked:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def __call__(self, expression: str) -> list[dict[str, Any]]:
        """What an expression gives now. urllib.error.HTTPError if it is none."""
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}", timeout=20) as answer:
            found = json.load(answer)
        assert found["status"] == "success"
        return list(found["data"]["result"])


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """A Prometheus with our rules that has read everything twice; scrape targets and interval are the test's."""
    directory, port = tmp_path_factory.mktemp("prometheus"), _free_port()
    with served() as (exposed, worker, exporter):
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
        config["rule_files"] = [str(PROMETHEUS / "alerts.yml")]
        for job, target in zip(config["scrape_configs"], (worker, exporter), strict=True):
            job.pop("dns_sd_configs", None)
            job["static_configs"] = [{"targets": [f"127.0.0.1:{target}"]}]
        file = directory / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={directory / 'data'}"]
        with Running([*command, f"--web.listen-address=127.0.0.1:{port}"]) as prometheus:
            prometheus.wait_for("Server is ready to receive web requests")
            asked = Asked(port)
            _wait_for_scrapes(asked, exposed)
            yield asked


def _wait_for_scrapes(ask: Asked, exposed: Exposed) -> None:
    """Until a rate has two points of each target: it has no way to tell us."""
    deadline_s = time.monotonic() + SCRAPES_TIMEOUT_S
    wanted = ("rate(embedq_jobs_total[1m]) > 0", "increase(embedq_dead_letters_total[1m]) > 0")
    while not all(ask(one) for one in wanted):
        assert time.monotonic() < deadline_s, "nothing was scraped"
        exposed.tick()
        time.sleep(0.2)


def filled(expression: str) -> str:
    """An expression with the dashboard's variables as "All" fills them."""
    return expression.replace("$__rate_interval", "1m").replace("$model", ".*").replace("$worker", ".*")


def names(expression: str) -> set[str]:
    return set(re.findall(r"\bembedq_\w+", expression))


def base(name: str) -> str:
    """A histogram's name without what its series add."""
    return re.sub(r"_(bucket|sum|count)$", "", name) if name.removesuffix("_bucket") in WORKER else name


def scaling_queries() -> list[str]:
    objects = rendered(ROOT / "deploy" / "kubernetes" / "worker")
    (scaled,) = [one for one in objects if one["kind"] == "ScaledObject"]
    return [one["metadata"]["query"] for one in scaled["spec"]["triggers"] if one["type"] == "prometheus"]


@needs_prometheus
def test_prometheus_accepts_its_configuration_and_the_rules() -> None:
    command = ["promtool", "check", "config", str(PROMETHEUS / "prometheus.yml")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f"SUCCESS: {len(RULES)} rules found" in answer.stdout


@needs_prometheus
def test_each_alert_fires_when_it_should_and_not_before() -> None:
    command = ["promtool", "test", "rules", str(ALERT_TESTS)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_each_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    tests = yaml.safe_load(ALERT_TESTS.read_text())["tests"]
    looks = [one for test in tests for one in test["alert_rule_test"]]
    for rule in RULES:
        fires = {bool(one["exp_alerts"]) for one in looks if one["alertname"] == rule["alert"]}
        assert fires == {True, False}, rule["alert"]


def test_each_alert_says_what_to_do_in_the_readme() -> None:
    readme = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    for rule in RULES:
        assert {"summary", "description"} <= set(rule["annotations"])
        assert f"`{rule['alert']}`" in readme


@needs_prometheus
@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS, ids=[f"{t} {n}" for n, (t, _) in enumerate(EXPRESSIONS)])
def test_every_expression_of_the_dashboard_gives_figures(ask: Asked, title: str, expression: str) -> None:
    assert ask(filled(expression)), f"{title}: nothing"


@needs_prometheus
def test_every_rule_can_be_evaluated_by_a_running_prometheus(ask: Asked) -> None:
    with urllib.request.urlopen(f"{ask.url}/api/v1/rules", timeout=20) as answer:
        rules = [rule for group in json.load(answer)["data"]["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in RULES}
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}  # unknown: its turn has not come
    for rule in RULES:
        ask(rule["expr"])


@needs_prometheus
def test_what_the_autoscaler_asks_gives_one_figure(ask: Asked) -> None:
    queries = scaling_queries()
    assert len(queries) == 2
    for query in queries:
        assert len(ask(query)) == 1
        # A model that nobody has announced counts as nothing to do, not as no answer.
        (unknown,) = ask(query.replace("minilm", "never-announced"))
        assert float(unknown["value"][1]) == 0
        # Without the exporter there is no answer, and nobody is scaled by it.
        gone = query.replace("minilm", "never-announced").replace("embedq-exporter", "gone")
        assert ask(gone) == []


@needs_prometheus
@pytest.mark.skipif(not find_browser(), reason="no Chromium is installed")
def test_a_person_sees_the_backlog_in_a_browser(ask: Asked, tmp_path: Path) -> None:
    """Prometheus' own page, asked what the dashboard's first graph asks."""
    browser = find_browser()
    assert browser
    expression = "sum by (model, kind) (embedq_backlog_seconds)"
    with open_page(browser) as page:
        page.goto(f"{ask.url}/graph?g0.expr={urllib.parse.quote(expression)}&g0.tab=0&g0.range_input=1m")
        page.wait_for_selector('text=kind="rerank"', timeout=20_000)
        shown = page.inner_text("body")
        page.screenshot(path=tmp_path / "graph.png")  # for whoever wants to look as well
    assert 'model="minilm"' in shown
    assert "No data" not in shown


def test_rules_dashboard_and_autoscaler_name_metrics_that_are_served() -> None:
    expressions = [expression for _, expression in EXPRESSIONS] + [rule["expr"] for rule in RULES] + scaling_queries()
    variables = [str(one["query"]) for one in DASHBOARD["templating"]["list"]]
    named = {base(name) for expression in expressions + variables for name in names(expression)}
    assert named <= {*WORKER, *EXPORTER}
    # And the dashboard shows all there is.
    assert {base(name) for _, expression in EXPRESSIONS for name in names(expression)} == {*WORKER, *EXPORTER}


def test_panels_do_not_overlap_and_have_a_unit() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)


def test_what_is_tried_here_is_what_the_code_serves() -> None:
    """Names and labels of the stand-in above, against those of the code."""
    if importlib.util.find_spec("embedq.tasks.metrics") is None:
        pytest.skip("embedq.tasks.metrics is not there; once it is, it is compared with")
    served_by_code: Callable[[str], dict[str, tuple[str, ...]]] = lambda kind: {  # noqa: E731
        name: metric.labels for name, metric in getattr(importlib.import_module("embedq.tasks.metrics"), kind).items()
    }
    assert served_by_code("WORKER") == WORKER
    assert served_by_code("EXPORTER") == EXPORTER
