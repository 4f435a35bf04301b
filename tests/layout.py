"""`python -m tests.layout`: the structure, read off the imports: rooms, floors and arrows of each folder, and a job's path.

A room is a file or a folder as a listing shows it. An arrow is "something in this room imports something in that
one"; a floor is a step in the longest chain of arrows. `tests/test_layout.py` holds the rules of who may import whom.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: Packages and modules that make up the project.
OURS = ("core", "tasks", "testing", "workers", "deploy", "tests", "celeryconfig", "__main__")

FILES = sorted(path for name in OURS for path in [*(ROOT / name).rglob("*.py"), ROOT / f"{name}.py"] if path.is_file())

#: The files that one dense embed passes through, in order. Each must exist (`tests/test_layout.py`).
MAIN_PATH = (
    "tasks/calls.py",
    "tasks/engine_task.py",
    "core/options.py",
    "tasks/sending.py",
    "core/codec.py",
    "celeryconfig.py",
    "workers/worker.py",
    "workers/broker/transport.py",
    "workers/broker/fetch.py",
    "workers/broker/leases.py",
    "workers/broker/transport.lua",
    "workers/broker/in_flight.py",
    "workers/jobs/request.py",
    "workers/jobs/message_schema.py",
    "workers/jobs/pool.py",
    "workers/jobs/held_job.py",
    "core/engine.py",
    "core/calls.py",
    "core/batching/job.py",
    "core/batching/encode_threads.py",
    "core/tokenizer.py",
    "core/batching/backlog.py",
    "core/batching/scheduler.py",
    "core/batching/device_loop.py",
    "core/models/encoders/encoder.py",
    "core/models/encoders/network.py",
    "core/models/encoders/packed.py",
    "core/models/pooling.py",
    "core/batching/completion_thread.py",
    "core/vectors.py",
    "core/results.py",
    "workers/jobs/answer_thread.py",
    "workers/jobs/result_backend.py",
    "workers/jobs/result_writer.py",
)


def production_source() -> str:
    """Everything that reads settings and writes keys: `core`, `tasks`, `workers` and celeryconfig.py, Lua included."""
    files = [path for name in ("core", "tasks", "workers") for path in sorted((ROOT / name).rglob("*"))]
    wanted = [path for path in files if path.suffix in (".py", ".lua")]
    return "\n".join(path.read_text(encoding="utf-8") for path in [*wanted, ROOT / "celeryconfig.py"])


def module_name(path: Path) -> str:
    """The dotted name a file is imported by: `embedq.core.vectors`, `tests.layout`."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name == "tests" or name.startswith("tests.") else f"embedq.{name}"


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path, with_type_checking: bool = True) -> set[str]:
    """Dotted names of everything a file imports, wherever in it the import stands."""
    return {name for node in _nodes(parsed(path), with_type_checking) for name in _names(node)}


def ours(names: set[str]) -> set[str]:
    """Those of `names` that are modules of the project. Not `embedq` itself, which holds the version and no code."""
    return {name for name in names if name.partition(".")[0] in ("embedq", "tests")} - {"embedq"}


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
        # `from embedq.core import vectors` imports the module embedq.core.vectors, not just embedq.core.
        return [
            f"{node.module}.{alias.name}" if _is_module(f"{node.module}.{alias.name}") else node.module
            for alias in node.names
        ]
    return []


@cache
def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.removeprefix("embedq.").split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def arrows(folder: str) -> dict[str, set[str]]:
    """The rooms of a folder (`workers`, `workers/jobs`), and for each the other rooms there that it imports."""
    place = ROOT / folder
    inside = [path for path in FILES if path.is_relative_to(place)]
    prefix = module_name(place / "__init__.py") + "."
    found: dict[str, set[str]] = {}
    for path in inside:
        room = _room(module_name(path).removeprefix(prefix)) if path != place / "__init__.py" else "__init__"
        targets = {_room(name.removeprefix(prefix)) for name in imported(path) if name.startswith(prefix)}
        found.setdefault(room, set()).update(targets)
    return {room: targets - {room} for room, targets in found.items()}


def _room(name: str) -> str:
    return name.partition(".")[0]


def floors(graph: dict[str, set[str]]) -> int:
    """Rooms on the longest chain of arrows. ValueError names the rooms of a circle."""
    heights: dict[str, int] = {}

    def height(room: str, above: tuple[str, ...]) -> int:
        if room in above:
            raise ValueError(" imports ".join((*above[above.index(room) :], room)))
        if room not in heights:
            heights[room] = 1 + max((height(one, (*above, room)) for one in graph.get(room, ())), default=0)
        return heights[room]

    return max((height(room, ()) for room in graph), default=0)


def folders() -> list[str]:
    """Every folder of the installed code, outermost first."""
    found = {path.parent.relative_to(ROOT).as_posix() for path in FILES if not path.is_relative_to(ROOT / "tests")}
    return sorted(found - {"."})


def main() -> int:
    """Print the table and the path."""
    print(f"{'folder':<26}{'rooms':>6}{'floors':>8}{'arrows':>8}{'files':>7}{'lines':>7}")
    for folder in folders():
        graph = arrows(folder)
        rooms = len(graph.keys() - {"__init__"})
        inside = [path for path in FILES if path.is_relative_to(ROOT / folder)]
        num_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in inside)
        num_arrows = sum(map(len, graph.values()))
        print(f"{folder:<26}{rooms:>6}{floors(graph):>8}{num_arrows:>8}{len(inside):>7}{num_lines:>7}")
    print(f"\none dense embed passes through {len(MAIN_PATH)} files:")
    for path in MAIN_PATH:
        print(f"  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
