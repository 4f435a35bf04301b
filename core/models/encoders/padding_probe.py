"""Whether a network gives a sequence the same states alone and in a padded batch, tried out when it is loaded.

Some types let padding reach into the states of a text (MobileBERT, ConvBERT, Nystromformer): what such a network gives
depends on the texts that share its batch, which is no vector of the text. Types in `core.checkpoint.network_types`
were compared in the tests; any other type is tried here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from embedq.core.checkpoint.network_types import ENCODER_CLASSES, ENCODER_TYPES
from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.errors import CannotLoadModel
from embedq.core.models.token_layout import TokenLayout
from embedq.core.sequence import Sequence, Tokens

#: Lengths of the sequences that share a batch.
_LENGTHS = (3, 17, 40)

#: The least cosine between a token's states alone and in the batch, in float32 and in half precisions.
_MIN_COSINE, _MIN_HALF_COSINE = 0.9999, 0.98


@torch.inference_mode()
def check_padding(network: nn.Module, spec: ModelSpec, device: str) -> None:
    """CannotLoadModel if padding changes what `network` gives for a sequence."""
    kind = str(spec.config.get("model_type"))
    if kind in ENCODER_TYPES or kind in ENCODER_CLASSES:
        return
    sequences = _sequences(spec)
    together = network(TokenLayout(sequences, device)).float()
    alone = torch.cat([network(TokenLayout([one], device)) for one in sequences])
    least = _MIN_COSINE if alone.dtype == torch.float32 else _MIN_HALF_COSINE
    cosine = float(functional.cosine_similarity(together, alone.float()).min())
    if not cosine >= least:  # not "below": it may be NaN
        raise CannotLoadModel(
            f"{spec.path} is of type {kind}, whose states of a text depend on the texts beside it: padding changes them "
            f"(cosine {cosine:.4f}), so its vectors would not repeat. This type cannot be served"
        )


def _sequences(spec: ModelSpec) -> list[Sequence]:
    """Of any tokens but the padding's, so many as the model allows."""
    draw = np.random.default_rng(0)
    other = int(spec.pad_token_id == 0)
    size = min(int(spec.config.get("vocab_size") or 100), 1_000)
    rows = [draw.integers(0, size, min(length, spec.max_length)) for length in _LENGTHS]
    return [Sequence(Tokens(np.where(row == spec.pad_token_id, other, row).astype(np.int32))) for row in rows]
