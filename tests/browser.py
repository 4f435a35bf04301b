"""A real headless Chromium, as it is installed on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

#: Names under which distributions install it.
_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")

#: No sandbox: CI often runs as root in a container. The rest keeps it from talking to anyone but us.
_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_browser() -> str | None:
    """The installed browser's program; None where there is none."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@contextmanager
def open_page(program: str) -> Iterator[Page]:
    """A page of a browser with a fresh profile, wide enough for a table of many columns."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=_ARGUMENTS)
        try:
            yield browser.new_page(viewport={"width": 1680, "height": 700})
        finally:
            browser.close()
