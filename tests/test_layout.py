"""The rules that hold the parts apart, read off the source; and what importing `tasks` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Packages and modules that make up the project.
OURS = ("core", "tasks", "workers", "deploy", "tests", "celeryconfig")

FILES = sorted(path for name in OURS for path in [*(ROOT / name).rglob("*.py"), ROOT / f"{name}.py"] if path.is_file())

#: Words that say nothing about what a file is for.
EMPTY_NAMES = frozenset(
    {"utils", "util", "helpers", "helper", "common", "base", "misc", "manager", "handler", "service"}
)

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60

#: Seconds that `import tasks` may take, the best of a few tries on a busy machine.
MAX_IMPORT_S = 0.5

HEAVY = ("torch", "transformers", "tokenizers", "pydantic", "huggingface_hub", "safetensors")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, with_type_checking: bool = True) -> set[str]:
    """Dotted names of everything a file imports, wherever in it the import stands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {name for node in _nodes(tree, with_type_checking) for name in _names(node)}


def _nodes(tree: ast.AST, with_type_checking: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not with_type_checking:
            continue
        yield node
        yield from _nodes(node, with_type_checking)


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        assert node.level == 0, "imports are written in full"
        # `from core import vectors` imports the module core.vectors, not just core.
        return [
            f"{node.module}.{alias.name}" if _is_module(f"{node.module}.{alias.name}") else node.module
            for alias in node.names
        ]
    return []


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def files_of(name: str) -> list[Path]:
    return [path for path in FILES if path.relative_to(ROOT).parts[0].removesuffix(".py") == name]


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] in OURS}


def breaches(package: str, allowed: tuple[str, ...], with_type_checking: bool = True) -> list[str]:
    """Imports of our own modules by `package` that are not `allowed`, nor inside it."""
    return [
        f"{module_name(path)} imports {name}"
        for path in files_of(package)
        for name in sorted(ours(imported(path, with_type_checking)))
        if not any(name == one or name.startswith(f"{one}.") for one in (package, *allowed))
    ]


def test_the_files_under_test_are_found() -> None:
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES} == set(OURS)


def test_core_imports_core_alone() -> None:
    assert breaches("core", ()) == []


@pytest.mark.parametrize("foreign", ["celery", "kombu", "redis", "amqp", "flower"])
def test_core_knows_no_queue(foreign: str) -> None:
    users = [
        module_name(path) for path in files_of("core") if foreign in {name.partition(".")[0] for name in imported(path)}
    ]
    assert users == []


def test_tasks_import_only_what_a_producer_has() -> None:
    allowed = ("core.errors", "core.codec", "core.checks", "core.results", "celeryconfig")
    assert breaches("tasks", allowed, with_type_checking=False) == []


def test_celeryconfig_imports_only_the_codec_and_the_errors() -> None:
    assert breaches("celeryconfig", ("core.errors", "core.codec")) == []


def test_workers_import_tasks_and_core() -> None:
    assert breaches("workers", ("tasks", "core", "celeryconfig")) == []


def test_nobody_imports_workers_but_deploy_and_the_tests() -> None:
    users = {module_name(path) for path in FILES if any(name.partition(".")[0] == "workers" for name in imported(path))}
    assert {name.partition(".")[0] for name in users} <= {"workers", "deploy", "tests"}


def test_nobody_imports_the_tests() -> None:
    users = {module_name(path) for path in FILES if any(name.partition(".")[0] == "tests" for name in imported(path))}
    assert {name.partition(".")[0] for name in users} <= {"tests"}


def offenders(offends: Callable[[Path, ast.Module], bool], but_not: tuple[str, ...] = ()) -> list[str]:
    """Names of the files that offend a rule, outside the packages in `but_not`."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    return [
        module_name(path)
        for path, tree in trees.items()
        if path.relative_to(ROOT).parts[0] not in but_not and offends(path, tree)
    ]


def test_nothing_that_runs_in_production_can_unpickle() -> None:
    pickles = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

    def loads_freely(path: Path, tree: ast.Module) -> bool:
        if not pickles.isdisjoint(name.partition(".")[0] for name in imported(path)):
            return True
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        loads = [call for call in calls if ast.unparse(call.func) in ("torch.load", "np.load", "numpy.load")]
        return any("weights_only=True" not in ast.unparse(call) for call in loads)

    assert offenders(loads_freely, but_not=("tests",)) == []


def test_every_file_can_be_read_in_one_go() -> None:
    assert offenders(lambda path, tree: len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES) == []


def test_every_function_can_be_read_in_one_go() -> None:
    def is_long(node: ast.AST) -> bool:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return False
        return (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES

    assert offenders(lambda path, tree: any(map(is_long, ast.walk(tree)))) == []


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert offenders(lambda path, tree: not EMPTY_NAMES.isdisjoint(path.stem.removeprefix("test_").split("_"))) == []


def test_every_file_says_what_it_is_for() -> None:
    assert offenders(lambda path, tree: bool(tree.body) and not ast.get_docstring(tree)) == []


def fresh(code: str) -> str:
    """What `code` prints in a new interpreter."""
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_importing_tasks_is_quick_and_loads_no_model_library() -> None:
    code = f"""
import sys, time
begun_s = time.process_time()  # what a neighbour on the machine takes does not count
import tasks
print(time.process_time() - begun_s, *sorted(set(sys.modules).intersection({HEAVY})))
"""
    tries = [fresh(code).split() for _ in range(3)]
    assert [loaded for _, *loaded in tries] == [[], [], []]
    assert min(float(took_s) for took_s, *_ in tries) < MAX_IMPORT_S


def test_tasks_stay_tasks_after_every_module_of_their_package_is_imported() -> None:
    code = """
import importlib, pkgutil, tasks
from celery import Celery, Task
names = [one.name for one in pkgutil.iter_modules(tasks.__path__)]
for name in names:
    importlib.import_module(f"tasks.{name}")
assert isinstance(tasks.embed, Task) and isinstance(tasks.rerank, Task) and isinstance(tasks.app, Celery)
assert names and not {"embed", "rerank", "app"} & set(names)
print("still tasks")
"""
    assert fresh(code) == "still tasks"


def test_importing_core_loads_nothing_heavy() -> None:
    assert fresh(f"import sys, core; print(*set(sys.modules).intersection({HEAVY}))") == ""
