"""FlagEmbedding's automatic classes: choose the class for a model by its name, the last part of a path or hub name.

`core.checkpoint.published_models` lists the names with their families.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, TypeVar

from embedq.core.checkpoint.prompts import PLAIN
from embedq.core.checkpoint.published_models import BY_NAME, defaults_of
from embedq.core.errors import InvalidInput
from embedq.core.flag.embedders import FlagICLModel, FlagLLMModel, FlagModel, FlagPseudoMoEModel
from embedq.core.flag.face import Devices
from embedq.core.flag.m3 import BGEM3FlagModel
from embedq.core.flag.rerankers import (
    FlagLLMReranker,
    FlagReranker,
    LayerWiseFlagLLMReranker,
    LightWeightFlagLLMReranker,
)

_Kind = TypeVar("_Kind", bound=Enum)


class EmbedderModelClass(Enum):
    """Names of the embedders' classes."""

    ENCODER_ONLY_BASE = "encoder-only-base"
    ENCODER_ONLY_M3 = "encoder-only-m3"
    DECODER_ONLY_BASE = "decoder-only-base"
    DECODER_ONLY_ICL = "decoder-only-icl"
    DECODER_ONLY_PSEUDO_MOE = "decoder-only-pseudo_moe"


class RerankerModelClass(Enum):
    """Names of the rerankers' classes."""

    ENCODER_ONLY_BASE = "encoder-only-base"
    DECODER_ONLY_BASE = "decoder-only-base"
    DECODER_ONLY_LAYERWISE = "decoder-only-layerwise"
    DECODER_ONLY_LIGHTWEIGHT = "decoder-only-lightweight"


#: What `from_finetuned` returns.
AnyEmbedder = FlagModel | BGEM3FlagModel | FlagLLMModel | FlagICLModel | FlagPseudoMoEModel
AnyReranker = FlagReranker | FlagLLMReranker | LayerWiseFlagLLMReranker | LightWeightFlagLLMReranker

_EMBEDDERS: dict[EmbedderModelClass, type[AnyEmbedder]] = {
    EmbedderModelClass.ENCODER_ONLY_BASE: FlagModel,
    EmbedderModelClass.ENCODER_ONLY_M3: BGEM3FlagModel,
    EmbedderModelClass.DECODER_ONLY_BASE: FlagLLMModel,
    EmbedderModelClass.DECODER_ONLY_ICL: FlagICLModel,
    EmbedderModelClass.DECODER_ONLY_PSEUDO_MOE: FlagPseudoMoEModel,
}

_RERANKERS: dict[RerankerModelClass, type[AnyReranker]] = {
    RerankerModelClass.ENCODER_ONLY_BASE: FlagReranker,
    RerankerModelClass.DECODER_ONLY_BASE: FlagLLMReranker,
    RerankerModelClass.DECODER_ONLY_LAYERWISE: LayerWiseFlagLLMReranker,
    RerankerModelClass.DECODER_ONLY_LIGHTWEIGHT: LightWeightFlagLLMReranker,
}

#: The class for names of a family. No name belongs to the pseudo MoE class.
_EMBEDDERS_BY_FAMILY = {face.family: face for face in _EMBEDDERS.values() if face is not FlagPseudoMoEModel}
_RERANKERS_BY_FAMILY = {face.family: face for face in _RERANKERS.values()}


class FlagAutoModel:
    """Embedders by name; see `from_finetuned`."""

    def __init__(self) -> None:
        raise InvalidInput("FlagAutoModel has no instances; call FlagAutoModel.from_finetuned(path)")

    @classmethod
    def from_finetuned(
        cls,
        model_name_or_path: str,
        model_class: str | EmbedderModelClass | None = None,
        normalize_embeddings: bool = True,
        use_fp16: bool = True,
        use_bf16: bool = False,
        query_instruction_for_retrieval: str | None = None,
        devices: Devices = None,
        pooling_method: str | None = None,
        trust_remote_code: bool | None = None,
        query_instruction_format: str | None = None,
        truncate_dim: int | None = None,
        **given: Any,
    ) -> AnyEmbedder:
        """Load a model by its name, or by `model_class`, with these arguments.

        Defaults are those of the name; with `model_class`, the class's pooling and the plain format, even if the class
        itself has another. InvalidInput for an unknown name, listing the known ones.
        """
        if model_class is not None:
            face = _EMBEDDERS[_member(EmbedderModelClass, model_class)]
            pooling, written, has_own_code = face.DEFAULT_POOLING_METHOD, PLAIN, False
        else:
            listed = defaults_of(model_name_or_path)
            if listed is None or listed.family not in _EMBEDDERS_BY_FAMILY:
                raise InvalidInput(_unknown(model_name_or_path, EmbedderModelClass, set(_EMBEDDERS_BY_FAMILY)))
            face = _EMBEDDERS_BY_FAMILY[listed.family]
            pooling = listed.pooling or face.DEFAULT_POOLING_METHOD
            written, has_own_code = listed.query_format, listed.has_own_code
        arguments: dict[str, Any] = {
            "normalize_embeddings": normalize_embeddings,
            "use_fp16": use_fp16,
            "use_bf16": use_bf16,
            "query_instruction_for_retrieval": query_instruction_for_retrieval,
            "query_instruction_format": written if query_instruction_format is None else query_instruction_format,
            "devices": devices,
            "pooling_method": pooling if pooling_method is None else pooling_method,
            "trust_remote_code": has_own_code if trust_remote_code is None else trust_remote_code,
            "truncate_dim": truncate_dim,
        }
        return face(model_name_or_path, **arguments, **given)


class FlagAutoReranker:
    """Rerankers by name; see `from_finetuned`."""

    def __init__(self) -> None:
        raise InvalidInput("FlagAutoReranker has no instances; call FlagAutoReranker.from_finetuned(path)")

    @classmethod
    def from_finetuned(
        cls,
        model_name_or_path: str,
        model_class: str | RerankerModelClass | None = None,
        use_fp16: bool = False,
        trust_remote_code: bool | None = None,
        **given: Any,
    ) -> AnyReranker:
        """Load a model by its name, or by `model_class`, with these arguments.

        InvalidInput for an unknown name, listing the known ones.
        """
        if model_class is not None:
            face = _RERANKERS[_member(RerankerModelClass, model_class)]
        else:
            listed = defaults_of(model_name_or_path)
            if listed is None or listed.family not in _RERANKERS_BY_FAMILY:
                raise InvalidInput(_unknown(model_name_or_path, RerankerModelClass, set(_RERANKERS_BY_FAMILY)))
            face = _RERANKERS_BY_FAMILY[listed.family]
        arguments: dict[str, Any] = {"use_fp16": use_fp16, "trust_remote_code": bool(trust_remote_code)}
        return face(model_name_or_path, **arguments, **given)


def _member(kinds: type[_Kind], given: str | _Kind) -> _Kind:
    try:
        return kinds(given)
    except ValueError:
        names = ", ".join(kind.value for kind in kinds)
        raise InvalidInput(f"model_class must be one of {names}; given {given!r:.40}") from None


def _unknown(path: str, kinds: type[Enum], families: set[str]) -> str:
    names = ", ".join(name for name, listed in BY_NAME.items() if listed.family in families)
    classes = ", ".join(kind.value for kind in kinds)
    return f"{path!r:.200} does not end in a known name ({names}); set model_class to one of {classes}"
