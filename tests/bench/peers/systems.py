"""The peers: where each one's environment is, what it is told to load, and in which ways it is asked.

A peer is what a user would start instead, with the best of a few batch sizes, tried at its first turn. The two
libraries that most people run are there once more as they come, in float32 and with the batch size of their own call.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tests.bench.peers.models import PEERS, Model
from tests.bench.peers.process import CannotMeasure, Program
from tests.bench.peers.texts import PASSAGES_PER_CALL, Work

#: Batch sizes that are tried.
BATCH_SIZES = (8, 32, 128)

#: Sequences that every system computes before it is measured.
_NUM_FIRST = 16

#: Sequences of each try of a batch size: a quarter of all, within these bounds, but never less than one batch.
_MIN_TRIED, _NUM_TRIED = 32, 160


#: How a server is asked, and ours: jobs or requests of so many texts.
LARGE, SMALL = f"by {PASSAGES_PER_CALL}", "by one"

_ST = "sentence_transformer"

#: Peers as people run them: asked without a batch size.
AS_THEY_COME = ("st-default", "flag-default")

#: By name: environment, program, and what the program is told.
_PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "st-default": ("sentence-transformers", _ST, {"backend": "torch", "precision": "float32"}),
    "st-float32": ("sentence-transformers", _ST, {"backend": "torch", "precision": "float32"}),
    "st-bfloat16": ("sentence-transformers", _ST, {"backend": "torch", "precision": "bfloat16"}),
    "onnx": ("onnx", _ST, {"backend": "onnx", "precision": "float32"}),
    "onnx-int8": ("onnx", _ST, {"backend": "onnx", "precision": "int8"}),
    "openvino": ("openvino", _ST, {"backend": "openvino", "precision": "auto"}),
    "flag-default": ("flagembedding", "flag_embedding", {"precision": "float32"}),
    "flag-float32": ("flagembedding", "flag_embedding", {"precision": "float32"}),
    "flag-bfloat16": ("flagembedding", "flag_embedding", {"precision": "bfloat16"}),
    "infinity-float32": ("infinity", "infinity", {"engine": "torch", "precision": "float32"}),
    "infinity-bfloat16": ("infinity", "infinity", {"engine": "torch", "precision": "bfloat16"}),
    "infinity-optimum": ("infinity", "infinity", {"engine": "optimum", "precision": "float32"}),
}


class System(Protocol):
    """Whatever is measured: a peer, or ours."""

    name: str
    #: Ways of asking it; each is measured by itself. "" where there is one only.
    ways: tuple[str, ...]
    #: Whether it must not be there while another has its turn.
    stops_after_turn: bool

    def start(self, model: Model, first: Work) -> dict[str, Any]:
        """Load and warm up, outside all measured time; tells precision and whatever else is of interest."""

    def measure(self, way: str, work: Work, save: Path | None) -> float:
        """Seconds of the whole of `work`; vectors or scores go to the .npy file `save`."""

    @property
    def peak_bytes(self) -> int:
        """The most memory it had in use since its start."""

    def stop(self) -> None:
        """Leave memory and cores; `start` may follow."""


@dataclass
class Peer:
    """A program of a peer, in that peer's environment."""

    name: str
    environment: str
    program: str
    loading: dict[str, Any]
    #: Where the environments are.
    folder: Path = PEERS
    ways: tuple[str, ...] = ("",)
    stops_after_turn: bool = False
    #: Entries of its requests by way.
    asking: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Whether a batch size is chosen when it loads, not with each request.
    is_loaded_by_size: bool = False
    #: Batch sizes to choose from; without any its own.
    sizes: tuple[int, ...] = BATCH_SIZES
    _running: Program | None = None
    _batch_size: int | None = None

    def start(self, model: Model, first: Work) -> dict[str, Any]:
        """As `System.start`. CannotMeasure if it is not installed or cannot do this."""
        self._model = model
        self._running = Program(interpreter(self.environment, self.folder), self.program)
        has_choice = self._batch_size is None and self.sizes
        about = self._try_sizes(first) if has_choice else self._load(self._batch_size)
        self.measure(self.ways[0], first.first(_NUM_FIRST), None)
        return about | {"batch_size": self._batch_size or "its own"}

    def measure(self, way: str, work: Work, save: Path | None) -> float:
        """As `System.measure`, by the peer's own clock."""
        assert self._running
        given: dict[str, Any] = (
            {"action": "embed", "texts": work.texts} if work.texts else {"action": "rerank", "calls": work.calls}
        )
        given |= {"save": str(save) if save else None, "batch_size": self._batch_size}
        return float(self._running.ask(given | self.asking.get(way, {}))["seconds"])

    @property
    def peak_bytes(self) -> int:
        """As `System.peak_bytes`; its tries of other batch sizes included."""
        assert self._running
        return self._running.peak_bytes

    def stop(self) -> None:
        """As `System.stop`."""
        if self._running:
            self._running.close()
        self._running = None

    def forget(self) -> None:
        """Another model or kind of text follows: its best batch size is another."""
        self._batch_size = None

    def _load(self, batch_size: int | None) -> dict[str, Any]:
        assert self._running
        request = {"action": "load", "batch_size": batch_size, **self._model.loading, **self.loading}
        return dict(self._running.ask(request)["about"])

    def _try_sizes(self, first: Work) -> dict[str, Any]:
        num_tried = min(_NUM_TRIED, max(_MIN_TRIED, first.num_sequences // 4))
        sizes = [size for size in self.sizes if size == self.sizes[0] or size <= first.num_sequences]
        seconds, about, loaded = {}, {}, None
        for size in sizes:
            if loaded is None or self.is_loaded_by_size:
                about, loaded = self._load(size), size
            self._batch_size = size
            self.measure(self.ways[0], first.first(_NUM_FIRST), None)
            sample = first.first(max(size, num_tried))
            seconds[size] = self.measure(self.ways[0], sample, None) / sample.num_sequences
        self._batch_size = min(seconds, key=seconds.__getitem__)
        return self._load(self._batch_size) if self.is_loaded_by_size and loaded != self._batch_size else about


@cache
def interpreter(environment: str, folder: Path) -> Path:
    """The Python of a peer's environment. CannotMeasure, with the reason, if it was not built."""
    found = folder / environment
    if (found / ".done").is_file():
        return found / "bin" / "python"
    if (found / "failed").is_file():
        lines = (found / "failed").read_text(encoding="utf-8").strip().splitlines()
        raise CannotMeasure(f"could not be installed: {lines[-1][:200] if lines else 'no reason was given'}")
    if environment == "sentence-transformers" and _has_own_transformers():
        return Path(sys.executable)
    raise CannotMeasure("not installed; run: make bench-peers")


def _has_own_transformers() -> bool:
    """Whether this environment has the tests' sentence-transformers."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sentence_transformers') is None)"
    return subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


def all_peers(concurrency: int, folder: Path = PEERS) -> dict[str, Peer]:
    """Every peer there is, by name, its environment in `folder`. A server has `concurrency` requests under way."""
    asking = {
        way: {"per_request": size, "concurrency": concurrency}
        for way, size in {LARGE: PASSAGES_PER_CALL, SMALL: 1}.items()
    }
    peers = {}
    for name, (environment, program, loading) in _PEERS.items():
        sizes = () if name in AS_THEY_COME else BATCH_SIZES
        peers[name] = Peer(name, environment, program, loading, folder, sizes=sizes)
        if program == "infinity":
            peers[name].ways, peers[name].asking, peers[name].is_loaded_by_size = (LARGE, SMALL), asking, True
    return peers


def cosines(found: np.ndarray, expected: np.ndarray, work: Work) -> np.ndarray:
    """Of each vector with the one expected; of scores, taken as one vector per call."""
    if found.ndim == 1:
        ends = np.cumsum([len(passages) for _, passages in work.calls])[:-1]
        rows = [np.split(scores.astype(np.float64), ends) for scores in (found, expected)]
    else:
        rows = [list(vectors.astype(np.float64)) for vectors in (found, expected)]
    return np.array([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(*rows, strict=True)])
