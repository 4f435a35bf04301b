"""The families by name: what each means, and which model types it fits. Chooses one for a directory by its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embedq.core.checkpoint.network_types import DECODER_TYPES, ENCODER_CLASSES, ENCODER_TYPES, is_native
from embedq.core.checkpoint.saved_modules import Saved
from embedq.core.checkpoint.spec import RERANKERS
from embedq.core.errors import CannotLoadModel

#: Every family and what it is, in the words that an error lists them with.
MEANINGS = {
    "encoder": "embeds with a network whose tokens see all others, as BERT",
    "m3": "BGE-M3: an encoder with sparse_linear.pt and colbert_linear.pt",
    "decoder": "embeds with a network whose tokens see those before them, as Mistral",
    "icl": "bge-en-icl: a decoder whose queries may bring examples",
    "cross_encoder": "reranks with a sequence classifier of one label",
    "llm_reranker": "bge-reranker-v2-gemma: a language model's logit of Yes",
    "layerwise_reranker": "bge-reranker-v2-minicpm-layerwise: a head behind each layer",
    "lightweight_reranker": "bge-reranker-v2.5-gemma2-lightweight: the same, and passages are compressed",
    "qwen3_reranker": "Qwen3-Reranker by its authors' recipe: yes against no",
    "logit_score": "a CrossEncoder that is a language model: logits of the tokens its LogitScore module names",
    "pooled_reranker": "a CrossEncoder of a network, a pooling and modules behind it, as Ettin's",
    "splade": "a sparse encoder: weights of words by a masked language model",
    "static": "StaticEmbedding and model2vec: the mean of a vector per token, without a network",
}

#: Families whose networks embedq builds by itself, whatever transformers knows of their types.
OWN_NETWORKS = frozenset({"layerwise_reranker", "lightweight_reranker", "static"})

#: What sentence-transformers calls the kinds that are not served, and what they are.
_OTHER_KINDS = {
    "MultiVectorEncoder": "it gives a vector for each token (late interaction) and none for a text",
    "ColBERT": "PyLate saved it: it gives a vector for each token (late interaction) and none for a text",
}

#: Types that a family can run; a family that is not listed checks its weights by itself.
_FITTING = {
    "icl": DECODER_TYPES,
    "llm_reranker": DECODER_TYPES,
    "logit_score": DECODER_TYPES,
    "m3": ENCODER_TYPES,
    "splade": ENCODER_TYPES,
    "qwen3_reranker": frozenset({"qwen3"}),
}

#: Architectures that say by themselves what they are.
_ARCHITECTURES = {
    "LayerWiseMiniCPMForCausalLM": "layerwise_reranker",
    "CostWiseGemmaForCausalLM": "lightweight_reranker",
}

#: What BGE-M3 adds to an XLM-R directory.
_M3_FILES = ("sparse_linear.pt", "colbert_linear.pt")


def listed() -> str:
    """Every family with its meaning, for a message."""
    return "; ".join(f"{name} ({meaning})" for name, meaning in MEANINGS.items())


def check(path: Path, family: str, config: dict[str, Any], saved: Saved | None) -> None:
    """CannotLoadModel unless there is such a family, and `path` can be of it."""
    if family not in MEANINGS:
        raise CannotLoadModel(f"family is {family!r:.80}, and there is none of that name. Families are {listed()}")
    if saved is not None:
        _check_saved(path, family, saved)
    kind = config.get("model_type")
    if family not in OWN_NETWORKS and not is_native(kind):
        raise _not_recognised(path, config, [str(name) for name in config.get("architectures") or []])
    fitting = _FITTING.get(family)
    is_wrong = (family == "encoder" and kind in DECODER_TYPES) or (
        family == "decoder" and (kind in ENCODER_TYPES or kind in ENCODER_CLASSES)
    )
    if is_wrong or (fitting is not None and kind not in fitting):
        fits = f": it is for {', '.join(sorted(fitting))}" if fitting else ""
        raise CannotLoadModel(f"{path} is of type {kind}, which family {family} ({MEANINGS[family]}) cannot run{fits}")
    if family == "qwen3_reranker" and "auto_map" in config:
        raise CannotLoadModel(
            f"{path} brings code of its own (auto_map), which is never run: it is no Qwen3-Reranker but another model of "
            "that type, with another prompt and other answers"
        )


def _check_saved(path: Path, family: str, saved: Saved) -> None:
    """CannotLoadModel if sentence-transformers' files describe something else than `family`."""
    told = of_saved(saved)
    if told is not None and told != family:
        raise CannotLoadModel(
            f"{path}/modules.json describes a {saved.kind} of family {told}, and `family` of the model is {family}. "
            'Leave `family` out; layout = "transformers" leaves sentence-transformers\' files unread'
        )
    if told is None and family in RERANKERS:
        raise CannotLoadModel(f"{path}/modules.json describes a {saved.kind}, and family {family} is a reranker")


