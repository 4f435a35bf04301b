"""Checkpoint -> transformers module on a device; batch -> padded tensors. Shared by the families."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.errors import CannotLoadModel
from embedq.core.models.safetensors_files import weight_files
from embedq.core.models.silence import without_load_report

#: Types whose attention caps its logits, which torch's own kernels cannot do: transformers' plain
#: implementation runs these, and takes memory for a score per pair of tokens and head.
CAPPED_TYPES = frozenset({"gemma2", "vaultgemma"})


#: Weights that may stay unread, because what a network gives does not depend on them: buffers that it computes
#: anew, and the heads of other tasks that stayed in the file. Any other unread weight means another network.
_HARMLESS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|rotary_emb\.(inv_freq|cos_cached|sin_cached))$|^(\w+\.)?pooler\."
    r"|^(cls|lm_head|head|decoder|predictions|classifier|pre_classifier|sop_classifier|qa_outputs|score)\."
    r"|^(vocab_transform|vocab_layer_norm|vocab_projector)\."
    r"|^(discriminator_predictions|generator_predictions|generator_lm_head)\."
)


def load(
    auto_class: Any, spec: ModelSpec, device: str, precision: str, unused: tuple[str, ...] = ()
) -> torch.nn.Module:
    """Build `auto_class` from the checkpoint: safetensors only, no remote code, every weight present and read.

    Weights whose name starts with one of `unused` may be missing: the family never reads them. The files are
    mapped, and each weight goes to the device by itself: host memory holds what a CPU computes with, of an
    accelerator's weights one at a time. CannotLoadModel names a weight that is missing, misshapen or unread.
    """
    target = getattr(torch, precision)
    try:
        with without_load_report():
            # No word on attention: transformers takes torch's fused kernel where a type has it, and
            # asked for it by name it would refuse the types that have not (MPNet).
            module, info = auto_class.from_pretrained(
                str(spec.path),
                # As stored, a weight stays in its mapped file; transformers would convert them all in host memory.
                # Not so with half precisions: this is also the dtype of constants, such as Gemma's scale.
                dtype=torch.float32 if _is_float32(spec.path) else target,
                device_map=None,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                # Only where it must be: asked for torch's fused kernel by name, transformers refuses the types
                # that have none (MPNet), and unasked it takes it wherever there is one.
                **({"attn_implementation": "eager"} if spec.config.get("model_type") in CAPPED_TYPES else {}),
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CannotLoadModel(f"{spec.path} cannot be loaded: {error}") from error
    _check(spec, info, unused)
    _place(module, device, target)
    round_weights(module, spec)
    loaded: torch.nn.Module = module.eval()
    return loaded


def _is_float32(path: Path) -> bool:
    """Whether all weights of a checkpoint are stored in float32."""
    found: set[str] = set()
    for file in weight_files(path):
        with safe_open(file, framework="pt", device="cpu") as reader:
            found |= {reader.get_slice(name).get_dtype() for name in reader.keys()}  # noqa: SIM118 (no mapping)
    return found - {"I64"} == {"F32"}  # old checkpoints list positions, too


def _check(spec: ModelSpec, info: dict[str, Any], unused: tuple[str, ...]) -> None:
    """CannotLoadModel unless every weight was in the files, in its shape, and nothing else that matters was."""
    for name, given, needed in sorted(info["mismatched_keys"]):
        raise CannotLoadModel(f"{spec.path} has {name} of shape {[*given]}; config.json describes {[*needed]}")
    unread = sorted(name for name in info["unexpected_keys"] if not _HARMLESS.search(name))
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(unused or ("\0",)))
    if missing:
        # transformers would fill them with random numbers and go on: plausible vectors, all wrong.
        raise CannotLoadModel(
            f"{spec.path} lacks {len(missing)} weights the model needs, among them {missing[0]}"
            + (f"; it has {len(unread)} that the model does not use, among them {unread[0]}" if unread else "")
        )
    if unread:
        # More layers than config.json says, an adapter, scales of quantized weights: without them, other numbers.
        raise CannotLoadModel(
            f"{spec.path} has {len(unread)} weights that the model described by config.json does not use, "
            f"among them {unread[0]}"
        )


def _place(module: torch.nn.Module, device: str, dtype: torch.dtype) -> None:
    """Put the weights on the device in `dtype` one by one, and the buffers in the dtype they have."""
    placed: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # weights that are tied stay one
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if weight not in placed:
                placed[weight] = torch.nn.Parameter(weight.detach().to(device, dtype), requires_grad=False)
            setattr(part, name, placed[weight])
    module.to(device)


def round_weights(module: torch.nn.Module, spec: ModelSpec) -> None:
    """Give up the digits that `weights_rounded_to` lacks; the dtype stays, so the arithmetic is as exact as before."""
    if spec.weights_rounded_to is not None:
        for weight in module.parameters():
            weight.data = weight.data.to(getattr(torch, spec.weights_rounded_to)).to(weight.dtype)
