"""The contract between the engine and a model, and the table of families.

To add a family: a file here with a class that fulfils `Model`, a line in FAMILIES, and in
`core.checkpoint.read_spec` the rule by which a directory is recognised.
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

#: Family name in `ModelSpec` -> module and class.
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
}

#: Families whose networks can run in int8; which types of them, `core.models.encoders.network` says.
INT8_FAMILIES = frozenset({"encoder", "m3", "cross_encoder"})

#: For each output, as many rows as a batch has sequences: one array, or a list of arrays of different lengths.
Outputs = Mapping[str, Any]

#: What `launch` returns: waits for the pass, and gives its outputs.
Launched = Callable[[], Outputs]


class Model(Protocol):
    """Weights on a device, and how their inputs are written.

    `wanted` and `encode_*` run on any number of threads at once, `launch` and what it returns on the
    device thread alone.
    """

    spec: ModelSpec
    #: What `launch` can give: of "dense", "sparse", "colbert", "score".
    outputs: frozenset[str]
    #: Torch's name of the device, the arithmetic in use, and why that was chosen.
    device: str
    precision: str
    reason: str
    #: Whether all of a batch are computed as long as its longest. Where not, a batch has the tokens of its sequences,
    #: and no padding: that a CPU's attention rounds lengths up, and products their rows, to the next 16 is not counted.
    is_padded: bool

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """What a call wants of a forward pass. InvalidInput if this model cannot give it."""
        ...

    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """Start one pass over `batch`; the function returned waits for it and gives its rows.

        Where the device works beside the host, this returns before the pass has ended. The rows are,
        for each wanted output, as many as sequences, in their order.

        "dense": (num_sequences, dim) pooled and not normalised; "colbert": per sequence a
        (num_tokens, dim) array, not normalised; "sparse": per sequence (ids (n,) int32, weights (n,));
        "score": (num_sequences, num_layers), one layer where the model knows no others. All float32.
        """
        ...


class Embedder(Model, Protocol):
    """A model that gives vectors, and can score by them."""

    def encode_texts(self, texts: list[str], options: EmbedOptions) -> list[Tokens]:
        """Texts with their prompt or instruction -> token ids, in order."""
        ...


class Reranker(Model, Protocol):
    """A model that reads query and passage together and only scores."""

    def encode_pairs(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[Tokens]:
        """(query, passage) pairs -> token ids, in order."""
        ...


def load_model(spec: ModelSpec, device: str, precision: Precision) -> Model:
    """Put the checkpoint's weights on the device.

    CannotLoadModel if they do not fit the family, InvalidSettings if the device or the family has not the precision.
    """
    if precision == "int8" and spec.family not in INT8_FAMILIES:
        raise InvalidSettings(
            f"precision int8 is for the families {', '.join(sorted(INT8_FAMILIES))}; {spec.path} is of {spec.family}"
        )
    module, _, name = FAMILIES[spec.family].partition(":")
    return cast(Model, getattr(importlib.import_module(module), name)(spec, device, precision))
