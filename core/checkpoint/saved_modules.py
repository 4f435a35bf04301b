"""The files that sentence-transformers saves beside the weights -> what they ask for.

Reads `modules.json`, the configuration of each module it lists, and `config_sentence_transformers.json`. Each key that
sentence-transformers reads is either carried out or refused by name: one that is left unread would give plausible
vectors, all of them others than the library's. Without `modules.json` the library reads none of these files, and so
do we. Knows no network and no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from embedq.core.checkpoint.files import read_json
from embedq.core.errors import CannotLoadModel

#: Classes count only below this package: `my_code.Pooling` is another class of the same name.
_PACKAGE = "sentence_transformers."

#: Where the first module's configuration may be; the first one with content counts.
_TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

#: Of a transformer module's task, the feature it makes and the output of the network it takes for that.
_TASKS = {
    "feature-extraction": ("token_embeddings", "last_hidden_state"),
    "sequence-classification": ("scores", "logits"),
    "text-generation": ("causal_logits", "logits"),
    "fill-mask": ("token_embeddings", "logits"),
}

#: Keys of `config_sentence_transformers.json`. `requirements` names versions of packages that embedq does not run.
_MODEL_KEYS = frozenset(
    {
        "__version__",
        "model_type",
        "prompts",
        "default_prompt_name",
        "similarity_fn_name",
        "truncate_dim",
        "activation_fn",
        "keep_in_fp32_modules",
        "max_active_dims",
        "requirements",
    }
)

#: Keys of the transformer module's file that embedq carries out or that change no number.
_TRANSFORMER_KEYS = frozenset(
    {
        "max_seq_length",
        "do_lower_case",
        "transformer_task",
        "modality_config",
        "module_output_name",
        "processing_kwargs",
        "unpad_inputs",
        "query_length",
        "document_length",
        "query_expansion",
        "backend",
    }
)

#: Older and newer names of what is handed to transformers.
_KWARGS = {
    "model_kwargs": ("model_args", "model_kwargs"),
    "processor_kwargs": ("tokenizer_args", "processor_kwargs"),
    "config_kwargs": ("config_args", "config_kwargs"),
}

#: Of those, what changes no number here: precision and kernels are the worker's to choose, heads and caches unused.
_HARMLESS_KWARGS = {
    "model_kwargs": frozenset(
        {"torch_dtype", "dtype", "attn_implementation", "device_map", "low_cpu_mem_usage", "add_pooling_layer"}
        | {"use_safetensors", "trust_remote_code", "unpad_inputs", "use_memory_efficient_attention"}
    ),
    "processor_kwargs": frozenset({"use_fast", "padding_side", "trust_remote_code", "model_max_length"})
    | {"truncation_side", "clean_up_tokenization_spaces"},
    "config_kwargs": frozenset({"use_cache", "torch_dtype", "dtype", "trust_remote_code"})
    | {"use_memory_efficient_attention", "unpad_inputs"},
}

#: Old flags of a pooling, in the order in which their vectors are joined, and the names of their modes.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

#: Modes of a pooling -> our names.
_POOLINGS = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last_token",
}

_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")

#: Activations of a CrossEncoder that keep the order; a call chooses between them with `normalize`.
_ACTIVATIONS = frozenset(
    {"torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity", "torch.nn.Sigmoid", "torch.nn.Identity"}
)


@dataclass(frozen=True, slots=True)
class SavedModule:
    """One entry of `modules.json` and its own configuration."""

    #: Last part of its class's name: "Dense".
    name: str
    #: Directory with its files.
    path: Path
    config: Mapping[str, Any]

    def refuse_other_keys(self, known: set[str]) -> None:
        """CannotLoadModel if the configuration has a key that is not `known`."""
        _refuse_unknown(self.path / "config.json", self.config, known)


@dataclass(frozen=True, slots=True)
class TransformerFile:
    """The statements of the first module's file about texts and the network."""

    task: str = "feature-extraction"
    max_length: int | None = None
    #: Tokens of a text by its input type, "query" or "document".
    lengths: Mapping[str, int] = field(default_factory=dict)
    lower: bool = False
    #: How a message's content is written, "flat" or "structured", where texts pass through the chat template.
    message_format: str | None = None
    #: What the chat template is given besides the messages.
    chat_kwargs: Mapping[str, Any] = field(default_factory=dict)
    truncation_side: str | None = None
    query_expansion: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """Everything sentence-transformers' files say of one checkpoint."""

    root: Path
    #: "SentenceTransformer", "CrossEncoder", "SparseEncoder" or "MultiVectorEncoder".
    kind: str
    modules: tuple[SavedModule, ...]
    transformer: TransformerFile
    prompts: Mapping[str, str]
    default_prompt: str
    similarity: str | None
    truncate_dim: int | None
    #: Words of a sparse vector that are kept, the heaviest ones.
    max_active_dims: int | None = None

    @property
    def names(self) -> list[str]:
        return [module.name for module in self.modules]

    def refuse(self, reason: str) -> CannotLoadModel:
        """The error for modules in an order, or of a kind, that is not served."""
        return CannotLoadModel(f"{self.root}/modules.json lists {', '.join(self.names)}; {reason}")


