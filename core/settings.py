"""Every limit and choice of a worker: its unit, its default and the reason for it.

Values come from arguments, then environment variables with the prefix EMBEDQ_, then one file,
`embedq.toml` in the working directory or wherever EMBEDQ_CONFIG points. They are read once, checked
against each other, and frozen. What a producer needs (server, limits of a call) is the file's
[wire] table, which `celeryconfig.py` reads without this module's dependencies.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from embedq.core.errors import InvalidSettings
from embedq.core.options import ALIAS

#: Arithmetic a model may run in; "auto" asks the device, and never takes int8.
Precision = Literal["auto", "float32", "bfloat16", "float16", "int8"]


class ModelSettings(BaseModel):
    """One model a worker serves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: A local directory, or a name on the hub ("BAAI/bge-m3").
    path: str
    #: Branch, tag or commit of a hub model. Name a commit in production, so that a changed hub
    #: repository cannot silently change stored vectors.
    revision: str | None = None
    #: Where a hub model is kept once fetched; None for the hub client's own cache.
    cache_dir: str | None = None
    #: Expected SHA-256 of the weights file; a file that differs is refused before it is read.
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    precision: Precision = "auto"
    #: Round weights to this, then compute in `precision`: what FlagEmbedding makes of half precision on a CPU.
    weights_rounded_to: Literal["float16", "bfloat16"] | None = None
    #: "transformers" reads the directory as FlagEmbedding does, as if sentence-transformers' files were not
    #: there: no modules, no prompts, and as many tokens as there are positions. None reads all.
    layout: Literal["transformers"] | None = None
    #: Tokens per sequence; None takes the checkpoint's own limit. Rerankers that put a prompt behind query and
    #: passage count these two alone, and take 512 of them where neither this nor a call says otherwise.
    max_length: int | None = Field(default=None, ge=3)
    #: What kind of model it is, where neither its name nor its files tell; see `core.models.FAMILIES`.
    family: str | None = None
    #: None takes what the directory says; else what its name tells; else mean, for decoders last_token.
    pooling: Literal["cls", "mean", "last_token"] | None = None
    #: Whether vectors are scaled to length 1; None takes what the directory says, else yes.
    normalize: bool | None = None
    #: Whether white space around texts is dropped first, as older versions of sentence-transformers did.
    strip: bool = False
    #: Written around every query and passage; formats hold {} twice, for instruction and text.
    query_instruction: str | None = None
    passage_instruction: str | None = None
    query_format: str | None = None
    passage_format: str | None = None
    #: In-context models: how an example is written ({} three times), and what follows the query.
    examples_format: str | None = None
    suffix: str | None = None
    #: Their examples for calls that bring none: dicts of "instruct", "query", "response".
    examples: tuple[dict[Literal["instruct", "query", "response"], str], ...] | None = None
    #: Which text of an over-long pair gives way; None for the passage.
    pair_truncation: Literal["passage", "longest"] | None = None
    #: Layered rerankers: what scores a layer, the head trained for that "layer", or the one at its place in
    #: the "request", as FlagEmbedding has it. None for what published scores rest on: lightweight rerankers
    #: by the request, others by the layer.
    heads_by: Literal["layer", "request"] | None = None


