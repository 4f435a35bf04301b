"""What one child process of the measurement is asked for; travels to it as JSON."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedq.deploy.demo import minilm
from tests.bench import random_models
from tests.conftest import GOLDEN

#: Models by the names they are asked for by: the shape, whether it is a cross-encoder, and for a quick run the golden
#: case that stands in for it. Vocabularies are those of small golden cases, whose texts have fewer characters for each
#: token than real ones; BERT's own is taken where the demo's model is installed, which has it.
MODELS: dict[str, tuple[str, bool, str]] = {
    "bert-base": ("bert-base", False, "flagmodel_mean"),
    "bge-m3": ("bge-m3", False, "bge_m3"),
    "bge-reranker-v2-m3": ("bge-reranker-v2-m3", True, "flagreranker_xlmr"),
}

#: The same shape with BERT's vocabulary.
_WITH_VOCABULARY = {"bert-base": "bge-base"}

#: Lengths in tokens by kind, from the least to the most: of a quick run, and of a real one.
QUICK_KINDS = {"short": (8, 8), "mixed": (4, 40)}
KINDS = {"50": (50, 50), "512": (512, 512), "mixed": (20, 512)}


@dataclass(frozen=True)
class Asked:
    """One model, and the steps to measure it in."""

    model: str
    directory: str
    steps: tuple[str, ...]
    device: str
    precision: str
    #: Seconds that each rate is counted for.
    seconds: float
    is_quick: bool

    @property
    def is_scored(self) -> bool:
        return MODELS[self.model][1]

    @property
    def path(self) -> Path:
        return Path(self.directory)

    @property
    def kinds(self) -> dict[str, tuple[int, int]]:
        return QUICK_KINDS if self.is_quick else KINDS

    @property
    def max_length(self) -> int:
        return max(longest for _, longest in self.kinds.values())

    @property
    def num_texts(self) -> int:
        """Different texts of each kind: more than are ever in flight, so that none is computed for several jobs."""
        return 200 if self.is_quick else 20_000

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def from_json(given: str) -> Asked:
    """What `Asked.as_json` wrote."""
    fields: dict[str, Any] = json.loads(given)
    return Asked(**{**fields, "steps": tuple(fields["steps"])})


def directory_of(model: str, folder: Path, is_quick: bool) -> Path:
    """Where the model's directory is, or is to be written."""
    return GOLDEN / MODELS[model][2] / "model" if is_quick else folder / model


def save(asked: Asked) -> None:
    """Write the model, if it is not there."""
    if asked.path.is_dir():
        return
    shape, is_scored, _ = MODELS[asked.model]
    if importlib.util.find_spec(minilm.PACKAGE):
        shape = _WITH_VOCABULARY.get(shape, shape)
    making = asked.path.with_name(f"{asked.path.name}.making")
    random_models.save(shape, making, is_scored)
    stated = making / "tokenizer_config.json"
    words = json.loads(stated.read_text(encoding="utf-8")) | {"model_max_length": asked.max_length}
    stated.write_text(json.dumps(words), encoding="utf-8")
    making.rename(asked.path)
