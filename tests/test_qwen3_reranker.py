"""Qwen3-Reranker: the ids and probabilities of its authors' recipe, run with plain transformers on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from embedq import core
from embedq.core.engine import Engine
from embedq.core.errors import CannotLoadModel, InvalidInput
from tests import rerankers
from tests.golden_cases import difference, read

#: As published with the weights.
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided."
    ' Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

PAIRS = rerankers.pairs(read("flagreranker_bert")[0])

#: Positions of the small model; the frame alone has some 250 of its single-byte tokens.
NUM_POSITIONS = 700


def write_tokenizer(path: Path, words: tuple[str, ...] = ("yes", "no")) -> Tokenizer:
    """Byte by byte, but for the words that the model answers and the special tokens of the chat."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "ye", *words])}
    merges = [
        pair for pair, made in ((("y", "e"), "ye"), (("ye", "s"), "yes"), (("n", "o"), "no")) if made in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


def write_model(path: Path, is_tied: bool) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(51)
    config = Qwen3Config(
        vocab_size=280,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=NUM_POSITIONS,
        tie_word_embeddings=is_tied,
        bos_token_id=None,
        eos_token_id=260,
        pad_token_id=259,
    )
    network = Qwen3ForCausalLM(config).eval()
    for weight in network.parameters():
        if weight.ndim > 1:  # large enough for texts to differ behind the long frame
            torch.nn.init.normal_(weight, std=0.3)
    network.save_pretrained(path)
    return network


def published_rows(tokenizer: Tokenizer, instruction: str, max_length: int) -> list[list[int]]:
    """The authors' recipe: prefix and suffix by themselves, between them one text that is cut at its end."""
    before, behind = (tokenizer.encode(text, add_special_tokens=False).ids for text in (PREFIX, SUFFIX))
    rows = []
    for query, document in PAIRS:
        text = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
        middle = tokenizer.encode(text).ids[: max_length - len(before) - len(behind)]
        rows.append([*before, *middle, *behind])
    return rows


def published_probabilities(network: torch.nn.Module, tokenizer: Tokenizer, rows: list[list[int]]) -> np.ndarray:
    """Full logits of a batch padded on the left; of yes and no at the last position the softmax."""
    longest = max(map(len, rows))
    ids = torch.tensor([[259] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    with torch.inference_mode():
        last = network(input_ids=ids, attention_mask=mask).logits[:, -1]
    answers = last[:, [tokenizer.token_to_id("no"), tokenizer.token_to_id("yes")]]
    probabilities: np.ndarray = answers.softmax(dim=1)[:, 1].numpy()
    return probabilities


def load(path: Path, **model: object) -> Engine:
    return core.load(str(path), device="cpu", model={"family": "qwen3_reranker", "precision": "float32", **model})


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("max_length", [NUM_POSITIONS, 300])
@pytest.mark.parametrize("instruction", [None, "Find the passage that the query quotes"])
def test_ids_and_probabilities_are_those_of_the_published_recipe(
    tmp_path: Path, is_tied: bool, max_length: int, instruction: str | None
) -> None:
    tokenizer, network = write_tokenizer(tmp_path), write_model(tmp_path, is_tied)
    rows = published_rows(tokenizer, instruction or INSTRUCTION, max_length)
    expected = published_probabilities(network, tokenizer, rows)
    given: dict[str, Any] = {"max_length": max_length, "query_instruction": instruction}
    with load(tmp_path) as engine:
        assert rerankers.encode(engine, PAIRS, **given) == rows
        together = engine.score(PAIRS, normalize=True, **given)
        alone = np.concatenate([engine.score([pair], normalize=True, **given) for pair in PAIRS])
        raw = engine.score(PAIRS, **given)
    assert np.ptp(expected) > 0.05
    assert difference(together, expected) <= 1
    assert difference(alone, expected) <= 1
    np.testing.assert_allclose(raw, np.log(expected) - np.log1p(-expected), atol=1e-4)


def test_the_name_tells_what_it_is_and_settings_the_instruction(tmp_path: Path) -> None:
    path = tmp_path / "Qwen3-Reranker-0.6B"
    path.mkdir()
    tokenizer = write_tokenizer(path)
    write_model(path, is_tied=True)
    with core.load(str(path), device="cpu", model={"query_instruction": "Find it"}) as engine:
        assert engine.models["model"].spec.family == "qwen3_reranker"
        assert rerankers.encode(engine, PAIRS) == published_rows(tokenizer, "Find it", NUM_POSITIONS)
        engine.warm_up()


def test_calls_get_8192_tokens_unless_they_or_the_settings_say_otherwise(tmp_path: Path) -> None:
    from embedq.core.checkpoint.read_spec import read_spec
    from embedq.core.settings import ModelSettings

    write_model(tmp_path, is_tied=True)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace(f": {NUM_POSITIONS}", ": 40960"))
    lengths = [
        (spec.default_length or spec.max_length, spec.max_length)
        for asked in (None, 2_000)
        for spec in [read_spec("r", ModelSettings(path=str(tmp_path), family="qwen3_reranker", max_length=asked))]
    ]
    assert lengths == [(8_192, 40_960), (2_000, 2_000)]


def test_a_length_that_leaves_no_room_for_the_pair_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    write_model(tmp_path, is_tied=True)
    with (
        load(tmp_path) as engine,
        pytest.raises(InvalidInput, match=r"max_length must be \d+ to 700 tokens .* given 20"),
    ):
        engine.score(PAIRS, max_length=20)


@pytest.mark.parametrize("option", ["prompt", "query_max_length", "cutoff_layers", "compress_ratio", "mode"])
def test_options_of_other_rerankers_are_refused(tmp_path: Path, option: str) -> None:
    write_tokenizer(tmp_path)
    write_model(tmp_path, is_tied=True)
    value: Any = {"prompt": "?", "mode": "dense"}.get(option, 2)
    with load(tmp_path) as engine, pytest.raises(InvalidInput, match=f"option {option} means nothing"):
        engine.score(PAIRS, **{option: value})


def test_a_tokenizer_that_cannot_answer_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, words=())
    write_model(tmp_path, is_tied=True)
    with pytest.raises(CannotLoadModel, match="has no tokens yes and no"):
        load(tmp_path)
