"""Into Qdrant: upserts of points whose ids follow from the rows' keys, so that a second one changes nothing."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any

from qdrant_client import QdrantClient, models

from embedq.core.errors import InvalidInput, StoreFailed
from embedq.tasks.datasets.store_urls import last_of_path

if TYPE_CHECKING:
    import pyarrow

_NOTES = "embedq_loads"

#: Points of one request: Qdrant takes 32 MB, and is fastest with some hundreds.
_BATCH = 256

#: Of the ids of points.
_NAMESPACE = uuid.UUID("6f0a1f2e-6a3b-4d0e-9a55-9d2f2a5d7f61")


class Qdrant:
    """One collection: `qdrant://host:6333/collection`, `qdrants://` with TLS, `qdrant:///folder/collection` without a server."""

    def __init__(self, url: str) -> None:
        base, self._name = last_of_path(url)
        scheme, _, rest = base.partition("://")
        if rest.startswith("/"):
            self._client = QdrantClient(path=rest)
        else:
            # The key of a server comes from QDRANT_API_KEY, not from a URL that is logged somewhere.
            self._client = QdrantClient(
                url=f"{'https' if scheme == 'qdrants' else 'http'}://{rest}", api_key=os.environ.get("QDRANT_API_KEY")
            )
        self._key = ""

    def __enter__(self) -> Qdrant:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def prepare(self, schema: pyarrow.Schema, key: str) -> None:
        """Make the collection if it is not there, without an index until the load is over."""
        self._key = key
        if "dense" not in schema.names:
            raise InvalidInput(
                "Qdrant takes points with vectors: the column 'dense' must be among those that are loaded"
            )
        if str(schema.field("dense").type.value_type) == "uint8":
            raise InvalidInput("Qdrant takes no packed binary vectors; it has binary quantisation of its own")
        size = schema.field("dense").type.list_size
        if not self._client.collection_exists(self._name):
            self._client.create_collection(
                self._name,
                vectors_config=models.VectorParams(size=size, distance=models.Distance.COSINE),
                optimizers_config=models.OptimizersConfigDiff(indexing_threshold=0),
            )
        if not self._client.collection_exists(_NOTES):
            self._client.create_collection(
                _NOTES, vectors_config=models.VectorParams(size=1, distance=models.Distance.DOT)
            )

    def versions(self, dataset: str) -> dict[int, str]:
        """By part of a dataset, the version of the object that was loaded."""
        found: dict[int, str] = {}
        offset: Any = None
        while True:
            points, offset = self._client.scroll(_NOTES, limit=1000, offset=offset, with_payload=True)
            for point in points:
                note = point.payload or {}
                if (note.get("target"), note.get("dataset")) == (self._name, dataset):
                    found[int(note["part"])] = str(note["version"])
            if offset is None:
                return found

    def load(self, dataset: str, part: int, version: str, table: pyarrow.Table) -> None:
        """Upsert, then note. Rows without a vector are left out."""
        for batch in table.to_batches(_BATCH):
            self._upsert(self._name, [self._point(row) for row in batch.to_pylist() if row["dense"] is not None])
        note = {"target": self._name, "dataset": dataset, "part": part, "version": version}
        self._upsert(_NOTES, [models.PointStruct(id=_id(f"{self._name} {dataset} {part}"), vector=[1.0], payload=note)])

    def finish(self) -> None:
        """Let it build its index now."""
        self._client.update_collection(
            self._name, optimizers_config=models.OptimizersConfigDiff(indexing_threshold=20_000)
        )

    def _point(self, row: dict[str, Any]) -> models.PointStruct:
        payload = {name: value for name, value in row.items() if name != "dense"}
        return models.PointStruct(id=_id(row[self._key]), vector=row["dense"], payload=payload)

    def _upsert(self, collection: str, points: list[models.PointStruct]) -> None:
        if not points:
            return
        try:
            self._client.upsert(collection, points, wait=True)
        except Exception as error:  # of its HTTP client, which has a dozen classes
            raise StoreFailed(f"Qdrant refuses points of {collection:.60}: {type(error).__name__}") from error


def _id(key: Any) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{type(key).__name__} {key}"))
