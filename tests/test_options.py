"""Every bad argument of a call is refused with InvalidInput that says what, the limit, and what was given."""

from __future__ import annotations

import random
import string
from dataclasses import fields
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq.core.errors import InvalidInput
from embedq.core.options import (
    ALIAS,
    INPUT_TYPES,
    MAX_COUNT,
    MAX_INSTRUCTION_CHARACTERS,
    MODES,
    OUTPUTS,
    EmbedOptions,
    RerankOptions,
    check_text,
    check_texts,
)
from embedq.core.results import Dtype

PROPERTY = settings(max_examples=100)

#: Values of every kind that a caller or a foreign message can put anywhere.
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**5000, -(10**5000)]),
    st.floats(),
    st.text(max_size=60),
    st.binary(max_size=5),
    st.lists(st.text(max_size=5) | st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([np.float32(1), np.int64(3), np.zeros(3), object(), {1}, (), ("dense",), b"dense", float]),
)

#: A text whose words occur in no message of ours.
SECRET = "xylophone zeppelin"


def refusal(call: Any, *args: Any) -> str:
    """The message with which `call(*args)` is refused."""
    with pytest.raises(InvalidInput) as caught:
        call(*args)
    return str(caught.value)


@PROPERTY
@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]))))
def test_every_list_of_encodable_strings_passes_unchanged(texts: list[str]) -> None:
    assert check_texts("texts", texts) == texts
    assert check_texts("texts", tuple(texts)) == texts


@PROPERTY
@given(
    st.lists(st.text(string.ascii_letters), max_size=3),
    st.text(max_size=5),
    st.characters(categories=["Cs"]),
    st.lists(st.text(), max_size=2),
)
def test_a_lone_surrogate_is_refused_and_its_text_is_named_by_number(
    before: list[str], start: str, surrogate: str, after: list[str]
) -> None:
    message = refusal(check_texts, "texts", [*before, start + surrogate, *after])
    assert f"number {len(before)}," in message
    assert f"character {len(start)};" in message
    message.encode()


@PROPERTY
@given(st.lists(JUNK, max_size=4) | JUNK)
def test_texts_are_checked_or_refused_whatever_they_are(value: Any) -> None:
    try:
        texts = check_texts("texts", value)
    except InvalidInput as error:
        str(error).encode()
    else:
        assert all(isinstance(text, str) for text in texts)


@PROPERTY
@given(st.sampled_from([EmbedOptions, RerankOptions]), st.data())
def test_options_are_built_or_refused_whatever_is_given(cls: Any, data: st.DataObject) -> None:
    names = [field.name for field in fields(cls)]
    given = data.draw(st.dictionaries(st.sampled_from(names), JUNK, max_size=3))
    try:
        options = cls.checked(given)
    except InvalidInput as error:
        options, told = None, str(error)
    if options is None:
        told.encode()
        assert any(name in told for name in given)
    else:
        hash(options)
        assert cls.checked({field.name: getattr(options, field.name) for field in fields(cls)}) == options


@pytest.mark.parametrize(
    ("value", "given"),
    [
        (None, "NoneType"),
        (3, "int"),
        ({"a": 1}, "dict"),
        (np.array(["a"]), "ndarray"),
        (b"abc", "bytes"),
        ((text for text in "ab"), "generator"),
        ({"a", "b"}, "set"),
    ],
)
def test_texts_that_are_no_list_are_refused_by_type(value: Any, given: str) -> None:
    assert refusal(check_texts, "texts", value) == f"texts must be a list of strings; given {given}"


def test_a_single_string_is_refused_with_the_way_to_write_it() -> None:
    message = refusal(check_texts, "passages", SECRET)
    assert "[passage]" in message
    assert SECRET not in message


@pytest.mark.parametrize("wrong", [None, 3, 1.5, b"abc", ["a"], np.str_, True])
def test_an_entry_that_is_no_string_is_refused_by_number_and_type(wrong: Any) -> None:
    message = refusal(check_texts, "texts", [SECRET, "", wrong])
    assert "number 2" in message
    assert type(wrong).__name__ in message
    assert SECRET not in message


@pytest.mark.parametrize("texts", [[], [""], ["", " "], ["a", "a"], ["\0"], ["x" * 10_000_000], ["🙂" * 1000]])
def test_empty_long_and_repeated_texts_are_allowed(texts: list[str]) -> None:
    assert check_texts("texts", texts) == texts


def test_a_surrogate_at_the_end_of_a_long_text_is_found_without_telling_the_text() -> None:
    message = refusal(check_texts, "texts", ["ä" * 1_000_000 + SECRET + "\udfff"])
    assert f"character {1_000_000 + len(SECRET):d}" in message
    assert len(message) < 200


