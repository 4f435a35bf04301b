"""The contract between the engine and a model, and the table of families.

To add a family: a file here with a class that fulfils `Model`, a line in FAMILIES, and in
`core.checkpoint` the rule by which a directory is recognised.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from core.checkpoint import ModelSpec
from core.checks import EmbedOptions, RerankOptions
from core.scheduler import Sequence
from core.tokenizer import Tokens

if TYPE_CHECKING:
    from core.settings import Precision

#: Family name in `ModelSpec` -> module and class.
FAMILIES = {
    "encoder": "core.models.encoder:Encoder",
    "cross_encoder": "core.models.cross_encoder:CrossEncoder",
}


class Model(Protocol):
    """Weights on a device, and how their inputs are written.

    `encode_*` run in any number of calling threads at once, `forward` on the device thread alone.
    """

    spec: ModelSpec
    #: What `forward` can give: of "dense", "colbert", "score".
    outputs: frozenset[str]
    #: Torch's name of the device, the arithmetic in use, and why that was chosen.
    device: str
    precision: str
    reason: str

    def encode_texts(self, texts: list[str], options: EmbedOptions) -> list[Tokens]:
        """Texts with their prompt or instruction -> token ids, in order. For models that embed."""
        ...

    def encode_pairs(self, query: str, passages: list[str], options: RerankOptions) -> list[Tokens]:
        """The query joined with each passage -> token ids, in order. For models that only rerank."""
        ...

    def forward(self, batch: list[Sequence], outputs: frozenset[str]) -> Mapping[str, Rows[np.ndarray]]:
        """One pass over `batch`; for each of `outputs`, as many rows as sequences, in their order.

        "dense": (num_sequences, dim) pooled and not normalised; "colbert": per sequence a
        (num_tokens, dim) array of rows of length 1; "score": (num_sequences,). All float32.
        """
        ...


def load_model(spec: ModelSpec, device: str, precision: Precision) -> Model:
    """Put the checkpoint's weights on the device. CannotLoadModel if they do not fit the family."""
    module, _, name = FAMILIES[spec.family].partition(":")
    return cast(Model, getattr(importlib.import_module(module), name)(spec, device, precision))
