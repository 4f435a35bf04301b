"""Every code block of the documentation: run, parsed, a tested file, or marked with the reason why not."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embedq import tasks
from embedq.core.settings import Settings, read_settings
from tests.bench.__main__ import COMMANDS
from tests.conftest import GOLDEN
from tests.doc_blocks import PAGES, Block, all_blocks, blocks_of, text_of
from tests.running import ROOT, require
from tests.said import run, run_within

#: Blocks that nothing runs, by page: another one is a decision.
NOT_RUN: dict[str, int] = {}

#: Languages of blocks that are no code.
PROSE = ("text",)

#: Programs of others that people are told to type.
PROGRAMS = {".venv/bin/pip", "cat", "cd", "celery", "cp", "docker", "export", "kubectl", "make", "pip", "printf"}
PROGRAMS |= {"eval", "ls", "python", "python3", "sed", "systemctl", "tar", "uvicorn"}

#: Blocks that tests of their own run -> the file of those tests.
NAMED = {
    "blob": "test_docs_programs.py",
    "failure blob": "test_docs_programs.py",
    "foreign": "test_docs_programs.py",
    "message": "test_docs_programs.py",
    "foreign chain": "test_docs_programs.py",
    "run": "test_docs_programs.py",
    "chains": "test_docs_chains.py",
    "datasets": "test_dataset_how_to.py",
    "chains: use": "test_docs_chains.py",
    "testing: conftest": "test_testing.py",
    "testing: fake": "test_testing.py",
    "testing: dimensions": "test_testing.py",
    "testing: models": "test_testing.py",
    "waiting: index": "test_docs_chains.py",
    "waiting: compare": "test_docs_chains.py",
}


def blocks(language: str) -> list[Block]:
    """Blocks of one language that no other test runs."""
    return [block for block in all_blocks() if block.language == language and not block.mark]


def pages_with(language: str) -> list[str]:
    return list(dict.fromkeys(block.page for block in blocks(language)))


@pytest.fixture
def stand_ins(server: str, minilm: Path) -> dict[str, str]:
    """What the pages name -> what stands for it in a test."""
    return {
        "/models/all-MiniLM-L6-v2": str(minilm),
        "/models/bge-m3": str(GOLDEN / "bge_m3" / "model"),
        "/models/bge-reranker-v2-m3": str(GOLDEN / "flagreranker_bert" / "model"),
        "redis://localhost:6379/0": server,
    }


def replaced(code: str, stand_ins: dict[str, str]) -> str:
    for said, there in stand_ins.items():
        code = code.replace(f'"{said}"', f'"{there}"')
    return code


def test_every_block_is_run_parsed_or_marked() -> None:
    known = ("python", "sh", "toml", "javascript", "go", *PROSE)
    assert [str(block) for block in all_blocks() if block.language not in known] == []
    counts: dict[str, int] = {}
    for block in all_blocks():
        if block.mark == "not run":
            counts[block.page] = counts.get(block.page, 0) + 1
    assert counts == NOT_RUN


def test_a_block_without_a_language_and_a_mark_are_found() -> None:
    text = "# Page\n\n<!-- not run: wants a cluster -->\n```sh\nrm -rf /\n```\n\n- item\n\n  ```\n  plain\n  ```\n"
    assert blocks_of("page.md", text) == [
        Block("page.md", 4, "sh", "rm -rf /\n", "not run", "wants a cluster"),
        Block("page.md", 10, "", "plain\n"),
    ]


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("page", pages_with("python"))
def test_python_of_a_page_runs(page: str, stand_ins: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, one after another, in one namespace and one event loop."""
    monkeypatch.setitem(sys.modules, "tasks", tasks)  # `import tasks` in the checkout
    namespace: dict[str, Any] = {"__name__": "page"}

    async def run() -> None:
        for block in blocks("python"):
            if block.page == page:
                await run_within("\n" * block.line + replaced(block.code, stand_ins), page, namespace)

    asyncio.run(run())


def test_a_comment_that_is_wrong_is_found() -> None:
    run("one = [1, 2]\nlen(one)  # 2: so many\nawait asyncio.sleep(0, 5)  # 5", "page", {"asyncio": asyncio})
    run("import numpy\nnumpy.zeros((2, 3))  # (2, 3) floats\nnumpy.arange(2)  # [0, 1]\nlen('a')  # one", "page", {})
    with pytest.raises(AssertionError, match="page:2 says 3, and it is 2"):
        run("one = [1, 2]\nlen(one)  # 3", "page", {})


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands_exist(block: Block) -> None:
    for words in commands_of(block.code):
        check_command(words)


