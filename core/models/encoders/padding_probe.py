"""Checks at load that a network computes the same states of a sequence alone and in a padded batch.

Some types let padding reach into the states of a text (MobileBERT, ConvBERT, Nystromformer): what such a network gives
depends on the texts that share its batch, which is no vector of the text. Types in `core.checkpoint.network_types`
were compared in the tests; any other type is tried here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from embedq.core.checkpoint.network_types import ENCODER_CLASSES, ENCODER_TYPES
from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.errors import CannotLoadModel
from embedq.core.models.token_layout import TokenLayout
from embedq.core.sequence import Sequence, Tokens

#: Lengths of the sequences that share a batch.
_LENGTHS = (3, 17, 40)

#: Tokens of a long text: the model's own limit, unless that would take minutes.
_LONGEST = 2_048

#: The least cosine between a token's states alone and in the batch, in float32 and in half precisions.
_MIN_COSINE, _MIN_HALF_COSINE = 0.9999, 0.98


@torch.inference_mode()
def check_padding(network: Callable[[TokenLayout], torch.Tensor], spec: ModelSpec, device: str) -> None:
    """CannotLoadModel if padding changes what `network` gives for a sequence."""
    kind = str(spec.config.get("model_type"))
    if kind in ENCODER_TYPES or kind in ENCODER_CLASSES:
        return
    sequences = random_sequences(spec, _LENGTHS)
    try:
        together = network(TokenLayout(sequences, device)).float()
        alone = torch.cat([network(TokenLayout([one], device)) for one in sequences])
        network(TokenLayout(random_sequences(spec, (_LONGEST,)), device))  # its positions may be fewer than stated
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise CannotLoadModel(
            f"{spec.path} is of type {kind}, which fails on texts of up to {min(spec.max_length, _LONGEST)} tokens "
            f"({type(error).__name__}: {error!s:.200}); if they are too long for it, set max_length of the model"
        ) from error
    least = _MIN_COSINE if alone.dtype == torch.float32 else _MIN_HALF_COSINE
    cosine = float(functional.cosine_similarity(together, alone.float()).min())
    if not cosine >= least:  # not "below": it may be NaN
        raise CannotLoadModel(
            f"{spec.path} is of type {kind}, whose states of a text depend on the texts beside it: padding changes them "
            f"(cosine {cosine:.4f}), so its vectors would not repeat. This type cannot be served"
        )


def random_sequences(spec: ModelSpec, lengths: tuple[int, ...]) -> list[Sequence]:
    """Sequences of `lengths`, as far as the model allows, of random tokens except padding; the same at every call."""
    draw = np.random.default_rng(0)
    other = int(spec.pad_token_id == 0)
    size = int(spec.config.get("vocab_size") or 100)
    rows = [draw.integers(0, size, min(length, spec.max_length)) for length in lengths]
    return [Sequence(Tokens(np.where(row == spec.pad_token_id, other, row).astype(np.int32))) for row in rows]
