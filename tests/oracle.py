"""sentence-transformers as the judge of a directory: its numbers beside ours, text by text and in batches.

What it gives of texts of two and of two hundred words, in eight languages and of none. In float32 on a CPU.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from embedq import core
from embedq.core.errors import CannotLoadModel

TEXTS = [
    "a ferry",
    "",
    " rain \n",
    "The garden of the lighthouse is small. " * 30,
    "Der Leuchtturm steht auf der Insel, und das Brot ist alt.",
    "Το ΠΛΟΊΟ φεύγει στις επτά",
    "Le jardin du phare est petit, n'est-ce pas ?",
    "Паром уходит в семь часов вечера.",
    "灯塔的花园很小，渡轮七点出发。",
    "حديقة المنارة صغيرة",
    "등대의 정원은 작다",
]

QUERY = "When does the Ferry leave?"
PAIRS = [(QUERY, text) for text in TEXTS] + [(TEXTS[3], TEXTS[4]), (TEXTS[3], TEXTS[3])]

#: The largest difference between two ways of computing the same in float32.
WITHIN = 2e-6

#: Recorded cases, whose tokenizers tiny checkpoints borrow.
GOLDEN = Path(__file__).parent / "golden"

#: Names of what is compared.
Numbers = dict[str, np.ndarray]


@contextmanager
def quiet() -> Iterator[None]:
    """The library's own warnings and messages are not this test's."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def of_library(path: Path, kind: str = "SentenceTransformer", batch_size: int = 64) -> Numbers:
    """The numbers of sentence-transformers for the directory; of texts alone where padding would reach its texts (`batch_size` 1)."""
    import sentence_transformers
    import torch

    with quiet():
        model = getattr(sentence_transformers, kind)(str(path), device="cpu", model_kwargs={"dtype": torch.float32})
        if kind == "CrossEncoder":
            return {"score": model.predict(PAIRS, batch_size=batch_size, activation_fn=torch.nn.Identity())}
        if kind == "SparseEncoder":
            return _sparse_of_library(model, batch_size)
        methods = {"plain": model.encode, "query": model.encode_query, "document": model.encode_document}
        rows = {name: method(TEXTS, batch_size=batch_size) for name, method in methods.items()}
        return rows | {"similarity": np.asarray(model.similarity(rows["query"][:1], rows["document"]))[0]}


def _sparse_of_library(model: Any, batch_size: int) -> Numbers:
    methods = {"plain": model.encode, "query": model.encode_query, "document": model.encode_document}
    return {
        name: np.asarray(method(TEXTS, batch_size=batch_size, convert_to_tensor=True, convert_to_sparse_tensor=False))
        for name, method in methods.items()
    }


def of_ours(path: Path, **model: Any) -> tuple[Numbers, Numbers]:
    """The same of embedq: each text alone, and all in one call. CannotLoadModel where it refuses."""
    with quiet(), core.load(str(path), precision="float32", device="cpu", model=model) as engine:
        spec = engine.models["model"].spec
        if not spec.is_embedder:
            together = {"score": engine.score(PAIRS)}
            return {"score": np.concatenate([engine.score([pair]) for pair in PAIRS])}, together
        types = {"plain": None, "query": "query", "document": "document"}
        if "sparse" in engine.models["model"].outputs and "dense" not in engine.models["model"].outputs:
            size = int(spec.dimensions)
            together = {
                n: _dense_of(engine.embed(TEXTS, outputs=["sparse"], input_type=t).sparse, size)
                for n, t in types.items()
            }
            return together, together
        alone = {
            name: np.concatenate([np.asarray(engine.embed([text], input_type=kind)) for text in TEXTS])
            for name, kind in types.items()
        }
        together = {name: np.asarray(engine.embed(TEXTS, input_type=kind)) for name, kind in types.items()}
        similarity = {"similarity": engine.score([(TEXTS[0], text) for text in TEXTS])}
        return alone | similarity, together | similarity


def _dense_of(rows: Any, size: int) -> np.ndarray:
    dense = np.zeros((len(rows), size), np.float32)
    for row, one in zip(dense, rows, strict=True):
        row[one.ids] = one.weights
    return dense


def difference(one: Numbers, other: Numbers) -> float:
    """The largest difference of two, relative to the largest number where that is above 1; infinite for other shapes."""
    largest = 0.0
    for name in one:
        if one[name].shape != other[name].shape:
            return float("inf")
        scale = max(1.0, float(np.abs(one[name]).max()))
        largest = max(largest, float(np.abs(one[name] - other[name]).max()) / scale)
    return largest


def verdict(path: Path, kind: str = "SentenceTransformer", **model: Any) -> str | float:
    """The largest difference to the library, alone and in a batch; or what embedq says when it refuses the directory."""
    try:
        alone, together = of_ours(path, **model)
    except CannotLoadModel as error:
        return str(error)
    for batch_size in (64, 1):  # some padding changes the library's numbers: then those of a text alone are the text's
        library = of_library(path, kind, batch_size)
        largest = max(difference(library, alone), difference(library, together))
        if largest <= WITHIN:
            break
    return largest