def commands_of(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, first those in `$(…)`."""
    joined, inner = code.replace("\\\n", " "), r"\$\(([^)]*)\)"
    for line in [*re.findall(inner, joined), *re.sub(inner, "", joined).splitlines()]:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("();|&"):
                if words:
                    yield [
                        one for one, before in zip(words, ["", *words], strict=False) if not {one, before} & {"<", ">"}
                    ]
                words = []
            elif words or not re.fullmatch(r"\w+=.*", word):  # else a variable of the command that follows
                words.append(word)


def check_command(words: list[str]) -> None:
    """AssertionError names a program, a target, a module, an extra, a command or an option that is not there."""
    program, *rest = words
    if program == "embedq":
        check_embedq(rest)
        return
    assert program in PROGRAMS, words
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets, words  # the others are variables
    if program.startswith("python") and rest[:1] == ["-m"] and rest[1] not in ("venv", "http.server"):
        assert importlib.util.find_spec(rest[1]), words
        if rest[1] == "tests.bench" and rest[2:]:
            assert rest[2] in COMMANDS, words
    if program.endswith("pip"):
        extras = set(tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"])
        named = [one for word in rest for one in re.findall(r"\[([\w,]+)\]", word)]
        assert {extra for one in named for extra in one.split(",")} <= extras, words


def test_commands_within_sentences_exist() -> None:
    """Those of `embedq` are checked by `test_names.py`."""
    found = [words for path in PAGES for words in re.findall(r"`((?:make|python -m) [^`…]+)", prose_of(path))]
    assert len(found) > 20
    for words in found:
        check_command(shlex.split(words))


def prose_of(path: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def check_embedq(words: list[str]) -> None:
    """A command line of `embedq`, held against its own parser: names of commands, names of options, how many arguments."""
    import click

    from embedq.__main__ import embedq

    command: click.Command = embedq
    context = click.Context(command, info_name="embedq")
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        assert found, f"embedq {' '.join(words)}"
        command, rest = found, rest[1:]
        context = click.Context(command, info_name=command.name, parent=context)
    if rest != ["--version"]:
        command.make_parser(context).parse_args(rest)


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_settings_files_are_accepted(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tomllib.loads(block.code)
    assert set(table.get("wire", {})) <= set(tasks.config.WIRE)
    assert set(table) <= set(Settings.model_fields)
    table.setdefault("models", {})  # a block may be of other settings alone
    (tmp_path / "embedq.toml").write_text(block.code)
    monkeypatch.setenv("EMBEDQ_CONFIG", str(tmp_path / "embedq.toml"))
    assert set(read_settings().models) == set(table["models"])


def test_links_of_files_outside_the_site_lead_somewhere() -> None:
    """Those within the site are checked by its strict build."""
    broken = []
    for path in PAGES:
        text = prose_of(path)
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
            there = (path.parent / target).resolve() if target else path
            if not there.is_relative_to(ROOT) or not there.exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
            elif anchor and anchor not in anchors(there):
                broken.append(f"{path.relative_to(ROOT)}: {target}#{anchor}")
    assert broken == []


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as the site has them."""
    from markdown.extensions.toc import slugify, unique

    text = prose_of(path)
    ids: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        unique(slugify(re.sub(r"[`*]", "", heading), "-"), ids)
    return ids


def test_the_readme_fits_on_some_screens() -> None:
    assert len(text_of("README.md").splitlines()) <= 150


def test_every_error_has_a_row() -> None:
    from embedq.core import errors

    classes = [one for one in vars(errors).values() if inspect.isclass(one) and issubclass(one, Exception)]
    bases = {base for one in classes for base in one.__bases__}  # of those here: a worker has subclasses of its own
    leaves = {one.__name__ for one in classes if one not in bases}
    rows = set(re.findall(r"^\| `(\w+)` \|", text_of("docs/reference/errors.md"), re.MULTILINE))
    assert leaves == rows - {"EmbedqError", "ProducerError", "OperatorError", "WorkerError"}


def test_every_named_block_has_a_test() -> None:
    assert {block.said for block in all_blocks() if block.mark == "test"} == set(NAMED)
    for name, file in NAMED.items():
        assert f'"{name}")' in text_of(f"tests/{file}")


def test_javascript_can_be_read(tmp_path: Path) -> None:
    require(shutil.which("node") is not None, "node is not there")
    for block in all_blocks():
        if block.language == "javascript":
            (tmp_path / "block.js").write_text(block.code)
            subprocess.run(["node", "--check", str(tmp_path / "block.js")], check=True)
