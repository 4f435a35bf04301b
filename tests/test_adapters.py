"""A LoRA adapter is merged into its base, beside it or apart from it, whether or not the package peft is installed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.checkpoint.revision import with_revision
from embedq.core.errors import CannotLoadModel
from embedq.core.settings import ModelSettings
from tests import oracle, saved_forms
from tests.lora import ALPHA, RANK, adapter
from tests.tiny_models import read, write


def merged(path: Path, added: dict[str, Any], scale: float) -> Path:
    """A copy of the directory whose weights hold the adapter already."""
    target = shutil.copytree(path, path.parent / "merged", ignore=shutil.ignore_patterns("adapter_*"))
    weights = load_file(target / "model.safetensors")
    weights |= {f"{name}.weight": weights[f"{name}.weight"] + scale * one for name, one in added.items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def vectors(path: Path) -> np.ndarray:
    return oracle.of_ours(path)[0]["plain"]


@pytest.fixture
def embedder(tmp_path: Path) -> Path:
    return saved_forms.save("bert dense normalize", tmp_path / "model")


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, ALPHA / RANK), (True, ALPHA / RANK**0.5)])
def test_an_adapter_beside_its_base_is_merged(embedder: Path, use_rslora: bool, scale: float) -> None:
    before = vectors(embedder)
    added = adapter(embedder, use_rslora=use_rslora)
    expected = vectors(merged(embedder, added, scale))
    found = vectors(embedder)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - before).max() > 0.01
    assert {file.name for file in embedder.iterdir()} >= {"adapter_config.json", "model.safetensors"}  # left as it was


def test_an_adapter_apart_from_its_base_takes_the_bases_weights_and_its_own_modules(
    embedder: Path, tmp_path: Path
) -> None:
    apart = shutil.copytree(embedder, tmp_path / "apart")
    (apart / "model.safetensors").unlink()
    (apart / "config.json").unlink()
    shutil.rmtree(apart / "2_Dense")
    write(apart / "modules.json", [one for one in read(apart / "modules.json") if not one["path"].startswith("2_")])
    (embedder / "tokenizer.json").unlink()  # its own is taken
    added = adapter(apart, base_model_name_or_path=str(embedder))
    found = vectors(apart)
    shutil.copy(apart / "tokenizer.json", embedder)
    shutil.copy(apart / "modules.json", embedder)
    np.testing.assert_allclose(found, vectors(merged(embedder, added, ALPHA / RANK)), atol=1e-6)


def revision(path: Path) -> str:
    return with_revision(read_spec("m", ModelSettings(path=str(path)))).revision


def test_an_adapter_and_its_base_are_part_of_the_revision_wherever_they_lie(embedder: Path, tmp_path: Path) -> None:
    apart = shutil.copytree(embedder, tmp_path / "apart")
    (apart / "model.safetensors").unlink()
    adapter(apart, base_model_name_or_path=str(embedder))
    found = [revision(apart)]
    adapter(apart, base_model_name_or_path=str(embedder), use_rslora=True)
    found.append(revision(apart))
    write(embedder / "tokenizer_config.json", {"model_max_length": 9})
    found.append(revision(apart))
    assert len(set(found)) == 3
    assert revision(embedder) not in found


def test_an_adapter_without_a_rank_is_refused(embedder: Path) -> None:
    adapter(embedder, r=0)
    with pytest.raises(CannotLoadModel, match="has r 0; it must be 1 or more"):
        vectors(embedder)


def test_names_from_under_a_head_are_found(embedder: Path) -> None:
    added = adapter(embedder, prefix="base_model.model.bert.")
    np.testing.assert_allclose(vectors(embedder), vectors(merged(embedder, added, ALPHA / RANK)), atol=1e-6)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["classifier"]}, "modules_to_save"),
        ({"rank_pattern": {"query": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"query": 8}}, "alpha_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused_by_name(
    embedder: Path, stated: dict[str, Any], said: str
) -> None:
    adapter(embedder, **stated)
    with pytest.raises(CannotLoadModel, match=said) as caught:
        vectors(embedder)
    assert "merge_and_unload" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["encoder.layer.7.attention.self.query"], "has no such weight"),
        (["encoder.layer.0.intermediate.dense"], "of that shape"),
        ([], "lacks a matrix"),
    ],
    ids=["another layer", "another shape", "nothing"],
)
def test_an_adapter_of_another_base_is_refused(embedder: Path, names: list[str], said: str) -> None:
    adapter(embedder, names)
    with pytest.raises(CannotLoadModel, match=said):
        vectors(embedder)


def test_a_pickled_adapter_is_refused(embedder: Path) -> None:
    adapter(embedder)
    (embedder / "adapter_model.safetensors").rename(embedder / "adapter_model.bin")
    with pytest.raises(CannotLoadModel, match="a pickled adapter is never read"):
        vectors(embedder)
