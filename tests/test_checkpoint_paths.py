"""A checkpoint's own files name only files of the checkpoint: whoever wrote them does not choose what a worker reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.errors import CannotLoadModel
from embedq.core.models.safetensors_files import weight_files
from embedq.core.settings import ModelSettings
from tests.checkpoints import as_sentence_transformer, save_encoder, write_json


@pytest.mark.parametrize("place", ["../outside", "1_Pooling/../../outside", "{outside}"])
@pytest.mark.parametrize("module", ["Transformer", "Pooling", "Dense"])
def test_a_module_outside_the_checkpoints_directory_is_refused(tmp_path: Path, module: str, place: str) -> None:
    """Its files there are complete: it is refused for its place alone."""
    outside = as_sentence_transformer(save_encoder(tmp_path / "outside"))
    names = ["Transformer", "Pooling", "Dense", "Normalize"]
    dense = {"in_features": 32, "out_features": 8, "bias": False}
    write_json(outside / "config.json", {**dense, "pooling_mode_mean_tokens": True})
    directory = as_sentence_transformer(save_encoder(tmp_path / "model"), modules=names)
    own = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": "3_Normalize"}
    (directory / "2_Dense").mkdir(exist_ok=True)
    write_json(directory / "2_Dense" / "config.json", dense)
    places = own | {module: place.format(outside=outside)}
    modules = [
        {"idx": index, "name": str(index), "path": places[name], "type": f"sentence_transformers.models.{name}"}
        for index, name in enumerate(names)
    ]
    write_json(directory / "modules.json", modules)
    with pytest.raises(CannotLoadModel, match="names files outside its own directory"):
        read_spec("m", ModelSettings(path=str(directory)))


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "part/model.safetensors"])
def test_weights_outside_the_checkpoints_directory_are_refused(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"weight": name}})
    with pytest.raises(CannotLoadModel, match="names files outside its own directory"):
        weight_files(tmp_path)
