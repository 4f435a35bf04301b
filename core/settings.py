"""The settings of a worker: each with its unit, its default and the reason for it.

Arguments override environment variables with the prefix EMBEDQ_, and those override one file: `embedq.toml` in the
working directory, or the file that EMBEDQ_CONFIG names. Settings are read once, checked against each other, and frozen.
Producers' settings (server, limits of a call) are in the file's [wire] table, which `celeryconfig.py` reads without
this module's dependencies.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from embedq.core.errors import InvalidSettings
from embedq.core.options import ALIAS
from embedq.core.setting_names import WIRE, hint, misspelt_variables, variable_of

#: Precisions a model can run in; "auto" chooses by the device, and never int8.
Precision = Literal["auto", "float32", "bfloat16", "float16", "int8"]

#: Longest time that a setting may name: a year. Python cannot wait for ever in seconds: an infinite limit would fail in the
#: thread that waits first.
_MAX_S = 365 * 86_400.0

#: Formats of a text, and how many {} each contains.
_FORMATS = {"query_format": 2, "passage_format": 2, "examples_format": 3}


class ModelSettings(BaseModel):
    """One model a worker serves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Local directory, or name on the hub ("BAAI/bge-m3").
    path: str
    #: Branch, tag or commit of a hub model. In production name a commit: otherwise a changed hub repository silently
    #: changes your vectors.
    revision: str | None = None
    #: Directory for downloaded hub models; None for the hub client's own cache.
    cache_dir: str | None = None
    #: Expected SHA-256 of the weights file. The worker refuses another file before reading it.
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    #: Precision to compute in. "auto" takes bfloat16 if the device multiplies it natively, otherwise float32 on CPUs
    #: and float16 on accelerators.
    precision: Precision = "auto"
    #: Round the weights to this, then compute in `precision`, as FlagEmbedding does for half precision on a CPU.
    weights_rounded_to: Literal["float16", "bfloat16"] | None = None
    #: "transformers" ignores sentence-transformers' files, as FlagEmbedding does: no modules, no prompts, and a limit
    #: of as many tokens as there are positions. None reads all files.
    layout: Literal["transformers"] | None = None
    #: Most tokens per sequence; None for the checkpoint's own limit. Rerankers with a prompt behind query and passage
    #: count only those two, and default to 512.
    max_length: int | None = Field(default=None, ge=3)
    #: Family of the model, if neither its name nor its files show it; see `core.models.FAMILIES`.
    family: str | None = None
    #: Pools hidden states into a vector. None: as the directory states, else as for its published name, else
    #: mean, and last_token for decoders.
    pooling: Literal["cls", "mean", "last_token"] | None = None
    #: True scales vectors to length 1. None: as the directory states, else true.
    normalize: bool | None = None
    #: True strips white space around texts, as older versions of sentence-transformers did.
    strip: bool = False
    #: Instruction to write around every query, unless a call has its own.
    query_instruction: str | None = None
    #: Instruction to write around every passage, unless a call has its own.
    passage_instruction: str | None = None
    #: Format of a query; contains {} twice, for instruction and text.
    query_format: str | None = None
    #: Format of a passage; contains {} twice, for instruction and text.
    passage_format: str | None = None
    #: In-context models: format of an example; contains {} three times, for instruction, query and response.
    examples_format: str | None = None
    #: In-context models: text to write after the query.
    suffix: str | None = None
    #: In-context models: examples for calls without their own, as dicts of "instruct", "query", "response".
    examples: tuple[dict[Literal["instruct", "query", "response"], str], ...] | None = None
    #: The text of an over-long pair that is cut: the passage, or the longer of the two; None for the passage.
    pair_truncation: Literal["passage", "longest"] | None = None
    #: Layered rerankers: which head scores a layer: the one trained for that "layer", or the one at the layer's place
    #: in the "request", as in FlagEmbedding. None reproduces published scores: by request for lightweight rerankers, by
    #: layer for others.
    heads_by: Literal["layer", "request"] | None = None

    @field_validator("path")
    @classmethod
    def _path_is_not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must name a directory or a model of the hub")
        return value

    @field_validator(*_FORMATS)
    @classmethod
    def _has_its_places(cls, value: str | None, info: ValidationInfo) -> str | None:
        num_places = _FORMATS[str(info.field_name)]
        if value is not None and value.count("{}") != num_places:
            raise ValueError(f"must contain {{}} {num_places} times, given {value.count('{}')} times")
        return value


