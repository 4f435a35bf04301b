"""The models of a test, as settings of a worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def served(models: Mapping[str, str] | None) -> dict[str, Any]:
    """Settings to serve these directories by alias, None for all-MiniLM-L6-v2. CannotLoadModel if that is not installed."""
    if models is None:
        from embedq.deploy.demo import minilm

        models = {minilm.ALIAS: str(minilm.directory())}
    # Defaults of a settings file or of the environment may name models that the test has not.
    defaults = {"default_embed": "", "default_rerank": ""}
    return {"models": {alias: {"path": str(path)} for alias, path in models.items()}, **defaults}
