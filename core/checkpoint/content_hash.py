"""What a checkpoint holds, in one word: two directories with equal words give equal vectors.

Small files are read whole. Of weights, which may have tens of gigabytes, the size, and blocks spread evenly over the
file: another training or fine-tuning changes all of them; a single weight changed by hand may go unseen.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

#: Files that decide what comes out: configuration, tokenizer, weights.
_ENDINGS = (".json", ".txt", ".model", ".safetensors", ".pt")

#: Larger files are read in so many blocks of so many bytes.
_NUM_BLOCKS, _BLOCK_BYTES = 64, 256 * 1024


def content_hash(directory: Path) -> str:
    """32 hexadecimal digits; empty where there is no such directory."""
    if not directory.is_dir():
        return ""
    whole = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.suffix in _ENDINGS and path.is_file()):
        name = path.relative_to(directory).as_posix().encode()
        whole.update(b"%d %s %d " % (len(name), name, path.stat().st_size))
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
