"""Loading takes no more host memory than the weights need, measured in a process of its own by what the kernel counts for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Reads one checkpoint in several ways; prints for each the peak of anonymous memory above what was there before.
#: Pages of a mapped file are not anonymous: the kernel drops them when it needs room, and processes share them.
_MEASURE = """
import json, sys, threading
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.models.encoders import bert
from embedq.core.models.weights import load
from embedq.core.settings import ModelSettings

directory = Path(sys.argv[1])
# 35 million weights, 140 MB in float32; the largest, of the words, 15.6 million.
config = transformers.BertConfig(
    hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048, architectures=["BertModel"]
)
config.save_pretrained(directory)
with torch.device("meta"):
    shapes = transformers.AutoModel.from_config(config).state_dict()
stored = {name: torch.ones(one.shape) for name, one in shapes.items()}
size_bytes = sum(4 * one.numel() for one in stored.values())
save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
stored.clear()
(directory / "tokenizer.json").write_text("{}")
spec = read_spec("m", ModelSettings(path=str(directory)))


def anonymous_bytes():
    for line in Path("/proc/self/status").open():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])


def peak_bytes(read):
    before, seen, is_over = anonymous_bytes(), [0], threading.Event()
    def watch():
        while not is_over.wait(0.0005):
            seen.append(anonymous_bytes())
    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = read()
    is_over.set()
    watcher.join()
    return max(*seen, anonymous_bytes()) - before


ways = {
    "a copy": lambda: {name: one.clone() for name, one in load_file(directory / "model.safetensors").items()},
    "cpu float32": lambda: load("AutoModel", spec, "cpu", "float32"),
    "cpu bfloat16": lambda: load("AutoModel", spec, "cpu", "bfloat16"),
    "elsewhere float32": lambda: load("AutoModel", spec, "meta", "float32"),
    "elsewhere bfloat16": lambda: load("AutoModel", spec, "meta", "bfloat16"),
    "bert float32": lambda: bert.load(spec, "cpu", "float32"),
    "bert bfloat16": lambda: bert.load(spec, "cpu", "bfloat16"),
    "bert elsewhere": lambda: bert.load(spec, "meta", "bfloat16"),
}
assert isinstance(ways["bert elsewhere"](), bert.Bert)
ways["elsewhere bfloat16"]()  # what a first time imports is no weight
print(json.dumps({name: peak_bytes(read) / size_bytes for name, read in ways.items()}))
"""


@pytest.mark.timing
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not say what a process takes")
def test_loading_takes_no_more_host_memory_than_the_weights_the_cpu_computes_with(tmp_path: Path) -> None:
    """Shares of the float32 checkpoint. "Elsewhere" is torch's device without memory, for an accelerator's."""
    answer = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        # Freed memory goes back to the kernel at once, so that no way of loading profits from the one before.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert answer.returncode == 0, answer.stderr
    peaks = json.loads(answer.stdout.splitlines()[-1])
    assert peaks.pop("a copy") > 0.95  # the measurement sees what it must not find below
    assert peaks == {
        "cpu float32": pytest.approx(0, abs=0.05),  # the file itself, mapped
        "cpu bfloat16": pytest.approx(0.5, abs=0.05),  # half as wide, once
        "elsewhere float32": pytest.approx(0, abs=0.05),
        "elsewhere bfloat16": pytest.approx(0, abs=0.05),
        "bert float32": pytest.approx(0, abs=0.05),  # the same without transformers
        "bert bfloat16": pytest.approx(0.5, abs=0.05),
        "bert elsewhere": pytest.approx(0, abs=0.05),
    }
