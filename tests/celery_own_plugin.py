"""Loaded into the processes that run Celery's own tests: our result backend by configuration, and each test's outcome."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from celery.loaders.app import AppLoader

from embedq import celeryconfig

#: The variable that names the file of outcomes.
NOTES = "CELERY_OWN_NOTES"


class Loader(AppLoader):
    """Celery's loader with our `override_backends`: applications that are made with defaults alone do not read theirs."""

    override_backends = celeryconfig.override_backends


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what a test's call came to, and what its fixtures came to unless they passed.

    At once: what ran is known if the process ends before its time.
    """
    if report.when == "call" or not report.passed:
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        with Path(os.environ[NOTES]).open("a", encoding="utf-8") as notes:
            notes.write(json.dumps({"test": report.nodeid, "outcome": outcome}) + "\n")
