"""What Prometheus would see: a scrape over HTTP, read with Prometheus' own parser."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

#: Seconds for what should happen within a few.
TIMEOUT_S = 60


class Scrape:
    """All samples of one scrape."""

    def __init__(self, address: str) -> None:
        status, text = get(f"{address}/metrics")
        assert status == 200, text
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels, others aside. AssertionError if there is none."""
        found = [one.value for one in self._samples if one.name == name and labels.items() <= one.labels.items()]
        assert found, f"no sample {name} {labels}"
        return sum(found)

    def labels(self, name: str) -> set[str]:
        """The names of the labels of all samples of this name."""
        return {label for one in self._samples if one.name == name for label in one.labels}


def get(url: str) -> tuple[int, str]:
    """Status and body of a page, errors included."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def wait_until(is_so: Callable[[], Any]) -> Any:
    """Ask, as a prober does, until the answer is true; returns it. AssertionError if it never is."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (answer := is_so()):
        assert time.monotonic() < deadline_s, "it did not become so"
        time.sleep(0.05)
    return answer
