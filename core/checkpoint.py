"""A model directory -> `ModelSpec`: everything the directory's own files say about how to run it.

Reads two layouts: sentence-transformers (`modules.json` names pooling, normalising, prompts and the
length limit) and a plain transformers directory (`config.json` alone). Never runs code from the
directory and never reads a pickle. Knows nothing of devices.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import CannotLoadModel
from core.settings import ModelSettings

#: Weights are read from these only; `pytorch_model.bin` is a pickle.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

#: What a hub download brings: weights as safetensors, and the small files that describe them.
_DOWNLOAD = ["*.safetensors", "*.json", "*.txt", "*.model"]

#: sentence-transformers module classes (the last part of their path) that `encoder` can run.
_MODULES = ["Transformer", "Pooling", "Normalize"]

#: Pooling of `1_Pooling/config.json` -> our names. Once a flag per mode, since sentence-transformers 6
#: the value of "pooling_mode".
_POOLINGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "cls": "cls", "mean": "mean"}

#: Model types whose attention looks both ways. Pooling over a decoder needs a family of its own.
ENCODER_TYPES = frozenset(
    {"albert", "bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta"}
)

#: Position ids of these start after the padding index, which takes that many off the limit.
_OFFSET_TYPES = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta"})

#: tokenizers write this order of magnitude for "no limit".
_NO_LIMIT = 10**6


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """How to run one checkpoint."""

    #: Name that jobs, queues, logs and metrics use.
    alias: str
    path: Path
    #: Which class of `core.models` runs it: "encoder" or "cross_encoder".
    family: str
    #: "cls" or "mean"; a cross-encoder has none.
    pooling: str | None
    #: Whether vectors are scaled to length 1 unless a call says otherwise.
    normalize: bool
    #: Tokens per sequence, special tokens included.
    max_length: int
    #: Components of a vector.
    dimensions: int
    pad_token_id: int
    #: Prompt per input type ("query", "document"), and the one used when a call names none.
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    #: Whether texts are lower-cased before the tokenizer's own rules (sentence-transformers' do_lower_case).
    lower: bool = False

    @property
    def is_embedder(self) -> bool:
        return self.family != "cross_encoder"

    def prompt(self, input_type: str | None, instruction: str | None) -> str:
        """What goes before each text: the call's instruction, else the checkpoint's own prompt."""
        if instruction is not None:
            return instruction
        return self.default_prompt if input_type is None else self.prompts.get(input_type, "")


def read_spec(alias: str, settings: ModelSettings) -> ModelSpec:
    """Find the checkpoint (downloading a hub name), verify it, and read how to run it.

    CannotLoadModel says what was looked for and where.
    """
    path = find(settings.path, settings.revision)
    _check_weights(path, settings.sha256)
    config = _read_json(path / "config.json")
    if config is None:
        raise CannotLoadModel(f"{path} has no config.json, so it is not a transformers checkpoint")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ENCODER_TYPES:
        raise CannotLoadModel(
            f"{path} is of type {model_type!r}; the types supported are {', '.join(sorted(ENCODER_TYPES))}"
        )
    is_classifier = any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    read = _read_cross_encoder if is_classifier else _read_encoder
    try:
        return read(alias, path, config, settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CannotLoadModel(f"a configuration file of {path} has not the expected form: {error!r:.200}") from error


def find(path_or_name: str, revision: str | None = None) -> Path:
    """A local directory as it is; any other name is fetched from the hub into its cache."""
    path = Path(path_or_name).expanduser()
    if path_or_name and path.is_dir():
        return path
    if path.is_absolute() or path_or_name.startswith((".", "~")) or path_or_name.count("/") != 1:
        raise CannotLoadModel(f"there is no model directory {path_or_name!r:.300}; a hub name is written owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_name, revision=revision, allow_patterns=_DOWNLOAD))
    except Exception as error:  # the client has dozens of classes: absent, private, offline, disk full
        raise CannotLoadModel(
            f"{path_or_name!r} is no local directory and cannot be fetched from the hub: {type(error).__name__}"
        ) from error


def _read_encoder(alias: str, path: Path, config: dict[str, Any], settings: ModelSettings) -> ModelSpec:
    modules = _read_json(path / "modules.json", list)
    pooling: str = settings.pooling or "mean"
    normalize = True
    if modules is not None:
        stated, normalize = _read_modules(path, modules)
        pooling = settings.pooling or stated
    sentence = _read_json(path / "sentence_bert_config.json") or {}
    described = _read_json(path / "config_sentence_transformers.json") or {}
    prompts = {name: text for name, text in (described.get("prompts") or {}).items() if text}
    if "passage" in prompts:  # an older name for the same thing
        prompts.setdefault("document", prompts["passage"])
    limit = _max_length(path, config)
    return ModelSpec(
        alias=alias,
        path=path,
        family="encoder",
        pooling=pooling,
        normalize=normalize,
        max_length=_chosen_length(alias, settings.max_length, sentence.get("max_seq_length"), limit),
        dimensions=int(config["hidden_size"] if "hidden_size" in config else config["dim"]),
        pad_token_id=_pad_token_id(config),
        prompts=prompts,
        default_prompt=prompts.get(described.get("default_prompt_name") or "", ""),
        lower=bool(sentence.get("do_lower_case")),
    )


def _read_cross_encoder(alias: str, path: Path, config: dict[str, Any], settings: ModelSettings) -> ModelSpec:
    num_labels = len(config.get("id2label") or {0: "", 1: ""})  # transformers' own default is two
    if num_labels != 1:
        raise CannotLoadModel(f"{path} has {num_labels} labels; a reranker gives one score, so it must have exactly 1")
    return ModelSpec(
        alias=alias,
        path=path,
        family="cross_encoder",
        pooling=None,
        normalize=False,
        max_length=_chosen_length(alias, settings.max_length, None, _max_length(path, config)),
        dimensions=1,
        pad_token_id=_pad_token_id(config),
    )


def _read_modules(path: Path, modules: list[dict[str, Any]]) -> tuple[str, bool]:
    """(pooling, whether vectors are normalised) from `modules.json`."""
    names = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if names not in (_MODULES[:2], _MODULES):
        raise CannotLoadModel(
            f"{path}/modules.json lists {', '.join(names)}; supported is Transformer, Pooling, then Normalize or nothing"
        )
    pooling_file = path / str(modules[1].get("path", "")) / "config.json"
    flags = _read_json(pooling_file) or {}
    chosen = flags.get("pooling_mode") or [
        name for name, is_on in flags.items() if name.startswith("pooling_mode_") and is_on
    ]
    if isinstance(chosen, str):
        chosen = [chosen]
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise CannotLoadModel(
            f"{pooling_file} asks for {chosen or 'no pooling'}; supported is one of {list(_POOLINGS)}"
        )
    if not flags.get("include_prompt", True):
        raise CannotLoadModel(
            f"{pooling_file} leaves the prompt out of the pooling (include_prompt); that is not supported"
        )
    return _POOLINGS[chosen[0]], "Normalize" in names


def _pad_token_id(config: dict[str, Any]) -> int:
    """The stated padding token; where none is stated, the one transformers takes for the type."""
    stated = config.get("pad_token_id")
    return int(config.get("model_type") in _OFFSET_TYPES) if stated is None else int(stated)


def _max_length(path: Path, config: dict[str, Any]) -> int:
    """The longest sequence the weights have positions for, or the tokenizer's own limit if shorter."""
    positions = int(config.get("max_position_embeddings") or 512)
    if config.get("model_type") in _OFFSET_TYPES:
        positions -= _pad_token_id(config) + 1
    tokenizer = (_read_json(path / "tokenizer_config.json") or {}).get("model_max_length")
    return min(positions, int(tokenizer)) if tokenizer and tokenizer < _NO_LIMIT else positions


