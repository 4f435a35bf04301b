"""Where a checkpoint is looked for, and what is said if it is not there."""

from __future__ import annotations

import pytest

from embedq.core.checkpoint.files import find
from embedq.core.errors import CannotLoadModel


@pytest.mark.parametrize("path", ["/no/such/directory", "./none", "~/no/such", "none", "a/b/c", ""])
def test_a_path_that_is_no_directory_is_refused_without_asking_a_hub(path: str) -> None:
    with pytest.raises(CannotLoadModel, match="no model directory"):
        find(path)


def test_a_file_is_no_model_directory() -> None:
    with pytest.raises(CannotLoadModel, match="no model directory"):
        find(__file__)


def test_a_hub_name_that_cannot_be_fetched_is_refused() -> None:
    with pytest.raises(CannotLoadModel, match="'owner/name' is no local directory and cannot be fetched"):
        find("owner/name")  # the tests run with the hub switched off
