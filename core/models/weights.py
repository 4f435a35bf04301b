"""Loads a checkpoint into transformers' module on a device, and checks that every weight was used.

Shared by the families.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.errors import CannotLoadModel
from embedq.core.models.adapters import base_alone, merge
from embedq.core.models.safetensors_files import weight_files
from embedq.core.models.silence import without_load_report

#: Model types whose attention caps its logits, which torch's fused kernels do not support. transformers' plain
#: implementation runs these; it needs memory for a score per head and pair of tokens.
CAPPED_TYPES = frozenset({"gemma2", "vaultgemma"})

#: Weights that may stay unused, because no output depends on them: buffers that the network recomputes, and heads of
#: other tasks left in the file. Any other unused weight means that the file belongs to another network.
HARMLESS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|rotary_emb\.(inv_freq|cos_cached|sin_cached))$|^(\w+\.)?pooler\."
    r"|^(cls|lm_head|head|decoder|predictions|classifier|pre_classifier|sop_classifier|qa_outputs|score)\."
    r"|^(vocab_transform|vocab_layer_norm|vocab_projector)\."
    r"|^(discriminator_predictions|generator_predictions|generator_lm_head)\."
)


def load(
    auto_class: str, spec: ModelSpec, device: str, precision: str, unused: tuple[str, ...] = ()
) -> torch.nn.Module:
    """Build transformers' `auto_class` from the checkpoint: safetensors only, no remote code, every weight there and used.

    Weights whose names start with one of `unused` may be missing, because the family does not use them. Files are
    mapped and weights copied to the device one by one, so host memory holds at most one weight of an accelerator's.
    CannotLoadModel names a weight that is missing, has another shape, or stays unused.
    """
    target = getattr(torch, precision)
    import transformers  # takes seconds, and the commonest types do without (core.models.encoders.bert)

    try:
        with without_load_report(), base_alone(spec.path) as base:
            module, info = getattr(transformers, auto_class).from_pretrained(
                str(base),
                # Loaded in its stored dtype, a weight stays in its mapped file; transformers would convert all weights
                # in host memory. Half precisions are converted at once: this is also the dtype of constants (Gemma's
                # scale).
                dtype=torch.float32 if _is_float32(spec.path) else target,
                device_map=None,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                # Set only where needed. By default transformers uses torch's fused kernel if a type supports it; asked
                # for it by name, it would refuse the types that do not (MPNet).
                **({"attn_implementation": "eager"} if spec.config.get("model_type") in CAPPED_TYPES else {}),
                ignore_mismatched_sizes=True,  # `_check` refuses them by name
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if "trust_remote_code" in str(error):  # transformers' own advice, which no setting here follows
            error = ValueError("it needs code that the checkpoint brings along, which is never run")
        raise CannotLoadModel(f"{spec.path} cannot be loaded: {error}") from error
    _check(spec, info, unused)
    if spec.adapter is not None:
        merge(module, spec.adapter)
    place(module, device, target)
    round_weights(module, spec)
    loaded: torch.nn.Module = module.eval()
    return loaded


def _is_float32(path: Path) -> bool:
    """Returns True if a checkpoint stores all weights in float32."""
    found: set[str] = set()
    for file in weight_files(path):
        with safe_open(file, framework="pt", device="cpu") as reader:
            found |= {reader.get_slice(name).get_dtype() for name in reader.keys()}  # noqa: SIM118 (no mapping)
    return found - {"I64"} == {"F32"}  # old checkpoints store position ids, too


def _check(spec: ModelSpec, info: dict[str, Any], unused: tuple[str, ...]) -> None:
    """CannotLoadModel unless the files hold every weight in its shape, and no other weight that matters."""
    for name, given, needed in sorted(info["mismatched_keys"]):
        raise CannotLoadModel(f"{spec.path} has {name} of shape {[*given]}; config.json describes {[*needed]}")
    unread = sorted(name for name in info["unexpected_keys"] if not HARMLESS.search(name))
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(unused or ("\0",)))
    if missing:
        # transformers fills them with random numbers and continues: plausible vectors, all wrong.
        raise CannotLoadModel(
            f"{spec.path} lacks {len(missing)} weights the model needs, among them {missing[0]}"
            + (f"; it has {len(unread)} that the model does not use, among them {unread[0]}" if unread else "")
        )
    if unread:
        # More layers than config.json states, an adapter, scales of quantized weights: without them results differ.
        raise CannotLoadModel(
            f"{spec.path} has {len(unread)} weights that the model described by config.json does not use, "
            f"among them {unread[0]}"
        )


def place(module: torch.nn.Module, device: str, dtype: torch.dtype) -> None:
    """Copy weights to the device one by one, converting them to `dtype`; buffers keep their dtype."""
    placed: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # tied weights stay tied
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if weight not in placed:
                placed[weight] = torch.nn.Parameter(weight.detach().to(device, dtype), requires_grad=False)
            setattr(part, name, placed[weight])
    module.to(device)


def round_weights(module: torch.nn.Module, spec: ModelSpec) -> None:
    """Round weights to the values that `weights_rounded_to` can hold; their dtype, and so the arithmetic, stays."""
    if spec.weights_rounded_to is not None:
        for weight in module.parameters():
            weight.data = weight.data.to(getattr(torch, spec.weights_rounded_to)).to(weight.dtype)
