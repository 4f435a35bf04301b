"""Token ids: those of transformers, exactly, for any text, any limit and any number of threads."""

from __future__ import annotations

import random
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer

from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.errors import CannotLoadModel, InvalidInput
from embedq.core.sequence import Tokens
from embedq.core.settings import ModelSettings
from embedq.core.special_tokens import Frame
from embedq.core.tokenizer import Tokenizer
from tests.checkpoints import save_cross_encoder, save_encoder, write_json

GOLDEN = Path(__file__).parent / "golden"

PROPERTY = settings(max_examples=100)

#: WordPiece that lower-cases, Unigram, byte-level BPE: each treats white space in its own way.
CASES = ["flagreranker_bert", "flagreranker_xlmr", "st_modernbert"]

#: Words, white space that splits them, and characters that look like white space and do not.
PIECES = st.sampled_from(
    [
        *["ferry", "the", "garden,", "a", "面包师", "é", "[SEP]", "</s>", "🙂", "x" * 120],
        *[" ", "  ", "\n", "\t", "\r", "\r\n", "\n\n"],
        *["\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u2028", "\u3000", "\u200b", "\ufeff", "\u0308", "\0"],
    ]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=120).map("".join)

HARD_TEXTS = [
    "",
    " ",
    "\n\t ",
    "a",
    "The ferry leaves at seven.",
    "naïve façade, señor Ångström",
    "[CLS] is a [SEP] token </s> <s>",
    "面包师在清晨四点开始揉面。" * 40,
    "👩‍🔬 looks at 🔭✨",
    "\0control\x07characters\x0c",
    "word " * 500,
    "x" * 5000,
    "ab " + "x" * 5000,
    "." * 600,
    " " * 3000 + "late" + " words" * 3000,
    "e\u0301" * 300,
]


def load(directory: Path, **given: Any) -> Tokenizer:
    return Tokenizer(read_spec("m", ModelSettings(path=str(directory), **given)))


def full_ids(directory: Path, text: str) -> list[int]:
    """The ids of all of `text`, without special tokens, from the Rust tokenizer itself."""
    rust = RustTokenizer.from_file(str(directory / "tokenizer.json"))
    rust.no_truncation()
    ids: list[int] = rust.encode(text, add_special_tokens=False).ids
    return ids


def _types(tokens: Tokens) -> list[int]:
    """The segment of each token."""
    assert tokens.type_ids is not None
    segments: list[int] = tokens.type_ids.tolist()
    return segments


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {case: load(GOLDEN / case / "model") for case in CASES}


@pytest.mark.parametrize("max_length", [3, 4, 7, 16, 64, 255, 256, 512])
def test_ids_are_those_of_transformers_at_every_limit(minilm: Path, max_length: int) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(minilm), local_files_only=True)
    ours = load(minilm, max_length=512).encode(HARD_TEXTS, max_length)
    for text, tokens in zip(HARD_TEXTS, ours, strict=True):
        wanted = reference(text, truncation=True, max_length=max_length)
        assert tokens.ids.tolist() == wanted["input_ids"]
        assert _types(tokens) == wanted["token_type_ids"]
        assert tokens.ids.dtype == np.int32


@pytest.mark.parametrize("case", CASES)
def test_pairs_are_joined_as_transformers_joins_them(case: str) -> None:
    from transformers import AutoTokenizer

    directory = GOLDEN / case / "model"
    reference = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    for query, passage in [("the ferry", "leaves at seven"), ("", "a garden"), ("面包师", "🙂 bread [SEP]")]:
        (tokens,) = load(directory).encode_pairs([(query, passage)])
        wanted = reference([(query, passage)])
        assert tokens.ids.tolist() == wanted["input_ids"][0]
        if "token_type_ids" in wanted:
            assert _types(tokens) == wanted["token_type_ids"][0]


@PROPERTY
@given(TEXTS, st.integers(3, 40), st.sampled_from(CASES))
def test_a_long_text_gives_the_first_tokens_of_all_its_tokens(
    tokenizers: dict[str, Tokenizer], text: str, max_length: int, case: str
) -> None:
    directory = GOLDEN / case / "model"
    (tokens,) = tokenizers[case].encode([text], max_length)
    assert tokens.ids[1:-1].tolist() == full_ids(directory, text)[: max_length - 2]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "text",
    [
        *("lightho" + one + "use" + "z" * 60 for one in "\x0b\x0c\x1c\x1f\x85\u2028\u200b"),
        "ab" + " " * 200 + "cd",
        "ab" + "\n" * 200 + "cd",
        " " * 200 + "ab",
    ],
    ids=ascii,
)
def test_a_long_text_is_never_cut_where_that_would_change_a_token(
    tokenizers: dict[str, Tokenizer], text: str, case: str
) -> None:
    for max_length in (3, 4, 5):
        (tokens,) = tokenizers[case].encode([text], max_length)
        assert tokens.ids[1:-1].tolist() == full_ids(GOLDEN / case / "model", text)[: max_length - 2]


