"""`embedq dataset`: a click group, attached to the root command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from embedq.core.command_line import CONTEXT, examples, needs
from embedq.core.errors import BadSource
from embedq.tasks.datasets.showing import Progress, shown
from embedq.tasks.server_errors import reaching_the_server


class Commands(click.Group):
    """Raises errors of the server's client as our own, of one line."""

    def invoke(self, context: click.Context) -> Any:
        """Run a command of the group."""
        with reaching_the_server():
            return super().invoke(context)


@click.group(
    cls=Commands,
    context_settings=CONTEXT,
    epilog=examples(
        "embedq dataset embed s3://corpus/docs/ s3://corpus/vectors/ --text body --keep id,url --model bge-m3",
        "embedq dataset status s3://corpus/vectors/",
        "embedq dataset load s3://corpus/vectors/ postgresql://host/base/table --key id",
    ),
)
def dataset() -> None:
    """Embed or rerank the rows of files, millions of them.

    Workers read and write the files; this command plans, queues and may then exit. What died, and what was done, is
    seen in the target, so every command works from any machine.
    """


def names(_: Any, __: Any, given: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in given.split(","))))


def _asked(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `embed` and `rerank` share."""
    for option in reversed(
        [
            click.argument("sources", nargs=-1, required=True),
            click.argument("target"),
            click.option("--keep", default="", callback=names, help="Columns copied into the target: id,url."),
            click.option(
                "--key", default="", callback=names, help="Columns that name a row in the list of failed ones."
            ),
            click.option("--model", help="Alias of the model; default: the pool's own."),
            click.option(
                "--rows-per-part", type=int, help="Rows of one job and one file of the target (default 20,000)."
            ),
            click.option("--max-length", type=int, help="Tokens per text; longer ones are cut."),
            click.option("--normalize/--no-normalize", default=None, help="Scale vectors, or map scores to 0..1."),
            click.option("--add", is_flag=True, help="Take new files of the source into the dataset in the target."),
            click.option(
                "--unconditional", is_flag=True, help="Write to a store that cannot refuse a name that is taken."
            ),
            click.option("--dry-run", is_flag=True, help="Print parts, rows and bytes, and start nothing."),
            click.option("--wait", is_flag=True, help="Show progress until it ends."),
        ]
    ):
        command = option(command)
    return command


@dataset.command(
    "embed",
    epilog=examples(
        "embedq dataset embed docs.parquet vectors/ --text body --keep id",
        "embedq dataset embed s3://corpus/docs/ s3://corpus/vectors/ --text body --dtype float16 --dry-run",
    ),
)
@_asked
@click.option("--text", default="text", show_default=True, help='A column, or a template: "{title}\\n{body}".')
@click.option("--outputs", default="dense", callback=names, show_default=True, help="dense,sparse,colbert.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "ubinary"]), default="float32", show_default=True)
@click.option("--dimensions", type=int, help="Keep so many leading components of each vector.")
@click.option("--input-type", type=click.Choice(["query", "document"]), help="Which of the model's prompts to use.")
@click.option("--instruction", help="Written before each text in place of the model's prompt.")
@needs("datasets", "pyarrow", "fsspec")
def embed(sources: tuple[str, ...], target: str, text: str, outputs: tuple[str, ...], **given: Any) -> None:
    """Embed each row of SOURCES into Parquet files in TARGET."""
    from embedq.tasks.datasets.manifest import Columns

    columns = Columns(text=text.replace("\\n", "\n"), keep=given.pop("keep"), key=given.pop("key"))
    _start("embed", sources, target, columns, {"outputs": outputs, **given})


@dataset.command("rerank", epilog=examples("embedq dataset rerank pairs.parquet scored/ --query q --passage p"))
@_asked
@click.option("--query", default="query", show_default=True, help="Column of the queries.")
@click.option("--passage", default="passage", show_default=True, help="Column of the passages.")
@needs("datasets", "pyarrow", "fsspec")
def rerank(sources: tuple[str, ...], target: str, query: str, passage: str, **given: Any) -> None:
    """Score the pair in each row of SOURCES into Parquet files in TARGET."""
    from embedq.tasks.datasets.manifest import Columns

    columns = Columns(query=query, passage=passage, keep=given.pop("keep"), key=given.pop("key"))
    _start("rerank", sources, target, columns, given)


def _start(kind: str, sources: tuple[str, ...], target: str, columns: Any, given: dict[str, Any]) -> None:
    from embedq.tasks.datasets.planning import estimate, plan, question
    from embedq.tasks.datasets.run import start
    from embedq.tasks.datasets.status import expected_s

    how = {name: given.pop(name) for name in ("add", "unconditional", "dry_run", "wait", "model", "rows_per_part")}
    asked = question(kind, sources, target, columns, how["model"], how["rows_per_part"], given)
    if how["dry_run"]:
        manifest, _ = plan(asked, how["add"])
        sizes = estimate(manifest)
        click.echo(f"{sizes['rows']:,} rows in {sizes['parts']:,} parts, about {sizes['bytes']:,} bytes of vectors")
        seconds = expected_s(manifest.model["alias"], len(manifest.parts))
        click.echo(
            "time: unknown before a worker has measured its speed"
            if seconds is None
            else f"time: about {seconds:,.0f} s"
        )
        return
    run = start(asked, how["add"], not how["unconditional"])
    click.echo(
        f"{run.manifest.num_rows:,} rows in {len(run.manifest.parts):,} parts are queued; dataset {run.manifest.id[:8]}"
    )
    if how["wait"]:
        _wait(run)


@dataset.command("status", epilog=examples("embedq dataset status s3://corpus/vectors/"))
@click.argument("target")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
@needs("datasets", "pyarrow", "fsspec")
def status(target: str, as_json: bool) -> None:
    """Show the progress of the dataset in TARGET, from any machine."""
    found = _open(target).status()
    click.echo(json.dumps(asdict(found)) if as_json else shown(found))


@dataset.command("watch", epilog=examples("embedq dataset watch s3://corpus/vectors/"))
@click.argument("target")
@needs("datasets", "pyarrow", "fsspec")
def watch(target: str) -> None:
    """Show progress until it ends. To stop watching stops nothing else."""
    _wait(_open(target))


@dataset.command("cancel", epilog=examples("embedq dataset cancel s3://corpus/vectors/"))
@click.argument("target")
@needs("datasets", "pyarrow", "fsspec")
def cancel(target: str) -> None:
    """Stop it; what is done stays, leftovers of broken writes are removed."""
    removed = _open(target).cancel()
    click.echo(f"cancelled; {len(removed)} leftovers removed. `embedq dataset resume` goes on")


@dataset.command("resume", epilog=examples("embedq dataset resume s3://corpus/vectors/ --wait"))
@click.argument("target")
@click.option("--wait", is_flag=True, help="Show progress until it ends.")
@needs("datasets", "pyarrow", "fsspec")
def resume(target: str, wait: bool) -> None:
    """Go on where it ended: queue all parts that are not done."""
    run = _open(target)
    click.echo(f"{run.resume():,} parts are queued")
    if wait:
        _wait(run)


@dataset.command("retry-failed", epilog=examples("embedq dataset retry-failed s3://corpus/vectors/"))
@click.argument("target")
@needs("datasets", "pyarrow", "fsspec")
def retry_failed(target: str) -> None:
    """Compute failed rows alone and write their parts anew; failed parts again."""
    click.echo(f"{_open(target).retry_failed():,} parts are queued")


@dataset.command("verify", epilog=examples("embedq dataset verify s3://corpus/vectors/"))
@click.argument("target")
@needs("datasets", "pyarrow", "fsspec")
def verify(target: str) -> None:
    """Read every part whole and compare it with the manifest."""
    found = _open(target).verify()
    click.echo(
        f"{found.parts:,} parts, {found.rows:,} rows, {found.failed_rows:,} without a vector, {found.bytes:,} bytes"
    )
    for number in found.missing[:20]:
        click.echo(f"part {number:,} is missing")
    for number, what in list(found.wrong.items())[:20]:
        click.echo(f"part {number:,} {what}")
    for name in found.leftovers[:20]:
        click.echo(f"left over: {name}")
    if not found.is_whole:
        raise BadSource(
            f"{target} is not whole: {len(found.missing):,} parts are missing, {len(found.wrong):,} are wrong"
        )


@dataset.command(
    "load",
    epilog=examples(
        "embedq dataset load s3://corpus/vectors/ postgresql://user@host/base/docs --key id --follow",
        "embedq dataset load vectors/ lancedb:///data/base/docs --key id",
        "embedq dataset load vectors/ qdrant://host:6333/docs --key id",
    ),
)
@click.argument("target")
@click.argument("store")
@click.option("--key", required=True, help="Column that names a row: equal keys are one row of the store.")
@click.option("--columns", default="", callback=names, help="Columns to load; default: all.")
@click.option("--follow", is_flag=True, help="Load parts as they are done, until the dataset ends.")
@click.option("--index/--no-index", default=True, show_default=True, help="Build the vectors' index at the end.")
@needs("datasets", "pyarrow", "fsspec")
def load(target: str, store: str, key: str, columns: tuple[str, ...], follow: bool, index: bool) -> None:
    """Load the dataset in TARGET into a database, part by part.

    What is loaded is not loaded again. STORE is the URL of a table: postgresql:// with pgvector, lancedb:// or
    lancedb+s3://, qdrant://; each needs the extra of its name.
    """
    from embedq.tasks.datasets.loading import load as load_parts

    with Progress() as progress:
        done = load_parts(_open(target), store, key, columns, follow, index, progress.loaded)
    click.echo(
        f"{done.rows:,} rows of {done.parts:,} parts loaded, {done.skipped:,} parts were there; {done.rows_per_s:,.0f} rows/s"
    )


def embed_files(sources: tuple[str, ...], target: str, text: str, **given: Any) -> None:
    """`embedq embed` into a folder: this machine reads and writes, texts travel through the queue."""
    from embedq.tasks.datasets.here import embed_here
    from embedq.tasks.datasets.manifest import Columns
    from embedq.tasks.datasets.planning import question

    columns = Columns(text=text.replace("\\n", "\n"), keep=given["keep"], key=given["key"])
    asked = question(
        "embed", sources, target, columns, given["model"], given["rows_per_part"], {"dtype": given["dtype"]}
    )
    with Progress() as progress, reaching_the_server():
        manifest = embed_here(asked, progress.loaded, given["add"])
    click.echo(f"{manifest.num_rows:,} rows in {len(manifest.parts):,} parts of {target}", err=True)


def _open(target: str) -> Any:
    from embedq.tasks.datasets.run import open_run

    return open_run(target)


def _wait(run: Any) -> None:
    with Progress() as progress:
        found = run.wait(tell=progress.told)
    click.echo(shown(found))
