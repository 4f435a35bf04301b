"""How one checkpoint would be run, line by line, and the file each line was read from. For `embedq check`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from embedq.core.checkpoint.families import MEANINGS
from embedq.core.checkpoint.files import read_json
from embedq.core.checkpoint.network_types import tokenizer_limit
from embedq.core.checkpoint.published_models import defaults_of
from embedq.core.checkpoint.saved_modules import TRANSFORMER_FILES, Saved, read_saved
from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.settings import ModelSettings


class Line(NamedTuple):
    """One thing that was read."""

    name: str
    value: str
    source: str


def report(spec: ModelSpec, settings: ModelSettings) -> list[Line]:
    """Everything that decides how `spec` runs. `settings` are those it was read with."""
    saved = read_saved(_root(spec)) if settings.layout is None else None
    described = "config_sentence_transformers.json"
    architectures = ", ".join(map(str, spec.config.get("architectures") or ["no architecture"]))
    lines = [
        Line("kind", saved.kind if saved else "transformers checkpoint", described if saved else "config.json"),
        Line("network", f"{spec.config.get('model_type')} ({architectures})", "config.json"),
        Line("family", f"{spec.family}: {MEANINGS[spec.family]}", _source_of_family(spec, settings, saved)),
    ]
    lines += _of_embedder(spec, settings, saved) if spec.is_embedder else _of_reranker(spec, saved)
    lines.append(
        Line("max_length", f"{spec.default_length or spec.max_length} tokens", _source_of_length(spec, settings, saved))
    )
    if spec.chat is not None:
        is_file = (spec.path / "chat_template.jinja").is_file()
        lines.append(
            Line(
                "chat template", "texts pass through it", "chat_template.jinja" if is_file else "tokenizer_config.json"
            )
        )
    return lines


def _root(spec: ModelSpec) -> Path:
    """The directory of `modules.json`: the network itself may lie in a folder below it."""
    return spec.path if (spec.path / "modules.json").is_file() else spec.path.parent


def _of_embedder(spec: ModelSpec, settings: ModelSettings, saved: Saved | None) -> list[Line]:
    described = "config_sentence_transformers.json"
    pooling = "settings" if settings.pooling else "1_Pooling/config.json" if saved else _published(settings)
    lines = [
        Line("pooling", str(spec.pooling) + ("" if spec.include_prompt else ", without the prompt"), pooling),
        Line("normalised", "yes" if spec.normalize else "no", "modules.json" if saved else "the default"),
        Line("dimensions", str(spec.dimensions), "modules.json" if saved else "config.json"),
    ]
    modules = [*(f"{one.name} of tokens" for one in spec.token_modules), *(one.name for one in spec.modules)]
    if modules:
        lines.append(Line("modules", ", ".join(modules), "modules.json"))
    for kind in ("query", "document"):
        if spec.prompts.get(kind):
            lines.append(Line(f"prompt, {kind}", repr(spec.prompts[kind]), described))
    if spec.default_prompt:
        lines.append(Line("default prompt", repr(spec.default_prompt), described))
    if spec.similarity != "cosine":
        lines.append(Line("similarity", spec.similarity, described))
    return lines


def _of_reranker(spec: ModelSpec, saved: Saved | None) -> list[Line]:
    lines = []
    if spec.query_instruction:
        source = "config_sentence_transformers.json" if saved and saved.default_prompt else "the family"
        lines.append(Line("instruction", repr(spec.query_instruction), source))
    if spec.family == "cross_encoder":
        lines.append(
            Line(
                "over-long pairs",
                f"the {spec.pair_truncation} gives way",
                "the default" if saved is None else "modules.json",
            )
        )
    return lines


def _source_of_family(spec: ModelSpec, settings: ModelSettings, saved: Saved | None) -> str:
    if settings.family:
        return "settings"
    if saved is not None and saved.kind == "CrossEncoder":
        return "modules.json"
    return "its published name" if defaults_of(settings.path) else "config.json"


def _source_of_length(spec: ModelSpec, settings: ModelSettings, saved: Saved | None) -> str:
    if settings.max_length:
        return "settings"
    if saved is not None and saved.transformer.max_length is not None:
        return next((name for name in TRANSFORMER_FILES if (spec.path / name).is_file()), "modules.json")
    limit = tokenizer_limit(read_json(spec.path / "tokenizer_config.json") or {})
    return "tokenizer_config.json" if limit == spec.max_length else "config.json"


def _published(settings: ModelSettings) -> str:
    listed = defaults_of(settings.path)
    return "its published name" if listed and listed.pooling else "the default"
