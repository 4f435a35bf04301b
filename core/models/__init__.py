"""The interface between the engine and a model, and the table of families.

To add a family: a file in `encoders/` or `decoders/` with a class that implements `Embedder` or `Reranker`, a line in
FAMILIES (for a reranker also in `core.checkpoint.spec.RERANKERS`), and a rule in `core.checkpoint.read_spec` or a name
in `core.checkpoint.published_models` that recognises its directories. CONTRIBUTING.md has the whole recipe.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.errors import InvalidSettings
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence, Tokens, Wanted

if TYPE_CHECKING:
    from embedq.core.settings import Precision

#: Module and class of each family in `ModelSpec`.
FAMILIES = {
    "encoder": "embedq.core.models.encoders.encoder:Encoder",
    "m3": "embedq.core.models.encoders.m3:M3",
    "decoder": "embedq.core.models.decoders.decoder:Decoder",
    "icl": "embedq.core.models.decoders.icl:InContext",
    "cross_encoder": "embedq.core.models.encoders.cross_encoder:CrossEncoder",
    "llm_reranker": "embedq.core.models.decoders.llm_reranker:LlmReranker",
    "layerwise_reranker": "embedq.core.models.decoders.layerwise_reranker:LayerwiseReranker",
    "lightweight_reranker": "embedq.core.models.decoders.lightweight_reranker:LightweightReranker",
    "qwen3_reranker": "embedq.core.models.decoders.qwen3_reranker:Qwen3Reranker",
    "logit_score": "embedq.core.models.decoders.logit_score:LogitScore",
    "pooled_reranker": "embedq.core.models.encoders.pooled_reranker:PooledReranker",
    "splade": "embedq.core.models.encoders.splade:Splade",
    "static": "embedq.core.models.static:Static",
}

#: Families whose networks can run in int8; `core.models.encoders.network` decides which model types.
INT8_FAMILIES = frozenset({"encoder", "m3", "cross_encoder"})

#: Rows of each output, one per sequence of the batch: one array, or a list of arrays of different lengths.
Outputs = Mapping[str, Any]

#: The function that `launch` returns: waits for the pass and returns its outputs.
Launched = Callable[[], Outputs]


class Model(Protocol):
    """A model on a device.

    Any number of threads may call `wanted` and `encode_*` at once; only the device thread calls `launch` and the
    function it returns.
    """

    spec: ModelSpec
    #: Outputs the model has, of "dense", "sparse", "colbert", "score".
    outputs: frozenset[str]
    #: Torch's name of the device, the precision in use, and why it was chosen.
    device: str
    precision: str
    reason: str
    #: Whether sequences are padded to the longest of their batch. Otherwise a batch has only its sequences' tokens; the
    #: rounding of a CPU's attention and products to multiples of 16 is not counted.
    is_padded: bool

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """The outputs and layers that a call requests. InvalidInput if this model does not have them."""
        ...

    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """Start one pass over `batch`; the returned function waits for it and returns its rows.

        On a device that works beside the host this returns before the pass has ended. Each wanted output has one row
        per sequence, in order.

        "dense": (num_sequences, dim) pooled and not normalised; "colbert": per sequence a
        (num_tokens, dim) array, not normalised; "sparse": per sequence (ids (n,) int32, weights (n,));
        "score": (num_sequences, num_layers), one layer for models without layers. All float32.
        """
        ...


class Embedder(Model, Protocol):
    """A model that computes vectors, and can score pairs by them."""

    def encode_texts(self, texts: list[str], options: EmbedOptions) -> list[Tokens]:
        """Encode texts with their prompt or instruction into token ids, in order."""
        ...


class Reranker(Model, Protocol):
    """A model that reads query and passage together and returns scores only."""

    def encode_pairs(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[Tokens]:
        """Encode (query, passage) pairs into token ids, in order."""
        ...


def load_model(spec: ModelSpec, device: str, precision: Precision) -> Model:
    """Load the checkpoint's weights onto the device.

    CannotLoadModel if they do not fit the family, InvalidSettings if the device or the family lacks the precision.
    """
    if precision == "int8" and spec.family not in INT8_FAMILIES:
        raise InvalidSettings(
            f"precision int8 is for the families {', '.join(sorted(INT8_FAMILIES))}; {spec.path} is of family {spec.family}"
        )
    module, _, name = FAMILIES[spec.family].partition(":")
    return cast(Model, getattr(importlib.import_module(module), name)(spec, device, precision))
