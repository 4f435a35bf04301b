"""The model core: runs models in the calling process, without Celery.

    from embedq import core

    with core.load("BAAI/bge-m3") as engine:
        engine.embed(["a text"]).dense

Importing this package loads no heavy library: torch loads inside `load`. Neither import nor `load` changes logging,
warnings, environment, signals or random numbers of the process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# `import core` in the checkout's root would make a second copy of every class, which `except` would not know.
if __name__ == "core":
    raise ImportError("the model core is embedq.core: `from embedq import core`, `python -m embedq.core.…`")

if TYPE_CHECKING:
    from embedq.core.engine import Engine
    from embedq.core.settings import Precision, Settings


def load(
    path: str,
    *,
    alias: str = "model",
    device: str = "auto",
    precision: Precision = "auto",
    model: dict[str, Any] | None = None,
    **settings: Any,
) -> Engine:
    """Load one checkpoint, a local directory or a hub name, and return an engine that serves it.

    `model` overrides the checkpoint's own configuration (`core.settings.ModelSettings`); `settings` configure the
    engine (`core.settings.Settings`). OperatorError if the checkpoint, the device or a setting cannot be used.
    """
    from embedq.core.settings import read_settings

    chosen = {"path": path, "precision": precision, **(model or {})}
    # A worker's environment or file may name default models that this call does not load.
    defaults = {"default_embed": "", "default_rerank": ""}
    return load_all(read_settings(models={alias: chosen}, device=device, **(defaults | settings)))


def load_all(settings: Settings) -> Engine:
    """Load every model of `settings` on one device and return the engine that serves them."""
    from embedq.core.checkpoint.files import refuse_absent
    from embedq.core.checkpoint.read_spec import read_spec
    from embedq.core.checkpoint.revision import with_revision
    from embedq.core.devices import choose_device
    from embedq.core.engine import Engine
    from embedq.core.errors import InvalidSettings
    from embedq.core.models import load_model

    if not settings.models:
        raise InvalidSettings(
            "no model is configured; set EMBEDQ_MODELS=alias=path, or [models.alias] path in embedq.toml"
        )
    refuse_absent(settings.models)
    device = choose_device(settings.device)
    specs = {alias: with_revision(read_spec(alias, model)) for alias, model in settings.models.items()}
    models = {alias: load_model(spec, device, settings.models[alias].precision) for alias, spec in specs.items()}
    return Engine(models, settings)
