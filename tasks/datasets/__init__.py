"""Datasets: rows in files, vectors out as files, through the queue's workers.

    run = tasks.datasets.embed("s3://corpus/docs/", "s3://corpus/vectors/", text="body", keep=["id"], model="bge-m3")
    run.wait()
    tasks.datasets.open("s3://corpus/vectors/").status()

The caller plans and queues, and may then exit: workers read and write the files themselves. Importing this loads
neither pyarrow nor fsspec.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from embedq.tasks.datasets.part_task import embed_part, rerank_part

if TYPE_CHECKING:
    from embedq.tasks.datasets.run import Run

__all__ = ["embed", "embed_part", "open", "rerank", "rerank_part"]


def embed(
    source: str | Iterable[str],
    target: str,
    *,
    text: str = "text",
    keep: Iterable[str] = (),
    key: Iterable[str] = (),
    model: str | None = None,
    rows_per_part: int | None = None,
    add: bool = False,
    unconditional: bool = False,
    **options: Any,
) -> Run:
    """Embed every row of `source` into Parquet files in `target`; returns once the parts are queued.

    `source` is a file, folder or glob, or several; `text` a column, or a template of columns ("{title}\\n{body}").
    `keep` are columns copied into the target; `key` those that name a row in the list of failed ones. `options` as in
    `core.options.EmbedOptions`. A second call with the same arguments goes on where the first ended; `add` takes new
    files of the source into it. InvalidInput if the target holds another dataset; BadSource for a file that cannot
    be read; StoreFailed if the target cannot be written, or overwrites what is there (see `unconditional`).
    """
    from embedq.tasks.datasets.manifest import Columns
    from embedq.tasks.datasets.planning import question
    from embedq.tasks.datasets.run import start

    columns = Columns(text=text, keep=tuple(keep), key=tuple(key))
    return start(question("embed", source, target, columns, model, rows_per_part, options), add, not unconditional)


def rerank(
    source: str | Iterable[str],
    target: str,
    *,
    query: str = "query",
    passage: str = "passage",
    keep: Iterable[str] = (),
    key: Iterable[str] = (),
    model: str | None = None,
    rows_per_part: int | None = None,
    add: bool = False,
    unconditional: bool = False,
    **options: Any,
) -> Run:
    """Score the pair in every row of `source`, as `embed` embeds; options as in `core.options.RerankOptions`."""
    from embedq.tasks.datasets.manifest import Columns
    from embedq.tasks.datasets.planning import question
    from embedq.tasks.datasets.run import start

    columns = Columns(query=query, passage=passage, keep=tuple(keep), key=tuple(key))
    return start(question("rerank", source, target, columns, model, rows_per_part, options), add, not unconditional)


def open(target: str) -> Run:
    """The run in a target, from any machine. InvalidInput if there is none."""
    from embedq.tasks.datasets.run import open_run

    return open_run(target)
