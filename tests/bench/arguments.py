"""What the measurements' command lines have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole(least: int = 1) -> Callable[[str], int]:
    """A parser of whole numbers from `least`. argparse's error says what was given."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}; given {text}")
        return number

    return parse
