"""Reranks with a Gemma-2 that has heads on many layers and can average a passage's tokens between layers.

FlagEmbedding's LightWeightFlagLLMReranker (bge-reranker-v2.5-gemma2-lightweight) on our own network,
`core.models.decoders.gemma2_lightweight`. `core.models.decoders.prompted_pairs` writes the pairs.
"""

from __future__ import annotations

import torch

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.devices import choose_precision
from embedq.core.errors import InvalidInput
from embedq.core.models import Launched
from embedq.core.models.decoders import gemma2_lightweight
from embedq.core.models.decoders.prompted_pairs import PromptedPairs
from embedq.core.models.requested_outputs import layers_of, refuse
from embedq.core.models.token_layout import pad
from embedq.core.models.transfer import launched_as
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence, Tokens, Wanted
from embedq.core.settings import Precision

#: The question to write behind each pair, unless a call has its own.
_PROMPT = "Predict whether passage B contains an answer to query A."

#: Layer before which passages are compressed if a call sets a ratio but no layers; FlagEmbedding's default.
_COMPRESS_LAYER = 8


class LightweightReranker:
    """Gemma-2 with heads and compression; returns one score per requested layer."""

    outputs = frozenset({"score"})
    is_padded = True

    def __init__(self, spec: ModelSpec, device: str, precision: Precision) -> None:
        self.spec = spec
        self.device = device
        self.precision, self.reason = choose_precision(device, precision)
        self._pairs = PromptedPairs.with_bos(spec, _PROMPT)
        self._network = gemma2_lightweight.load(spec.path, device, self.precision)

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """See `core.models.Model.wanted`. No `cutoff_layers` means the last layer, no ratio no compression."""
        assert isinstance(options, RerankOptions)
        refuse(self.spec, options, ("mode", "weights"))
        layers = layers_of(self.spec, self._network.layers, options)
        ratio = options.compress_ratio or 1
        compressed = self._compress_layers(options.compress_layers) if ratio > 1 else ()
        return Wanted(self.outputs, layers, compress_layers=compressed, compress_ratio=ratio)

    def encode_pairs(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[Tokens]:
        """See `core.models.Reranker.encode_pairs`."""
        return self._pairs.encode(pairs, options)

    @torch.inference_mode()
    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """See `core.models.Model.launch`."""
        ids, mask = pad(batch, self.spec.pad_token_id, self.device)
        scores = self._network(
            ids,
            mask,
            wanted.cutoff_layers or self._network.layers[-1:],
            query_lengths=torch.tensor([one.tokens.num_query_tokens for one in batch], device=self.device),
            prompt_lengths=torch.tensor([one.tokens.num_prompt_tokens for one in batch], device=self.device),
            compress_layers=wanted.compress_layers,
            compress_ratio=wanted.compress_ratio,
            heads="own" if self.spec.heads_by == "layer" else "in_order",
        )  # (num_layers, num_sequences)
        return launched_as("score", scores.T)

    def _compress_layers(self, asked: tuple[int, ...] | None) -> tuple[int, ...]:
        """The layers before which to compress, ascending. Before the first layer there is nothing to average yet."""
        last = self._network.shape.num_layers - 1
        if asked is None:
            return (_COMPRESS_LAYER,) if last >= _COMPRESS_LAYER else ()
        for layer in asked:
            if not 1 <= layer <= last:
                raise InvalidInput(f"compress_layers must be 1 to {last} for model {self.spec.alias}; given {layer}")
        return tuple(sorted(set(asked)))