class Settings(BaseSettings):
    """All settings of one worker process."""

    model_config = SettingsConfigDict(env_prefix="EMBEDQ_", frozen=True, extra="forbid")

    #: Models by alias. In the environment: "minilm=/models/minilm,reranker=BAAI/bge-reranker-v2-m3".
    models: Annotated[dict[str, ModelSettings], NoDecode] = {}
    #: Alias that serves jobs which name no model; "none" for no model. Not set: the only one that
    #: can, if there is just one.
    default_embed: str | None = None
    default_rerank: str | None = None
    #: "auto" takes CUDA, then Ascend NPU, Moore Threads MUSA, Apple MPS, CPU.
    device: str = "auto"
    #: Tokens of one forward pass, padding included. None: 1,024 on a CPU (larger batches leave its
    #: cache and were slower) or 2,048 where it runs one at a time, 16,384 on accelerators, less where their memory allows less; a longer sequence runs alone.
    max_batch_tokens: int | None = Field(default=None, ge=16)
    #: Sequences of one forward pass; bounds the bookkeeping when texts are very short.
    max_batch_sequences: int = Field(default=512, ge=1)
    #: Tokens encoded ahead of the device; beyond it encoding waits. 4 bytes each, and enough for
    #: hundreds of batches: a deep backlog is what lets sequences of like length meet.
    max_waiting_tokens: int = Field(default=4_000_000, ge=1_000)
    #: Seconds of one batch, as far as the speed measured so far tells: what an interactive job may have to wait for.
    max_batch_s: float = Field(default=0.5, gt=0)
    #: While bulk work waits, it gets a batch at least this often, whatever interactive work does.
    max_bulk_wait_s: float = Field(default=2.0, gt=0)
    #: Forward passes at once on a CPU, each on its part of the cores; one that is alone gets all. None: one for four
    #: cores, and two on fewer. Accelerators run one.
    cpu_streams: int | None = Field(default=None, ge=1, le=64)
    #: Threads that turn texts into token ids. None: half the cores, at least 2 and at most 4.
    encode_threads: int | None = Field(default=None, ge=1, le=256)
    #: Seconds without progress after which a forward pass counts as hung: the worker says so and ends, and its
    #: jobs go to another. Longer than the longest single sequence takes.
    hang_timeout_s: float = Field(default=300.0, gt=0)
    #: Seconds a worker may take from its start until it takes jobs. Its launcher ends one that takes longer and starts
    #: another, three times at most. A large model from a slow disk takes minutes; a disk that is gone takes for ever.
    load_timeout_s: float = Field(default=1800.0, gt=0)
    #: Batches a worker fetches ahead, in tokens; the rest stays in the queue for other workers. Two would keep the
    #: device busy; lengths need more to meet: see docs/measurements.md, "window".
    window_batches: int = Field(default=16, ge=2)
    #: Jobs one worker holds at a time, those that wait for their countdown included.
    max_jobs: int = Field(default=10_000, ge=1)
    #: Seconds a worker may take to finish its jobs after SIGTERM before it is killed; what it had
    #: not finished returns to the queue.
    drain_timeout_s: float = Field(default=60.0, gt=0)
    #: Port at which a worker serves its metrics and its health; of several on one host, each takes this and the number
    #: of its device, a second one on a device 100 more. 0 takes a free one, which the log names. None serves nothing.
    metrics_port: int | None = Field(default=None, ge=0, le=65_535)
    #: The address it listens at. Whoever reaches it can read all metrics: there is no password.
    metrics_host: str = "127.0.0.1"
    #: Whether spans are made of jobs and batches, for OpenTelemetry; needs the extra `otel`.
    traces: bool = False
    #: Producers' settings; declared so that the file may hold them, used by `celeryconfig.py` only.
    wire: dict[str, Any] = Field(default={}, exclude=True)

    @field_validator("models", mode="before")
    @classmethod
    def _models_from_text(cls, value: Any) -> Any:
        """Accept "alias=path,alias=path", JSON, and in a mapping "alias": "path" for short."""
        if isinstance(value, str):
            value = json.loads(value) if value.lstrip().startswith("{") else _split_models(value)
        if isinstance(value, dict):
            return {alias: {"path": m} if isinstance(m, str) else m for alias, m in value.items()}
        return value

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
    """Where the settings file is looked for; it need not exist unless EMBEDQ_CONFIG names it."""
    named = os.environ.get("EMBEDQ_CONFIG")
    if named and not Path(named).is_file():
        raise InvalidSettings(f"EMBEDQ_CONFIG is {named!r}, and there is no such file")
    return Path(named or "embedq.toml")


def read_settings(**overrides: Any) -> Settings:
    """Read all settings. InvalidSettings names every wrong one, what it may be, and what was given."""
    given = {name: value for name, value in overrides.items() if value is not None}
    if isinstance(given.get("models"), dict):
        # As text, because mappings of several sources are merged: a call that names its models would
        # load those of the file as well.
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


def _split_models(text: str) -> dict[str, str]:
    models = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        alias, _, path = (piece.strip() for piece in part.partition("="))
        if not path:
            raise ValueError(f"a model is written alias=path; given {part!r}")
        if alias in models:
            raise ValueError(f"the alias {alias!r} stands for two models")
        models[alias] = path
    return models


def _problem(error: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    if error["type"] == "extra_forbidden":  # its value stays untold: it may be a URL with a password
        return f"{name}: there is no such setting here; what producers need goes into the table [wire]"
    is_told = "given" not in message and name != "wire" and not isinstance(error["input"], dict)
    given = f", given {error['input']!r:.80}" if is_told else ""
    return f"{name} (EMBEDQ_{name.split('.')[0].upper()}): {message}{given}"
