"""Reads from a model directory's files how to run it, as a `ModelSpec`.

Reads two layouts: sentence-transformers (`modules.json` names pooling, normalising, prompts and the length limit) and a
plain transformers directory (`config.json` alone). Never runs code from the directory and never reads a pickle. Knows
nothing of devices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from embedq.core.checkpoint.files import check_weights, find, read_json
from embedq.core.checkpoint.published_models import BY_FAMILY, RERANKER_PROMPTS, ModelDefaults, defaults_of
from embedq.core.checkpoint.spec import RERANKERS, DenseModule, ModelSpec
from embedq.core.errors import CannotLoadModel
from embedq.core.settings import ModelSettings

#: sentence-transformers modules (the last part of their class's path) that may follow the pooling.
_BEHIND = ("Dense", "Normalize")

#: Our names of the pooling flags in `1_Pooling/config.json`.
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last_token",
    "pooling_mode_cls": "cls",
    "pooling_mode_mean": "mean",
}

#: Model types with bidirectional attention.
ENCODER_TYPES = frozenset(
    {"albert", "bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta"}
)

#: Model types with causal attention; these need a family of their own.
DECODER_TYPES = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "llama",
        "mistral",
        "mixtral",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
    }
)

#: Model types whose position ids start after the padding index, which lowers the limit by as many tokens.
_OFFSET_TYPES = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta"})

#: Tokenizers write numbers above this for "no limit".
_NO_LIMIT = 10**6


class Modules(NamedTuple):
    """Pooling, normalising and Dense modules, as `modules.json` names them."""

    pooling: str | None
    normalize: bool
    dense: tuple[DenseModule, ...]


#: Families of architectures that belong to one family only.
_ARCHITECTURES = {
    "LayerWiseMiniCPMForCausalLM": "layerwise_reranker",
    "CostWiseGemmaForCausalLM": "lightweight_reranker",
}

#: Tokens for calls without `max_length`, by family, as in the models' own libraries. The weights allow far more, but
#: then every over-long passage would cost a language model's full context.
_USUAL_LENGTHS = {"llm_reranker": 512, "layerwise_reranker": 512, "lightweight_reranker": 512, "qwen3_reranker": 8_192}

#: Pooling by family where neither directory nor name states it; other families use the last token.
_USUAL_POOLINGS = {"encoder": "mean", "m3": "cls"}

#: Files that BGE-M3 adds to an XLM-R directory.
_M3_FILES = ("sparse_linear.pt", "colbert_linear.pt")


def read_spec(alias: str, settings: ModelSettings) -> ModelSpec:
    """Find the checkpoint (downloading a hub name), verify it, and read how to run it.

    Settings override the tables of published names, and those override the directory's own files. CannotLoadModel names
    what is missing or unsupported, and where.
    """
    path = find(settings.path, settings.revision, settings.cache_dir)
    check_weights(path, settings.sha256)
    config = read_json(path / "config.json")
    if config is None:
        raise CannotLoadModel(f"{path} has no config.json, so it is not a transformers checkpoint")
    listed = defaults_of(settings.path)
    try:
        family = settings.family or (listed.family if listed else _family(path, config))
        if family in RERANKERS:
            return _read_reranker(alias, path, family, config, settings)
        return _read_embedder(
            alias, path, family, config, settings, listed or BY_FAMILY.get(family, ModelDefaults(family))
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CannotLoadModel(
            f"a configuration file of {path} does not have the expected form: {error!r:.200}"
        ) from error


def _family(path: Path, config: dict[str, Any]) -> str:
    """Recognise the family by the directory's own files. CannotLoadModel lists the signs looked for."""
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(model_type, str):
        model_type = repr(model_type)
    for name in architectures:
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
        if name.endswith("ForSequenceClassification"):
            return "cross_encoder"
    if any((path / name).is_file() for name in _M3_FILES):
        return "m3"
    if model_type in ENCODER_TYPES:
        return "encoder"
    if model_type in DECODER_TYPES and (
        (path / "modules.json").is_file() or any(str(name).endswith("Model") for name in architectures)
    ):
        return "decoder"
    raise CannotLoadModel(
        f"{path} is not recognised: type {model_type}, architectures {architectures}. Looked for modules.json, "
        f"{' or '.join(_M3_FILES)}, an architecture that ends in ForSequenceClassification, one of "
        f"{', '.join(_ARCHITECTURES)}, an encoder's type ({', '.join(sorted(ENCODER_TYPES))}), and a decoder's type "
        f"({', '.join(sorted(DECODER_TYPES))}) without a language model's head. "
        "If you know what it is, set `family` of the model"
    )


def _read_embedder(
    alias: str, path: Path, family: str, config: dict[str, Any], settings: ModelSettings, listed: ModelDefaults
) -> ModelSpec:
    is_layered = settings.layout is None  # read sentence-transformers' files, too
    modules = read_json(path / "modules.json", list) if is_layered else None
    stated = _read_modules(path, modules) if modules is not None else Modules(None, True, ())
    sentence = (read_json(path / "sentence_bert_config.json") or {}) if is_layered else {}
    described = (read_json(path / "config_sentence_transformers.json") or {}) if is_layered else {}
    prompts = {name: text or "" for name, text in (described.get("prompts") or {}).items()}
    if "passage" in prompts:  # an older name for the same thing
        prompts.setdefault("document", prompts["passage"])
    limit = _max_length(path, config, settings)
    hidden = int(config["hidden_size"] if "hidden_size" in config else config["dim"])
    return ModelSpec(
        alias=alias,
        path=path,
        family=family,
        pooling=settings.pooling or stated.pooling or listed.pooling or _USUAL_POOLINGS.get(family, "last_token"),
        normalize=stated.normalize if settings.normalize is None else settings.normalize,
        max_length=_chosen_length(alias, settings.max_length, sentence.get("max_seq_length"), limit),
        dimensions=stated.dense[-1].out_features if stated.dense else hidden,
        pad_token_id=_pad_token_id(config),
        config=config,
        prompts=prompts,
        default_prompt=prompts.get(described.get("default_prompt_name") or "", ""),
        query_format=settings.query_format or listed.query_format,
        strip=settings.strip,
        lower=bool(sentence.get("do_lower_case")),
        dense_modules=stated.dense,
        weights_rounded_to=settings.weights_rounded_to,
        **_given(
            settings,
            "query_instruction",
            "passage_instruction",
            "passage_format",
            "examples_format",
            "suffix",
            "examples",
        ),
    )


