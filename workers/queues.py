"""Queue name → model: exact (from an engine) or a guess (from settings)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from embedq import tasks
from embedq.core.engine import Engine
from embedq.core.settings import Settings


def queues_of(engine: Engine) -> dict[str, str]:
    """The queues that a worker consumes: both of each model, so that a call it cannot serve fails, and the defaults."""
    return _queues(engine.models, {"embed": engine.calls.default_embed, "rerank": engine.calls.default_rerank})


def likely_queues(settings: Settings) -> dict[str, str]:
    """The queues that workers with these settings will probably consume; a ready worker reports the exact ones."""
    only = next(iter(settings.models)) if len(settings.models) == 1 else None
    named = {"embed": settings.default_embed or only, "rerank": settings.default_rerank or only}
    return _queues(settings.models, {kind: alias for kind, alias in named.items() if alias in settings.models})


def _queues(models: Iterable[str], defaults: Mapping[str, str | None]) -> dict[str, str]:
    models = list(models)
    named = {tasks.config.queue_name(kind, alias): alias for alias in models for kind in ("embed", "rerank")}
    named |= {tasks.config.parts_queue(alias): alias for alias in models}
    return named | {tasks.config.queue_name(kind): alias for kind, alias in defaults.items() if alias}
