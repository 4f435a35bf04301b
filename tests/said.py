"""Runs the documentation's Python, and compares what expressions give with the comments behind them.

    len(rows)  # 1000                      the value is 1000
    vectors.dense.shape  # (2, 128): cut   the value is (2, 128)
    vectors.dense  # (2, 384) float32      an array of that shape
    ranking.order  # [1, 0]: best first    an array of these values

A comment that does not begin with a number, a tuple, a list or a string is prose.
"""

from __future__ import annotations

import ast
import asyncio
import re
from typing import Any

import numpy as np

#: The beginning of a comment that is a value.
_VALUE = re.compile(r"  # (\d+|\([\d, ]+\)|\[[\d, ]*\]|\"[^\"]*\")(?=$|[:, ])")


class _Compared(ast.NodeTransformer):
    """Each expression that stands by itself, with a value in the comment behind it -> a comparison of the two."""

    def __init__(self, source: str) -> None:
        self._lines = source.splitlines()

    def visit_Expr(self, node: ast.Expr) -> ast.AST:  # the name decides what it visits
        said = _VALUE.search(self._lines[(node.end_lineno or 0) - 1])
        if not said:
            return node
        value = ast.parse(said[1], mode="eval").body
        call = ast.Call(ast.Name("_compare", ast.Load()), [node.value, value, ast.Constant(node.lineno)], [])
        return ast.fix_missing_locations(ast.copy_location(ast.Expr(call), node))


def run(source: str, name: str, namespace: dict[str, Any]) -> None:
    """Run a block in `namespace`; awaits at its top level run in an event loop of its own."""
    asyncio.run(run_within(source, name, namespace))


async def run_within(source: str, name: str, namespace: dict[str, Any]) -> None:
    """Run a block in the event loop of the caller. AssertionError names the line whose comment is wrong."""

    def compare(value: Any, said: Any, line: int) -> None:
        assert are_alike(value, said), f"{name}:{line} says {said!r}, and it is {value!r:.200}"

    namespace["_compare"] = compare
    tree = _Compared(source).visit(ast.parse(source, name))
    code = compile(tree, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if awaitable := eval(code, namespace):
        await awaitable


def are_alike(value: Any, said: Any) -> bool:
    """Returns True if a value is what a comment says: an array by its shape, if that is a tuple, else by its values."""
    if isinstance(value, np.ndarray):
        return bool(value.shape == said) if isinstance(said, tuple) else value.tolist() == said
    return bool(value == said)
