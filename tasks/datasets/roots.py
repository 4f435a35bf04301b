"""Checks that a path lies below the roots of this worker. Without roots nothing may be opened."""

from __future__ import annotations

import os

from embedq.core.errors import InvalidInput
from embedq.tasks.datasets.stores import Location, locate


class Roots:
    """Folders and URL prefixes of EMBEDQ_DATA_ROOTS."""

    def __init__(self, roots: tuple[str, ...]) -> None:
        """InvalidInput if one of them is no path or URL."""
        self._roots = [locate(root) for root in roots]

    def check(self, url: str) -> Location:
        """The location of `url`, with `..` and links resolved. InvalidInput if it lies under no root."""
        location = locate(url)
        if not any(_is_under(location, root) for root in self._roots):
            named = ", ".join(map(str, self._roots)) or "there is none"
            raise InvalidInput(
                f"this worker does not open {location!s:.200}: EMBEDQ_DATA_ROOTS names the folders and URL prefixes "
                f"it may ({named:.400})"
            )
        return location


def _is_under(location: Location, root: Location) -> bool:
    if location.protocol != root.protocol:
        return False
    path = root.path.rstrip(os.sep if root.is_local else "/")
    return location.path == path or location.path.startswith(f"{path}/")
