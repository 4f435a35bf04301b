"""URLs that name a table or collection of a database: the database's own, and the name at the end of the path."""

from __future__ import annotations

from embedq.core.errors import InvalidInput


def last_of_path(url: str) -> tuple[str, str]:
    """(the URL without the last part of its path, that part). InvalidInput if there is none."""
    head, query = (url.partition("?")[0].rstrip("/"), url.partition("?")[2])
    front, _, name = head.rpartition("/")
    if not name or front.endswith(("/", ":")):
        raise InvalidInput("the URL must end in the name of a table or collection")
    return f"{front}?{query}" if query else front, name
