"""The page "Embed ten million rows", as a new user follows it, on fewer rows and a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from embedq.__main__ import main
from tests.chaos.fleet import Fleet
from tests.chaos.light_worker import ALIAS
from tests.dataset_files import table_of
from tests.doc_blocks import code_of, text_of
from tests.light_fleets import light_fleet

PAGE = "docs/how-to/datasets.md"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module", autouse=True)
def fleet(server: str, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with light_fleet(server, tmp_path_factory.mktemp("fleet"), 1, EMBEDQ_DATA_ROOTS=str(root)) as fleet:
        yield fleet


@pytest.fixture
def corpus(root: Path, request: pytest.FixtureRequest) -> Path:
    """The folder that the page calls s3://corpus."""
    made = root / request.node.name
    (made / "docs").mkdir(parents=True)
    pq.write_table(table_of(500), made / "docs" / "rows.parquet")
    return made


def as_here(said: str, corpus: Path) -> str:
    return said.replace("s3://corpus", str(corpus)).replace("bge-m3", ALIAS)


def test_the_pages_python_runs(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(as_here(code_of(PAGE, "datasets"), corpus), {})
    assert re.search(r"^completed [\d.]+$", capsys.readouterr().out, re.MULTILINE)


def test_the_pages_commands_run_from_start_to_verified(corpus: Path) -> None:
    lines = [
        as_here(line.partition("#")[0], corpus)
        for line in text_of(PAGE).splitlines()
        if line.startswith("embedq dataset")
    ]
    (start,) = (line for line in lines if " embed " in line)
    assert main([*start.split()[1:], "--wait"]) == 0
    others = [line for line in lines if re.search(r" (status|watch) ", line)]
    assert len(others) == 2
    assert [main(line.split()[1:]) for line in others] == [0, 0]
    for command in re.findall(r"`embedq dataset (cancel|retry-failed|verify|resume) TARGET`", text_of(PAGE)):
        assert main(["dataset", command, str(corpus / "vectors")]) == 0