class Settings(BaseSettings):
    """All settings of one worker process."""

    model_config = SettingsConfigDict(env_prefix="EMBEDQ_", frozen=True, extra="forbid")

    #: Models to serve, by alias. In the environment: "minilm=/models/minilm,reranker=BAAI/bge-reranker-v2-m3".
    models: Annotated[dict[str, ModelSettings], NoDecode] = {}
    #: Alias of the model for embedding jobs that name none; "none" refuses them. Unset: the only model that can, if
    #: there is just one.
    default_embed: str | None = None
    #: Alias of the model for reranking jobs that name none; "none" refuses them. Unset: the only reranker, or without
    #: rerankers the only embedding model.
    default_rerank: str | None = None
    #: Device to run on: "cuda:0", "npu:0", "musa:0", "mps" or "cpu". "auto" takes the first that is present, in this
    #: order.
    device: str = "auto"
    #: Most tokens of one forward pass, padding included. None: 1,024 on a CPU (larger batches exceed its cache and were
    #: slower), 2,048 on a CPU that runs one pass at a time, 16,384 on accelerators, or less if memory is short. A
    #: longer sequence runs alone.
    max_batch_tokens: int | None = Field(default=None, ge=16)
    #: Most sequences of one forward pass; limits the bookkeeping for very short texts.
    max_batch_sequences: int = Field(default=512, ge=1)
    #: Most tokens to encode ahead of the device, of each class. 4 bytes each. The default is hundreds of batches,
    #: because a deep backlog lets sequences of similar length share a batch.
    max_waiting_tokens: int = Field(default=4_000_000, ge=1_000)
    #: Most seconds of one batch, estimated from the measured speed: an interactive job may have to wait that long.
    max_batch_s: float = Field(default=0.5, gt=0, le=_MAX_S)
    #: Most seconds that bulk work is passed over for interactive work before it gets a turn, at each stage: a batch's worth of
    #: jobs fetched, a slice of 256 texts encoded, a batch computed.
    max_bulk_wait_s: float = Field(default=2.0, gt=0, le=_MAX_S)
    #: Forward passes to run at once on a CPU, each on its part of the cores; a pass that runs alone uses all. None: one
    #: per four cores, at least two. Accelerators run one.
    cpu_streams: int | None = Field(default=None, ge=1, le=64)
    #: Threads that encode texts into token ids. None: half the cores, at least 2 and at most 4.
    encode_threads: int | None = Field(default=None, ge=1, le=256)
    #: Seconds without progress after which a forward pass counts as hung: the worker logs it and exits, and its jobs
    #: are redelivered to another. Must exceed the time of the longest single sequence.
    hang_timeout_s: float = Field(default=300.0, gt=0, le=_MAX_S)
    #: Most seconds from a worker's start until it takes jobs. The launcher ends a slower one and starts another, at
    #: most three times. A large model on a slow disk takes minutes; a lost disk would take for ever.
    load_timeout_s: float = Field(default=1800.0, gt=0, le=_MAX_S)
    #: Batches' worth of tokens to prefetch. More lets similar lengths share a batch, but leaves less for other workers.
    #: Two would keep the device busy; see docs/measurements.md, "window".
    window_batches: int = Field(default=16, ge=2)
    #: Most jobs that one worker holds at a time. Jobs that wait for their countdown do not count, up to as many again; those
    #: beyond wait on the server.
    max_jobs: int = Field(default=10_000, ge=1)
    #: Seconds a worker has after SIGTERM to finish its jobs before it is killed; unfinished jobs return to the queue.
    drain_timeout_s: float = Field(default=60.0, gt=0, le=_MAX_S)
    #: Port of a worker's metrics and health pages. With several workers on one host, each adds the number of its
    #: device, and a second worker on one device adds 100. 0 takes a free port and logs it. None serves nothing.
    metrics_port: int | None = Field(default=None, ge=0, le=65_535)
    #: Address at which a worker serves its metrics and health pages. There is no password: whoever reaches it can read
    #: all metrics.
    metrics_host: str = "127.0.0.1"
    #: Folders and URL prefixes, "/data,s3://corpus/docs", below which workers may read and write datasets; `..` and links
    #: are resolved first. Empty: none, because a message may name any file.
    data_roots: Annotated[tuple[str, ...], NoDecode] = ()
    #: True records spans of jobs and batches for OpenTelemetry; needs the extra `otel`.
    traces: bool = False
    #: True lets this worker serve another revision of a model than workers present do, if dimensions and outputs are
    #: the same. Otherwise it is refused, because their vectors would be mixed. A launcher sets it for the successors of
    #: a rolling restart (SIGHUP); set it where a service manager replaces workers one by one.
    replace_revision: bool = False
    #: Producers' settings. Declared so that the file may contain them; only `celeryconfig.py` reads them.
    wire: dict[str, Any] = Field(default={}, exclude=True)

    @field_validator("models", mode="before")
    @classmethod
    def _models_from_text(cls, value: Any) -> Any:
        """Accept "alias=path,alias=path", JSON, and mappings of aliases to paths."""
        if isinstance(value, str):
            value = json.loads(value) if value.lstrip().startswith("{") else _split_models(value)
        if isinstance(value, dict):
            return {alias: {"path": m} if isinstance(m, str) else m for alias, m in value.items()}
        return value

    @field_validator("data_roots", mode="before")
    @classmethod
    def _roots_from_text(cls, value: Any) -> Any:
        """Accept "one,another"."""
        return tuple(filter(None, (part.strip() for part in value.split(",")))) if isinstance(value, str) else value

    @field_validator("default_embed", "default_rerank")
    @classmethod
    def _empty_is_not_set(cls, value: str | None) -> str | None:
        return value or None

    @model_validator(mode="after")
    def _aliases(self) -> Settings:
        for alias in self.models:
            if not ALIAS.fullmatch(alias):
                raise ValueError(
                    f"models (EMBEDQ_MODELS): an alias must be 1 to 63 of a-z 0-9 . _ - and begin with a letter or digit, "
                    f"given {alias!r}"
                )
        for name in ("default_embed", "default_rerank"):
            alias = getattr(self, name)
            if alias not in (None, "none", *self.models):
                raise ValueError(
                    f"{name} (EMBEDQ_{name.upper()}): must be one of the models ({', '.join(self.models)}), given {alias!r}"
                )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config_file())