def read_saved(root: Path) -> Saved | None:
    """All of sentence-transformers' files in `root`; None where it would read none. CannotLoadModel names a key."""
    listed = read_json(root / "modules.json", list)
    if listed is None:
        return None
    modules = tuple(_module(root, entry) for entry in listed)
    file = root / "config_sentence_transformers.json"
    described = read_json(file) or {}
    _refuse_unknown(file, described, _MODEL_KEYS)
    prompts = {name: text or "" for name, text in (described.get("prompts") or {}).items()}
    default = described.get("default_prompt_name")
    kind = described.get("model_type") or "SentenceTransformer"
    named = prompts | ({"query": prompts.get("query", ""), "document": ""} if kind != "CrossEncoder" else {})
    if default is not None and default not in named:
        raise CannotLoadModel(f"{file} has default_prompt_name {default!r:.80}, and its prompts are {sorted(prompts)}")
    _check_model_keys(file, described, kind, modules)
    similarity = described.get("similarity_fn_name")
    return Saved(
        root=root,
        kind=kind,
        modules=modules,
        transformer=_transformer(modules[0]) if modules and modules[0].name == "Transformer" else TransformerFile(),
        prompts=prompts,
        default_prompt=(prompts | {"document": prompts.get("document", "")}).get(default or "", ""),
        similarity=similarity if similarity in _SIMILARITIES else None,
        truncate_dim=described.get("truncate_dim"),
        max_active_dims=described.get("max_active_dims"),
    )


def _refuse_unknown(file: Path, content: Mapping[str, Any], known: frozenset[str] | set[str]) -> None:
    """CannotLoadModel if `content` has a key that is not among the `known` ones."""
    unknown = sorted(content.keys() - known)
    if unknown:
        raise CannotLoadModel(
            f"{file} has {', '.join(map(repr, unknown))}, which may change the numbers and which embedq does not read; "
            f"it reads {', '.join(sorted(known))}"
        )


def pooling_of(module: SavedModule) -> tuple[str, ...]:
    """The modes of a Pooling module, by our names, in the order in which their vectors are joined."""
    config, file = module.config, module.path / "config.json"
    module.refuse_other_keys(
        {"word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt", *_FLAGS}
    )
    if not config:
        raise CannotLoadModel(f"{file} is empty or missing; it must say pooling_mode, one of {', '.join(_POOLINGS)}")
    named = config.get("pooling_mode")
    modes = [mode for flag, mode in _FLAGS.items() if config.get(flag)] if named is None else named
    if named is None and not modes and config.keys() & _FLAGS.keys():
        raise CannotLoadModel(f"{file} asks for no pooling; supported are {', '.join(_POOLINGS)}")
    modes = [modes] if isinstance(modes, str) else list(modes or ["mean"])
    unknown = [mode for mode in modes if mode not in _POOLINGS]
    if unknown:
        raise CannotLoadModel(f"{file} asks for pooling {unknown[0]!r:.80}; supported are {', '.join(_POOLINGS)}")
    return tuple(_POOLINGS[mode] for mode in modes)


def transformer_file(path: Path) -> Path | None:
    """The file in `path` that configures a Transformer module, the first that has content; None if none has."""
    return next((path / name for name in _TRANSFORMER_FILES if read_json(path / name)), None)


def _module(root: Path, entry: Mapping[str, Any]) -> SavedModule:
    kind, place = str(entry["type"]), PurePosixPath(str(entry["path"]))
    if place.is_absolute() or ".." in place.parts:
        raise CannotLoadModel(f"{root}/modules.json names files outside its own directory: {str(place)!r:.80}")
    if not kind.startswith(_PACKAGE):
        raise CannotLoadModel(
            f"{root}/modules.json names the class {kind!r:.80}, code that the checkpoint brings along and that is never "
            f"run; classes below {_PACKAGE[:-1]} are supported"
        )
    path = root / place
    name = kind.rpartition(".")[2]
    if name in ("Transformer", "MLMTransformer"):
        file = transformer_file(path)
        config: Any = read_json(file) if file else {}
        if name == "MLMTransformer":  # an older name
            name, config = "Transformer", {"transformer_task": "fill-mask"} | config
    else:
        config = read_json(path / "config.json") or {}
    return SavedModule(name, path, config)


