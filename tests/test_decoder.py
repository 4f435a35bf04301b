"""Decoders beyond the golden vectors: who sees whom, windows, caps, poolings, ends, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from embedq import core
from embedq.core.errors import CannotLoadModel, InvalidInput
from embedq.core.options import EmbedOptions
from tests import tiny_models

#: Lengths all about, some longer than the windows.
TEXTS = ["a ferry", "", "rain " * 40, "The garden of the lighthouse is small.", "灯塔", "one two three four five " * 3]

SIZES: dict[str, Any] = {
    "vocab_size": 1300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 2,
}

#: The case whose tokenizer goes with them: it adds a beginning and an end.
TOKENIZER = "flagllmmodel_last_token"

DECODERS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral_windows": MistralConfig(**SIZES, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2_windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, attn_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
}


def load(path: Path, **model: Any) -> Any:
    return core.load(str(path), precision="float32", device="cpu", model={"family": "decoder"} | model)


def states(path: Path, rows: list[list[int]], **changes: Any) -> list[np.ndarray]:
    """Last hidden states of each row by itself, as transformers' plain attention gives them."""
    module = AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", **changes).eval()
    with torch.inference_mode():
        return [module(input_ids=torch.tensor([row])).last_hidden_state[0].numpy() for row in rows]


def rows_of(engine: Any) -> list[list[int]]:
    encoded = engine.models["model"].encode_texts(TEXTS, EmbedOptions())
    return [tokens.ids.tolist() for tokens in encoded]


