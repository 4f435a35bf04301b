"""A worker of ours whose model costs nothing: what is left is what a job costs beside its forward pass.

`python -m tests.bench.costless` is `workers.worker` with another model behind the engine's seam; transport,
pool, engine and result backend are those of production. Prints a line per thread, so that its time can be told.
"""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from celery.signals import worker_ready

from embedq import tasks
from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.engine import Engine
from embedq.core.models import Launched
from embedq.core.models.requested_outputs import of_embedder
from embedq.core.options import EmbedOptions
from embedq.core.sequence import Sequence, Tokens, Wanted
from embedq.core.settings import read_settings
from embedq.tasks.models import Registry
from embedq.workers import logs, worker
from embedq.workers.broker.decompression import restrict
from embedq.workers.context import Lifecycle
from embedq.workers.jobs.result_backend import use_batches
from embedq.workers.monitoring.health import Health
from embedq.workers.monitoring.heartbeat import Heart

ALIAS = "costless"

#: Components of a vector: MiniLM's.
DIMENSIONS = 384

#: Every text's vector, as the stock worker returns it too.
VECTOR = np.linspace(1, 2, DIMENSIONS, dtype=np.float32)
VECTOR /= np.linalg.norm(VECTOR)


class Costless:
    """Gives every text the same vector. Its tokens are the bytes of the text, so that different texts differ."""

    outputs = frozenset({"dense"})
    device, precision, reason = "cpu", "float32", "it computes nothing"
    is_padded = False

    def __init__(self, max_sequences: int) -> None:
        self.spec = ModelSpec(
            alias=ALIAS,
            path=Path("/nowhere"),
            family="encoder",
            pooling="mean",
            normalize=True,
            max_length=512,
            dimensions=DIMENSIONS,
            pad_token_id=0,
        )
        self._rows = np.tile(VECTOR, (max_sequences, 1))

    def wanted(self, options: Any) -> Wanted:
        """See `core.models.Model.wanted`."""
        return of_embedder(self.spec, self.outputs, options)

    def encode_texts(self, texts: list[str], options: EmbedOptions) -> list[Tokens]:
        """See `core.models.Embedder.encode_texts`."""
        return [Tokens(np.frombuffer(text.encode(), np.uint8).astype(np.int32)) for text in texts]

    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """See `core.models.Model.launch`."""
        rows = {"dense": self._rows[: len(batch)]}
        return lambda: rows


def main() -> int:
    """Serve the queue `embed` until SIGTERM; returns the exit code."""
    logs.set_up()
    # One pass at a time, as on an accelerator: streams share out a CPU's cores for computing, and nothing is computed here.
    settings = read_settings(models={ALIAS: "/nowhere"}, cpu_streams=1)
    use_batches(tasks.app)
    restrict(tasks.config.wire["max_bytes_per_job"])
    worker_ready.connect(_tell_threads)
    with Engine({ALIAS: Costless(settings.max_batch_sequences)}, settings) as engine:
        Registry(tasks.app.backend.client).announce(worker.announcements(engine))
        lifecycle = Lifecycle()
        return worker.serve(engine, settings, Health(lifecycle), Heart(lifecycle, None))


def _tell_threads(**_: Any) -> None:
    for thread in threading.enumerate():
        fields = {"action": "thread", "id": thread.native_id, "name_of": thread.name.replace(" ", "_")}
        logging.getLogger("embedq.workers").info("a thread", extra=fields)


if __name__ == "__main__":
    sys.exit(main())
