"""Turning a pickled checkpoint into safetensors, once."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from embedq.core.convert import convert
from embedq.core.errors import CannotLoadModel
from tests.running import ROOT


def test_the_weights_are_the_same_afterwards(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": shared, "b": shared.T, "tied": shared}, tmp_path / "pytorch_model.bin")
    command = [sys.executable, "-m", "embedq.core.convert", str(tmp_path)]
    assert subprocess.check_output(command, text=True, cwd=ROOT).strip() == str(tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded, {"a": shared, "b": shared.T, "tied": shared})


def test_a_file_of_the_first_versions_of_torch_is_converted(tmp_path: Path) -> None:
    weights = {"a": torch.arange(6.0)}
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(load_file(convert(tmp_path)), weights)


def test_a_pickle_without_names_is_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CannotLoadModel, match="holds list, not weights by name"):
        convert(tmp_path)


class Attack:
    """A hostile pickle: creates a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.target,))


def test_a_pickle_that_is_more_than_weights_is_refused_and_not_run(tmp_path: Path) -> None:
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"a": Attack(tmp_path / "created")}, file)
    with pytest.raises(CannotLoadModel, match="not a plain file of weights"):
        convert(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_nothing_to_convert_or_already_converted_is_said(tmp_path: Path) -> None:
    with pytest.raises(CannotLoadModel, match=r"has no pytorch_model\.bin"):
        convert(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CannotLoadModel, match="exists already"):
        convert(tmp_path)
