"""Cross-encoders: the ids and scores of FlagEmbedding, sentence-transformers and transformers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedq import core
from embedq.core.engine import Engine
from embedq.core.errors import CannotLoadModel, InvalidInput
from embedq.core.options import RerankOptions
from tests import rerankers
from tests.conftest import GOLDEN
from tests.golden_cases import Call, calls, difference, read

CASES = ("flagreranker_xlmr", "flagreranker_bert")
ST_CASE = "st_cross_encoder"
each_call = pytest.mark.parametrize("call", calls(*CASES), ids=str)
each_st_call = pytest.mark.parametrize("call", calls(ST_CASE), ids=str)
each_prediction = pytest.mark.parametrize("call", [call for call in read(ST_CASE) if call.method == "predict"], ids=str)


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    """By case; sentence-transformers cuts the longer text of a pair, FlagEmbedding the passage."""
    with ExitStack() as stack:
        cutting = dict.fromkeys(CASES) | {ST_CASE: "longest"}
        yield {case: stack.enter_context(rerankers.load(case, pair_truncation=how)) for case, how in cutting.items()}


@pytest.fixture(scope="module")
def rounded() -> Iterator[dict[str, Engine]]:
    with ExitStack() as stack:
        yield {case: stack.enter_context(rerankers.load(case, precision="bfloat16")) for case in CASES}


def st_pairs(call: Call) -> list[tuple[str, str]]:
    return rerankers.pairs(call) if call.query is None else [(call.query, document) for document in call.inputs]


def is_identity(call: Call) -> bool:
    """Returns True if the call asked for the logit; sentence-transformers' default for one label is the sigmoid."""
    return call.kwargs.get("activation_fn") == "torch.nn.Identity"


@each_call
def test_a_pair_has_the_ids_of_the_library(engines: dict[str, Engine], call: Call) -> None:
    rerankers.assert_same_ids(engines[call.case], call)


@each_call
def test_a_batch_scores_as_the_library_does(engines: dict[str, Engine], call: Call) -> None:
    rerankers.assert_same_scores(engines[call.case], call)


@each_call
def test_a_pair_alone_scores_as_the_library_does(engines: dict[str, Engine], call: Call) -> None:
    rerankers.assert_same_scores_alone(engines[call.case], call)


@pytest.mark.parametrize("case", CASES)
def test_mixed_jobs_score_as_the_library_does(engines: dict[str, Engine], case: str) -> None:
    rerankers.assert_same_scores_in_mixtures(engines[case], read(case), seed=23)


@each_call
def test_bfloat16_stays_close(rounded: dict[str, Engine], call: Call) -> None:
    rerankers.assert_close_in_bfloat16(rounded[call.case], call)


@pytest.mark.parametrize("call", [*calls("flagreranker_bert"), *calls(ST_CASE)], ids=str)
def test_query_and_passage_have_segments_of_their_own(engines: dict[str, Engine], call: Call) -> None:
    given = rerankers.options(call)
    model: Any = engines[call.case].models["model"]
    tokens = model.encode_pairs(st_pairs(call), RerankOptions.checked(given))
    assert [one.type_ids.tolist() for one in tokens if one.type_ids is not None] == call.token_ids["token_type_ids"]


@each_st_call
def test_an_over_long_pair_is_cut_as_sentence_transformers_does(engines: dict[str, Engine], call: Call) -> None:
    ids = rerankers.encode(engines[ST_CASE], st_pairs(call), max_length=call.constructor["max_length"])
    assert ids == call.token_ids["input_ids"]


@each_prediction
def test_a_prediction_is_that_of_sentence_transformers(engines: dict[str, Engine], call: Call) -> None:
    given = {"max_length": call.constructor["max_length"], "normalize": not is_identity(call)}
    together = engines[ST_CASE].score(st_pairs(call), **given)
    alone = [engines[ST_CASE].score([pair], **given)[0] for pair in st_pairs(call)]
    assert difference(together, call.expected[""]) <= 1
    assert difference(alone, call.expected[""]) <= 1


@pytest.mark.parametrize("call", [call for call in read(ST_CASE) if call.method == "rank"], ids=str)
def test_a_ranking_is_that_of_sentence_transformers(engines: dict[str, Engine], call: Call) -> None:
    assert call.query is not None
    ranking = engines[ST_CASE].rerank(
        call.query,
        call.inputs,
        top_k=call.kwargs.get("top_k"),
        max_length=call.constructor["max_length"],
        normalize=True,
    )
    assert ranking.order.tolist() == call.expected["corpus_id"].tolist()
    assert difference(ranking.scores[ranking.order], call.expected["score"]) <= 1


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_modernbert_scores_as_transformers_does(tmp_path: Path, pooling: str) -> None:
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    torch.manual_seed(41)
    config = ModernBertConfig(
        vocab_size=764,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        local_attention=16,
        max_position_embeddings=128,
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
        classifier_pooling=pooling,
        num_labels=1,
    )
    network = ModernBertForSequenceClassification(config).eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / ST_CASE / "model" / file, tmp_path)
    network.save_pretrained(tmp_path)
    pairs = rerankers.pairs(read(ST_CASE)[0])
    with core.load(str(tmp_path), device="cpu", precision="float32") as engine:
        rows = rerankers.encode(engine, pairs)
        assert max(map(len, rows)) > 2 * 16  # longer than the window of local attention
        together = engine.score(pairs)
        alone = np.concatenate([engine.score([pair]) for pair in pairs])
    with torch.inference_mode():
        expected = np.array([network(torch.tensor([row])).logits.item() for row in rows], np.float32)
    assert np.ptp(expected) > 0.1
    assert difference(together, expected) <= 1
    assert difference(alone, expected) <= 1


def test_a_query_that_fills_the_model_is_refused_with_the_numbers(engines: dict[str, Engine]) -> None:
    pair = ("ferry " * 300, "boat " * 9)
    with pytest.raises(InvalidInput, match=r"a pair has \d+ tokens, and model model takes 128; lower query_max_length"):
        engines["flagreranker_bert"].score([pair], query_max_length=300)


@pytest.mark.parametrize("option", ["prompt", "cutoff_layers", "compress_layers", "compress_ratio", "mode", "weights"])
def test_options_of_other_rerankers_are_refused(engines: dict[str, Engine], option: str) -> None:
    value: Any = {"prompt": "?", "mode": "dense", "weights": (1, 1, 1)}.get(option, 2)
    with pytest.raises(InvalidInput, match=f"option {option} means nothing to model model, a cross encoder"):
        engines["flagreranker_bert"].score([("ferry", "boat")], **{option: value})


def test_more_than_one_label_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertForSequenceClassification(BertConfig(**sizes, vocab_size=9, num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(CannotLoadModel, match="has 3 labels; a reranker gives one score"):
        core.load(str(tmp_path), device="cpu")