def test_a_long_text_is_not_cut_inside_a_run_of_blanks_that_is_one_token(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "st_modernbert" / "model", tmp_path, dirs_exist_ok=True)
    rust = RustTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rust.add_tokens([" " * count for count in range(2, 25)])  # as in the real ModernBERT
    rust.save(str(tmp_path / "tokenizer.json"))
    text = "ab" + " " * 500 + "cd"
    for max_length in range(3, 12):
        (tokens,) = load(tmp_path).encode([text], max_length)
        assert tokens.ids[1:-1].tolist() == full_ids(tmp_path, text)[: max_length - 2]


@PROPERTY
@given(TEXTS, TEXTS, st.integers(8, 60), st.sampled_from(CASES[:2]))
def test_of_a_pair_the_query_keeps_three_quarters_and_the_passage_the_rest(
    tokenizers: dict[str, Tokenizer], query: str, passage: str, max_length: int, case: str
) -> None:
    directory = GOLDEN / case / "model"
    num_special = 3 if case == "flagreranker_bert" else 4
    first = full_ids(directory, query)[: min(max_length * 3 // 4, max_length - num_special)]
    second = full_ids(directory, passage)[: max_length - num_special - len(first)]
    (tokens,) = tokenizers[case].encode_pairs([(query, passage)], max_length)
    cls, sep, between = (2, 3, [3]) if num_special == 3 else (0, 2, [2, 2])
    assert tokens.ids.tolist() == [cls, *first, *between, *second, sep]
    is_second = [0] * (len(tokens.ids) - len(second) - 1) + [1] * (len(second) + 1)
    assert _types(tokens) == (is_second if num_special == 3 else [0] * len(tokens.ids))


@pytest.mark.parametrize("case", CASES)
def test_no_sequence_is_longer_than_its_limit(tokenizers: dict[str, Tokenizer], case: str) -> None:
    for max_length in (8, 64):
        for tokens in tokenizers[case].encode(HARD_TEXTS, max_length):
            assert len(tokens.ids) == len(_types(tokens)) <= max_length
        for query in HARD_TEXTS:
            for tokens in tokenizers[case].encode_pairs([(query, text) for text in HARD_TEXTS], max_length):
                assert len(tokens.ids) == len(_types(tokens)) <= max_length


@pytest.mark.timeout(20)
@pytest.mark.parametrize("filler", ["word ", "面", "\n"])
def test_a_long_pair_costs_time_in_proportion_to_its_length(tokenizers: dict[str, Tokenizer], filler: str) -> None:
    long = "ab " + filler * (200_000 // len(filler))
    (tokens,) = tokenizers["flagreranker_bert"].encode_pairs([(long, long)], 64)
    assert len(tokens.ids) <= 64


class Unprotected:
    """A tokenizer that is told its limit before each call, as transformers tells it: the limit belongs to all threads."""

    def __init__(self, directory: Path) -> None:
        self._rust = RustTokenizer.from_file(str(directory / "tokenizer.json"))

    def encode(self, texts: list[str], max_length: int) -> list[Tokens]:
        self._rust.enable_truncation(max_length)
        encoded = self._rust.encode_batch(texts)
        return [Tokens(np.array(one.ids, np.int32), np.array(one.type_ids, np.int32)) for one in encoded]


def check_eight_threads(tokenizer: Any) -> None:
    """Eight threads, each call with a limit of its own: AssertionError unless all get the ids that one gets."""
    random_ = random.Random(1)
    calls = [(random_.sample(HARD_TEXTS, 6), random_.randint(8, 64)) for _ in range(240)]
    alone = [tokenizer.encode(texts, limit) for texts, limit in calls]
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places between any two steps
    try:
        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(lambda call: tokenizer.encode(*call), calls))
    finally:
        sys.setswitchinterval(interval_s)
    for one, other in zip(alone, together, strict=True):
        assert [tokens.ids.tolist() for tokens in one] == [tokens.ids.tolist() for tokens in other]


@pytest.mark.parametrize("case", CASES)
def test_eight_threads_get_the_ids_of_one(tokenizers: dict[str, Tokenizer], case: str) -> None:
    check_eight_threads(tokenizers[case])


def test_eight_threads_break_a_tokenizer_that_is_told_its_limit_before_each_call() -> None:
    """The same check on what ours must not be: without this, it might never find anything."""
    unprotected = Unprotected(GOLDEN / "flagreranker_bert" / "model")
    with pytest.raises((AssertionError, RuntimeError)) as broken:  # wrong ids, or "Already borrowed"
        check_eight_threads(unprotected)
    assert isinstance(broken.value, AssertionError) or "borrowed" in str(broken.value)


RUNS = st.lists(st.integers(0, 2**31 - 1), max_size=3)


@PROPERTY
@given(st.data(), st.sampled_from([1, 2]))
def test_rows_between_special_tokens_are_what_they_would_be_one_by_one(data: st.DataObject, num_texts: int) -> None:
    runs = data.draw(st.lists(RUNS, min_size=num_texts + 1, max_size=num_texts + 1))
    types = [data.draw(st.lists(st.integers(0, 1), min_size=len(run), max_size=len(run))) for run in runs]
    text_types = data.draw(st.lists(st.integers(0, 1), min_size=num_texts, max_size=num_texts))
    rows = data.draw(st.lists(st.tuples(*[RUNS] * num_texts), max_size=4))
    found = Frame(runs, types, text_types).around(rows)
    assert len(found) == len(rows)
    for texts, one in zip(rows, found, strict=True):
        ids, of_ids = [*runs[0]], [*types[0]]
        for text, of_text, behind, of_behind in zip(texts, text_types, runs[1:], types[1:], strict=True):
            ids += text + behind
            of_ids += [of_text] * len(text) + of_behind
        assert (one.ids.tolist(), one.type_ids.tolist()) == (ids, of_ids)  # type: ignore[union-attr]
        assert one.ids.dtype == one.type_ids.dtype == np.int32  # type: ignore[union-attr]


@pytest.mark.parametrize("max_length", [65, 100_000, 2])
def test_a_limit_above_the_models_or_without_room_is_refused(tmp_path: Path, max_length: int) -> None:
    tokenizer = load(save_encoder(tmp_path))
    with pytest.raises(InvalidInput, match=f"3 to 64 tokens for model m; given {max_length}"):
        tokenizer.encode(["a"], max_length)


def test_a_pair_needs_room_for_a_token_of_each(tmp_path: Path) -> None:
    tokenizer = load(save_cross_encoder(tmp_path))
    with pytest.raises(InvalidInput, match="6 to 64 tokens"):
        tokenizer.encode_pairs([("the ferry", "a garden")], 5)
    (tokens,) = tokenizer.encode_pairs([("the ferry island", "a garden boat")], 6)
    assert len(tokens.ids) == 6


def test_a_model_whose_limit_leaves_no_room_is_not_loaded(tmp_path: Path) -> None:
    save_cross_encoder(tmp_path)
    with pytest.raises(CannotLoadModel, match="max_length"):
        load(tmp_path, max_length=5)


def test_texts_are_lowered_where_the_checkpoint_says_so_and_blanks_are_left_to_the_tokenizer(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / "st_modernbert" / "model", directory)  # tells blanks and capitals apart

    def ids(text: str) -> list[int]:
        return [int(one) for one in load(directory).encode([text])[0].ids]

    assert ids(" The Ferry ") != ids("The Ferry")
    assert ids("The Ferry [SEP]") != ids("the ferry [SEP]")
    write_json(directory / "sentence_bert_config.json", {"do_lower_case": True})
    assert ids("The Ferry [SEP]") == ids("the ferry [SEP]") != ids("the ferry [sep]")


def test_a_checkpoint_without_tokenizer_json_is_refused(tmp_path: Path) -> None:
    (save_encoder(tmp_path) / "tokenizer.json").unlink()
    with pytest.raises(CannotLoadModel, match=r"no tokenizer\.json"):
        load(tmp_path)


@pytest.mark.parametrize("content", [{}, {"model": {"type": "Unknown"}}, []])
def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path, content: Any) -> None:
    write_json(save_encoder(tmp_path) / "tokenizer.json", content)
    with pytest.raises(CannotLoadModel, match=r"tokenizer\.json cannot be read"):
        load(tmp_path)


def test_truncation_and_padding_stored_in_the_file_are_not_applied(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    rust = RustTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rust.enable_truncation(4)
    rust.enable_padding(length=50)
    rust.save(str(tmp_path / "tokenizer.json"))
    assert len(load(tmp_path).encode(["the ferry garden island boat"])[0].ids) == 7
