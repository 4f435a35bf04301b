"""Pages that are read off the code are what the code says now, and a field, a key or a file without a description is an error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import generate
from embedq import celeryconfig
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.settings import ModelSettings, Settings
from tests.layout import FILES, ROOT, production_source

SOURCE = production_source()

PAGES = generate.pages()


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_is_what_the_code_says(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == PAGES[page], "run `make docs`"


def test_every_setting_is_on_its_page() -> None:
    page = generate.settings()
    names = [*celeryconfig.WIRE, *(name for name in Settings.model_fields if name != "wire")]
    assert [name for name in names if f"| `EMBEDQ_{name.upper()}` |" not in page] == []
    assert [name for name in ModelSettings.model_fields if f"| `{name}` |" not in page] == []


def test_every_variable_that_the_code_reads_is_on_the_page() -> None:
    named = set(re.findall(r"\"(EMBEDQ_[A-Z_]+)\"", SOURCE)) - {"EMBEDQ_"}
    assert named <= set(re.findall(r"`(EMBEDQ_[A-Z_]+)`", generate.settings()))


def test_every_option_is_on_its_page() -> None:
    embed, rerank = generate.options().split("## tasks.rerank")
    for part, kind in ((embed, EmbedOptions), (rerank, RerankOptions)):
        rows = set(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE))
        assert set(kind.__dataclass_fields__) <= rows


def test_every_key_is_on_its_page() -> None:
    keys = set(re.findall(r"\bembedq:[a-z_]+", SOURCE))
    assert len(keys) > 4
    assert keys == set(re.findall(r"^\| `(embedq:[a-z_]+)", generate.redis_keys(), re.MULTILINE))


def test_every_file_is_on_the_map() -> None:
    page = generate.code_map()
    parts = [path for path in FILES if path.relative_to(ROOT).parts[0] in generate.PARTS]
    missing = [path for path in parts if path.read_text(encoding="utf-8").strip() and f"| `{path.name}` |" not in page]
    assert missing == []


def test_a_field_without_a_description_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "given.py").write_text(
        "class Given:\n    #: Two\n    #: lines.\n    one: int = 1\n    other: int = 2\n"
    )
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"given.py: Given.other has no #: line above it"):
        generate.descriptions("given.py", "Given")
    (tmp_path / "whole.py").write_text("class Given:\n    #: Two\n    #: lines.\n    one: int = 1\n")
    assert generate.descriptions("whole.py", "Given") == {"one": "Two lines."}


def test_keys_are_read_with_all_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = '"""Of a file.\n\n    embedq:one    hash   name -> a value\n                         of two lines\n\n    Not of it.\n"""\n'
    (tmp_path / "keys.py").write_text(head)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    assert generate.keys_at_head("keys.py") == [("embedq:one", "hash", "name -> a value of two lines")]
    (tmp_path / "none.py").write_text('"""Of a file."""\n')
    with pytest.raises(ValueError, match=r"none.py lists no keys at its head"):
        generate.keys_at_head("none.py")


def test_a_file_that_a_page_shows_is_brought_up_to_date() -> None:
    old = "before\n\n<!-- file: tests/__init__.py -->\n```python\nold\n```\n\nafter\n"
    path = next(path for path in FILES if path.name == "own_server.py")
    shown = old.replace("tests/__init__.py", path.relative_to(ROOT).as_posix())
    assert generate.with_files(shown) == shown.replace("old\n```", path.read_text(encoding="utf-8") + "```")
