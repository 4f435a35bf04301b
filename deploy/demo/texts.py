"""The demo's texts: what the Python that runs it says about its own standard library.

Comes in: nothing but the library's source files, which are parsed and never run. Goes out: real
English prose, the same texts in the same order on every run of the same Python.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from embedq.core.errors import OperatorError

#: Below this a docstring is a label ("Return self."), not a text that could answer a question.
MIN_CHARACTERS = 40

#: Directories that are no part of the library itself, or hold files that are broken on purpose.
_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})

#: Syntax nodes that can carry a docstring.
_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Text:
    """One docstring and where it stands."""

    #: Dotted name of the module, class or function it describes.
    where: str
    text: str

    @property
    def first_line(self) -> str:
        return self.text.partition("\n")[0]


def read(max_texts: int, library: Path | None = None) -> list[Text]:
    """Read up to `max_texts` different docstrings below `library`, by default the standard library.

    Single-file modules come before packages, and both by name: a small number still covers the
    modules people know. A file that cannot be parsed is passed over; OperatorError if none is left.
    """
    root = library or Path(sysconfig.get_path("stdlib"))
    found: dict[str, Text] = {}
    for path in _source_files(root):
        for text in _docstrings(path, _module_name(path.relative_to(root))):
            found.setdefault(text.text, text)
            if len(found) == max_texts:
                return list(found.values())
    if not found:
        raise OperatorError(f"there is no Python source file with a docstring below {root}")
    return list(found.values())


def _source_files(root: Path) -> list[Path]:
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    own = (path for path in paths if not _SKIPPED.intersection(path.parts))
    return [root / path for path in sorted(own, key=lambda path: (len(path.parts), path.as_posix()))]


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _docstrings(path: Path, module: str) -> Iterator[Text]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own invalid escapes are not our user's business
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            return
    for name, node in _definitions(tree, module):
        text = (ast.get_docstring(node) or "").strip()
        if len(text) >= MIN_CHARACTERS and _is_encodable(text):
            yield Text(name, text)


def _definitions(node: _Definition, name: str) -> Iterator[tuple[str, _Definition]]:
    """The module, its classes and functions, and theirs; functions inside functions are not looked at."""
    yield name, node
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _definitions(child, f"{name}.{child.name}")


def _is_encodable(text: str) -> bool:
    """Returns True if it can travel as UTF-8; a docstring may show lone surrogates as an example."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
