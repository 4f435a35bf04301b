"""Celery's canvases and Python's everyday types on the wire: what kombu's JSON carries, ours carries too."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Any
from uuid import UUID

import msgpack
import pytest
from celery import Celery, Signature, chain, chord, group
from celery.canvas import maybe_signature
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.utils.json import dumps, loads

from embedq.core.codec import pack, unpack

PROPERTY = settings(max_examples=150)

app = Celery("canvases", set_as_current=False)


@app.task(name="add", shared=False)
def add(*numbers: int) -> int:
    return sum(numbers)


def lazily(canvases: list[Signature]) -> Iterator[Signature]:
    """The same ones from a generator, as applications often make a group."""
    yield from canvases


SINGLES = st.builds(lambda numbers, is_immutable: add.signature(numbers, immutable=is_immutable), st.lists(st.integers(0, 9), max_size=3).map(tuple), st.booleans())  # fmt: skip
SPECIAL = st.sampled_from(
    [
        add.chunks(zip(range(7), range(7), strict=True), 3),
        add.chunks(zip(range(7), range(7), strict=True), 3).group(),
        add.map([1, 2, 3]),
        add.starmap([(1, 2), (3, 4)]),
        add.starmap((number, number) for number in range(3)),
        add.s(1).set(link=add.s(2), link_error=add.s(3)),
    ]
)
CANVASES = st.recursive(
    SINGLES | SPECIAL,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: chain(*parts))
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: group(parts))
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: group(lazily(parts)))
        | st.tuples(st.lists(inner, min_size=1, max_size=3), inner).map(lambda parts: chord(parts[0], parts[1]))
    ),
    max_leaves=6,
)


@PROPERTY
@given(CANVASES)
def test_a_canvas_arrives_as_it_arrives_in_json(canvas: Signature) -> None:
    arrived = unpack(pack(canvas))
    assert json.loads(dumps(arrived)) == json.loads(dumps(canvas))
    assert json.loads(dumps(maybe_signature(arrived, app=app))) == json.loads(dumps(maybe_signature(canvas, app=app)))


@pytest.mark.parametrize(
    "value",
    [
        datetime(2026, 11, 30, 12, 5, 1, 250, tzinfo=UTC),
        datetime(2026, 11, 30),
        date(2026, 11, 30),
        time(12, 5, 1),
        Decimal("1.10"),
        UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
    ],
    ids=repr,
)
def test_the_types_of_kombus_json_travel_in_its_form(value: Any) -> None:
    assert unpack(pack({"value": value})) == {"value": value}
    assert type(unpack(pack(value))) is type(value)
    assert loads(dumps(value)) == value
    assert loads(json.dumps(msgpack.unpackb(pack(value)))) == value, "kombu reads our form"


class Level(IntEnum):
    HIGH = 3


class Colour(StrEnum):
    RED = "red"


class Point(dict[str, int]):
    """A dict whose length is not its number of keys, as Celery's group."""

    def __len__(self) -> int:
        return 7


class Lazy(list[int]):
    """A list that holds nothing until somebody iterates, as those Celery makes of generators."""

    def __iter__(self) -> Iterator[int]:
        return iter((1, 2, 3))


class Money:
    def __json__(self) -> dict[str, str]:
        return {"amount": "1.10"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2**64, 2**64),
        (-(2**63) - 1, -(2**63) - 1),
        (10**4000, 10**4000),
        (2**64 - 1, 2**64 - 1),
        ({1, 2}, {1, 2}),
        (frozenset({"a"}), frozenset({"a"})),
        (Level.HIGH, 3),
        (Colour.RED, "red"),
        (True, True),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(list, a=[1]), {"a": [1]}),
        (Point(a=1, b=2), {"a": 1, "b": 2}),
        (Lazy(), [1, 2, 3]),
        ((1, (2, "x")), [1, [2, "x"]]),
        (bytearray(b"xy"), b"xy"),
        (Money(), {"amount": "1.10"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_derives_from_a_plain_type_travels_as_that_type(value: Any, expected: Any) -> None:
    assert unpack(pack([value, "behind it"])) == [expected, "behind it"]


MALFORMED = [
    *[(marker, written) for marker in ("datetime", "date", "time", "uuid") for written in (None, "nonsense", 1.5, [[1]], {"hex": 3}, "9" * 5000)],
    *[("decimal", written) for written in (None, "nonsense", [[1]], {})],  # type: ignore[var-annotated]
    *[("set", written) for written in (None, 1.5, [[1]])],
    *[("int", written) for written in (None, "nonsense", 1.5, [1])],
]  # fmt: skip


@pytest.mark.parametrize(("marker", "written"), MALFORMED)
def test_a_malformed_value_is_an_error_that_does_not_quote_it(marker: str, written: Any) -> None:
    with pytest.raises(ValueError, match=r"^malformed bytes arrived: no \w+$") as caught:
        unpack(msgpack.packb({"__type__": marker, "__value__": written}))
    assert caught.value.__cause__ is None


def test_an_unknown_type_stays_a_map() -> None:
    given = {"__type__": "os.system", "__value__": "echo"}
    assert unpack(pack(given)) == given
    assert unpack(pack({"__type__": ["x"], "__value__": 1})) == {"__type__": ["x"], "__value__": 1}


def test_what_has_no_form_is_refused_by_the_name_of_its_class() -> None:
    with pytest.raises(TypeError, match="cannot send a object"):
        pack(object())
