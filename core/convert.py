"""`embedq convert DIRECTORY` writes model.safetensors from pytorch_model.bin, once per checkpoint.

Reads the pickle with torch's weights-only loader, which builds tensors and nothing else. The old file stays; the new
one appears whole or not at all.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

from embedq.core.errors import CannotLoadModel


def convert(directory: Path) -> Path:
    """Write `model.safetensors` beside `pytorch_model.bin` and return its path.

    CannotLoadModel if that is impossible.
    """
    source, target = directory / "pytorch_model.bin", directory / "model.safetensors"
    if not source.is_file():
        raise CannotLoadModel(f"{directory} has no pytorch_model.bin to convert")
    if target.exists():
        raise CannotLoadModel(f"{target} exists already")

    import torch
    from safetensors.torch import save_file

    is_mapped = zipfile.is_zipfile(source)  # torch before 1.6 wrote no archives, and others cannot be mapped
    try:
        weights = torch.load(source, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:  # the loader refuses a pickle with its own errors, of many classes
        raise CannotLoadModel(f"{source} is not a plain file of weights: {type(error).__name__}") from error
    if not isinstance(weights, dict):
        raise CannotLoadModel(f"{source} holds {type(weights).__name__}, not weights by name")
    # safetensors refuses tensors that share memory (tied weights); copies of them read back equal.
    plain = {name: tensor.contiguous().clone() for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
    part = target.with_suffix(".part")
    save_file(plain, part, metadata={"format": "pt"})
    part.replace(target)
    return target


def main() -> int:
    """Run `embedq convert` under the name it had before; returns the exit code."""
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m embedq.core.convert DIRECTORY", file=sys.stderr)
        return 2 if len(sys.argv) != 2 else 0
    try:
        print(convert(Path(sys.argv[1])))
    except KeyboardInterrupt:
        print("embedq.core.convert: interrupted", file=sys.stderr)
        return 130
    except (CannotLoadModel, OSError) as error:
        print(f"embedq.core.convert: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
