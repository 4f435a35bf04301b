"""Long texts without white space: the ids are those of the whole text, and cost what the kept tokens cost."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.long_texts import LongTexts
from embedq.core.settings import ModelSettings
from embedq.core.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"

PROPERTY = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])

#: WordPiece, Unigram behind Metaspace, byte-level BPE, and BPE over the whole text as one word.
CASES = ["flagreranker_bert", "flagreranker_xlmr", "st_modernbert", "layerwise_reranker"]

#: What occurs beside each other in texts without white space, by script.
SCRIPTS = {
    "Chinese": "面包师在清晨四点开始揉，。的一是不了人我有他这",
    "Japanese": "パン屋は朝四時に生地をこね始める。ー",
    "Thai": "คนทำขนมปังเริ่มนวดแป้งตอนตีสี่",
    "Hindi": "बेकरसुबहचारबजेआटागूंथनाशुरूकरताहै",
    "Korean": "제빵사는새벽네시에반죽을시작한다",
    "Arabic": "يبدأالخبازبعجنالعجين",
    "base64": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=",
    "hexadecimal": "0123456789abcdef",
    "emoji": "👩\u200d🔬🔭✨🙂🇩🇪",
    "accents": "aeiou\u0301\u0323\u0308é",
    "periodic": "面",
    "punctuation": ".-_",
    "special": "<s>[SEP]</mask",
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, RustTokenizer]:
    found = {case: RustTokenizer.from_file(str(GOLDEN / case / "model" / "tokenizer.json")) for case in CASES}
    for rust in found.values():
        rust.no_truncation()
    return found


def whole(rust: RustTokenizer, text: str) -> list[int]:
    ids: list[int] = rust.encode(text, add_special_tokens=False).ids
    return ids


@PROPERTY
@given(
    st.sampled_from(CASES),
    st.lists(st.sampled_from(sorted(SCRIPTS)), min_size=1, max_size=3),
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.sampled_from(["", "ab ", "\u3000", "面 包"]),
)
def test_ids_are_the_first_of_the_whole_text_in_every_script(
    tokenizers: dict[str, RustTokenizer], case: str, scripts: list[str], seed: int, max_tokens: int, start: str
) -> None:
    random_ = random.Random(seed)
    text = start + "".join("".join(random_.choices(SCRIPTS[script], k=4_000)) for script in scripts)
    rust = tokenizers[case]
    assert LongTexts(rust).first_ids(text, max_tokens, 16 * max_tokens) == whole(rust, text)[:max_tokens]


@PROPERTY
@given(st.integers(0, 2**32), st.integers(1, 30), st.sampled_from(["BPE", "bytes", "Unigram", "WordPiece", "digits"]))
def test_ids_are_the_first_of_the_whole_text_whatever_the_vocabulary_merges(
    seed: int, max_tokens: int, kind: str
) -> None:
    """Tiny random vocabularies over few letters: a cut then nearly always falls into a token."""
    random_ = random.Random(seed)
    rust = random_tokenizer(random_, kind)
    letters = "面é" if kind == "bytes" else "ab1"
    text = "".join(random_.choices(letters, weights=[3, 1, 1][: len(letters)], k=4_000))
    assert LongTexts(rust).first_ids(text, max_tokens, 16) == whole(rust, text)[:max_tokens]


def random_tokenizer(random_: random.Random, kind: str) -> RustTokenizer:
    """A tokenizer of few random tokens of up to six letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "bytes" else ["a", "b", "1"]
    known = (
        next(one for one, _ in pre_tokenizers.ByteLevel(False).pre_tokenize_str("面é")) if kind == "bytes" else "ab1"
    )
    words = {"".join(random_.choices(known, k=random_.randint(2, 6))) for _ in range(12)}
    if kind == "Unigram":
        scores = [("[UNK]", -9.0), *((one, -random_.random() * 4 - 1) for one in sorted({*letters, *words}))]
        return RustTokenizer(models.Unigram(scores, unk_id=0))
    if kind == "WordPiece":
        pieces = ["[UNK]", *letters[:2], *sorted(words), *("##" + one for one in sorted({*letters, *words}))]
        limit = random_.choice([5, 100, 10_000])
        vocabulary = {one: index for index, one in enumerate(dict.fromkeys(pieces))}
        return RustTokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=limit))
    vocabulary, merges = {one: index for index, one in enumerate(letters)}, []
    for _ in range(10):
        pair = random_.choice([*known, *list(vocabulary)[len(letters) :]]), random_.choice(list(known))
        if "".join(pair) not in vocabulary:
            vocabulary["".join(pair)] = len(vocabulary)
            merges.append(pair)
    rust = RustTokenizer(models.BPE(vocabulary, merges))
    if kind == "bytes":
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=True)
    if kind == "digits":
        rust.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\d]+|\d{1,3}"), "isolated")
    return rust


