"""The measurement of accelerators runs, on a CPU and tiny models, and keeps to its time."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.bench import accelerator
from tests.bench.accelerator import texts
from tests.bench.accelerator.asked import MODELS, Asked, from_json
from tests.conftest import GOLDEN
from tests.running import Running

#: What a busy machine may need for a quick run; a quiet one needs a tenth of it.
TIMEOUT_S = 110

#: Of each kind of figures one, for each step.
KEYS = (
    "tokenizing_short_rust_2",
    "limit",
    "forward_mixed_packed_share",
    "forward_mixed_padded_tokens_per_s",
    "forward_mixed_gain",
    "engine_mixed_texts_per_s",
    "engine_mixed_computing",
    "queue_mixed_large_tokens_per_s",
    "queue_short_one_text_texts_per_s",
)


def test_every_step_is_measured_and_told(tmp_path: Path) -> None:
    file, model = tmp_path / "figures.json", "bert-base"
    command = [sys.executable, "-m", "tests.bench", "accelerator", "--quick", "--device", "cpu", "--models", model]
    command += ["--seconds", "0.2", "--process-s", str(TIMEOUT_S), "--json", str(file)]
    with Running(command) as running:
        assert running.wait(TIMEOUT_S) == 0, running.output
    told = json.loads(file.read_text())
    assert told["faults"] == []
    figures = {figure["key"]: figure for figure in told["figures"]}
    assert len(figures) == len(told["figures"])
    measured = {key: figure["value"] for key, figure in figures.items()}
    assert all(math.isfinite(value) for value in measured.values())
    assert all(measured[f"{model}_{key}"] > 0 for key in KEYS)
    bare, engine = (f"{model}_{name}_tokens_per_s" for name in ("forward_mixed_packed", "engine_mixed"))
    assert measured[f"{engine}_of_bare"] == pytest.approx(measured[engine] / measured[bare])
    for figure in figures.values():
        assert figure["what"].strip() in running.output


def test_what_there_is_no_time_for_is_left_out_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--device", "cpu", "--limit-s", "10", "--models", "bge-m3", "--steps", "forward,queue"]
    assert accelerator.main(arguments) == 1
    assert capsys.readouterr().err.splitlines() == [
        "bge-m3: forward: left out, with 0 s left",
        "bge-m3: queue: left out, with 0 s left",
    ]


def test_a_process_that_takes_too_long_is_stopped_and_what_it_measured_is_told(tmp_path: Path) -> None:
    run = accelerator._Run(accelerator._parser().parse_args(["--quick"]), tmp_path)
    line = json.dumps({"key": "bge-m3_limit", "what": "a limit", "value": 7.0, "unit": "TFLOP/s"})
    with Running([sys.executable, "-c", f"import time; print({line!r}, flush=True); time.sleep(600)"]) as child:
        child.wait_for("bge-m3_limit")
        run._finish(child, "bge-m3: forward", 0.5)
        assert child.process.poll() is not None
    assert [(figure.key, figure.value) for figure in run.figures] == [("bge-m3_limit", 7.0)]
    assert run.faults == ["bge-m3: forward: stopped after 0 s; what it had measured is told"]


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    run = accelerator._Run(accelerator._parser().parse_args(["--quick"]), tmp_path)
    with Running([sys.executable, "-c", "raise SystemExit('no such device')"]) as child:
        run._finish(child, "bge-m3: queue", 60.0)
    assert run.faults == ["bge-m3: queue: ended with 1: no such device"]


def test_the_targets_are_those_of_the_whole_path() -> None:
    from tests.bench.accelerator.queued import TARGETS

    assert {model for model, _ in TARGETS} <= set(MODELS)
    asked = Asked("bge-m3", "/nowhere", ("queue",), "cuda:0", "bfloat16", 3.0, is_quick=False)
    assert {kind for _, kind in TARGETS} <= set(asked.kinds)
    assert from_json(asked.as_json()) == asked
    assert asked.max_length == 512


@pytest.mark.parametrize("model", [case for _, _, case in MODELS.values()])
def test_texts_have_the_lengths_asked_for_and_are_different(model: str) -> None:
    directory, bounds = GOLDEN / model / "model", (10, 40)
    found = texts.draw(directory, bounds, 60)
    assert len(set(found)) == 60
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths = np.array([len(encoding.ids) for encoding in tokenizer.encode_batch(found)])
    # A word that is cut may be other tokens than its beginning was.
    assert np.abs(lengths - texts.lengths_of(bounds, 60)).max() <= 3
    assert lengths.mean() == pytest.approx(25, abs=1.5)
