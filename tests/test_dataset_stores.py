"""Objects of a target on a file system, whole or not at all; and what workers may open."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedq.core.errors import InvalidInput, StoreFailed
from embedq.tasks.datasets.roots import Roots
from embedq.tasks.datasets.stores import TEMPORARY, Store, locate
from tests.dataset_files import create_at_once


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(locate(str(tmp_path / "target")))


def left(store: Store) -> list[str]:
    return sorted(path.name for path in Path(store.path(TEMPORARY)).glob("*"))


def test_an_object_is_created_once_and_replaced_whole(store: Store) -> None:
    assert store.create("a/part", lambda file: file.write(b"first"))
    assert not store.create("a/part", lambda file: file.write(b"second"))
    assert store.read("a/part") == b"first"
    store.replace("a/part", lambda file: file.write(b"third"))
    assert store.read("a/part") == b"third"
    assert (left(store), list(store.entries("a"))) == ([], ["a/part"])
    store.remove("a/part")
    store.remove("a/part")
    assert (store.read("a/part"), store.entry("a/part"), store.entries("none")) == (None, None, {})


def test_of_many_that_create_an_object_one_does(store: Store) -> None:
    won = create_at_once([store] * 8, "part")
    assert len(won) == 1
    assert store.read("part") == b"%d" % won[0]
    assert left(store) == []


def test_a_write_that_fails_leaves_nothing(store: Store) -> None:
    def break_off(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.create("part", break_off)
    assert (left(store), store.entries()) == ([], {})


def test_what_a_killed_worker_left_is_removed_by_whoever_writes_or_finds_the_object(store: Store) -> None:
    for number in (1, 2):
        folder = Path(store.path(TEMPORARY))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"part-{number}.99.abcd").write_bytes(b"half")
    assert len(store.leftovers(0.0)) == 2
    store.create("part-1", lambda file: file.write(b"whole"))
    assert left(store) == ["part-2.99.abcd"]
    store.tidy("part-2")
    assert left(store) == []


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of a megabyte; skips where none may be mounted."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    ).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        if options:
            subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", ""):
        store = Store(locate(str(tmp_path / "small" / "target")))
        with pytest.raises(StoreFailed, match=r"target/part cannot be written: No space left on device"):
            store.create("part", lambda file: file.write(b"x" * 2_000_000))
        assert (left(store), store.entries()) == ([], {})
        assert store.create("part", lambda file: file.write(b"x" * 500_000))


def test_a_read_only_target_is_a_clear_error(tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "ro"):
        store = Store(locate(str(tmp_path / "fixed" / "target")))
        with pytest.raises(StoreFailed, match=r"cannot be written: Read-only file system"):
            store.check()


def test_a_path_below_a_root_is_opened_and_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "database").mkdir()
    (tmp_path / "data" / "out").symlink_to(tmp_path / "database")
    (tmp_path / "alias").symlink_to(tmp_path / "data")
    roots = Roots((str(tmp_path / "alias"), "s3://corpus/docs"))
    for fine in (tmp_path / "data", tmp_path / "data" / "new" / "file", tmp_path / "database" / ".." / "data" / "x"):
        assert roots.check(str(fine)).path.startswith(str(tmp_path / "data"))
    assert str(roots.check("s3://corpus/docs/a")) == "s3://corpus/docs/a"
    outside = [
        tmp_path / "database" / "x", tmp_path / "data" / ".." / "x", tmp_path / "data" / "out" / "x", "/etc/passwd",
        f"file://{tmp_path}/x", "s3://corpus/docs2/a", "s3://corpus", "gs://corpus/docs/a", "http://corpus/docs/a",
    ]  # fmt: skip
    for path in outside:
        with pytest.raises(InvalidInput, match=r"this worker does not open .*EMBEDQ_DATA_ROOTS"):
            roots.check(str(path))


def test_without_roots_nothing_is_opened_and_the_refusal_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"EMBEDQ_DATA_ROOTS names .*\(there is none\)"):
        Roots(()).check(str(tmp_path))


@pytest.mark.parametrize(
    "url",
    [
        "filecache::file:///data/x", "simplecache::s3://corpus/docs/x", "s3://corpus/docs/../other", "s3://corpus//x",
        "s3://key:secret@corpus/docs/x", "s3://user:pass@corpus/x", "s3://corpus/./x", "s3://corpus/../etc", "s3://", "",
        "a\0b",
    ],
)  # fmt: skip
def test_urls_that_lead_elsewhere_than_they_say_are_refused_whatever_the_roots(url: str) -> None:
    with pytest.raises(InvalidInput):
        locate(url)
