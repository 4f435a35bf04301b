"""Checkpoint -> transformers module on a device; batch -> padded tensors. Shared by the families."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from core.errors import CannotLoadModel
from core.sequence import Sequence
from core.spec import ModelSpec

transformers_logging.disable_progress_bar()
# Its load report lists weights we drop on purpose (an unused pooler); what matters is checked below.
transformers_logging.set_verbosity_error()


#: Types whose attention caps its logits, which torch's own kernels cannot do: transformers' plain
#: implementation runs these, and takes memory for a score per pair of tokens and head.
CAPPED_TYPES = frozenset({"gemma2", "vaultgemma"})


def load(
    auto_class: Any, spec: ModelSpec, device: str, precision: str, unused: tuple[str, ...] = ()
) -> torch.nn.Module:
    """Build `auto_class` from the checkpoint: safetensors only, no remote code, every weight present.

    Weights whose name starts with one of `unused` may be missing: the family never reads them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # No word on attention: transformers takes torch's fused kernel where a type has it, and
            # asked for it by name it would refuse the types that have not (MPNet).
            module, info = auto_class.from_pretrained(
                str(spec.path),
                dtype=getattr(torch, precision),
                device_map=None,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                # Only where it must be: asked for torch's fused kernel by name, transformers refuses the types
                # that have none (MPNet), and unasked it takes it wherever there is one.
                **({"attn_implementation": "eager"} if spec.config.get("model_type") in CAPPED_TYPES else {}),
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CannotLoadModel(f"{spec.path} cannot be loaded: {error}") from error
    missing = [name for name in info["missing_keys"] if not name.startswith(unused or ("\0",))]
    if missing:
        # transformers would fill them with random numbers and go on: plausible vectors, all wrong.
        raise CannotLoadModel(
            f"{spec.path} lacks {len(missing)} weights the model needs, among them {sorted(missing)[0]}"
        )
    round_weights(module, spec)
    loaded: torch.nn.Module = module.to(device).eval()
    return loaded


def round_weights(module: torch.nn.Module, spec: ModelSpec) -> None:
    """Give up the digits that `weights_rounded_to` lacks; the dtype stays, so the arithmetic is as exact as before."""
    if spec.weights_rounded_to is not None:
        for weight in module.parameters():
            weight.data = weight.data.to(getattr(torch, spec.weights_rounded_to)).to(weight.dtype)


def pad(batch: list[Sequence], pad_token_id: int, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ids (num_sequences, longest) int64, mask of the same shape, or None when nothing is padded)."""
    longest = max(sequence.length for sequence in batch)
    ids = torch.full((len(batch), longest), pad_token_id, dtype=torch.int64)
    for row, sequence in enumerate(batch):
        ids[row, : sequence.length] = torch.from_numpy(sequence.tokens.ids)
    if all(sequence.length == longest for sequence in batch):
        return ids.to(device), None
    lengths = torch.tensor([sequence.length for sequence in batch])
    mask = (torch.arange(longest) < lengths[:, None]).to(torch.int64)  # (num_sequences, longest)
    return ids.to(device), mask.to(device)


def pad_types(batch: list[Sequence], device: str) -> torch.Tensor:
    """(num_sequences, longest) int64 segment ids; padding counts as segment 0."""
    longest = max(sequence.length for sequence in batch)
    types = torch.zeros((len(batch), longest), dtype=torch.int64)
    for row, sequence in enumerate(batch):
        if sequence.tokens.type_ids is not None:
            types[row, : sequence.length] = torch.from_numpy(sequence.tokens.type_ids)
    return types.to(device)
