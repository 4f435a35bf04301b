"""The error tree: one string each, a message of its own, and the shape that the module draws."""

from __future__ import annotations

import importlib
import re

import pytest

from embedq.core import errors
from embedq.core.errors import EmbedqError


def _all_classes(cls: type[EmbedqError]) -> list[type[EmbedqError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _all_classes(sub))]


CLASSES = [cls for cls in _all_classes(EmbedqError) if cls.__module__ == errors.__name__]


def _drawn_parents() -> dict[str, str]:
    """Class -> parent, as the tree in the module's docstring shows them by indentation."""
    parents: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if not (found := re.match(r"([ │├└─]*)([A-Z]\w+)(?:  |$)", line)):
            continue
        depth = len(found[1])
        path = [(column, name) for column, name in path if column < depth]
        if path:
            parents[found[2]] = path[-1][1]
        path.append((depth, found[2]))
    return parents


def test_the_tree_is_the_one_the_module_draws() -> None:
    assert len(CLASSES) > 10
    assert _drawn_parents() == {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES if cls is not EmbedqError}


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_is_rebuilt_from_its_module_name_and_one_string(cls: type[EmbedqError]) -> None:
    raised = cls("texts 3 of 4")
    rebuilt = getattr(importlib.import_module(cls.__module__), cls.__name__)(*raised.args)
    assert (type(rebuilt), rebuilt.args, str(rebuilt)) == (cls, ("texts 3 of 4",), "texts 3 of 4")


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_without_a_message_speaks_through_its_docstring(cls: type[EmbedqError]) -> None:
    assert cls.__doc__
    assert str(cls()) == cls.__doc__
    assert "\n" not in str(cls())


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_takes_no_second_argument(cls: type[EmbedqError]) -> None:
    with pytest.raises(TypeError):
        cls("one", "two")  # type: ignore[call-arg]
