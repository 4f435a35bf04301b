"""embedq as users have it: a real wheel, installed into an environment of its own that does not know the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

from tests.running import ROOT, Running

#: Of the checkout, what is no source: also what a build leaves behind, from which setuptools would build again.
_NO_SOURCE = (".*", "__pycache__", "build", "dist", "*.egg-info", "node_modules", "site")

#: Python's interface of a package's build, as pip calls it, but in this environment: nothing is downloaded.
_BUILD = "import sys, setuptools.build_meta as build; print(getattr(build, sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, directory: Path) -> Path:
    """Build a "wheel" or "sdist" of a source tree, which the build writes into; returns the file."""
    command = [sys.executable, "-c", _BUILD, f"build_{kind}", str(directory)]
    return directory / run(command, source).splitlines()[-1]


def copy_of_checkout(directory: Path) -> Path:
    """The sources of the checkout, without what git does not keep."""
    return Path(copytree(ROOT, directory, ignore=ignore_patterns(*_NO_SOURCE)))


def run(command: Sequence[str], directory: Path, **environment: str) -> str:
    """A command's standard output; AssertionError with all it printed if it fails."""
    variables = {**os.environ, "PYTHONPATH": "", **environment}
    done = subprocess.run(
        command, cwd=directory, env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Installed:
    """An environment with the wheel and, borrowed from the one the tests run in, the packages of others."""

    def __init__(self, wheel: Path, directory: Path) -> None:
        venv.create(directory, symlinks=True)
        self.python = str(directory / "bin" / "python")
        (self.site_packages,) = (directory / "lib").glob("python*/site-packages")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python]
        run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], directory)
        self.names = {path.name for path in self.site_packages.iterdir()}
        # By their folders: the lines that make an installation of the checkout editable there are not read.
        borrowed = [path for path in sys.path if Path(path).name == "site-packages"]
        (self.site_packages / "borrowed.pth").write_text("\n".join(borrowed))

    def run(self, directory: Path, *arguments: str, **environment: str) -> str:
        """The output of `python …` in `directory`."""
        return run([self.python, *arguments], directory, **environment)

    def start(self, directory: Path, *arguments: str, **environment: str) -> Running:
        """`python …` as a process that goes on."""
        return Running([self.python, *arguments], {"PYTHONPATH": "", **environment}, directory)

    def says(self, directory: Path, expression: str, **environment: str) -> Any:
        """The value of an expression that knows `tasks`, as its repr."""
        return self.run(directory, "-c", f"from embedq import tasks; print({expression})", **environment).strip()
