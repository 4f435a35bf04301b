"""The faces take FlagEmbedding's arguments, refuse others, and load accordingly."""

from __future__ import annotations

import gc
import inspect
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedq.core import flag
from embedq.core.errors import CannotLoadModel, DeviceFailure, InvalidInput, InvalidSettings
from tests.conftest import GOLDEN
from tests.running import ROOT

ENCODER = GOLDEN / "flagmodel_cls" / "model"
DECODER = GOLDEN / "flagllmmodel_qwen3" / "model"
RERANKER = GOLDEN / "flagreranker_bert" / "model"

_START = {"model_name_or_path": inspect.Parameter.empty}
_EMBED = {"normalize_embeddings": True, "use_fp16": True, "use_bf16": False, "query_instruction_for_retrieval": None}
_LENGTHS = {"batch_size": 256, "query_max_length": 512, "passage_max_length": 512}
_RESULT = {"convert_to_numpy": True, "truncate_dim": None}
_CODE = {"trust_remote_code": False, "cache_dir": None}
_INSTRUCT = {"query_instruction_format": "Instruct: {}\nQuery: {}"}
_PAIRS = {"batch_size": 128, "query_max_length": None, "max_length": 512, "normalize": False}
_LETTERS = {
    "peft_path": None,
    "use_fp16": False,
    "use_bf16": False,
    "query_instruction_for_rerank": "A: ",
    "query_instruction_format": "{}{}",
    "passage_instruction_for_rerank": "B: ",
    "passage_instruction_format": "{}{}",
    "cache_dir": None,
    "trust_remote_code": False,
    "devices": None,
}

#: FlagEmbedding 1.4.2: class -> its constructor's parameters in their order, with their defaults.
CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "FlagModel": _START
    | _EMBED
    | {"query_instruction_format": "{}{}", "devices": None, "pooling_method": "cls"}
    | _CODE
    | _LENGTHS
    | _RESULT,
    "BGEM3FlagModel": _START
    | _EMBED
    | {"query_instruction_format": "{}{}", "devices": None, "pooling_method": "cls"}
    | _CODE
    | {"colbert_dim": -1}
    | _LENGTHS
    | {"return_dense": True, "return_sparse": False, "return_colbert_vecs": False, "truncate_dim": None},
    "FlagLLMModel": _START | _EMBED | _INSTRUCT | {"devices": None} | _CODE | _LENGTHS | _RESULT,
    "FlagPseudoMoEModel": _START
    | (_EMBED | {"use_fp16": False, "use_bf16": True})
    | _INSTRUCT
    | {"devices": None, "trust_remote_code": True, "cache_dir": None}
    | _LENGTHS
    | _RESULT
    | {"domain_for_pseudo_moe": None},
    "FlagICLModel": _START
    | _EMBED
    | {"query_instruction_format": "<instruct>{}\n<query>{}", "suffix": "\n<response>", "devices": None}
    | {"examples_for_task": None, "examples_instruction_format": "<instruct>{}\n<query>{}\n<response>{}"}
    | _CODE
    | _LENGTHS
    | _RESULT,
    "FlagReranker": _START
    | {"use_fp16": False, "query_instruction_for_rerank": None, "query_instruction_format": "{}{}"}
    | {"passage_instruction_for_rerank": None, "passage_instruction_format": "{}{}"}
    | _CODE
    | {"devices": None}
    | _PAIRS,
    "FlagLLMReranker": _START | _LETTERS | {"prompt": None} | _PAIRS,
    "LayerWiseFlagLLMReranker": _START | _LETTERS | {"cutoff_layers": None, "prompt": None} | _PAIRS,
    "LightWeightFlagLLMReranker": _START
    | _LETTERS
    | {"cutoff_layers": None, "compress_layers": [8], "compress_ratio": 1, "prompt": None}
    | _PAIRS,
}

_ENCODE = {"batch_size": None, "max_length": None}
_M3_ENCODE = _ENCODE | {"return_dense": None, "return_sparse": None, "return_colbert_vecs": None}
_ENCODE_METHODS = {"encode": "sentences", "encode_queries": "queries", "encode_corpus": "corpus"}

#: The same of its calls: (class, method) -> parameters.
METHODS: dict[tuple[str, str], dict[str, Any]] = {
    (name, method): {first: inspect.Parameter.empty}
    | (_M3_ENCODE if name == "BGEM3FlagModel" else _ENCODE | {"convert_to_numpy": None})
    for name in ("FlagModel", "BGEM3FlagModel", "FlagLLMModel", "FlagPseudoMoEModel", "FlagICLModel")
    for method, first in _ENCODE_METHODS.items()
} | {
    ("FlagReranker", "compute_score"): {"sentence_pairs": inspect.Parameter.empty},
    ("BGEM3FlagModel", "compute_score"): {
        "sentence_pairs": inspect.Parameter.empty,
        "batch_size": None,
        "max_query_length": None,
        "max_passage_length": None,
        "weights_for_different_modes": None,
    },
}


