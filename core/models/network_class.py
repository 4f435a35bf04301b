"""Names the class of transformers that builds a checkpoint's network without a head."""

from __future__ import annotations

from embedq.core.checkpoint.network_types import ENCODER_CLASSES
from embedq.core.checkpoint.spec import ModelSpec


def network_class(spec: ModelSpec) -> str:
    """`AutoModel`, but of a network that also has a decoder the class of its encoder alone."""
    return ENCODER_CLASSES.get(str(spec.config.get("model_type")), "AutoModel")
