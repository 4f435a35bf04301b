"""The options of a call, and the checks of its arguments that need no model.

The producer checks a call, so that a mistake raises where it was made; the worker checks it again, because any program
can write to the queue. The results (`list[str]`, `EmbedOptions`, `RerankOptions`) count as checked everywhere else. The
engine checks what depends on the model: its dimension, its outputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Self, cast, get_args

import numpy as np

from embedq.core.errors import InvalidInput
from embedq.core.results import Dtype

#: Outputs an embedding job can ask for; not every model has them all.
OUTPUTS = ("dense", "sparse", "colbert")

#: Ways in which an embedding model scores a passage; rerankers have one way and take no mode.
MODES = ("dense", "sparse", "colbert", "weighted")

#: Group sizes that lightweight rerankers were trained with.
COMPRESS_RATIOS = (1, 2, 4, 8)

#: More layers than any model has.
_MAX_LAYERS = 1_000

INPUT_TYPES = ("query", "document")

#: Keys of an example for an in-context model.
_EXAMPLE_KEYS = ("instruct", "query", "response")

#: Options of a rerank that are texts themselves.
_RERANK_TEXTS = (
    "query_instruction",
    "query_instruction_format",
    "passage_instruction",
    "passage_instruction_format",
    "prompt",
)

#: A model's alias becomes part of a queue's name, a worker's name and a metric label.
ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

#: Immutable types: options with equal values of these types are interchangeable.
_PLAIN = frozenset({str, int, float, bool, type(None)})

#: Above any dimension, length or number of passages, and within the range of every wire format.
MAX_COUNT = 2**31 - 1

#: Longer instructions are probably texts passed as the wrong argument.
MAX_INSTRUCTION_CHARACTERS = 10_000

#: A job of more rows is bulk whatever its priority: it is seconds of work on a CPU.
MAX_INTERACTIVE_ROWS = 1_000

#: Celery's priorities on Redis are 0 to 9, 0 first; up to this one a job is interactive.
MAX_INTERACTIVE_PRIORITY = 4


class _Options:
    """Base of `EmbedOptions` and `RerankOptions`: builds and checks them from keyword arguments."""

    __slots__ = ()

    @classmethod
    def checked(cls, given: dict[str, Any]) -> Self:
        """Build from keyword arguments. InvalidInput for an unknown one, listing the known ones."""
        # Most jobs of an application have equal options, and checking them took a tenth of a worker's time per small
        # job, so checked options are cached: by type as well, because 1 == True, and therefore only for plain values.
        if not _are_plain(given):
            given = {name: _plain(value) for name, value in given.items()}
            if not _are_plain(given):
                return cls._built(given)
        return cast(Self, _remembered(cls, tuple(given), *given.values()))  # type: ignore[arg-type]  # a class is hashable

    @classmethod
    def _built(cls, given: dict[str, Any]) -> Self:
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # subclasses are dataclasses
        unknown = [name for name in given if name not in known]
        if unknown:
            raise InvalidInput(f"unknown option {unknown[0]!r:.40}; the options are {', '.join(known)}")
        return cls(**given)


def _are_plain(given: dict[str, Any]) -> bool:
    return all(type(value) in _PLAIN for value in given.values())


def _plain(value: Any) -> Any:
    """The value with NumPy's scalars as Python's own: programs compute limits and layers with NumPy."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value


@lru_cache(maxsize=256, typed=True)
def _remembered(kind: type[_Options], names: tuple[str, ...], *values: Any) -> _Options:
    """Cache of checked options; errors are not cached."""
    return kind._built(dict(zip(names, values, strict=True)))


