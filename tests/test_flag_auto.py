"""The automatic classes: which face, pooling and format a name stands for."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedq.core import flag
from embedq.core.errors import InvalidInput
from tests.conftest import GOLDEN

#: Checkpoints that each class can load, whatever they are called.
_MODELS = {
    "FlagModel": "flagmodel_cls",
    "BGEM3FlagModel": "bge_m3",
    "FlagLLMModel": "flagllmmodel_qwen3",
    "FlagICLModel": "flagiclmodel",
    "FlagPseudoMoEModel": "flagllmmodel_qwen3",
    "FlagReranker": "flagreranker_bert",
    "FlagLLMReranker": "flagllmreranker_llama",
    "LayerWiseFlagLLMReranker": "layerwise_reranker",
    "LightWeightFlagLLMReranker": "lightweight_reranker",
}

_INSTRUCT, _TAGS = "Instruct: {}\nQuery: {}", "<instruct>{}\n<query>{}"

#: FlagEmbedding 1.4.2's embedders: names -> class, pooling, query format.
EMBEDDERS = {
    "bge-reasoner-embed-qwen3-8b-0923": ("FlagLLMModel", "last_token", _INSTRUCT),
    "bge-code-v1 bge-multilingual-gemma2": ("FlagLLMModel", "last_token", _TAGS),
    "bge-en-icl": ("FlagICLModel", "last_token", _TAGS),
    "bge-m3": ("BGEM3FlagModel", "cls", "{}{}"),
    "bge-large-en-v1.5 bge-base-en-v1.5 bge-small-en-v1.5 bge-large-zh-v1.5 bge-base-zh-v1.5 bge-small-zh-v1.5 "
    "bge-large-en bge-base-en bge-small-en bge-large-zh bge-base-zh bge-small-zh "
    "gte-multilingual-base gte-large-en-v1.5 gte-base-en-v1.5 gte-large-zh gte-base-zh gte-small-zh "
    "bce-embedding-base_v1": ("FlagModel", "cls", "{}{}"),
    "Qwen3-Embedding-0.6B Qwen3-Embedding-4B Qwen3-Embedding-8B": (
        "FlagLLMModel",
        "last_token",
        "Instruct: {}\nQuery:{}",
    ),
    "e5-mistral-7b-instruct gte-Qwen2-7B-instruct gte-Qwen2-1.5B-instruct gte-Qwen1.5-7B-instruct "
    "SFR-Embedding-2_R SFR-Embedding-Mistral Linq-Embed-Mistral": ("FlagLLMModel", "last_token", _INSTRUCT),
    "e5-large-v2 e5-base-v2 e5-small-v2 e5-large e5-base e5-small "
    "multilingual-e5-large multilingual-e5-base multilingual-e5-small gte-large gte-base gte-small": (
        "FlagModel",
        "mean",
        "{}{}",
    ),
    "multilingual-e5-large-instruct": ("FlagModel", "mean", _INSTRUCT),
}

RERANKERS = {
    "bge-reranker-base bge-reranker-large bge-reranker-v2-m3 bce-reranker-base_v1 jina-reranker-v2-base-multilingual "
    "jina-reranker-v1-turbo-en gte-multilingual-reranker-base": "FlagReranker",
    "bge-reranker-v2-gemma": "FlagLLMReranker",
    "bge-reranker-v2-minicpm-layerwise": "LayerWiseFlagLLMReranker",
    "bge-reranker-v2.5-gemma2-lightweight": "LightWeightFlagLLMReranker",
}


def called(directory: Path, name: str, face: str) -> str:
    """A checkpoint for `face` in a directory of that name."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(GOLDEN / _MODELS[face] / "model", target_is_directory=True)
    return str(path)


@pytest.mark.parametrize(
    ("name", "expected"), [(name, expected) for names, expected in EMBEDDERS.items() for name in names.split()]
)
def test_an_embedder_s_name_tells_class_pooling_and_format(
    name: str, expected: tuple[str, str, str], tmp_path: Path
) -> None:
    with flag.FlagAutoModel.from_finetuned(called(tmp_path, name, expected[0]), devices="cpu") as face:
        assert (type(face).__name__, face.pooling_method, face.query_instruction_format) == expected
        assert face.spec.pooling == face.pooling_method
        assert face.use_fp16


@pytest.mark.parametrize(
    ("name", "expected"), [(name, expected) for names, expected in RERANKERS.items() for name in names.split()]
)
def test_a_reranker_s_name_tells_its_class(name: str, expected: str, tmp_path: Path) -> None:
    with flag.FlagAutoReranker.from_finetuned(called(tmp_path, name, expected), devices="cpu") as face:
        assert type(face).__name__ == expected
        assert not face.use_fp16


@pytest.mark.parametrize("name", ["bge-en-icl/checkpoint-500", "bge-en-icl/"])
def test_a_name_is_found_behind_a_checkpoint_s_number_and_a_slash(name: str, tmp_path: Path) -> None:
    path = called(tmp_path, name.rstrip("/"), "FlagICLModel") + "/" * name.endswith("/")
    with flag.FlagAutoModel.from_finetuned(path, devices="cpu") as face:
        assert type(face) is flag.FlagICLModel


