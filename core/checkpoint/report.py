"""Lists how one checkpoint would be run, and the file each line was read from. For `embedq check`."""

from __future__ import annotations

from typing import NamedTuple

from embedq.core.checkpoint.families import MEANINGS, of_saved
from embedq.core.checkpoint.files import read_json
from embedq.core.checkpoint.network_types import tokenizer_limit
from embedq.core.checkpoint.published_models import defaults_of
from embedq.core.checkpoint.saved_modules import Saved, read_saved, transformer_file
from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.settings import ModelSettings

#: The file in which sentence-transformers describes a whole model.
_DESCRIBED = "config_sentence_transformers.json"


class Line(NamedTuple):
    """One thing that was read."""

    name: str
    value: str
    source: str


def report(spec: ModelSpec, settings: ModelSettings) -> list[Line]:
    """Everything that decides how `spec` runs. `settings` are those it was read with."""
    saved = read_saved(spec.root or spec.path) if settings.layout is None else None
    lines = [
        Line("kind", saved.kind if saved else "transformers checkpoint", _DESCRIBED if saved else "config.json"),
        _network(spec),
        Line("family", f"{spec.family}: {MEANINGS[spec.family]}", _source_of_family(settings, saved)),
    ]
    if spec.adapter is not None:
        lines.append(Line("adapter", f"merged into {spec.adapter.base}", "adapter_config.json"))
    lines += _of_embedder(spec, settings, saved) if spec.is_embedder else _of_reranker(spec, saved)
    lines.append(
        Line("max_length", f"{spec.default_length or spec.max_length} tokens", _source_of_length(spec, settings, saved))
    )
    if spec.chat is not None:
        is_file = (spec.chat.path / "chat_template.jinja").is_file()
        lines.append(
            Line(
                "chat template", "texts pass through it", "chat_template.jinja" if is_file else "tokenizer_config.json"
            )
        )
    return lines


def _network(spec: ModelSpec) -> Line:
    if spec.family == "static":
        return Line("network", "none: a table of vectors", "model.safetensors")
    architectures = ", ".join(map(str, spec.config.get("architectures") or ["no architecture"]))
    return Line("network", f"{spec.config.get('model_type')} ({architectures})", "config.json")


def _of_embedder(spec: ModelSpec, settings: ModelSettings, saved: Saved | None) -> list[Line]:
    lines = []
    if spec.family not in ("splade", "static"):  # they have their own way from tokens to a text
        what = f"{spec.pooling}{'' if spec.include_prompt else ', without the prompt'}"
        lines.append(Line("pooling", what, _source_of_pooling(settings, saved)))
    lines += [
        Line("normalised", "yes" if spec.normalize else "no", "modules.json" if saved else "the default"),
        Line("dimensions", str(spec.dimensions), "modules.json" if saved else "config.json"),
    ]
    modules = [*(f"{one.name} of tokens" for one in spec.token_modules), *(one.name for one in spec.modules)]
    if modules:
        lines.append(Line("modules", ", ".join(modules), "modules.json"))
    for kind in ("query", "document"):
        if spec.prompts.get(kind):
            lines.append(Line(f"prompt, {kind}", repr(spec.prompts[kind]), _DESCRIBED))
    if spec.default_prompt:
        lines.append(Line("default prompt", repr(spec.default_prompt), _DESCRIBED))
    if spec.similarity != "cosine":
        lines.append(Line("similarity", spec.similarity, _DESCRIBED))
    return lines


def _of_reranker(spec: ModelSpec, saved: Saved | None) -> list[Line]:
    lines = []
    if spec.query_instruction:
        source = _DESCRIBED if saved and saved.default_prompt else "the family"
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


def _source_of_family(settings: ModelSettings, saved: Saved | None) -> str:
    if settings.family:
        return "settings"
    if saved is not None and of_saved(saved) is not None:
        return "modules.json"
    return "its published name" if defaults_of(settings.path) else "config.json"


def _source_of_length(spec: ModelSpec, settings: ModelSettings, saved: Saved | None) -> str:
    if settings.max_length:
        return "settings"
    if spec.family == "static" or (spec.default_length is not None and not spec.is_embedder):
        return "the family"
    home = saved.modules[0].path if saved else spec.path
    file = transformer_file(home)
    if file is not None and saved is not None and saved.transformer.max_length is not None:
        return file.name
    limit = tokenizer_limit(read_json(home / "tokenizer_config.json") or {})
    return "tokenizer_config.json" if limit == spec.max_length else "config.json"


def _source_of_pooling(settings: ModelSettings, saved: Saved | None) -> str:
    if settings.pooling:
        return "settings"
    if saved is not None:
        return next(f"{one.path.relative_to(saved.root)}/config.json" for one in saved.modules if one.name == "Pooling")
    listed = defaults_of(settings.path)
    return "its published name" if listed and listed.pooling else "the default"