@dataclass(frozen=True, slots=True)
class EmbedOptions(_Options):
    """Options of an embedding call. InvalidInput names the wrong option, its allowed values, and the value given."""

    #: Alias of a model; None for the default model.
    model: str | None = None
    #: "query" or "document": which of the checkpoint's prompts to write before each text; None for its default prompt.
    input_type: str | None = None
    #: Instruction to write around each text, by `instruction_format`, instead of the checkpoint's prompt.
    instruction: str | None = None
    #: Contains {} twice, for instruction and text; None for the model's own format for the input type.
    instruction_format: str | None = None
    #: In-context models: dicts of "instruct", "query", "response" to write before each query.
    examples: tuple[dict[str, str], ...] | None = None
    #: Number of leading components to keep (Matryoshka); None keeps all.
    dimensions: int | None = None
    #: Element type of dense vectors: "float32", "float16", "int8" with its ranges, or "ubinary", 8 dimensions per byte.
    dtype: Dtype = "float32"
    #: Any of "dense", "sparse", "colbert", as far as the model has them.
    outputs: tuple[str, ...] = ("dense",)
    #: Most tokens per text, special tokens included; longer texts are cut. None for the model's limit.
    max_length: int | None = None
    #: True scales vectors to length 1, False does not; None follows the checkpoint.
    normalize: bool | None = None
    #: True adds `Timings` to the result.
    timings: bool = False

    def __post_init__(self) -> None:
        _optional_alias(self.model)
        _one_of("input_type", self.input_type, (None, *INPUT_TYPES))
        _optional_instruction("instruction", self.instruction)
        _optional_instruction("instruction_format", self.instruction_format)
        _check_examples(self.examples)
        _optional_count("dimensions", self.dimensions)
        _one_of("dtype", self.dtype, get_args(Dtype))
        _optional_count("max_length", self.max_length, minimum=3)
        _one_of("normalize", self.normalize, (None, True, False))
        _one_of("timings", self.timings, (True, False))
        if not isinstance(self.outputs, list | tuple) or not self.outputs:
            raise InvalidInput(f"outputs must be a list of {', '.join(OUTPUTS)}; given {_given(self.outputs)}")
        for output in self.outputs:
            _one_of("outputs", output, OUTPUTS)
        # Lists from the wire become tuples, so that options can be compared.
        object.__setattr__(self, "outputs", tuple(self.outputs))
        object.__setattr__(self, "examples", None if self.examples is None else tuple(self.examples))


@dataclass(frozen=True, slots=True)
class RerankOptions(_Options):
    """Options of a reranking call. InvalidInput names the wrong option, its allowed values, and the value given."""

    #: Alias of a model; None for the default model.
    model: str | None = None
    #: Embedding models: score by "dense" vectors (None), "sparse", "colbert", or all three "weighted" by `weights`.
    mode: str | None = None
    #: Weights of dense, sparse and colbert scores; None for equal weights.
    weights: tuple[float, float, float] | None = None
    #: Number of best passages to list in `Ranking.order`; None lists all.
    top_k: int | None = None
    #: True maps scores to 0..1 by the sigmoid, which does not change the order.
    normalize: bool = False
    #: Most tokens per query-passage pair; with an embedding model, per text. None for the model's own.
    max_length: int | None = None
    #: Most tokens of the query among them; None for three quarters.
    query_max_length: int | None = None
    #: Instruction to write around the query; None for the one the model was trained with.
    query_instruction: str | None = None
    #: Contains {} twice, for instruction and query; None for the model's own format.
    query_instruction_format: str | None = None
    #: Instruction to write around each passage; None for the one the model was trained with.
    passage_instruction: str | None = None
    #: Contains {} twice, for instruction and passage; None for the model's own format.
    passage_instruction_format: str | None = None
    #: Language models: the question to write behind each pair; None for the model's own.
    prompt: str | None = None
    #: Layered models: layers whose scores to return; None for the last.
    cutoff_layers: tuple[int, ...] | None = None
    #: Compressing models: layers before which to compress passages; None for the published one.
    compress_layers: tuple[int, ...] | None = None
    #: Compressing models: how many tokens become one; None compresses nothing.
    compress_ratio: int | None = None
    #: True adds `Timings` to the result.
    timings: bool = False

    def __post_init__(self) -> None:
        _optional_alias(self.model)
        _one_of("mode", self.mode, (None, *MODES))
        _optional_count("top_k", self.top_k)
        _optional_count("query_max_length", self.query_max_length)
        for name in _RERANK_TEXTS:
            _optional_instruction(name, getattr(self, name))
        for name in ("cutoff_layers", "compress_layers"):
            object.__setattr__(self, name, _optional_layers(name, getattr(self, name)))
        _one_of("compress_ratio", self.compress_ratio, (None, *COMPRESS_RATIOS))
        object.__setattr__(self, "weights", _optional_weights(self.weights))
        _one_of("normalize", self.normalize, (True, False))
        _one_of("timings", self.timings, (True, False))
        _optional_count("max_length", self.max_length, minimum=3)


