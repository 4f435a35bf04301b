"""Reranks with a MiniCPM that has a scoring head on every layer; a pass stops after the last requested layer.

FlagEmbedding's LayerWiseFlagLLMReranker (bge-reranker-v2-minicpm-layerwise) on our own network,
`core.models.decoders.minicpm`. `core.models.decoders.prompted_pairs` writes the pairs.
"""

from __future__ import annotations

import torch

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.devices import choose_precision
from embedq.core.models import Launched
from embedq.core.models.decoders import minicpm
from embedq.core.models.decoders.prompted_pairs import YES_NO_PROMPT, PromptedPairs
from embedq.core.models.requested_outputs import layers_of, refuse
from embedq.core.models.token_layout import pad
from embedq.core.models.transfer import launched_as
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence, Tokens, Wanted
from embedq.core.settings import Precision


class LayerwiseReranker:
    """MiniCPM with a head per layer; returns one score per requested layer."""

    outputs = frozenset({"score"})
    is_padded = True

    def __init__(self, spec: ModelSpec, device: str, precision: Precision) -> None:
        self.spec = spec
        self.device = device
        self.precision, self.reason = choose_precision(device, precision)
        self._pairs = PromptedPairs.with_bos(spec, YES_NO_PROMPT)
        self._network = minicpm.load(spec.path, device, self.precision)

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """See `core.models.Model.wanted`. No `cutoff_layers` means the last layer.

        With `heads_by` "request" heads stay in the order of the request while states ascend, as in FlagEmbedding: if a
        call requests layers in another order, the head of one layer reads the state of another.
        """
        assert isinstance(options, RerankOptions)
        refuse(self.spec, options, ("mode", "weights", "compress_layers", "compress_ratio"))
        layers = layers_of(self.spec, self._network.layers, options)
        asked = tuple(dict.fromkeys(options.cutoff_layers or layers))
        is_mixed = self.spec.heads_by == "request" and asked != layers
        return Wanted(self.outputs, layers, head_layers=asked if is_mixed else ())

    def encode_pairs(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[Tokens]:
        """See `core.models.Reranker.encode_pairs`."""
        return self._pairs.encode(pairs, options)

    @torch.inference_mode()
    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """See `core.models.Model.launch`."""
        ids, mask = pad(batch, self.spec.pad_token_id, self.device)
        layers = wanted.cutoff_layers or self._network.layers[-1:]
        scores = self._network(ids, mask, layers, head_layers=wanted.head_layers or None)  # (num_layers, num_sequences)
        return launched_as("score", scores.T)
