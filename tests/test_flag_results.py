"""The faces return FlagEmbedding's types, have switches for what it does unasked, its helpers, and nothing for nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedq import core
from embedq.core import flag
from embedq.core.errors import InvalidInput
from tests.conftest import GOLDEN
from tests.golden_cases import difference, read

M3 = str(GOLDEN / "bge_m3" / "model")
ENCODER = str(GOLDEN / "flagmodel_cls" / "model")
DECODER = str(GOLDEN / "flagllmmodel_qwen3" / "model")
ICL = str(GOLDEN / "flagiclmodel" / "model")
RERANKER = str(GOLDEN / "flagreranker_bert" / "model")
TEXTS = ["what does a lighthouse do", "", "a lamp in a tower that ships can see from far away", "ferry"]
PAIRS = [(TEXTS[0], text) for text in TEXTS]


def scores_of(face: flag.BGEM3FlagModel, pairs: Any, **given: Any) -> dict[str, Any]:
    """Scores of some pairs by their name."""
    scores = face.compute_score(pairs, **given)
    assert isinstance(scores, dict)
    return scores


@pytest.fixture(scope="module")
def encoder() -> Iterator[flag.FlagModel]:
    with flag.FlagModel(ENCODER, use_fp16=False, devices="cpu") as face:
        yield face


@pytest.fixture(scope="module")
def m3() -> Iterator[flag.BGEM3FlagModel]:
    with flag.BGEM3FlagModel(M3, use_fp16=False, devices="cpu") as face:
        yield face


@pytest.fixture(scope="module")
def reranker() -> Iterator[flag.FlagReranker]:
    with flag.FlagReranker(RERANKER, devices="cpu") as face:
        yield face


@pytest.mark.parametrize("method", ["encode", "encode_queries", "encode_corpus"])
def test_tensors_are_given_where_arrays_are_not_wanted(encoder: flag.FlagModel, method: str) -> None:
    for texts in (TEXTS, TEXTS[0]):
        array, tensor = getattr(encoder, method)(texts), getattr(encoder, method)(texts, convert_to_numpy=False)
        assert type(tensor) is torch.Tensor
        assert tensor.dtype is torch.float32
        assert tensor.device.type == "cpu"
        np.testing.assert_array_equal(tensor.numpy(), array)
    encoder.convert_to_numpy = False
    assert type(getattr(encoder, method)(TEXTS)) is torch.Tensor
    encoder.convert_to_numpy = True


def test_no_texts_give_no_vectors(encoder: flag.FlagModel, m3: flag.BGEM3FlagModel) -> None:
    assert encoder.encode([]).shape == (0, 48)
    assert encoder.encode([], convert_to_numpy=False).shape == (0, 48)
    given = m3.encode([], return_sparse=True, return_colbert_vecs=True)
    assert given["dense_vecs"].shape == (0, 48)
    assert (given["lexical_weights"], given["colbert_vecs"]) == ([], [])


def test_no_pairs_give_no_scores(reranker: flag.FlagReranker, m3: flag.BGEM3FlagModel) -> None:
    assert reranker.compute_score([]) == []
    assert m3.compute_score([]) == []


@pytest.mark.parametrize("pair", [("a", "b"), ["a", "b"], [("a", "b")], (("a", "b"),), [["a", "b"]]])
def test_one_pair_may_be_written_in_any_way(reranker: flag.FlagReranker, m3: flag.BGEM3FlagModel, pair: Any) -> None:
    (score,) = reranker.compute_score(pair)
    assert type(score) is float
    scores = scores_of(m3, pair)["dense"]
    assert type(scores) is (float if isinstance(pair[0], str) else list)


@pytest.mark.parametrize("pairs", [None, "ab", [("a",)], [("a", 1)]])
def test_what_is_no_pair_is_refused(reranker: flag.FlagReranker, m3: flag.BGEM3FlagModel, pairs: Any) -> None:
    for face in (reranker, m3):
        with pytest.raises(InvalidInput, match="must be"):
            face.compute_score(pairs)


def test_m3_must_be_asked_for_something(m3: flag.BGEM3FlagModel) -> None:
    with pytest.raises(InvalidInput, match="outputs must be a list of dense, sparse, colbert"):
        m3.encode("a", return_dense=False)


def test_lexical_weights_of_what_is_missing_are_zero(m3: flag.BGEM3FlagModel) -> None:
    weights = m3.encode(TEXTS[0], return_sparse=True)["lexical_weights"]
    assert weights["0"] == 0


def test_attributes_may_be_changed_between_calls(encoder: flag.FlagModel, reranker: flag.FlagReranker) -> None:
    plain, score = encoder.encode_queries("a"), reranker.compute_score(("a", "b"))
    encoder.query_instruction_for_retrieval, encoder.query_instruction_format = "find", r"{}:\n{}"
    reranker.normalize = True
    try:
        np.testing.assert_allclose(encoder.encode_queries("a"), encoder.encode("find:\na"), atol=1e-6)
        np.testing.assert_allclose(
            encoder.encode("a", instruction="find", instruction_format="{}:\n{}"), encoder.encode("find:\na"), atol=1e-6
        )
        assert reranker.compute_score(("a", "b")) == pytest.approx([1 / (1 + np.exp(-score[0]))])
    finally:
        encoder.query_instruction_for_retrieval, reranker.normalize = None, False
    np.testing.assert_allclose(encoder.encode_queries("a"), plain, atol=1e-6)


def test_examples_can_be_set_and_set_back() -> None:
    examples = [{"instruct": "find", "query": "a", "response": "b"}]
    with flag.FlagICLModel(ICL, use_fp16=False, devices="cpu", examples_for_task=examples) as face:
        given = face.encode_queries("lighthouse")
        face.set_examples([])
        without = face.encode_queries("lighthouse")
        face.set_examples()
        np.testing.assert_allclose(face.encode_queries("lighthouse"), given, atol=1e-6)
        assert np.abs(given - without).max() > 1e-3
        face.stop_self_query_pool()


@pytest.mark.parametrize(
    ("name", "path", "half"),
    [
        ("FlagModel", ENCODER, {}),
        ("FlagModel", ENCODER, {"use_bf16": True}),
        ("BGEM3FlagModel", M3, {}),
        ("FlagLLMModel", DECODER, {}),
        ("FlagICLModel", ICL, {}),
        ("FlagPseudoMoEModel", DECODER, {}),
    ],
)
def test_half_precision_on_a_cpu_rounds_the_weights_and_nothing_else(
    name: str, path: str, half: dict[str, Any], tmp_path: Path
) -> None:
    face = getattr(flag, name)
    with face(path, devices="cpu", **half) as asked:
        assert asked.precision == "float32"
        given = vectors(asked)
        is_bf16 = asked.use_bf16
    rounded = rounded_copy(path, tmp_path / "model", torch.bfloat16 if is_bf16 else torch.float16)
    full = {"use_fp16": False, "use_bf16": False, "devices": "cpu"}
    with face(str(rounded), **full) as by_hand, face(path, **full) as exact:
        np.testing.assert_allclose(given, vectors(by_hand), atol=1e-6)
        assert np.abs(given - vectors(exact)).max() > 1e-5
        with face(path, devices="cpu", round_weights_on_cpu=False, **half) as kept:
            np.testing.assert_allclose(vectors(kept), vectors(exact), atol=1e-6)


def vectors(face: Any) -> np.ndarray:
    """All that a face says of some texts."""
    if not isinstance(face, flag.BGEM3FlagModel):
        return face.encode_queries(TEXTS)
    given = face.encode_queries(TEXTS, return_sparse=True, return_colbert_vecs=True)
    sparse = [list(weights.values()) for weights in given["lexical_weights"]]
    return np.concatenate([given["dense_vecs"].ravel(), *sparse, np.concatenate(given["colbert_vecs"]).ravel()])


def rounded_copy(source: str, directory: Path, dtype: torch.dtype) -> Path:
    """A checkpoint whose float32 weights hold nothing that `dtype` could not."""
    shutil.copytree(source, directory)
    file = directory / "model.safetensors"
    save_file(
        {name: weight.to(dtype).to(weight.dtype) for name, weight in load_file(file).items()}, file, {"format": "pt"}
    )
    for head in directory.glob("*_linear.pt"):
        state = torch.load(head, weights_only=True)
        torch.save({name: weight.to(dtype).to(weight.dtype) for name, weight in state.items()}, head)
    return directory


def test_without_padding_in_scores_a_pair_s_score_is_its_own() -> None:
    batched, alone = (call for call in read("bge_m3") if call.id.startswith("score_short_passages"))
    with flag.BGEM3FlagModel(str(batched.model), **batched.constructor, score_padding=False) as face:
        given = scores_of(face, batched.inputs, **batched.kwargs)
    assert max(difference(scores, alone.expected[name]) for name, scores in given.items()) <= 1
    assert np.abs(alone.expected["colbert"] - batched.expected["colbert"]).max() > 1e-3  # the switch does something


@pytest.mark.parametrize("name", ["layerwise_reranker", "lightweight_reranker"])
def test_heads_by_layer_give_a_layer_one_score_however_it_is_asked_for(name: str) -> None:
    call = read(name)[0]
    with getattr(flag, call.library)(str(call.model), **call.constructor, heads_by="layer") as face:
        both = face.compute_score(PAIRS, cutoff_layers=[2, 4])
        np.testing.assert_allclose(face.compute_score(PAIRS, cutoff_layers=[4, 2]), both, rtol=1e-5, atol=1e-5)
        for layer, scores in zip((2, 4), both, strict=True):
            np.testing.assert_allclose(face.compute_score(PAIRS, cutoff_layers=[layer]), scores, rtol=1e-5, atol=1e-5)
    with getattr(flag, call.library)(str(call.model), **call.constructor) as face:
        asked = [4, 2] if name == "layerwise_reranker" else [2, 4]
        assert np.abs(np.array(face.compute_score(PAIRS, cutoff_layers=asked)) - both).max() > 0.1


def test_layers_and_compression_of_the_constructor_are_those_of_calls_that_name_none() -> None:
    call = next(call for call in read("lightweight_reranker") if call.id == "compress_4_twice_several_layers")
    with flag.LightWeightFlagLLMReranker(str(call.model), **(call.constructor | call.kwargs)) as face:
        assert difference(face.compute_score(call.inputs), call.expected[""]) <= 1
        older = face.compute_score(call.inputs, compress_layer=[2, 3], compress_layers=[1])
        assert difference(older, call.expected[""]) <= 1
        # Of the layers of larger models there is nothing to compress.
        plain = face.compute_score(PAIRS, compress_layers=[0, 8, 30], cutoff_layers=[4])
        assert plain == pytest.approx(face.compute_score(PAIRS, compress_ratio=1, cutoff_layers=[4]), rel=1e-4)


def test_m3_s_helpers_agree_with_its_scores(m3: flag.BGEM3FlagModel) -> None:
    given = m3.encode(TEXTS, return_sparse=True, return_colbert_vecs=True)
    lexical, colbert = given["lexical_weights"], given["colbert_vecs"]
    scores = scores_of(m3, PAIRS, batch_size=1)
    matrix = m3.compute_lexical_matching_score(lexical, lexical)
    assert matrix.shape == (4, 4)
    np.testing.assert_allclose(matrix[0], scores["sparse"], atol=1e-5)
    assert m3.compute_lexical_matching_score(lexical[0], lexical[2]) == pytest.approx(scores["sparse"][2], abs=1e-5)
    with pytest.raises(InvalidInput, match="two dicts or two lists"):
        m3.compute_lexical_matching_score(lexical[0], lexical)
    score = m3.colbert_score(colbert[0], colbert[2])
    assert type(score) is torch.Tensor
    assert score.item() == pytest.approx(scores["colbert"][2], abs=1e-5)


def test_ids_become_tokens(m3: flag.BGEM3FlagModel) -> None:
    weights = m3.encode([TEXTS[3]] * 2, return_sparse=True)["lexical_weights"]
    read_back: Any = m3.convert_id_to_token(weights)
    assert len(read_back) == 2
    assert list(read_back[0].values()) == list(weights[0].values())
    assert all(token and token in TEXTS[3] for token in read_back[0])
    assert m3.convert_id_to_token(weights[0]) == m3.convert_id_to_token(weights[:1]) == read_back[0]


def test_colbert_alone_may_have_weight(m3: flag.BGEM3FlagModel) -> None:
    given = scores_of(m3, PAIRS, weights_for_different_modes=[0, 0, 1])
    assert given["colbert+sparse+dense"] == pytest.approx(given["colbert"])
    assert np.isnan(given["sparse+dense"]).all()
    with pytest.raises(InvalidInput, match="three numbers from 0"):
        m3.compute_score(PAIRS, weights_for_different_modes=[1, 1])


def test_the_engine_can_be_asked_for_what_faces_give(m3: flag.BGEM3FlagModel) -> None:
    weights = [0.4, 0.2, 0.4]
    given = scores_of(m3, PAIRS, batch_size=1, weights_for_different_modes=weights)
    with core.load(M3, device="cpu", precision="float32") as engine:
        for mode, name in {"dense": "dense", "weighted": "colbert+sparse+dense"}.items():
            np.testing.assert_allclose(engine.score(PAIRS, mode=mode, weights=weights), given[name], atol=1e-5)