def _from_array(value: Any) -> Any:
    """A NumPy array of strings or objects as nested lists; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray) and value.dtype.kind in "UO" else value


def check_texts(name: str, texts: Any) -> list[str]:
    """Return `texts` as a list. InvalidInput unless it is a list or tuple of strings that UTF-8 can encode."""
    if not isinstance(texts, list | tuple):
        hint = f"; for one text write [{name[:-1]}]" if isinstance(texts, str) else ""
        raise InvalidInput(f"{name} must be a list of strings; given {type(texts).__name__}{hint}")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidInput(f"{name} must be strings; number {index} is {type(text).__name__}")
        check_text(f"{name}, number {index},", text)
    return list(texts)


def check_pairs(pairs: Any) -> list[tuple[str, str]]:
    """Return `pairs` as a list of tuples. InvalidInput unless it is a list of (query, passage) pairs of strings."""
    pairs = _from_array(pairs)
    if isinstance(pairs, list | tuple):
        pairs = [_from_array(pair) for pair in pairs]
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise InvalidInput(f"pairs must be a list of (query, passage) pairs; given {type(pairs).__name__}")
    sides = [check_texts(name, [pair[side] for pair in pairs]) for side, name in enumerate(("queries", "passages"))]
    return list(zip(*sides, strict=True))


def check_text(name: str, text: Any) -> str:
    """Return `text`. InvalidInput unless it is a string that UTF-8 can encode."""
    if not isinstance(text, str):
        raise InvalidInput(f"{name} must be a string; given {type(text).__name__}")
    if not text.isascii():  # isascii is a flag lookup, and lone surrogates are never ASCII
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(
                f"{name} cannot be encoded as UTF-8: lone surrogate at character {error.start}; "
                "decode the source with errors='replace', or remove it"
            ) from None
    return text


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    # Types must be equal too: 1 == True would accept a number as a flag.
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise InvalidInput(f"{name} must be one of {', '.join(map(str, allowed))}; given {_given(value)}")


def _optional_count(name: str, value: Any, minimum: int = 1) -> None:
    if value is not None and (type(value) is not int or value < minimum):
        raise InvalidInput(f"{name} must be a whole number from {minimum}; given {_given(value)}")
    if value is not None and value > MAX_COUNT:
        raise InvalidInput(f"{name} may be up to {MAX_COUNT:,}; given {_given(value)}")


def _optional_alias(value: Any) -> None:
    if value is not None and not (isinstance(value, str) and ALIAS.fullmatch(value)):
        raise InvalidInput(
            f"model must be an alias of 1 to 63 of a-z 0-9 . _ -, beginning with a letter or digit; given {_given(value)}"
        )


def _optional_instruction(name: str, value: Any) -> None:
    if value is not None and len(check_text(name, value)) > MAX_INSTRUCTION_CHARACTERS:
        raise InvalidInput(f"{name} may have {MAX_INSTRUCTION_CHARACTERS:,} characters; given {len(value):,}")


def _check_examples(examples: Any) -> None:
    if examples is None:
        return
    if not isinstance(examples, list | tuple) or not all(isinstance(one, dict) for one in examples):
        raise InvalidInput(f"examples must be a list of dicts; given {_given(examples)}")
    for example in examples:
        unknown = set(example) - set(_EXAMPLE_KEYS)
        if unknown:
            raise InvalidInput(f"an example holds {', '.join(_EXAMPLE_KEYS)}; given {len(unknown)} other keys")
        for name, text in example.items():
            _optional_instruction(f"{name} of an example", text)


def _optional_layers(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None or type(value) is int:
        value = value if value is None else (value,)
    if value is not None and not (
        isinstance(value, list | tuple) and all(type(one) is int and 0 <= one < _MAX_LAYERS for one in value)
    ):
        raise InvalidInput(f"{name} must be a list of layer numbers below {_MAX_LAYERS}; given {_given(value)}")
    return None if value is None else tuple(value)


def _optional_weights(value: Any) -> tuple[float, float, float] | None:
    if value is None:
        return None
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(_is_weight(one) for one in value)
        or not sum(value)
    ):
        raise InvalidInput(
            f"weights must be three numbers from 0, for dense, sparse and colbert; given {_given(value)}"
        )
    return (float(value[0]), float(value[1]), float(value[2]))


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < float("inf")


def _given(value: Any) -> str:
    """Describe a wrong value: numbers and short strings as they are, anything else by its type."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"one of {value.bit_length()} bits"  # Python refuses to print numbers of thousands of digits
    if isinstance(value, bool | int | float) or value is None:
        return str(value)[:40]
    return repr(value) if isinstance(value, str) and len(value) <= 40 else type(value).__name__
