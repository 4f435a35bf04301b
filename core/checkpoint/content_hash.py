"""Hashes the files of a checkpoint: two directories with equal hashes give equal vectors.

Reads small files whole. Of weights, which may have tens of gigabytes, it reads the size, and blocks spread evenly over
the file: another training or fine-tuning changes all of them; a single weight changed by hand may go unseen.
"""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch
from pathlib import Path

from embedq.core.checkpoint.files import PATTERNS

#: Larger files are read in so many blocks of so many bytes.
_NUM_BLOCKS, _BLOCK_BYTES = 64, 256 * 1024


def content_hash(directory: Path, *others: Path) -> str:
    """32 hexadecimal digits of the files of one directory or several; empty if the first does not exist."""
    if not directory.is_dir():
        return ""
    whole = hashlib.sha256()
    for folder in (directory, *others):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if any(fnmatch(name, pattern) for pattern in PATTERNS):
                encoded = name.encode()
                whole.update(b"%d %s %d " % (len(encoded), encoded, path.stat().st_size))
                _add(whole, path)
    return whole.hexdigest()[:32]


def _add(whole: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _NUM_BLOCKS * _BLOCK_BYTES:
            whole.update(file.read())
            return
        for number in range(_NUM_BLOCKS):
            file.seek((size - _BLOCK_BYTES) * number // (_NUM_BLOCKS - 1))
            whole.update(file.read(_BLOCK_BYTES))
