"""Embeds with a decoder, mostly by its last token: Mistral, Qwen2, Qwen3, Gemma, Llama and similar models.

Sequences are padded on the right without a mask: with causal attention no token sees later ones, so padding changes
nothing, and causal kernels need no mask in memory. A checkpoint whose `config.json` states bidirectional attention gets
a mask.

FlagEmbedding's PseudoMoE models are decoders too. What distinguishes them, a `domain` that selects experts, is in code
of the checkpoint's directory, which embedq never runs.
"""

from __future__ import annotations

from typing import Literal

import torch

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.devices import choose_precision
from embedq.core.errors import CannotLoadModel
from embedq.core.models import Launched
from embedq.core.models.pooling import Pooling
from embedq.core.models.requested_outputs import of_embedder
from embedq.core.models.token_layout import TokenLayout, pad
from embedq.core.models.transfer import launched_as
from embedq.core.models.weights import CAPPED_TYPES, load
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence, Tokens, Wanted
from embedq.core.settings import Precision
from embedq.core.text_inputs import TextInputs
from embedq.core.tokenizer import Tokenizer


class Decoder:
    """A decoder, its pooling, and the projections behind it."""

    outputs = frozenset({"dense"})
    is_padded = True

    def __init__(self, spec: ModelSpec, device: str, precision: Precision) -> None:
        self.spec = spec
        self.device = device
        self.precision, self.reason = choose_precision(device, precision)
        self._tokenizer = Tokenizer(spec)
        self._direction = _direction(spec)
        self._module = load("AutoModel", spec, device, self.precision)
        self._pool = Pooling(spec, device)
        self._inputs = TextInputs(spec, self._tokenizer)

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """See `core.models.Model.wanted`."""
        return of_embedder(self.spec, self.outputs, options)

    def encode_texts(self, texts: list[str], options: EmbedOptions) -> list[Tokens]:
        """See `core.models.Embedder.encode_texts`."""
        return self._inputs.encode(texts, options)

    @torch.inference_mode()
    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """See `core.models.Model.launch`."""
        ids, mask = pad(batch, self.spec.pad_token_id, self.device)
        # Without a cache: nothing is generated, and a cache would keep keys and values of every layer.
        hidden = self._module(input_ids=ids, attention_mask=self._seen(ids, mask), use_cache=False).last_hidden_state
        layout = TokenLayout(batch, self.device)
        return launched_as("dense", self._pool(layout.without_padding(hidden), layout))

    def _seen(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The attention mask to pass to transformers; None for causal attention."""
        if self._direction == "causal":
            return None
        mask = torch.ones_like(ids) if mask is None else mask
        # A mask with four axes is used as it is: no version of transformers adds causality to it.
        return mask if self._direction == "windows" else mask[:, None, None, :].bool()


def _direction(spec: ModelSpec) -> Literal["causal", "both", "windows"]:
    """The tokens that a token sees: those before it, all, or windows as in transformers' own Gemma 3.

    CannotLoadModel if that is uncertain: a wrong guess would give plausible vectors, all wrong.
    """
    config, kind = spec.config, spec.config.get("model_type")
    has_windows = bool(config.get("use_sliding_window", config.get("sliding_window")))
    if config.get("use_bidirectional_attention"):
        if kind == "gemma3_text":
            return "windows"
        raise CannotLoadModel(
            f"{spec.path}/config.json has use_bidirectional_attention, which is supported for gemma3_text only; it is {kind}"
        )
    if config.get("is_causal") is False:
        if has_windows or kind in CAPPED_TYPES:
            raise CannotLoadModel(
                f"{spec.path}/config.json says is_causal: false, and as {kind} its attention "
                f"{'looks through a sliding window' if has_windows else 'is capped'}; the two together are not supported"
            )
        return "both"
    brought = config.get("auto_map") or {}
    if "AutoModel" in brought and "is_causal" not in config:
        raise CannotLoadModel(
            f"{spec.path} brings its own code (auto_map: AutoModel is {brought['AutoModel']!s:.80}), which is never run, "
            "and does not say whether its attention is causal, which that code may decide. If you know, write "
            '"is_causal": true or false into its config.json'
        )
    return "causal"
