"""The texts of all measurements: docstrings of the standard library, whole and cut to their first words.

All are different, so that nothing is gained by computing a text once for several jobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from embedq.core.errors import OperatorError
from embedq.deploy.demo import texts

#: Tokens of a short text at most, the two special ones included.
MAX_SHORT_TOKENS = 16

#: Tokens that any text is cut to.
MAX_TOKENS = 256

#: Docstrings read per text wanted: some begin alike, and count once among the short ones.
_READ_PER_TEXT = 2


@dataclass(frozen=True)
class RealTexts:
    """As many of both kinds as asked for."""

    mixed: list[str]
    short: list[str]
    mean_mixed_tokens: float
    mean_short_tokens: float


def read(num_texts: int, model: Path) -> RealTexts:
    """`num_texts` docstrings, and as many beginnings of docstrings, by the tokenizer of `model`."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    whole = [text.text for text in texts.read(_READ_PER_TEXT * num_texts)]
    encoded = tokenizer.encode_batch(whole)
    cut = (
        text[: encoding.offsets[min(len(encoding.ids), MAX_SHORT_TOKENS) - 2][1]]
        for text, encoding in zip(whole, encoded, strict=True)
    )
    short = [text for text in dict.fromkeys(cut) if text]
    if num_texts > len(short):
        raise OperatorError(
            f"the standard library has {len(short):,} texts to measure with; {num_texts:,} were asked for"
        )
    short, whole = short[:num_texts], whole[:num_texts]
    return RealTexts(whole, short, _mean_tokens(tokenizer, whole), _mean_tokens(tokenizer, short))


def _mean_tokens(tokenizer: Tokenizer, chosen: list[str]) -> float:
    """As the model takes them, that is, cut."""
    lengths = [min(len(encoding.ids), MAX_TOKENS) for encoding in tokenizer.encode_batch(chosen)]
    return sum(lengths) / len(lengths)
