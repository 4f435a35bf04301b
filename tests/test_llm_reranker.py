"""Rerankers of language models by the logit of Yes: the library's ids and scores, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from embedq import core
from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.engine import Engine
from embedq.core.errors import CannotLoadModel, InvalidInput
from embedq.core.settings import ModelSettings
from embedq.core.tokenizer import Tokenizer
from tests import rerankers
from tests.decoders import changed_copy
from tests.golden_cases import Call, calls, read

CASES = ("flagllmreranker", "flagllmreranker_llama", "flagllmreranker_bos_is_pad")
each_call = pytest.mark.parametrize("call", calls(*CASES), ids=str)


def load(path: Path, **model: Any) -> Engine:
    chosen = {"family": "llm_reranker", "precision": "float32", **model}
    return core.load(str(path), device="cpu", model=chosen)


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    with ExitStack() as stack:
        yield {case: stack.enter_context(rerankers.load(case, family="llm_reranker")) for case in CASES}


@pytest.fixture(scope="module")
def rounded() -> Iterator[dict[str, Engine]]:
    with ExitStack() as stack:
        chosen = {"family": "llm_reranker", "precision": "bfloat16"}
        yield {case: stack.enter_context(rerankers.load(case, **chosen)) for case in CASES}


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
    rerankers.assert_same_scores_in_mixtures(engines[case], read(case), seed=21)


@each_call
def test_bfloat16_stays_close(rounded: dict[str, Engine], call: Call) -> None:
    rerankers.assert_close_in_bfloat16(rounded[call.case], call)


@pytest.mark.parametrize("case", CASES)
def test_no_logits_of_the_whole_vocabulary_are_computed(engines: dict[str, Engine], case: str) -> None:
    engine = engines[case]
    vocabulary = engine.models["model"].spec.config["vocab_size"]
    widths: list[int] = []

    def note(_: torch.nn.Module, __: Any, output: Any) -> None:
        widths.extend(value.shape[-1] for value in [output] if isinstance(value, torch.Tensor))

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    engine.score([("where is the ferry", "at the pier")])
    hook.remove()
    assert widths
    assert vocabulary not in widths


def test_a_query_is_encoded_once_however_many_passages_it_has(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    ids = Tokenizer.ids

    def noted(self: Tokenizer, texts: list[str], max_tokens: int) -> list[list[int]]:
        encoded.extend(texts)
        return ids(self, texts, max_tokens)

    monkeypatch.setattr(Tokenizer, "ids", noted)
    rerankers.encode(engines[CASES[0]], [("ferry", f"boat {number}") for number in range(20)])
    assert encoded.count("A: ferry") == 1
    assert len(encoded) == 1 + 20 + 1  # and the prompt


def test_the_final_soft_cap_of_gemma_2_applies(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(31)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(
        **sizes, vocab_size=1267, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, sliding_window=16
    )
    network = Gemma2ForCausalLM(config).eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    changed_copy(CASES[0], tmp_path)
    network.save_pretrained(tmp_path)
    call = read(CASES[0])[0]
    with load(tmp_path) as engine:
        scores = engine.score(rerankers.pairs(call), **rerankers.options(call))
    yes = rerankers.plain_ids(CASES[0], "Yes")[0]
    with torch.inference_mode():
        rows = call.token_ids["input_ids"]
        expected = torch.stack([network(torch.tensor([row])).logits[0, -1, yes] for row in rows])
    assert expected.abs().max() > 1  # near the cap, where it shows
    torch.testing.assert_close(torch.from_numpy(scores), expected, atol=1e-5, rtol=1e-5)


def test_calls_get_512_tokens_unless_they_or_the_settings_say_otherwise(tmp_path: Path) -> None:
    path = changed_copy(CASES[1], tmp_path, {"max_position_embeddings": 2_048})
    stated = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(stated | {"model_max_length": 2_048}))
    pair = ("ferry", "boat " * 3_000)
    with load(path) as engine:
        num_prompt = len(rerankers.encode(engine, [("", "")])[0])
        usual, more = (len(rerankers.encode(engine, [pair], **given)[0]) for given in ({}, {"max_length": 1_500}))
        assert 512 <= usual <= 512 + num_prompt
        assert 1_500 <= more <= 1_500 + num_prompt
    with load(path, max_length=1_000) as engine:
        assert 1_000 <= len(rerankers.encode(engine, [pair])[0]) <= 1_000 + num_prompt
        with pytest.raises(InvalidInput, match="max_length must be 3 to 1000 tokens for model model; given 1001"):
            engine.score([pair], max_length=1_001)


def test_a_pair_that_exceeds_the_positions_is_refused_with_the_numbers(engines: dict[str, Engine]) -> None:
    engine = engines[CASES[1]]
    with pytest.raises(
        InvalidInput, match=r"a pair has 5\d\d tokens, \d+ of them its prompt, and .* takes 512"
    ) as error:
        engine.score([("ferry", "timetable " * 900)], max_length=500)
    assert "timetable" not in str(error.value)
    with pytest.raises(InvalidInput, match="shorten the prompt"):
        engine.score([("ferry", "boat")], prompt="is it so? " * 900)


@pytest.mark.parametrize(
    ("stated", "config", "first"),
    [
        ({"bos_token": "<s>"}, {}, 1),
        ({"bos_token": {"content": "<s>", "lstrip": False}}, {}, 1),
        ({"bos_token": None}, {"bos_token_id": 1}, None),
        ({}, {"bos_token_id": 1}, 1),
        ({}, {"bos_token_id": None}, None),
        ({"bos_token": "<s>", "pad_token": "<s>"}, {}, None),
    ],
    ids=["by name", "with details", "named none", "config only", "nowhere", "also the padding"],
)
def test_a_bos_goes_in_front_if_the_tokenizer_has_one_of_its_own(
    tmp_path: Path, stated: dict[str, Any], config: dict[str, Any], first: int | None
) -> None:
    path = changed_copy(CASES[1], tmp_path, config)
    (path / "special_tokens_map.json").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps(stated))
    with load(path) as engine:
        row = rerankers.encode(engine, [("ferry", "boat")])[0]
    query = rerankers.plain_ids(CASES[1], "A: ferry")
    start = query if first is None else [first, *query]
    assert row[: len(start)] == start


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    path = changed_copy(CASES[1], tmp_path, drop=("lm_head.weight",))
    with pytest.raises(CannotLoadModel, match=r"lacks 1 weights the model needs, among them lm_head\.weight"):
        load(path)


@pytest.mark.parametrize(
    "option", [{"cutoff_layers": [1]}, {"compress_ratio": 2}, {"mode": "dense"}, {"weights": (1, 1, 1)}], ids=str
)
def test_options_of_other_rerankers_are_refused(engines: dict[str, Engine], option: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=rf"option {next(iter(option))} means nothing to .* llm reranker"):
        engines[CASES[0]].score([("ferry", "boat")], **option)


def test_the_name_of_the_published_model_tells_what_it_is(tmp_path: Path) -> None:
    path = changed_copy(CASES[0], tmp_path / "bge-reranker-v2-gemma")
    assert read_spec("gemma", ModelSettings(path=str(path))).family == "llm_reranker"


def test_a_rerank_orders_passages_and_knows_no_pairs(engines: dict[str, Engine]) -> None:
    call = read(CASES[0])[0]
    given = rerankers.options(call)
    passages = [passage for _, passage in rerankers.pairs(call)]
    ranking = engines[CASES[0]].rerank("ferry", passages, top_k=5, **given)
    scores = engines[CASES[0]].score([("ferry", passage) for passage in passages], **given)
    assert ranking.scores.tolist() == pytest.approx(scores.tolist(), abs=1e-5)
    assert ranking.order.tolist() == sorted(range(len(scores)), key=lambda index: -ranking.scores[index])[:5]
    assert engines[CASES[0]].score([]).shape == (0,)
    with pytest.raises(InvalidInput, match="cannot embed"):
        engines[CASES[0]].embed(["ferry"], model="model")