def _chosen_length(alias: str, asked: int | None, stated: int | None, limit: int) -> int:
    if asked is not None and asked > limit:
        raise CannotLoadModel(f"max_length of model {alias!r} is set to {asked}; its weights carry {limit} tokens")
    return asked or min(stated or limit, limit)


def _check_weights(path: Path, sha256: str | None) -> None:
    if not any((path / name).is_file() for name in _WEIGHTS):
        raise CannotLoadModel(
            f"{path} has no weights as safetensors: looked for {' and '.join(_WEIGHTS)}. A pickle (pytorch_model.bin) is "
            "never served; turn a local one into safetensors once with `python -m core.convert DIRECTORY`"
        )
    if sha256 is None:
        return
    if not (path / _WEIGHTS[0]).is_file():
        raise CannotLoadModel(f"{path} has its weights in several files; sha256 is for one, {_WEIGHTS[0]}")
    with (path / _WEIGHTS[0]).open("rb") as weights:
        found = hashlib.file_digest(weights, "sha256").hexdigest()
    if found != sha256:
        raise CannotLoadModel(f"{path / _WEIGHTS[0]} has SHA-256 {found}, not the expected {sha256}")


def _read_json(path: Path, form: type = dict) -> Any:
    """The file's content, of that form; None where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CannotLoadModel(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, form):
        raise CannotLoadModel(f"{path} holds a {type(content).__name__} where a {form.__name__} is expected")
    return content