def parameters(function: Any) -> list[tuple[str, Any]]:
    """(name, default) of each parameter, in order."""
    found = [one for one in inspect.signature(function).parameters.values() if one.name != "self"]
    assert found.pop().kind is inspect.Parameter.VAR_KEYWORD
    return [(one.name, one.default) for one in found]


def copied(source: Path, directory: Path, **config: Any) -> Path:
    """A checkpoint of one's own, with `config` in its config.json."""
    shutil.copytree(source, directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return directory


@pytest.fixture(scope="module")
def encoder() -> Iterator[flag.FlagModel]:
    with flag.FlagModel(str(ENCODER), use_fp16=False, devices="cpu") as face:
        yield face


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_constructor_takes_what_flag_embedding_s_takes(name: str) -> None:
    assert parameters(getattr(flag, name)) == list(CONSTRUCTORS[name].items())


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_a_call_takes_what_flag_embedding_s_takes(name: str, method: str) -> None:
    assert parameters(getattr(getattr(flag, name), method)) == list(METHODS[name, method].items())


def test_an_unknown_keyword_of_a_constructor_is_refused_with_all_that_are_known() -> None:
    with pytest.raises(
        InvalidInput, match=r"FlagReranker has no argument 'passage_max_length'; it has .*max_length"
    ) as e:
        flag.FlagReranker(str(RERANKER), passage_max_length=64)
    assert all(name in str(e.value) for name in CONSTRUCTORS["FlagReranker"])


@pytest.mark.parametrize("method", _ENCODE_METHODS)
def test_an_unknown_keyword_of_encode_is_refused(encoder: flag.FlagModel, method: str) -> None:
    with pytest.raises(InvalidInput, match=f"FlagModel.*{method} has no argument 'batchsize'; it has .*batch_size"):
        getattr(encoder, method)(["a"], batchsize=2)
    if method != "encode":  # their own instruction is the constructor's
        with pytest.raises(InvalidInput, match="no argument 'instruction'"):
            getattr(encoder, method)(["a"], instruction="b")


def test_a_keyword_of_another_reranker_is_refused() -> None:
    with (
        flag.FlagReranker(str(RERANKER), devices="cpu") as face,
        pytest.raises(InvalidInput, match="has no argument 'cutoff_layers'; it has sentence_pairs, batch_size"),
    ):
        face.compute_score([("a", "b")], cutoff_layers=[1])


@pytest.mark.parametrize(
    ("name", "path", "given", "told"),
    [
        ("FlagModel", ENCODER, {"pooling_method": "last_token"}, "one of cls, mean; given 'last_token'"),
        ("FlagLLMModel", DECODER, {"pooling_method": "mean"}, "one of last_token; given 'mean'"),
        ("FlagLLMReranker", RERANKER, {"peft_path": "adapter"}, "merge the adapter"),
        ("BGEM3FlagModel", GOLDEN / "bge_m3" / "model", {"colbert_dim": 8}, "colbert_dim is 8; .* has 48 outputs"),
        ("FlagModel", ENCODER, {"devices": []}, "empty list"),
        ("FlagModel", ENCODER, {"devices": [0.5]}, "a string, a number or a list of them; given float"),
    ],
)
def test_what_cannot_be_honoured_is_refused(name: str, path: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        getattr(flag, name)(str(path), **({"devices": "cpu"} | given))


def test_the_true_size_of_colbert_vectors_is_accepted() -> None:
    with flag.BGEM3FlagModel(str(GOLDEN / "bge_m3" / "model"), devices="cpu", colbert_dim=48) as face:
        assert face.encode("a", return_colbert_vecs=True)["colbert_vecs"].shape[1] == 48


def test_of_several_devices_the_first_is_used_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="of 2 devices only 'cpu' is used") as caught:
        face = flag.FlagModel(str(ENCODER), devices=["cpu", "cuda:1"])
    face.close()
    assert caught[0].filename == __file__
    assert face.target_devices == ["cpu"]


def test_a_number_means_an_accelerator() -> None:
    with pytest.raises(InvalidSettings, match=r"device '\w+:99' was asked for; this process sees \d+ of kind"):
        flag.FlagModel(str(ENCODER), devices=99)


@pytest.mark.parametrize(
    ("name", "case", "given", "precision"),
    [
        ("FlagReranker", "flagreranker_bert", {"use_fp16": True}, "float32"),
        ("FlagLLMReranker", "flagllmreranker_llama", {"use_fp16": True}, "float32"),
        ("FlagLLMReranker", "flagllmreranker_llama", {"use_bf16": True}, "bfloat16"),
        ("LayerWiseFlagLLMReranker", "layerwise_reranker", {}, "float32"),
        ("LightWeightFlagLLMReranker", "lightweight_reranker", {"use_bf16": True}, "bfloat16"),
    ],
)
def test_rerankers_on_a_cpu_take_bf16_and_no_fp16(name: str, case: str, given: dict[str, bool], precision: str) -> None:
    with getattr(flag, name)(str(GOLDEN / case / "model"), devices="cpu", **given) as face:
        assert face.precision == precision
        assert len(face.compute_score(("a", "b"))) == 1


def test_importing_loads_no_torch() -> None:
    command = "import sys; from embedq.core.flag import FlagAutoModel; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_a_checkpoint_s_code_is_never_run(tmp_path: Path) -> None:
    path = copied(ENCODER, tmp_path / "model", auto_map={"AutoModel": "theirs.Model"})
    (path / "theirs.py").write_text("raise RuntimeError('it ran')\n")
    with pytest.warns(UserWarning, match="contains code of its own, which is never run") as caught:
        face = flag.FlagModel(str(path), use_fp16=False, devices="cpu", trust_remote_code=True)
    assert caught[0].filename == __file__
    with face, flag.FlagModel(str(ENCODER), use_fp16=False, devices="cpu", trust_remote_code=True) as plain:
        np.testing.assert_array_equal(face.encode("a"), plain.encode("a"))


def test_a_domain_is_refused_where_the_checkpoint_s_own_code_would_choose_it(tmp_path: Path) -> None:
    with flag.FlagPseudoMoEModel(str(DECODER), devices="cpu", domain_for_pseudo_moe="general") as plain:
        np.testing.assert_array_equal(plain.encode("a"), plain.encode("a", domain="coding"))
    path = copied(DECODER, tmp_path / "model", auto_map={"AutoModel": "theirs.Model"}, is_causal=True)
    with flag.FlagPseudoMoEModel(str(path), devices="cpu", trust_remote_code=False) as routed:
        assert routed.encode("a").shape == (48,)
        with pytest.raises(InvalidInput, match="domain 'coding' cannot be chosen"):
            routed.encode_queries("a", domain_for_pseudo_moe="coding")


def test_files_of_sentence_transformers_do_not_count(tmp_path: Path) -> None:
    source = GOLDEN / "st_mean_pooling" / "model"
    bare = tmp_path / "model"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("modules.json", "*sentence*", "1_*", "2_*"))
    texts = ["  white space around  ", "one word " * 50, "query"]
    with (
        flag.FlagModel(str(source), pooling_method="mean", devices="cpu") as face,
        flag.FlagModel(str(bare), pooling_method="mean", devices="cpu") as plain,
    ):
        np.testing.assert_array_equal(face.encode(texts, max_length=60), plain.encode(texts, max_length=60))
    described = GOLDEN / "st_qwen3_embedding" / "model"
    with flag.FlagLLMModel(str(described), devices="cpu") as prompted:  # its queries have a prompt elsewhere
        np.testing.assert_array_equal(prompted.encode_queries("a"), prompted.encode("a"))


