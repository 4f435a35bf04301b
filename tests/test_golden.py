"""The real MiniLM and the golden cases, held against the libraries whose numbers they must give.

The golden cases are tiny checkpoints with what FlagEmbedding and sentence-transformers compute from
them; `meta.json` of each says how. Their tolerances: token ids exact, normalised values and scores
within 1e-5, values that are not normalised within 1e-5 plus 1e-5 of their size.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import core
from core.checks import EmbedOptions, RerankOptions
from core.engine import Engine
from deploy.demo import texts as demo_texts

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5


def load(directory: Path, **settings: Any) -> Engine:
    return core.load(str(directory), device="cpu", precision="float32", **settings)


@pytest.fixture(scope="module")
def real_texts() -> list[str]:
    """1,000 docstrings of the standard library: 20 longer than any limit, and of the others the short ones."""
    found = [one.text for one in demo_texts.read(3000)]
    chosen = sorted(found, key=len)[-20:] + [text for text in found if len(text) <= 300][:980]
    assert len(chosen) == 1000
    return random.Random(0).sample(chosen, 1000)


@pytest.fixture(scope="module")
def engine(minilm: Path) -> Iterator[Engine]:
    """The real MiniLM in float32."""
    with load(minilm) as engine:
        yield engine


@pytest.fixture(scope="module")
def vectors(engine: Engine, real_texts: list[str]) -> np.ndarray:
    """(1000, 384) what the engine makes of the real texts, in batches of its own choice."""
    dense = engine.embed(real_texts).dense
    assert dense is not None
    return dense


def test_vectors_of_real_texts_are_those_of_sentence_transformers(
    minilm: Path, real_texts: list[str], vectors: np.ndarray
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer

        reference = SentenceTransformer(str(minilm), device="cpu", local_files_only=True)
        wanted = reference.encode(real_texts, batch_size=32, show_progress_bar=False)
    cosines = (vectors * wanted).sum(axis=1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(wanted, axis=1)
    print(
        f"\nMiniLM, 1,000 texts, against sentence-transformers: "
        f"lowest cosine {cosines.min():.8f}, largest difference {np.abs(vectors - wanted).max():.2e}"
    )
    assert vectors.dtype == np.float32
    assert cosines.min() >= 0.99999
    np.testing.assert_allclose(vectors, wanted, atol=TOLERANCE)


def test_a_text_alone_gives_the_vector_it_has_in_any_batch(
    engine: Engine, real_texts: list[str], vectors: np.ndarray
) -> None:
    chosen = random.Random(1).sample(range(1000), 40)
    alone = np.concatenate([engine.embed([real_texts[index]]).dense for index in chosen])
    print(f"\nMiniLM, a text alone against in a batch: largest difference {np.abs(alone - vectors[chosen]).max():.2e}")
    np.testing.assert_allclose(alone, vectors[chosen], atol=TOLERANCE)


def test_the_order_of_the_texts_changes_nothing_but_the_order(
    engine: Engine, real_texts: list[str], vectors: np.ndarray
) -> None:
    order = random.Random(2).sample(range(1000), 60)
    again = np.asarray(engine.embed([real_texts[index] for index in order]))
    np.testing.assert_allclose(again, vectors[order], atol=TOLERANCE)


def test_token_rows_are_unit_vectors_whatever_the_batch(engine: Engine, real_texts: list[str]) -> None:
    together = engine.embed([*real_texts[:8], ""], outputs=["colbert"]).colbert
    assert together is not None
    for text, rows in zip([*real_texts[:8], ""], together, strict=True):
        (alone,) = engine.embed([text], outputs=["colbert"]).colbert or []
        np.testing.assert_allclose(rows, alone, atol=TOLERANCE)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=TOLERANCE)
    assert len(together[-1]) == 1  # of the empty text only the closing token is left


class Golden:
    """One golden case: its inputs, its numbers, its token ids."""

    def __init__(self, case: str) -> None:
        self.directory = GOLDEN / case / "model"
        read = json.loads((GOLDEN / case / "inputs.json").read_text(encoding="utf-8"))
        self.inputs = read["inputs"]
        self.values = {call["id"]: call.get("input_value") for call in read["calls"]}
        self.expected = np.load(GOLDEN / case / "expected.npz")
        self.token_ids = json.loads((GOLDEN / case / "token_ids.json").read_text(encoding="utf-8"))


def check_ids(golden: Golden, call: str, tokens: list[Any]) -> None:
    """Ids, and segments where the network got any, exactly."""
    wanted = golden.token_ids[call]
    assert [one.ids.tolist() for one in tokens] == wanted["input_ids"]
    if "token_type_ids" in wanted:
        assert [one.type_ids.tolist() for one in tokens] == wanted["token_type_ids"]


EMBED_CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    # case, call, settings of the model, options of the call
    ("flagmodel_cls", "encode", {"pooling": "cls"}, {"max_length": 40}),
    ("flagmodel_cls", "encode_queries", {"pooling": "cls"}, {"max_length": 20}),
    ("flagmodel_cls", "encode_max16", {"pooling": "cls"}, {"max_length": 16}),
    ("flagmodel_cls", "encode_not_normalized", {"pooling": "cls"}, {"max_length": 64, "normalize": False}),
    ("flagmodel_cls", "encode_one_string", {"pooling": "cls"}, {"max_length": 40}),
    ("flagmodel_mean", "encode", {"pooling": "mean"}, {"max_length": 48}),
    ("flagmodel_mean", "encode_max12", {"pooling": "mean"}, {"max_length": 12}),
    ("flagmodel_mean", "encode_not_normalized", {"pooling": "mean"}, {"max_length": 48, "normalize": False}),
    ("flagmodel_mean", "encode_pad_multiple", {"pooling": "mean"}, {"max_length": 48}),
    ("st_mean_pooling", "encode", {}, {}),
    ("st_mean_pooling", "encode_default_batch", {}, {}),
    ("st_mean_pooling", "encode_truncate_dim_normalized", {}, {"dimensions": 12}),
    ("st_mean_pooling", "encode_prompt", {}, {"instruction": "query: "}),
    ("st_mean_pooling", "encode_one_string", {}, {}),
    ("st_modernbert", "encode", {}, {}),
    ("st_modernbert", "encode_query", {}, {"input_type": "query"}),
    ("st_modernbert", "encode_document", {}, {"input_type": "document", "normalize": True}),
    ("st_modernbert", "encode_prompt_name", {}, {"input_type": "query"}),
]


@pytest.mark.parametrize(
    ("case", "call", "model", "options"), EMBED_CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_golden_embeddings(case: str, call: str, model: dict[str, Any], options: dict[str, Any]) -> None:
    golden = Golden(case)
    texts = golden.inputs["texts"] if golden.values[call] is None else [golden.values[call]]
    settings = core.settings.read_settings(
        models={"m": {"path": str(golden.directory), "precision": "float32", **model}}, device="cpu"
    )
    with core.load_all(settings) as engine:
        check_ids(golden, call, engine.models["m"].encode_texts(texts, EmbedOptions(**options)))
        vectors = np.asarray(engine.embed(texts, **options))
    wanted = golden.expected[call].reshape(len(texts), -1)
    np.testing.assert_allclose(vectors, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_golden_embeddings_cut_without_scaling_again() -> None:
    # sentence-transformers cuts after it has normalised; here that is a slice of the whole vector.
    golden = Golden("st_mean_pooling")
    with load(golden.directory) as engine:
        vectors = np.asarray(engine.embed(golden.inputs["texts"]))[:, :12]
    np.testing.assert_allclose(vectors, golden.expected["encode_truncate_dim"], atol=TOLERANCE)


RERANK_CASES: list[tuple[str, dict[str, Any], str, str]] = [
    # call, options, what goes before the query and before the passage
    ("raw", {"max_length": 64}, "", ""),
    ("normalized", {"max_length": 64, "normalize": True}, "", ""),
    ("raw_max24", {"max_length": 24}, "", ""),
    ("instructions", {"max_length": 64}, "query: ", "<doc>\n"),
    ("one_pair", {"max_length": 64}, "", ""),
]


@pytest.mark.parametrize("case", ["flagreranker_bert", "flagreranker_xlmr"])
@pytest.mark.parametrize(
    ("call", "options", "before_query", "before_passage"),
    RERANK_CASES,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_golden_rerank_scores(
    case: str, call: str, options: dict[str, Any], before_query: str, before_passage: str
) -> None:
    golden = Golden(case)
    pairs = golden.inputs["pairs"] if golden.values[call] is None else [golden.values[call]]
    pairs = [(before_query + query, before_passage + passage) for query, passage in pairs]
    with load(golden.directory) as engine:
        model = engine.models["model"]
        ids = [model.encode_pairs(query, [passage], RerankOptions(**options))[0] for query, passage in pairs]
        check_ids(golden, call, ids)
        scores = np.concatenate([engine.rerank(query, [passage], **options).scores for query, passage in pairs])
    np.testing.assert_allclose(scores, golden.expected[call], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("case", ["flagreranker_bert", "flagreranker_xlmr"])
def test_golden_rerank_scores_do_not_depend_on_the_batch(case: str) -> None:
    golden = Golden(case)
    query = "does a compass point north?"
    passages = [passage for _, passage in golden.inputs["pairs"]]
    with load(golden.directory) as engine:
        together = engine.rerank(query, passages).scores
        alone = np.concatenate([engine.rerank(query, [passage]).scores for passage in passages])
    np.testing.assert_allclose(together, alone, atol=TOLERANCE, rtol=TOLERANCE)