def _check_model_keys(file: Path, described: Mapping[str, Any], kind: str, modules: tuple[SavedModule, ...]) -> None:
    activation = described.get("activation_fn")
    if kind == "CrossEncoder" and activation is not None and activation not in _ACTIVATIONS:
        raise CannotLoadModel(
            f"{file} has activation_fn {activation!r:.80}; supported are Sigmoid and Identity, which `normalize` chooses"
        )
    # Dense modules compute in float32 anyway; what is inside the network has the precision of the network.
    dense = {f"{number}.linear" for number, module in enumerate(modules) if module.name == "Dense"}
    for name in described.get("keep_in_fp32_modules") or ():
        if name not in dense:
            raise CannotLoadModel(f"{file} has keep_in_fp32_modules {name!r:.80}; supported are Dense modules")
    for name in ("truncate_dim", "max_active_dims"):
        count = described.get(name)
        if count is not None and (type(count) is not int or count < 1):
            raise CannotLoadModel(f"{file} has {name} {count!r:.80}; it must be a whole number from 1")
    if kind == "SparseEncoder" and described.get("similarity_fn_name") not in (None, "dot"):
        raise CannotLoadModel(
            f"{file} has similarity_fn_name {described['similarity_fn_name']!r:.80}; of a SparseEncoder dot is supported"
        )


def _transformer(module: SavedModule) -> TransformerFile:
    config = dict(module.config)
    file = transformer_file(module.path) or module.path
    kwargs = {name: _kwargs(file, config, name) for name in _KWARGS}
    if config.pop("tokenizer_name_or_path", None) is not None:
        raise CannotLoadModel(f"{file} has tokenizer_name_or_path: a tokenizer of another place, which is not fetched")
    _refuse_unknown(file, config, _TRANSFORMER_KEYS)
    task = config.get("transformer_task") or "feature-extraction"
    if task not in _TASKS:
        raise CannotLoadModel(f"{file} has transformer_task {task!r:.80}; supported are {', '.join(_TASKS)}")
    length = kwargs["processor_kwargs"].get("model_max_length", config.get("max_seq_length"))
    processing = _processing(file, config.get("processing_kwargs") or {})
    lengths = {"query": config.get("query_length"), "document": config.get("document_length")}
    stated = {name: value for name, value in lengths.items() if value is not None}
    return TransformerFile(
        task=task,
        max_length=processing["text"].get("max_length", length),
        lengths={} if "max_length" in processing["text"] else stated,
        lower=bool(config.get("do_lower_case")),
        message_format=_message_format(file, config, task),
        chat_kwargs=processing["chat_template"],
        truncation_side=kwargs["processor_kwargs"].get("truncation_side"),
        query_expansion=config.get("query_expansion"),
    )


def _kwargs(file: Path, config: dict[str, Any], name: str) -> dict[str, Any]:
    """The arguments for transformers under their older or newer name; taken out of `config`."""
    found: dict[str, Any] = {}
    for key in _KWARGS[name]:
        found |= config.pop(key, None) or {}
    for key in sorted(found.keys() - _HARMLESS_KWARGS[name]):
        raise CannotLoadModel(f"{file} has {name} {key!r:.80}, which is not supported; it may change the numbers")
    return found


def _processing(file: Path, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The supported part of `processing_kwargs`: a length for texts, and values for the chat template."""
    text, chat = dict(given.get("text") or {}), dict(given.get("chat_template") or {})
    others = [f"{name}.{key}" for name in given if name not in ("text", "chat_template") for key in given[name] or {}]
    # Padding does not reach a text's numbers here, and the last token's logits are taken anyway.
    others += [f"text.{key}" for key in text.keys() - {"max_length", "truncation", "padding", "logits_to_keep"}]
    if text.get("truncation") not in (None, True, "longest_first"):
        others.append(f"text.truncation ({text['truncation']})")
    sizes = {"padding", "truncation", "max_length", "return_tensors", "restore_suffix", "chat_template", "tools"}
    others += [f"chat_template.{key}" for key in chat.keys() & (sizes | {"documents", "continue_final_message"})]
    if others:
        raise CannotLoadModel(f"{file} has processing_kwargs {', '.join(sorted(others))}, which is not supported")
    return {"text": text, "chat_template": chat}


def _message_format(file: Path, config: Mapping[str, Any], task: str) -> str | None:
    """The form of a message's content; None if texts pass through no template. CannotLoadModel for other inputs."""
    modalities = config.get("modality_config")
    if modalities is None:
        return None
    feature, output = _TASKS[task]
    if (config.get("module_output_name") or feature) != feature:
        raise CannotLoadModel(
            f"{file} has module_output_name {config['module_output_name']!r:.80}; of {task} {feature} is supported"
        )
    for name, how in modalities.items():
        if name not in ("text", "message"):
            raise CannotLoadModel(f"{file} has modality_config {name!r:.80}; supported are text and message")
        if how.get("method") != "forward" or how.get("method_output_name") not in (output, [output]):
            raise CannotLoadModel(
                f"{file} takes {name} from {how.get('method')!s:.40}, {how.get('method_output_name')!s:.80}; supported is "
                f"{output} of forward"
            )
    if "message" not in modalities:
        return None
    form = modalities["message"].get("format", "auto")
    if form not in ("flat", "structured", "auto"):
        raise CannotLoadModel(f"{file} has the message format {form!r:.80}; supported are flat, structured and auto")
    return str(form)