def test_a_default_length_beyond_the_model_s_positions_cuts_and_an_explicit_one_is_refused(
    encoder: flag.FlagModel,
) -> None:
    text = "one word after the other " * 200
    np.testing.assert_allclose(encoder.encode(text), encoder.encode(text, max_length=128), atol=1e-6)
    with pytest.raises(InvalidInput, match="to 128 tokens"):
        encoder.encode(text, max_length=512)


def test_a_hub_model_is_found_in_cache_dir(tmp_path: Path) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--owner--tiny"
    shutil.copytree(ENCODER, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    with flag.FlagModel("owner/tiny", devices="cpu", cache_dir=str(tmp_path)) as face:
        assert face.encode("a").shape == (48,)
    with pytest.raises(CannotLoadModel):
        flag.FlagModel("owner/tiny", devices="cpu", cache_dir=str(tmp_path / "elsewhere"))


def test_a_closed_face_refuses_calls() -> None:
    with flag.FlagModel(str(ENCODER), devices="cpu") as face:
        face.stop_self_pool()
        assert face.encode("a").shape == (48,)
    with pytest.raises(DeviceFailure, match="closed"):
        face.encode("a")


def test_a_face_nobody_holds_ends_its_thread() -> None:
    before = set(threading.enumerate())
    face = flag.FlagModel(str(ENCODER), devices="cpu")
    assert set(threading.enumerate()) - before
    del face
    gc.collect()
    assert not set(threading.enumerate()) - before


def test_pairs_may_be_rows_of_a_numpy_array() -> None:
    pairs = [("a query", "a passage"), ("a query", "another passage")]
    with flag.FlagReranker(str(RERANKER), devices="cpu") as face:
        expected = face.compute_score(pairs)
        assert face.compute_score(list(np.array(pairs))) == expected
        assert face.compute_score(np.array(pairs)) == expected
        assert face.compute_score(np.array(pairs)[0]) == face.compute_score(pairs[0])


@pytest.mark.parametrize(("name", "path"), [("FlagModel", ENCODER), ("FlagReranker", RERANKER)])
def test_a_face_has_the_attributes_that_programs_read(name: str, path: Path) -> None:
    with getattr(flag, name)(str(path), devices="cpu") as face:
        assert face.device == "cpu"
        assert face.model.spec is face.spec
        tokenizer = face.tokenizer
        assert tokenizer is face.tokenizer
        assert tokenizer.name_or_path == str(path)
        assert len(tokenizer("two words")["input_ids"]) > 2
