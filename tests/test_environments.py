"""Finding the machine's interpreters, and reading what broke; making the environments takes minutes and is no test."""

from __future__ import annotations

import sys
from pathlib import Path

from tests import environments


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_first_cpython_of_each_version_is_found_and_nothing_else(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    program(first / "python3.12", "echo PyPy.3.12")
    program(first / "python3.13", "exit 127")  # a shim of a version that is not chosen
    program(first / "python3.14", "echo CPython.3.13")
    program(first / "python3.10", "echo CPython.3.10")
    program(second / "python3.12", "echo CPython.3.12")
    program(second / "python3.13", "echo CPython.3.13")
    program(tmp_path / "third" / "python3.13", "echo CPython.3.13")
    found = environments.interpreters([tmp_path / "none", first, second, tmp_path / "third"])
    assert found == {"3.12": second / "python3.12", "3.13": second / "python3.13"}


def test_the_interpreter_of_this_run_is_found() -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert version in environments.interpreters(environments._folders())


def test_what_failed_is_named(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="one"/>'
        '<testcase classname="tests.test_a" name="two"><failure message="x"/></testcase>'
        '<testcase classname="tests.test_b" name="three"><error message="x"/></testcase></testsuite></testsuites>'
    )
    assert environments.failures(report) == ["tests.test_a::two", "tests.test_b::three"]


def test_pins_are_read_for_all_that_newest_replaces() -> None:
    pins = environments.pins("torch")
    assert set(environments.NEWEST) | {"torch"} <= set(pins)


def test_a_command_that_is_none_is_explained() -> None:
    assert environments.main(["something"]) == 2