class Counting:
    """A tokenizer that counts the characters it encodes."""

    def __init__(self, rust: RustTokenizer) -> None:
        self._rust = rust
        self.num_characters = 0

    def encode_batch_fast(self, texts: list[str], **given: Any) -> Any:
        self.num_characters += sum(map(len, texts))
        return self._rust.encode_batch_fast(texts, **given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rust, name)


@pytest.mark.parametrize(
    ("case", "script"),
    # Thai is unknown to the small vocabulary of the XLM-R: all of it is one token there.
    [
        (case, script)
        for case in CASES
        for script in ("Chinese", "base64", "hexadecimal", "Thai")
        if (case, script) != ("flagreranker_xlmr", "Thai")
    ],
)
def test_what_is_encoded_depends_on_the_tokens_kept_and_not_on_the_text(
    tokenizers: dict[str, RustTokenizer], case: str, script: str
) -> None:
    counted = []
    for length in (300_000, 600_000):
        counting = Counting(tokenizers[case])
        text = "".join(random.Random(1).choices(SCRIPTS[script], k=length))
        LongTexts(counting).first_ids(text, 64, 1024)  # type: ignore[arg-type]
        counted.append(counting.num_characters)
    assert counted[0] == counted[1] < 200_000


@pytest.mark.parametrize("is_dropped", [True, False])
def test_characters_that_a_rule_drops_without_a_limit_are_not_taken_for_a_border(is_dropped: bool) -> None:
    """Behind an endless run of accents, the word goes on."""
    rust = RustTokenizer(models.WordPiece({"[UNK]": 0, "ab": 1, "##c": 2, "abc": 3}, unk_token="[UNK]"))
    if is_dropped:
        rust.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    text = "ab" + "\u0301" * 30_000 + "c"
    assert LongTexts(rust).first_ids(text, 3, 48) == whole(rust, text)[:3]


def test_a_rule_that_looks_at_the_end_of_a_text_makes_us_read_all_of_it() -> None:
    vocabulary = {letter: index for index, letter in enumerate("0123456789")} | {"01": 10}
    rust = RustTokenizer(models.BPE(vocabulary, [("0", "1")]))
    rust.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*\b)"), "isolated")  # digits from the right
    for length in (30_000, 30_001, 30_002):
        text = ("0123456789" * 3_001)[:length]
        assert LongTexts(rust).first_ids(text, 5, 80) == whole(rust, text)[:5]


@PROPERTY
@given(st.text("ab \u9762", max_size=200), st.text("ab \u9762", max_size=200), st.integers(8, 40))
def test_of_the_longer_of_two_texts_as_much_is_cut_as_if_both_were_encoded_to_their_ends(
    longest: Tokenizer, query: str, passage: str, max_length: int
) -> None:
    rust = RustTokenizer.from_file(str(GOLDEN / "st_cross_encoder" / "model" / "tokenizer.json"))
    rust.no_padding()
    rust.enable_truncation(max_length, strategy="longest_first")
    (tokens,) = longest.encode_pairs([(query, passage)], max_length)
    assert tokens.ids.tolist() == rust.encode(query, passage).ids


def test_a_short_query_does_not_make_a_long_passage_be_read_to_its_end(longest: Tokenizer) -> None:
    counting = Counting(longest._rust)
    longest._rust = longest._long_texts._rust = counting  # type: ignore[assignment]
    longest.encode_pairs([("the ferry", "garden " * 500_000)], 64)
    assert counting.num_characters < 10_000


@pytest.mark.parametrize("script", ["Chinese", "base64"])
def test_a_model_s_tokenizer_reads_no_further_than_what_is_kept(script: str) -> None:
    """XLM-R's, to which no character but white space ends a word."""
    tokenizer = Tokenizer(read_spec("m", ModelSettings(path=str(GOLDEN / "flagreranker_xlmr" / "model"))))
    text = "".join(random.Random(1).choices(SCRIPTS[script], k=600_000))
    first = whole(tokenizer._rust, text)[:62]
    counting = Counting(tokenizer._rust)
    tokenizer._rust = tokenizer._long_texts._rust = counting  # type: ignore[assignment]
    assert tokenizer.ids([text], 62) == [first]
    assert counting.num_characters < 200_000


def test_a_long_query_is_read_to_its_end_once_whatever_the_number_of_passages(longest: Tokenizer) -> None:
    """Of 64 tokens 61 are for the texts: the longer of two gets the odd one, so both must be read to their ends."""
    counting = Counting(longest._rust)
    longest._rust = longest._long_texts._rust = counting  # type: ignore[assignment]
    longest.encode_pairs([("ferry " * 5_000, "garden " * 100)] * 10, 64)
    assert 30_000 < counting.num_characters < 60_000


@pytest.fixture
def longest() -> Tokenizer:
    """A cross-encoder's tokenizer that cuts the longer text of a pair."""
    directory = str(GOLDEN / "st_cross_encoder" / "model")
    return Tokenizer(read_spec("m", ModelSettings(path=directory, pair_truncation="longest")))