@pytest.mark.parametrize("value", [None, 3, ["a query"], b"a query"])
def test_a_query_that_is_no_string_is_refused(value: Any) -> None:
    assert refusal(check_text, "query", value) == f"query must be a string; given {type(value).__name__}"


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [
        ("model", "BAAI/bge-m3", "a-z 0-9"),
        ("model", "", "1 to 63"),
        ("model", 3, "alias"),
        ("model", "a" * 64, "1 to 63"),
        ("input_type", "passage", "query, document"),
        ("input_type", True, "query, document"),
        ("instruction", 3, "string"),
        ("instruction", "\ud800", "UTF-8"),
        ("dimensions", 0, "from 1"),
        ("dimensions", -1, "from 1"),
        ("dimensions", True, "from 1"),
        ("dimensions", 2.0, "from 1"),
        ("dimensions", np.int64(0), "from 1"),
        ("dimensions", np.float64(2.0), "from 1"),
        ("dimensions", np.bool_(True), "from 1"),
        ("dimensions", MAX_COUNT + 1, f"up to {MAX_COUNT:,}; given {MAX_COUNT + 1}"),
        ("dtype", "float64", "float32, float16, int8, ubinary"),
        ("dtype", "<f4", "float32, float16, int8, ubinary"),
        ("dtype", np.float32, "float32, float16, int8, ubinary"),
        ("dtype", None, "float32, float16, int8, ubinary"),
        ("outputs", "dense", "dense, sparse, colbert"),
        ("outputs", [], "dense, sparse, colbert"),
        ("outputs", None, "dense, sparse, colbert"),
        ("outputs", ["dense", "splade"], "dense, sparse, colbert"),
        ("outputs", [["dense"]], "dense, sparse, colbert"),
        ("max_length", 2, "from 3"),
        ("max_length", "512", "from 3"),
        ("normalize", 1, "None, True, False"),
        ("normalize", "yes", "None, True, False"),
    ],
)
def test_a_wrong_embed_option_is_refused_with_its_limit(option: str, value: Any, limit: str) -> None:
    message = refusal(EmbedOptions.checked, {option: value})
    assert message.startswith(option)
    assert limit in message


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [
        ("model", "UPPER", "a-z 0-9"),
        ("mode", "lexical", "dense, sparse, colbert"),
        ("top_k", 0, "from 1"),
        ("top_k", -3, "from 1"),
        ("top_k", 10**30, f"up to {MAX_COUNT:,}; given one of 100 bits"),
        ("top_k", "3", "from 1"),
        ("normalize", None, "True, False"),
        ("max_length", 2, "from 3"),
    ],
)
def test_a_wrong_rerank_option_is_refused_with_its_limit(option: str, value: Any, limit: str) -> None:
    message = refusal(RerankOptions.checked, {option: value})
    assert message.startswith(option)
    assert limit in message


@pytest.mark.parametrize(
    "given",
    [
        *({"dtype": dtype} for dtype in get_args(Dtype)),
        *({"input_type": one} for one in INPUT_TYPES),
        {"outputs": list(OUTPUTS)},
        {"model": "bge-m3.v1_5", "dimensions": 1, "max_length": 3, "normalize": False},
        {"instruction": ""},
        {"instruction": "x" * MAX_INSTRUCTION_CHARACTERS},
    ],
)
def test_every_documented_embed_option_is_accepted(given: dict[str, Any]) -> None:
    options = EmbedOptions.checked(given)
    assert {name: getattr(options, name) for name in given} == {
        name: tuple(value) if name == "outputs" else value for name, value in given.items()
    }


@pytest.mark.parametrize("given", [{"mode": mode} for mode in MODES] + [{"top_k": 1, "normalize": True}])
def test_every_documented_rerank_option_is_accepted(given: dict[str, Any]) -> None:
    options = RerankOptions.checked(given)
    assert {name: getattr(options, name) for name in given} == given


def test_a_long_instruction_is_refused_by_its_length_alone() -> None:
    message = refusal(EmbedOptions.checked, {"instruction": SECRET * 1000})
    assert f"{MAX_INSTRUCTION_CHARACTERS:,}" in message
    assert f"{len(SECRET) * 1000:,}" in message
    assert SECRET not in message


@pytest.mark.parametrize("cls", [EmbedOptions, RerankOptions])
def test_an_unknown_option_is_refused_and_the_known_ones_are_listed(cls: Any) -> None:
    message = refusal(cls.checked, {"batch_size": 3})
    assert "'batch_size'" in message
    assert all(field.name in message for field in fields(cls))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_too_long_to_print_is_refused_like_any_other(sign: int) -> None:
    assert "16610 bits" in refusal(RerankOptions.checked, {"top_k": sign * 10**5000})


def test_a_long_wrong_value_is_told_by_type_and_never_in_full() -> None:
    assert SECRET not in refusal(EmbedOptions.checked, {"input_type": SECRET * 10})
    assert SECRET not in refusal(EmbedOptions.checked, {"model": SECRET * 10})


@PROPERTY
@given(st.from_regex(ALIAS, fullmatch=True))
def test_every_alias_that_settings_accept_is_accepted_in_a_call(alias: str) -> None:
    assert EmbedOptions.checked({"model": alias}).model == alias


@pytest.mark.parametrize(
    ("first", "then"), [({"normalize": True}, {"normalize": 1}), ({"dimensions": 1}, {"dimensions": True})]
)
def test_what_was_allowed_before_allows_nothing_that_only_equals_it(
    first: dict[str, Any], then: dict[str, Any]
) -> None:
    assert EmbedOptions.checked(first) == EmbedOptions.checked(dict(first))
    with pytest.raises(InvalidInput):
        EmbedOptions.checked(then)


def test_options_made_before_are_those_that_were_asked_for() -> None:
    draw = random.Random(7)
    for _ in range(1_000):
        given = {"dimensions": draw.choice([None, 1, 2]), "normalize": draw.choice([None, True, False])}
        found = EmbedOptions.checked(dict(draw.sample(sorted(given.items()), 2)))
        assert (found.dimensions, found.normalize) == (given["dimensions"], given["normalize"])
