"""Computes the revision of a model that a worker serves, from its files and from how they are read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from embedq.core.checkpoint.content_hash import content_hash
from embedq.core.checkpoint.spec import ModelSpec

#: What settings may change about a checkpoint's numbers. The precision is not among it: devices differ in theirs, and
#: workers on several kinds of devices may share a queue.
_READING = (
    "family",
    "pooling",
    "normalize",
    "max_length",
    "default_length",
    "dimensions",
    "prompts",
    "default_prompt",
    "query_instruction",
    "passage_instruction",
    "query_format",
    "passage_format",
    "examples_format",
    "suffix",
    "examples",
    "pair_truncation",
    "heads_by",
    "strip",
    "lower",
    "include_prompt",
    "lengths",
    "truncation_side",
    "weights_rounded_to",
)


def with_revision(spec: ModelSpec) -> ModelSpec:
    """`spec` with the revision that its files and settings make. Reads the files in part, see `content_hash`."""
    root = spec.root or spec.path
    # The network may lie in a folder of the checkpoint, or be the base of an adapter and so lie elsewhere.
    directories = [root] if spec.path.is_relative_to(root) else [root, spec.path]
    return replace(spec, revision=f"{content_hash(*directories)}.{_reading(spec)}")


def _reading(spec: ModelSpec) -> str:
    """8 hexadecimal digits; equal for two models of the same files exactly if those are read alike."""
    chosen = {name: getattr(spec, name) for name in _READING}
    # What modules there are decides a setting (`layout`); what is in them is in the files.
    chosen["modules"] = [module.name for module in (*spec.token_modules, *spec.modules)]
    return hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()[:8]