def of_saved(saved: Saved) -> str | None:
    """The family, if the modules alone decide it; None for a network that embeds. CannotLoadModel for what is not served."""
    if saved.kind == "SentenceTransformer":
        return "static" if saved.names[:1] == ["StaticEmbedding"] else None
    task = saved.transformer.task
    if saved.kind == "SparseEncoder":
        if saved.names == ["Transformer", "SpladePooling"] and task == "fill-mask":
            return "splade"
        raise saved.refuse(
            f"of a SparseEncoder, a Transformer for fill-mask with SpladePooling is supported; its task is {task}"
        )
    if saved.names == ["Transformer"] and task == "sequence-classification":
        return "cross_encoder"
    if saved.names == ["Transformer", "LogitScore"] and task == "text-generation":
        return "logit_score"
    if saved.names[:1] == ["Transformer"] and "Pooling" in saved.names and task == "feature-extraction":
        return "pooled_reranker"
    raise saved.refuse(
        "of a CrossEncoder supported are a Transformer for sequence-classification, one for text-generation with "
        f"LogitScore, and one for feature-extraction with Pooling and Dense; its task is {task}"
    )


def check_kind(saved: Saved) -> None:
    """CannotLoadModel for a kind, or a first module, that no family runs; before its weights are looked for."""
    if saved.kind not in ("SentenceTransformer", "CrossEncoder", "SparseEncoder"):
        meaning = _OTHER_KINDS.get(saved.kind, "a kind that embedq does not know")
        raise CannotLoadModel(
            f"{saved.root} is a {saved.kind} of sentence-transformers (config_sentence_transformers.json): {meaning}. "
            "Supported are SentenceTransformer, CrossEncoder and SparseEncoder"
        )
    if saved.names[:1] not in (["Transformer"], ["StaticEmbedding"]):
        raise saved.refuse("supported as the first module are Transformer and StaticEmbedding")


def of_files(path: Path, config: dict[str, Any], saved: Saved | None) -> str:
    """The family that a directory's own files show. CannotLoadModel lists what was looked for."""
    told = of_saved(saved) if saved else None
    if told is not None:
        return told
    model_type, architectures = config.get("model_type"), [str(name) for name in config.get("architectures") or []]
    for name in architectures:
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
        if name.endswith("ForSequenceClassification") and saved is None:
            return "cross_encoder"
    if any((path / name).is_file() for name in _M3_FILES):
        return "m3"
    if saved is None:
        _refuse_masked_model(path, architectures)
    found = _by_type(model_type, architectures, saved)
    if found is None:
        raise _not_recognised(path, config, architectures)
    return found


def _by_type(model_type: Any, architectures: list[str], saved: Saved | None) -> str | None:
    if not isinstance(model_type, str):
        return None
    if model_type in ENCODER_TYPES or model_type in ENCODER_CLASSES:
        return "encoder"
    if model_type in DECODER_TYPES:
        return "decoder" if saved or any(name.endswith("Model") for name in architectures) else None
    # Pooling is stated, and padding is probed at load: what else there is to know of a type is transformers' affair.
    return "encoder" if saved and is_native(model_type) else None


def _refuse_masked_model(path: Path, architectures: list[str]) -> None:
    """CannotLoadModel for a masked language model: its head may make a sparse encoder, or be left from training."""
    if any(name.endswith("ForMaskedLM") for name in architectures):
        raise CannotLoadModel(
            f"{path} is a masked language model ({', '.join(architectures)}) without modules.json: a sparse encoder "
            '(SPLADE), or a base model that was not trained to embed. Set family = "splade" of the model for '
            'weights of words, or family = "encoder" for its mean-pooled states'
        )


def _not_recognised(path: Path, config: dict[str, Any], architectures: list[str]) -> CannotLoadModel:
    kind = config.get("model_type")
    if "auto_map" in config and not is_native(kind):
        return CannotLoadModel(
            f"{path} is of type {kind}, which transformers has no code for: the checkpoint brings its own (auto_map), "
            "and that is never run. Look for a conversion to a native type, which newer versions of the model often are"
        )
    return CannotLoadModel(
        f"{path} is not recognised: type {kind}, architectures {architectures}. Looked for modules.json, "
        f"{' or '.join(_M3_FILES)}, an architecture that ends in ForSequenceClassification, one of "
        f"{', '.join(_ARCHITECTURES)}, an encoder's type ({', '.join(sorted(ENCODER_TYPES | ENCODER_CLASSES.keys()))}), "
        f"and a decoder's type ({', '.join(sorted(DECODER_TYPES))}) without a language model's head. "
        f"If you know what it is, set `family` of the model to one of: {listed()}"
    )
