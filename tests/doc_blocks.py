"""The code blocks of the documentation, each with its page, line and mark.

A mark is a comment right above a block:

    <!-- test: name -->          a test of its own runs it, or all blocks of one name together
    <!-- file: path -->          it is that file, which other tests run
    <!-- not run: reason -->     nothing runs it
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from markdown_it import MarkdownIt

from tests.running import ROOT

#: The pages whose blocks people are told to type.
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deploy").rglob("README.md"),
    ]
)

_MARK = re.compile(r"<!-- (test|file|not run): (.+?) -->")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    language: str
    code: str
    #: Of the mark above it: "test", "file" or "not run", and what follows; empty without one.
    mark: str = ""
    said: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> list[Block]:
    """All fenced blocks of a page, those in lists included."""
    found: list[Block] = []
    mark: re.Match[str] | None = None
    for token in MarkdownIt().enable("table").parse(text):
        if token.type == "fence":
            line = token.map[0] + 1 if token.map else 0
            kind, said = (mark[1], mark[2]) if mark else ("", "")
            found.append(Block(page, line, token.info.strip(), token.content, kind, said))
        if token.type in ("fence", "html_block"):
            mark = _MARK.match(token.content) if token.type == "html_block" else None
        elif not token.type.endswith("_close"):
            mark = None
    return found


@cache
def all_blocks() -> tuple[Block, ...]:
    """The blocks of every page."""
    return tuple(
        block
        for path in PAGES
        for block in blocks_of(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    )


def code_of(page: str, name: str) -> str:
    """The code under one name on a page, in its order. KeyError if there is none."""
    parts = [block.code for block in all_blocks() if block.page == page and (block.mark, block.said) == ("test", name)]
    if not parts:
        raise KeyError(f"{page} has no block marked test: {name}")
    return "\n".join(parts)


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")
