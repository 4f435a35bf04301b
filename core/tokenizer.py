"""Encodes texts and pairs into token ids within a model's limit. Any thread may call; the slow part holds no lock.

All threads share one Rust tokenizer. It is never reconfigured after loading (no truncation or padding state), which
makes sharing safe; truncation happens here instead, per call. Knows nothing of models or batches.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.normalizers import BertNormalizer, Lowercase
from tokenizers.normalizers import Sequence as Rules

from embedq.core.checkpoint.files import read_json
from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.errors import CannotLoadModel, InvalidInput
from embedq.core.long_texts import LongTexts
from embedq.core.sequence import Tokens
from embedq.core.special_tokens import read_frame

#: Largest share of a pair's tokens that the query may take; the passage gets the rest. FlagEmbedding's rule.
QUERY_SHARE = (3, 4)

#: Characters to encode first per token that may be kept. Real text has 3 to 5 per token, so this nearly always
#: suffices, and a book costs no more than its first pages.
_CHARACTERS_PER_TOKEN = 16

#: More tokens than any text has.
ALL_TOKENS = 2**31

#: Tokenizer classes that put `add_eos_token` above what `tokenizer.json` says (transformers v4, with which
#: their models were trained); others ignore it.
_ENDING_CLASSES = ("Llama", "CodeLlama", "Gemma")

#: Tokenizer classes that take their normalizing from `tokenizer_config.json`, whatever `tokenizer.json` says.
_NORMALIZING_CLASSES = ("Bert", "DistilBert", "Electra", "MPNet")


class Tokenizer:
    """Encodes texts and pairs for one model."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._rust = _load(spec)
        self._stated = read_json((spec.tokenizer_path or spec.path) / "tokenizer_config.json") or {}
        self._cuts_left = self._read_side() == "left"
        self._rust.no_truncation()
        self._rust.no_padding()
        self._normalize_as_stated()
        if spec.lower:  # as a rule of the tokenizer, so that special tokens in a text keep their case
            rules = [Lowercase()] + ([self._rust.normalizer] if self._rust.normalizer else [])
            self._rust.normalizer = Rules(rules)
        self._long_texts = LongTexts(self._rust)
        self._frame = read_frame(self._rust, num_texts=1).ended_by(self._read_end())
        self._pair_frame = read_frame(self._rust, num_texts=2)
        least = self._frame.num_tokens if spec.is_embedder else self._pair_frame.num_tokens + 2
        if spec.max_length <= least:
            raise CannotLoadModel(
                f"max_length of model {spec.alias} is {spec.max_length}; with its special tokens it needs at least {least + 1}"
            )

    def encode(self, texts: list[str], max_length: int | None = None) -> list[Tokens]:
        """Encode single texts, each cut to `max_length` tokens (None: the model's own limit)."""
        limit = self.checked_length(max_length, self._frame.num_tokens)
        rows = self._frame.around([(ids,) for ids in self.ids(texts, limit - self._frame.num_tokens)])
        if self._frame.num_tokens == 0 and not all(len(row.ids) for row in rows):
            raise InvalidInput(
                f"a text has no tokens, and model {self._spec.alias} adds no special ones, so it cannot read an empty text"
            )
        return rows

    def encode_pairs(
        self, pairs: list[tuple[str, str]], max_length: int | None = None, query_max_length: int | None = None
    ) -> list[Tokens]:
        """Encode (query, passage) pairs, joined by the checkpoint's pair template.

        The passage is cut: the query keeps up to `query_max_length` tokens (None: 3/4 of `max_length`), the passage
        gets the rest. This follows FlagEmbedding's FlagReranker with the ids of transformers v4, also where
        `query_max_length` leaves the passage no room: then it is not cut at all, and the pair exceeds `max_length`.
        With `pair_truncation` "longest" the longer of the two is cut, as sentence-transformers does, and the query has
        no limit unless the call sets one.
        """
        limit = self.checked_length(max_length, self._pair_frame.num_tokens + 2)
        room = limit - self._pair_frame.num_tokens
        queries = list(dict.fromkeys(query for query, _ in pairs))  # a rerank has one, many times
        is_longest = self._spec.pair_truncation == "longest"
        share = min(limit * QUERY_SHARE[0] // QUERY_SHARE[1], room)
        query_limit = query_max_length or (room + 1 if is_longest else share)
        encoded = dict(zip(queries, self.ids(queries, query_limit), strict=True))
        passages = self.ids([passage for _, passage in pairs], room + 1 if is_longest else limit)
        if is_longest and room % 2:
            self._complete(pairs, encoded, passages, room, query_max_length or ALL_TOKENS)
        cut = _cut_longest if is_longest else _cut_passage if query_max_length is None else _cut_passage_with_room
        kept = _last if self._cuts_left else _first
        cuts = [cut(encoded[query], passage, room, kept) for (query, _), passage in zip(pairs, passages, strict=True)]
        joined = self._pair_frame.around(cuts)
        if self._pair_frame.num_tokens == 0 and not all(len(row.ids) for row in joined):
            raise InvalidInput(
                f"a pair has no tokens, and model {self._spec.alias} adds no special ones, so it cannot read an empty pair"
            )
        self._check_positions(joined)
        return joined

    def _complete(
        self,
        pairs: list[tuple[str, str]],
        queries: dict[str, list[int]],
        passages: list[list[int]],
        room: int,
        query_limit: int,
    ) -> None:
        """Encode both texts of a pair to their ends if each alone exceeds the room: the longer gets the odd token."""
        places = [
            place
            for place, (query, _) in enumerate(pairs)
            if len(queries[query]) > room and len(passages[place]) > room
        ]
        asked = list(dict.fromkeys(pairs[place][0] for place in places))
        queries.update(zip(asked, self.ids(asked, query_limit), strict=True))
        read = self.ids([pairs[place][1] for place in places], ALL_TOKENS)
        for place, ids in zip(places, read, strict=True):
            passages[place] = ids

    def encode_written(self, texts: list[str], limit: int, end: tuple[int, ...]) -> list[Tokens]:
        """Encode texts that contain their special tokens, each cut to `limit` tokens; the last of a cut one become `end`."""
        rows = [np.array(ids, np.int32) for ids in self.ids(texts, limit)]
        for row in rows:
            kept = min(len(end), len(row))
            if kept and len(row) >= limit:
                row[len(row) - kept :] = end[len(end) - kept :]
        if not all(map(len, rows)):
            raise InvalidInput(f"the chat template of model {self._spec.alias} writes no tokens for a text")
        return [Tokens(row, np.zeros_like(row)) for row in rows]

    def is_special(self, token_id: int) -> bool:
        """Returns True if the token is special: no part of a text."""
        token = self._rust.get_added_tokens_decoder().get(token_id)
        return bool(token is not None and token.special)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens included."""
        text: str = self._rust.decode(ids, skip_special_tokens=False)
        return text

    def id_of(self, token: str | None) -> int | None:
        """The id of a token string; None if the vocabulary lacks it."""
        found: int | None = self._rust.token_to_id(token) if token is not None else None
        return found

    def special_id(self, name: str) -> int | None:
        """The id of the token that the checkpoint calls `name` ("bos_token"); None if it has none.

        The tokenizer's files decide; `config.json` only if they do not mention it.
        """
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            stated = read_json((self._spec.tokenizer_path or self._spec.path) / file) or {}
            if name in stated:
                token = stated[name]
                return self.id_of(token["content"] if isinstance(token, dict) else token)
        stated_id = self._spec.config.get(f"{name}_id")
        return stated_id if isinstance(stated_id, int) else None

    def _read_end(self) -> list[int]:
        """The end token, if only a tokenizer class (Llama's, or the directory's own) adds it, not `tokenizer.json`.

        A text's vector is often that of its last token, so a missing end token would change it.
        """
        stated = self._stated
        does_end = str(stated.get("tokenizer_class")).startswith(_ENDING_CLASSES) or "auto_map" in stated
        end = self.special_id("eos_token")
        if not (stated.get("add_eos_token") is True and does_end) or end is None:
            return []
        plain, full = (self._rust.encode("a", add_special_tokens=has_special).ids for has_special in (False, True))
        return [end] if full[-1] == plain[-1] else []  # otherwise the template already adds something

    def _read_side(self) -> str:
        """The end of an over-long text that transformers would cut off."""
        truncation = self._rust.truncation or {}
        return str(
            self._spec.truncation_side or self._stated.get("truncation_side") or truncation.get("direction") or "right"
        ).lower()

    def _normalize_as_stated(self) -> None:
        """Lower-case and strip as `tokenizer_config.json` states, if the tokenizer's class gives it precedence."""
        normalizer = self._rust.normalizer
        name = str(self._stated.get("tokenizer_class")).removesuffix("Fast").removesuffix("Tokenizer")
        if not isinstance(normalizer, BertNormalizer) or name not in _NORMALIZING_CLASSES:
            return
        self._rust.normalizer = BertNormalizer(
            handle_chinese_chars=self._stated.get("tokenize_chinese_chars", True),
            strip_accents=self._stated.get("strip_accents"),
            lowercase=self._stated.get("do_lower_case", True),
        )

    def _check_positions(self, joined: list[Tokens]) -> None:
        """InvalidInput if a pair exceeds the model's limit: `query_max_length` may leave the passage no room."""
        longest = max((len(one.ids) for one in joined), default=0)
        if longest > self._spec.max_length:
            raise InvalidInput(
                f"a pair has {longest} tokens, and model {self._spec.alias} takes {self._spec.max_length}; lower query_max_length"
            )

    def checked_length(self, max_length: int | None, minimum: int) -> int:
        """The limit to use for a call. InvalidInput if it is above the model's or leaves no room."""
        limit = self._spec.max_length
        if max_length is None:
            return self._spec.default_length or limit
        if not minimum < max_length <= limit:
            raise InvalidInput(
                f"max_length must be {minimum + 1} to {limit} tokens for model {self._spec.alias}; given {max_length}"
            )
        return max_length

    def ids(self, texts: list[str], max_tokens: int) -> list[list[int]]:
        """The first `max_tokens` ids of each text, without special tokens."""
        if self._spec.strip:
            texts = [text.strip() for text in texts]
        if self._cuts_left:
            whole = self._rust.encode_batch_fast(texts, add_special_tokens=False)
            return [_last(one.ids, max_tokens) for one in whole]
        num_characters = max_tokens * _CHARACTERS_PER_TOKEN
        heads = [self._long_texts.head(text, num_characters) for text in texts]
        encoded = self._rust.encode_batch_fast(heads, add_special_tokens=False)  # without offsets: a fifth faster
        return [
            one.ids[:max_tokens]
            if len(one) >= max_tokens or len(head) == len(text)
            else self._long_texts.first_ids(text, max_tokens, num_characters)
            for text, head, one in zip(texts, heads, encoded, strict=True)
        ]


Kept = Callable[[list[int], int], list[int]]


def _first(ids: list[int], count: int) -> list[int]:
    return ids[:count]


def _last(ids: list[int], count: int) -> list[int]:
    return ids[max(len(ids) - count, 0) :]


def _cut_passage(query: list[int], passage: list[int], room: int, kept: Kept) -> tuple[list[int], list[int]]:
    return query, kept(passage, room - len(query))


def _cut_passage_with_room(query: list[int], passage: list[int], room: int, kept: Kept) -> tuple[list[int], list[int]]:
    return _cut_passage(query, passage, room, kept) if len(query) < room else (query, passage)


def _cut_longest(query: list[int], passage: list[int], room: int, kept: Kept) -> tuple[list[int], list[int]]:
    """Cut the longer one until both are equally long; then they share the room."""
    if len(query) + len(passage) <= room:
        return query, passage
    shorter = min(len(query), len(passage))
    if 2 * shorter > room:
        shorter = room // 2
    is_query_longer = len(query) > len(passage)
    query_room = room - shorter if is_query_longer else shorter
    return kept(query, query_room), kept(passage, room - query_room)


def _load(spec: ModelSpec) -> RustTokenizer:
    """Read `tokenizer.json` directly, because versions of transformers interpret it differently."""
    path = spec.tokenizer_path or spec.path
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CannotLoadModel(
            f'{path} has no tokenizer.json; make one beside the weights once: python -c "from transformers '
            f"import AutoTokenizer as T; T.from_pretrained('{path}').save_pretrained('{path}')\""
        )
    try:
        return RustTokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise CannotLoadModel(f"{file} cannot be read as a tokenizer: {error}") from None
