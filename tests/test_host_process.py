"""A program that imports the core and loads a model keeps its process as it was: the core is a library there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.layout import ROOT

#: What a host may have set for itself, read twice and compared. Loggers that appear are the libraries' own; those
#: there were keep their level, handlers and filters. What torch and transformers do when they are imported is theirs.
_PROBE = """
import faulthandler, gc, locale, logging, os, random, signal, sys, threading, warnings
import numpy as np, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

found = {}

def loggers():
    named = {name: one for name, one in logging.root.manager.loggerDict.items() if isinstance(one, logging.Logger)}
    return {
        f"logger {name}": (one.level, [*one.handlers], [*one.filters], one.propagate, one.disabled)
        for name, one in {"": logging.root, **named}.items()
    }

def state():
    return loggers() | {
        "logging disabled": logging.root.manager.disable,
        "progress bars": transformers_logging.is_progress_bar_enabled(),
        "environment": dict(os.environ),
        "warning filters": [*warnings.filters],
        "showwarning": warnings.showwarning,
        "signal handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "garbage collector": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, faulthandler.is_enabled()),
        "streams": (sys.stdout, sys.stderr),
        "interpreter": (sys.getswitchinterval(), sys.getrecursionlimit(), [*sys.path], os.getcwd()),
        "locale": locale.setlocale(locale.LC_ALL),
        "cores": os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random numbers": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "threads": {one.name for one in threading.enumerate()},
    }

def differences():
    for one in threading.enumerate():
        if one.name == "watchdog":  # it has been told to end, and nobody waits for it
            one.join(10)
    after = state()
    return [name for name in before if before[name] != after[name]]

from transformers.models.bert import modeling_bert
from transformers.models.xlm_roberta import modeling_xlm_roberta
transformers_logging.set_verbosity_info()
logging.getLogger("transformers.modeling_utils").setLevel(logging.INFO)
logging.basicConfig(level=logging.WARNING)
warnings.simplefilter("default")
gc.set_threshold(701, 11, 12)
random.seed(1), np.random.seed(2), torch.manual_seed(3)

before = state()
import embedq.core, embedq.core.engine, embedq.core.flag, embedq.core.convert
found["import"] = differences()
"""


#: Golden cases, and how a host loads them.
LOADS: dict[str, dict[str, Any]] = {
    "flagmodel_cls": {"precision": "float32"},
    "flagmodel_mean": {"precision": "bfloat16"},
    "bge_m3": {"precision": "float32"},
    "flagreranker_xlmr": {"precision": "float32"},
    "flagllmreranker": {"precision": "float32", "model": {"family": "llm_reranker"}},
    "layerwise_reranker": {"precision": "float32"},
}

_LOADS = """
import json
from concurrent.futures import ThreadPoolExecutor
from embedq.core.errors import CannotLoadModel

def load(case):
    with embedq.core.load(PATHS[case], device="cpu", **LOADS[case]) as engine:
        engine.warm_up()
        if engine.models["model"].spec.is_embedder:
            engine.embed(["a text"])
        engine.rerank("a text", ["another", "text"])

for case in LOADS:
    load(case)
    found[case] = differences()
with ThreadPoolExecutor(4) as threads:
    list(threads.map(load, 2 * list(LOADS)))
found["several threads"] = differences()
try:
    embedq.core.load(BROKEN, device="cpu")
except CannotLoadModel:
    found["failed load"] = differences()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For each thing a host does with the core, the parts of its process that are different afterwards."""
    golden = ROOT / "tests" / "golden"
    broken: Path = tmp_path_factory.mktemp("broken")
    for file in (golden / "flagmodel_cls" / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"cut off")
    paths = {case: str(golden / case / "model") for case in LOADS}
    given = f"PATHS, LOADS, BROKEN = {paths!r}, {LOADS!r}, {str(broken)!r}\n"
    code = _PROBE + given + _LOADS
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, list[str]] = json.loads(run.stdout)
    return found


def test_importing_the_core_changes_nothing_of_its_host(changed: dict[str, list[str]]) -> None:
    assert changed["import"] == []


@pytest.mark.parametrize("case", LOADS)
def test_loading_and_using_a_model_changes_nothing_of_its_host(changed: dict[str, list[str]], case: str) -> None:
    assert changed[case] == []


def test_loads_in_several_threads_leave_the_choice_of_the_host(changed: dict[str, list[str]]) -> None:
    assert changed["several threads"] == []


def test_a_load_that_fails_changes_nothing_of_its_host(changed: dict[str, list[str]]) -> None:
    assert changed["failed load"] == []
