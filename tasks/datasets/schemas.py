"""Types of columns as text that a manifest can hold."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow


def schema_to_text(schema: pyarrow.Schema) -> str:
    """As Arrow writes it, in base64."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def schema_from_text(text: str) -> pyarrow.Schema:
    """Undo `schema_to_text`."""
    import pyarrow as pa

    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))
