"""Every metric that the documentation or deploy name exists, and the documentation explains every value of their labels."""

from __future__ import annotations

import re
from itertools import chain

import pytest

from embedq.tasks.metrics import BUILD, EXPORTER, OUTCOMES, STAGES, WORKER, Families, Metric
from embedq.testing import fixtures
from tests.running import ROOT

ALL = WORKER | EXPORTER

REFERENCE = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")

EXPLANATION = (ROOT / "docs" / "operating" / "metrics.md").read_text(encoding="utf-8")

#: Files that whoever runs us writes queries in.
FILES = sorted(
    path
    for kind in ("json", "yml", "yaml", "md")
    for path in chain((ROOT / "deploy").rglob(f"*.{kind}"), (ROOT / "docs").rglob(f"*.{kind}"))
)

#: What looks like a metric of ours in a query: a value of a label, an alert's or a rule's name do not.
_NAME = re.compile(r"(?<![\w:/-])embedq_[a-z_]+(?=[\s{\[()`\"',]|$)")

#: In code blocks, and not metrics: commands of remote control, and the fixtures of `embedq.testing`.
_OTHERS = {"embedq_stats", "embedq_status"} | {name for name in vars(fixtures) if name.startswith("embedq_")}


def named(text: str) -> set[str]:
    """Metrics that a text names; of a histogram its own name."""
    return {_own(name) for name in _NAME.findall(text)} - _OTHERS


def _own(name: str) -> str:
    own = re.sub("_(bucket|sum|count)$", "", name)
    return own if ALL.get(own, Metric("gauge", (), "")).kind == "histogram" else name


def test_every_stage_and_outcome_is_explained() -> None:
    assert all(f"`{name}`" in EXPLANATION for name in (*STAGES, *OUTCOMES))


def test_no_query_names_a_metric_that_there_is_not() -> None:
    assert named(REFERENCE) == set(ALL)
    assert {path.name: found for path in FILES if (found := named(path.read_text(encoding="utf-8")) - set(ALL))} == {}


def test_names_are_found_in_queries() -> None:
    query = 'histogram_quantile(0.9, rate(embedq_job_seconds_bucket{stage="waited"}[5m])) > embedq_no_such_thing'
    assert named(query) == {"embedq_job_seconds", "embedq_no_such_thing"}


def test_names_say_their_kind_and_none_is_taken_twice() -> None:
    assert set(WORKER) & set(EXPORTER) == set(BUILD)  # of a process, whichever it is
    for name, metric in ALL.items():
        assert name.endswith("_total") == (metric.kind == "counter"), name
    # In OpenMetrics a counter's name is without its ending.
    assert len({name.removesuffix("_total") for name in ALL}) == len(ALL)


def test_a_metric_takes_exactly_its_labels() -> None:
    families = Families(EXPORTER)
    with pytest.raises(AssertionError, match="embedq_workers has the labels"):
        families.add("embedq_workers", 1.0)
    with pytest.raises(AssertionError, match="embedq_workers has the labels"):
        families.add("embedq_workers", 1.0, model="minilm", kind="embed")