@pytest.mark.parametrize("name", DECODERS)
def test_a_padded_batch_gives_what_a_text_gives_by_itself(name: str, tmp_path: Path) -> None:
    path = tiny_models.save(tmp_path, DECODERS[name], TOKENIZER)
    with load(path) as engine:
        expected = [row[-1] for row in states(path, rows_of(engine))]
        found = engine.embed(TEXTS, normalize=False).dense
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "change"), [("mistral", {"sliding_window": 8}), ("gemma2", {"attn_logit_softcapping": None})]
)
def test_windows_and_caps_make_a_difference(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    """Else the test above would show nothing of them."""
    path = tiny_models.save(tmp_path, DECODERS[name], TOKENIZER)
    with load(path) as engine:
        rows = rows_of(engine)
    plain, changed = states(path, rows), states(path, rows, **change)
    assert max(np.abs(one[-1] - other[-1]).max() for one, other in zip(plain, changed, strict=True)) > 1e-3


@pytest.mark.parametrize(("pooling", "pick"), [("cls", lambda row: row[0]), ("mean", lambda row: row.mean(axis=0))])
def test_other_poolings_leave_padding_out(pooling: str, pick: Any, tmp_path: Path) -> None:
    path = tiny_models.save(tmp_path, DECODERS["qwen3"], TOKENIZER)
    with load(path, pooling=pooling) as engine:
        expected = [pick(row) for row in states(path, rows_of(engine))]
        found = engine.embed(TEXTS, normalize=False).dense
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_cached(tmp_path: Path) -> None:
    path = tiny_models.save(tmp_path, DECODERS["llama"], TOKENIZER, use_cache=True)
    caches = []
    with load(path) as engine:
        engine.models["model"]._module.register_forward_hook(
            lambda _, __, output: caches.append(output.past_key_values)
        )
        engine.embed(TEXTS)
    assert set(caches) == {None}


def test_attention_in_both_directions_where_the_checkpoint_says_so(tmp_path: Path) -> None:
    path = tiny_models.save(tmp_path, DECODERS["qwen2"], TOKENIZER, is_causal=False)
    with load(path) as engine:
        rows = rows_of(engine)
        found = engine.embed(TEXTS, normalize=False).dense
    module = AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        # Nothing added to any score: everything sees everything.
        whole = [
            module(input_ids=torch.tensor([row]), attention_mask=torch.zeros(1, 1, len(row), len(row))) for row in rows
        ]
    np.testing.assert_allclose(found, [one.last_hidden_state[0, -1] for one in whole], atol=1e-5, rtol=1e-5)
    causal = [row[-1] for row in states(path, rows, is_causal=True)]
    assert np.abs(found - causal).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "stated", "message"),
    [
        ("qwen2_windows", {"is_causal": False}, "is_causal: false, and as qwen2 .* sliding window"),
        ("gemma2", {"is_causal": False, "sliding_window": None}, "is_causal: false, and as gemma2 .* is capped"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention.* it is gemma2"),
        ("qwen2", {"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}, r"AutoModel is modeling_qwen.Qwen2Model"),
    ],
)
def test_a_checkpoint_whose_attention_is_not_known_is_refused(
    name: str, stated: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tiny_models.save(tmp_path, DECODERS[name], TOKENIZER, **stated)
    with pytest.raises(CannotLoadModel, match=message):
        load(path)


def test_code_of_its_own_is_no_matter_once_the_checkpoint_says_who_sees_whom(tmp_path: Path) -> None:
    path = tiny_models.save(tmp_path, DECODERS["qwen2"], TOKENIZER)
    with load(path) as engine:
        plain = engine.embed(TEXTS).dense
    tiny_models.change(path / "config.json", auto_map={"AutoModel": "modeling_qwen.Qwen2Model"}, is_causal=True)
    with load(path) as engine:
        np.testing.assert_array_equal(engine.embed(TEXTS).dense, plain)


def without_end(path: Path) -> Path:
    """Its tokenizer.json adds a beginning and no end."""
    content = tiny_models.read(path / "tokenizer.json")
    template = content["post_processor"]
    template["single"] = template["single"][:-1]
    tiny_models.write(path / "tokenizer.json", content)
    return path


@pytest.mark.parametrize(
    ("stated", "is_added"),
    [
        ({}, False),
        ({"add_eos_token": True}, False),
        ({"add_eos_token": False, "tokenizer_class": "LlamaTokenizerFast"}, False),
        ({"add_eos_token": True, "tokenizer_class": "LlamaTokenizerFast"}, True),
        ({"add_eos_token": True, "auto_map": {"AutoTokenizer": [None, "tokenization_qwen.Fast"]}}, True),
    ],
)
def test_the_end_token_that_a_class_would_add_is_added(stated: dict[str, Any], is_added: bool, tmp_path: Path) -> None:
    path = tiny_models.save(tmp_path, DECODERS["mistral"], TOKENIZER)
    with load(path) as engine:
        whole = rows_of(engine)
    tiny_models.change(without_end(path) / "tokenizer_config.json", **stated)
    with load(path) as engine:
        assert rows_of(engine) == (whole if is_added else [row[:-1] for row in whole])
        model = engine.models["model"]
        (cut,) = model.encode_texts(["rain " * 40], EmbedOptions(max_length=10))
    assert len(cut.ids) == 10
    assert (cut.ids[-1] == whole[0][-1]) == is_added


def test_an_end_that_is_there_is_not_added_again(tmp_path: Path) -> None:
    path = tiny_models.save(tmp_path, DECODERS["mistral"], TOKENIZER)
    with load(path) as engine:
        whole = rows_of(engine)
    tiny_models.change(path / "tokenizer_config.json", add_eos_token=True, tokenizer_class="LlamaTokenizer")
    with load(path) as engine:
        assert rows_of(engine) == whole


def test_a_text_without_any_token_is_refused(tmp_path: Path) -> None:
    path = without_end(tiny_models.save(tmp_path, DECODERS["qwen2"], "flagllmmodel_qwen2_right_padding"))
    with load(path) as engine:
        assert engine.embed(["a ferry"]).dense.shape == (1, 32)
        with pytest.raises(InvalidInput, match="a text has no tokens"):
            engine.embed(["a ferry", ""])


def test_a_decoder_has_no_rows_by_token(tmp_path: Path) -> None:
    path = tiny_models.save(tmp_path, DECODERS["qwen2"], TOKENIZER)
    with load(path) as engine, pytest.raises(InvalidInput, match="no 'colbert' output; it has dense"):
        engine.embed(["a ferry"], outputs=["colbert"])