def config_file() -> Path:
    """Path of the settings file; the file need not exist unless EMBEDQ_CONFIG names it."""
    named = os.environ.get("EMBEDQ_CONFIG")
    if named and not Path(named).is_file():
        raise InvalidSettings(f"EMBEDQ_CONFIG is {named!r}, but there is no such file")
    return Path(named or "embedq.toml")


def read_settings(**overrides: Any) -> Settings:
    """Read all settings. InvalidSettings names each wrong one, its allowed values, and the value given.

    A variable EMBEDQ_… that nothing reads is wrong, too: whoever set it expects an effect.
    """
    if misspelt := misspelt_variables():
        raise InvalidSettings("; ".join(map(_misspelt, misspelt.items())))
    given = {name: value for name, value in overrides.items() if value is not None}
    if isinstance(given.get("models"), dict):
        # As text, because pydantic merges mappings of several sources: a call that names its models would load the
        # file's models as well.
        given["models"] = json.dumps(given["models"], default=ModelSettings.model_dump)
    try:
        return Settings(**given)
    except ValidationError as error:
        problems = "; ".join(_problem(dict(one)) for one in error.errors())
        raise InvalidSettings(f"{problems} (known settings: {', '.join(Settings.model_fields)})") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidSettings(f"{config_file()} cannot be read as TOML: {error}") from None
    except ValueError as error:  # a variable whose text cannot be parsed at all
        raise InvalidSettings(f"the settings cannot be read: {error}") from None


def models_text(options: Sequence[str]) -> str:
    """The text of EMBEDQ_MODELS for models written alias=path, one each; a path may contain commas.

    InvalidSettings names one that is not so written, or an alias that stands for two.
    """
    try:
        return json.dumps(_models_of(options))
    except ValueError as error:
        raise InvalidSettings(f"--model: {error}") from None


def _split_models(text: str) -> dict[str, str]:
    try:
        return _models_of(text.split(","))
    except ValueError as error:
        if "," not in text:
            raise
        raise ValueError(f'{error}; where a path contains a comma, write JSON: {{"alias": "path"}}') from None


def _models_of(parts: Iterable[str]) -> dict[str, str]:
    models: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in parts)):
        alias, _, path = (piece.strip() for piece in part.partition("="))
        if not path:
            raise ValueError(f"a model is written alias=path; given {part!r}")
        if alias in models:
            raise ValueError(f"the alias {alias!r} stands for two models")
        models[alias] = path
    return models


def _misspelt(variable: tuple[str, str | None]) -> str:
    name, meant = variable
    return f"{name} is no setting of embedq" + (f", did you mean {variable_of(meant)}?" if meant else "")


def _problem(error: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    if error["type"] == "extra_forbidden":  # without its value, which may be a URL with a password
        return f"{name}: unknown setting{_cure(error['loc'])}"
    is_shown = "given" not in message and name != "wire" and not isinstance(error["input"], dict)
    given = f", given {error['input']!r:.80}" if is_shown else ""
    return f"{name} (EMBEDQ_{name.split('.')[0].upper()}): {message}{given}"


def _cure(place: tuple[str | int, ...]) -> str:
    """What to write in place of an unknown setting, as far as can be guessed."""
    *above, name = map(str, place)
    if above:
        return hint(name, ModelSettings.model_fields)
    if name in WIRE:
        return "; it belongs in the table [wire]"
    return hint(name, Settings.model_fields) or "; producers' settings belong in the table [wire]"