def _read_reranker(alias: str, path: Path, family: str, config: dict[str, Any], settings: ModelSettings) -> ModelSpec:
    num_labels = len(config.get("id2label") or {0: "", 1: ""})  # transformers' own default is two
    if family == "cross_encoder" and num_labels != 1:
        raise CannotLoadModel(f"{path} has {num_labels} labels; a reranker gives one score, so it must have exactly 1")
    limit = _max_length(path, config, settings)
    length = _chosen_length(alias, settings.max_length, None, limit)
    usual = _USUAL_LENGTHS.get(family) if settings.max_length is None else None
    names = (
        "query_instruction",
        "passage_instruction",
        "query_format",
        "passage_format",
        "pair_truncation",
        "heads_by",
    )
    return ModelSpec(
        alias=alias,
        path=path,
        family=family,
        pooling=None,
        normalize=False,
        max_length=length,
        dimensions=1,
        pad_token_id=_pad_token_id(config),
        config=config,
        default_length=min(usual, length) if usual else None,
        num_positions=limit,
        **(RERANKER_PROMPTS.get(family, {}) | _given(settings, *names)),
    )


def _given(settings: ModelSettings, *names: str) -> dict[str, Any]:
    """Those of `names` that are set, with their values."""
    return {name: value for name in names if (value := getattr(settings, name)) is not None}


def _read_modules(path: Path, modules: list[dict[str, Any]]) -> Modules:
    """Read the modules behind the transformer. CannotLoadModel for modules that are not supported."""
    names = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if names[:2] != ["Transformer", "Pooling"] or any(name not in _BEHIND for name in names[2:]):
        raise CannotLoadModel(
            f"{path}/modules.json lists {', '.join(names)}; supported are Transformer, Pooling, then any of {', '.join(_BEHIND)}"
        )
    dense = [
        _read_dense(path / str(module["path"])) for module, name in zip(modules, names, strict=True) if name == "Dense"
    ]
    if "Normalize" in names[:-1]:
        raise CannotLoadModel(f"{path}/modules.json lists {', '.join(names)}; Normalize is supported as the last only")
    return Modules(
        _read_pooling(path / str(modules[1].get("path", "")) / "config.json"), "Normalize" in names, tuple(dense)
    )


def _read_pooling(file: Path) -> str:
    flags = read_json(file) or {}
    chosen = [name for name, is_on in flags.items() if name.startswith("pooling_mode_") and is_on is True]
    # Newer files name the mode itself.
    named = flags.get("pooling_mode") or []
    chosen += [f"pooling_mode_{name}" for name in ([named] if isinstance(named, str) else named)]
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise CannotLoadModel(f"{file} asks for {chosen or 'no pooling'}; supported is one of {list(_POOLINGS)}")
    if flags.get("include_prompt") is False:
        raise CannotLoadModel(f"{file} leaves the prompt out of the pooling (include_prompt), which is not supported")
    return _POOLINGS[chosen[0]]


def _read_dense(directory: Path) -> DenseModule:
    config = read_json(directory / "config.json") or {}
    if "in_features" not in config:
        raise CannotLoadModel(f"{directory}/config.json does not say in_features and out_features of the Dense module")
    read = config.get("module_input_name") or "sentence_embedding"
    if config.get("use_residual") or {read, config.get("module_output_name") or read} != {"sentence_embedding"}:
        raise CannotLoadModel(
            f"{directory}/config.json asks for a Dense module with a residual, or one that reads or writes something "
            "else than sentence_embedding; neither is supported"
        )
    return DenseModule(
        directory,
        int(config["in_features"]),
        int(config["out_features"]),
        bool(config.get("bias", True)),
        str(config.get("activation_function", "torch.nn.modules.activation.Tanh")),
    )


def _pad_token_id(config: dict[str, Any]) -> int:
    """The stated padding token; if none is stated, transformers' default for the type."""
    stated = config.get("pad_token_id")
    return int(config.get("model_type") in _OFFSET_TYPES) if stated is None else int(stated)


def _max_length(path: Path, config: dict[str, Any], settings: ModelSettings) -> int:
    """The number of positions in the weights, or the tokenizer's own limit if lower."""
    positions = int(config.get("max_position_embeddings") or 512)
    if config.get("model_type") in _OFFSET_TYPES:
        positions -= _pad_token_id(config) + 1
    if settings.layout == "transformers":
        return positions
    tokenizer = (read_json(path / "tokenizer_config.json") or {}).get("model_max_length")
    return min(positions, int(tokenizer)) if tokenizer and tokenizer < _NO_LIMIT else positions


def _chosen_length(alias: str, asked: int | None, stated: int | None, limit: int) -> int:
    if asked is not None and asked > limit:
        raise CannotLoadModel(
            f"max_length of model {alias!r} is set to {asked}; its weights have positions for {limit} tokens"
        )
    return asked or min(stated or limit, limit)
