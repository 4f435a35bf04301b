"""Bytes on the wire: what travels comes back the same, anything else is refused with ValueError."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedq.core.codec import DTYPES, pack, unpack
from embedq.core.results import Embeddings, Ranking, Sparse

#: The same examples in every run.
PROPERTY = settings(max_examples=60)

ARRAYS = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)

#: Values under keys that mean something to the decoder, in every wrong combination.
HOSTILE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=3)
    | st.binary(max_size=16) | st.sampled_from([*sorted(DTYPES), "|O", "<U4", "embeddings", "ranking", [2], [0, 2**63], [1] * 9]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data", "embedq", "dense", "colbert", "values", "offsets", "int8_ranges", "scores", "order", "model"]),
        inner,
        max_size=6,
    )
    | st.fixed_dictionaries({"dtype": inner, "shape": inner, "data": inner})
    | st.fixed_dictionaries({"embedq": st.just("ranking"), "scores": inner, "order": inner})
    | st.fixed_dictionaries({"embedq": st.just("embeddings"), "dense": inner, "colbert": inner}),
    max_leaves=10,
)  # fmt: skip

#: Good blobs of every kind, for mutation.
BLOBS = [
    pack(Embeddings(np.arange(12, dtype=np.float32).reshape(3, 4), model="m")),
    pack(Embeddings(None, [np.ones((2, 3), np.float32), np.ones((1, 3), np.float32)], None, None, "m")),
    pack(Embeddings(sparse=[Sparse(np.arange(3, dtype=np.int32), np.ones(3, np.float32))])),
    pack(Embeddings(np.zeros((2, 4), np.int8), int8_ranges=np.zeros((2, 4), np.float32))),
    pack(Ranking(np.arange(5, dtype=np.float32), np.arange(3, dtype=np.int32), "m")),
    pack({"status": "SUCCESS", "result": [np.zeros((2, 2), np.float16)], "children": [{"a": [None, 1.5]}]}),
]


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Gives a function that tells the most bytes that Python and NumPy held at once in this block."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def array_map(dtype: Any, shape: Any, data: Any) -> bytes:
    """The wire form of an array, with whatever is given in place of the right values."""
    packed: bytes = msgpack.packb({"dtype": dtype, "shape": shape, "data": data})
    return packed


@PROPERTY
@given(ARRAYS)
def test_an_array_comes_back_with_its_type_shape_and_bytes(array: np.ndarray) -> None:
    back = unpack(pack(array))
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


@PROPERTY
@given(PLAIN)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    assert unpack(pack(value)) == value


def test_an_array_arrives_as_a_read_only_view_and_not_as_a_copy() -> None:
    packed = pack(np.zeros((1000, 256), np.float32))
    with peak_memory() as peak_bytes:
        back = unpack(packed)
        assert peak_bytes() < 1.5 * back.nbytes  # msgpack takes the bytes out once; the array adds nothing
    assert not back.flags.writeable
    assert not back.flags.owndata


@pytest.mark.parametrize("dtype", [">f4", ">i8", ">u4", ">f2"])
def test_a_big_endian_array_travels_as_little_endian(dtype: str) -> None:
    array = np.array([[1, 2], [3, 40]], dtype)
    back = unpack(pack(array))
    assert back.dtype.str == dtype.replace(">", "<")
    np.testing.assert_array_equal(back, array)


def test_an_array_that_is_not_contiguous_travels_in_row_order() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    np.testing.assert_array_equal(unpack(pack(array)), array)


@pytest.mark.parametrize(
    "value",
    [
        np.array(["a text"]),
        np.array([object()], dtype=object),
        np.zeros(2, "i4,f4"),
        np.zeros(2, "i4,f4")[0],
        np.zeros(2, bool),
        np.zeros(2, np.float64),
        np.zeros(2, np.complex64),
        np.zeros(2, "M8[s]"),
        np.zeros((1, 1, 1, 1, 1), np.float32),
        np.datetime64("2020-01-01"),
        object(),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)  # fmt: skip
def test_what_has_no_form_on_the_wire_is_refused_when_sent(value: Any) -> None:
    with pytest.raises(TypeError):
        pack(value)


def test_a_class_of_a_registered_name_that_is_not_the_registered_class_is_refused() -> None:
    impostor = type("Ranking", (), {"to_map": lambda self: {}})()
    with pytest.raises(TypeError):
        pack(impostor)


@pytest.mark.parametrize(
    ("dtype", "shape", "data"),
    [
        ("<f4", [2], b"1234567"),
        ("<f4", [2], b"123456789"),
        ("<f4", [-1], b"1234"),
        ("<f4", [-1, -1], b"1234"),
        ("<f4", [2**63, 0], b""),
        ("<f4", [2**62, 2**62, 0], b""),
        ("<f4", [2**64 - 1] * 4, b"1234"),
        ("<f4", [1] * 5, b"1234"),
        ("<f4", [True], b"1234"),
        ("<f4", [1.0], b"1234"),
        ("<f4", [[1]], b"1234"),
        ("<f4", "1", b"1234"),
        ("<f4", None, b"1234"),
        ("<f4", {"a": 1}, b"1234"),
        ("|O", [1], b"12345678"),
        ("<U1", [1], b"1234"),
        ("|V4", [1], b"1234"),
        ("i4,f4", [1], b"12345678"),
        (">f4", [1], b"1234"),
        ("float32", [1], b"1234"),
        (["<f4"], [1], b"1234"),
        ({"<f4": 1}, [1], b"1234"),
        (b"<f4", [1], b"1234"),
        (None, [1], b"1234"),
        (7, [1], b"1234"),
    ],
)  # fmt: skip
def test_a_malformed_array_is_refused_when_it_arrives(dtype: Any, shape: Any, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"array|dimension|shape"):
        unpack(array_map(dtype, shape, data))


@pytest.mark.parametrize("data", ["1234", None, 5, [1, 2]])
def test_a_map_with_the_keys_of_an_array_but_no_bytes_stays_a_map(data: Any) -> None:
    assert unpack(array_map("<f4", [1], data)) == {"dtype": "<f4", "shape": [1], "data": data}


@pytest.mark.parametrize("name", ["os.system", "", "Embeddings", ["ranking"], {"a": 1}, None, 3, b"ranking"])
def test_an_unknown_class_name_stays_a_plain_map(name: Any) -> None:
    assert unpack(msgpack.packb({"embedq": name, "a": 1})) == {"embedq": name, "a": 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"embedq": "ranking"},
        {"embedq": "ranking", "scores": 1, "order": 2},
        {"embedq": "ranking", "scores": [0.5], "order": [0]},
        {"embedq": "embeddings", "dense": "a text"},
        {"embedq": "embeddings", "dense": [[1.0]]},
        {"embedq": "embeddings", "colbert": 5},
        {"embedq": "embeddings", "colbert": {"values": 1, "offsets": 2}},
        {"embedq": "embeddings", "colbert": {}},
        {"embedq": "embeddings", "int8_ranges": "a text"},
        {"embedq": "embeddings", "model": [1]},
    ],
)
def test_a_result_with_missing_or_wrong_fields_is_refused_when_it_arrives(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Embeddings|Ranking"):
        unpack(msgpack.packb(fields))


def test_result_arrays_of_a_wrong_shape_or_type_are_refused_when_they_arrive() -> None:
    for fields in (
        {"embedq": "embeddings", "dense": np.zeros(3, np.float32)},
        {
            "embedq": "embeddings",
            "colbert": {"values": np.zeros((2, 2), np.float32), "offsets": np.array([0.5], np.float32)},
        },
        {"embedq": "ranking", "scores": np.zeros((2, 2), np.float32), "order": np.zeros(2, np.int32)},
        {"embedq": "ranking", "scores": np.zeros(2, np.float32), "order": np.zeros(2, np.float32)},
    ):
        with pytest.raises(ValueError, match=r"Embeddings|Ranking"):
            unpack(pack(fields))


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",
        b"\xc0\xc0",
        b"\xa1\xff",
        b"\x91" * 100_000 + b"\xc0",
        b"\x81\xa1a" * 100_000 + b"\xc0",
        b"\x83\xa5dtype" + b"\x91" * 900 + b"\xc0\xa5shape\x90\xa4data\xc4\x00",
        b"\x83\xa5dtype\xa3<f4\xa5shape" + b"\x91" * 900 + b"\xc0\xa4data\xc4\x00",
        b"\x81\x91\x01\x02",
        b"\x81\x80\x02",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc7\x05\xff" + b"\xff" * 5,
    ],
    ids=lambda packed: f"{len(packed)}-bytes-{packed[:4].hex()}",
)
def test_hostile_bytes_are_refused_and_cost_no_more_than_their_own_size(packed: bytes) -> None:
    with peak_memory() as peak_bytes:
        with pytest.raises(ValueError):  # noqa: PT011  # msgpack's own texts, of which some are empty
            unpack(packed)
        assert peak_bytes() < 1_000_000 + 16 * len(packed)


def test_every_truncation_of_a_result_is_refused() -> None:
    for blob in BLOBS:
        for length in range(len(blob)):
            with pytest.raises(ValueError):  # noqa: PT011
                unpack(blob[:length])


@settings(PROPERTY, max_examples=600)
@given(
    st.sampled_from(BLOBS),
    st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4),
)
def test_mutated_bytes_are_decoded_or_refused_with_value_error(
    blob: bytes, edits: list[tuple[int, bytes, int]]
) -> None:
    for position, inserted, num_removed in edits:
        blob = blob[:position] + inserted + blob[position + num_removed :]
    _decode_or_refuse(blob)


@settings(PROPERTY, max_examples=600)
@given(HOSTILE)
def test_hostile_maps_are_decoded_or_refused_with_value_error(value: Any) -> None:
    _decode_or_refuse(msgpack.packb(value))


def _decode_or_refuse(packed: bytes) -> None:
    try:
        value = unpack(packed)
    except ValueError:
        return
    repr(value)  # what was accepted can be shown: logs and Flower do that


def test_plain_msgpack_and_numpy_read_a_result_without_our_code() -> None:
    dense = np.arange(6, dtype=np.float32).reshape(2, 3)
    blob = msgpack.unpackb(pack({"status": "SUCCESS", "result": Embeddings(dense, model="m")}))
    assert blob["result"]["embedq"] == "embeddings"
    array = blob["result"]["dense"]
    assert array == {"dtype": "<f4", "shape": [2, 3], "data": dense.tobytes()}
    np.testing.assert_array_equal(np.frombuffer(array["data"], array["dtype"]).reshape(array["shape"]), dense)