@pytest.mark.parametrize(
    ("kind", "expected", "pooling"),
    [
        ("encoder-only-base", "FlagModel", "cls"),
        ("encoder-only-m3", "BGEM3FlagModel", "cls"),
        ("decoder-only-base", "FlagLLMModel", "last_token"),
        ("decoder-only-icl", "FlagICLModel", "last_token"),
        ("decoder-only-pseudo_moe", "FlagPseudoMoEModel", "last_token"),
    ],
)
def test_a_class_may_be_named_for_any_directory(kind: str, expected: str, pooling: str) -> None:
    path = str(GOLDEN / _MODELS[expected] / "model")
    for model_class in (kind, flag.EmbedderModelClass(kind)):
        with flag.FlagAutoModel.from_finetuned(path, model_class=model_class, devices="cpu") as face:
            assert type(face).__name__ == expected
            assert face.pooling_method == pooling
            # Also where the class itself would write another: so it is there.
            assert face.query_instruction_format == "{}{}"
            assert (face.use_fp16, face.use_bf16) == (True, False)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("encoder-only-base", "FlagReranker"),
        ("decoder-only-base", "FlagLLMReranker"),
        ("decoder-only-layerwise", "LayerWiseFlagLLMReranker"),
        ("decoder-only-lightweight", "LightWeightFlagLLMReranker"),
    ],
)
def test_a_reranker_s_class_may_be_named_for_any_directory(kind: str, expected: str) -> None:
    path = str(GOLDEN / _MODELS[expected] / "model")
    for model_class in (kind, flag.RerankerModelClass(kind)):
        with flag.FlagAutoReranker.from_finetuned(path, model_class=model_class, devices="cpu", max_length=64) as face:
            assert type(face).__name__ == expected
            assert face.max_length == 64


def test_what_is_given_goes_before_what_a_name_tells(tmp_path: Path) -> None:
    path = called(tmp_path, "multilingual-e5-large-instruct", "FlagModel")
    given: dict[str, Any] = {"pooling_method": "cls", "query_instruction_format": "{} {}", "truncate_dim": 8}
    with flag.FlagAutoModel.from_finetuned(path, devices="cpu", passage_max_length=20, **given) as face:
        assert {name: getattr(face, name) for name in given} == given
        assert face.passage_max_length == 20
        assert np.asarray(face.encode("a")).shape == (8,)


@pytest.mark.parametrize("auto", [flag.FlagAutoModel, flag.FlagAutoReranker])
def test_an_unknown_name_is_refused_with_all_that_are_known(auto: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        auto.from_finetuned("somewhere/else")
    tables = EMBEDDERS if auto is flag.FlagAutoModel else RERANKERS
    kinds = flag.EmbedderModelClass if auto is flag.FlagAutoModel else flag.RerankerModelClass
    for word in [*" ".join(tables).split(), *(kind.value for kind in kinds)]:
        assert word in str(caught.value)


def test_names_and_classes_of_the_other_kind_are_refused() -> None:
    with pytest.raises(InvalidInput, match="does not end in a known name"):
        flag.FlagAutoModel.from_finetuned("BAAI/bge-reranker-base")
    with pytest.raises(InvalidInput, match="does not end in a known name"):
        flag.FlagAutoReranker.from_finetuned("BAAI/bge-m3")
    with pytest.raises(
        InvalidInput, match=r"model_class must be one of encoder-only-base, .*; given 'encoder-only-m3'"
    ):
        flag.FlagAutoReranker.from_finetuned("anything", model_class="encoder-only-m3")


def test_the_automatic_classes_take_what_flag_embedding_s_take() -> None:
    def defaults(function: Any) -> dict[str, Any]:
        found = inspect.signature(function).parameters.values()
        return {one.name: one.default for one in found if one.kind is not one.VAR_KEYWORD}

    assert list(defaults(flag.FlagAutoModel.from_finetuned).items()) == [
        ("model_name_or_path", inspect.Parameter.empty),
        ("model_class", None),
        ("normalize_embeddings", True),
        ("use_fp16", True),
        ("use_bf16", False),
        ("query_instruction_for_retrieval", None),
        ("devices", None),
        ("pooling_method", None),
        ("trust_remote_code", None),
        ("query_instruction_format", None),
        ("truncate_dim", None),
    ]
    assert list(defaults(flag.FlagAutoReranker.from_finetuned).items()) == [
        ("model_name_or_path", inspect.Parameter.empty),
        ("model_class", None),
        ("use_fp16", False),
        ("trust_remote_code", None),
    ]


@pytest.mark.parametrize("auto", [flag.FlagAutoModel, flag.FlagAutoReranker])
def test_the_automatic_classes_have_no_instances(auto: Any) -> None:
    with pytest.raises(InvalidInput, match="from_finetuned"):
        auto()
