"""A producer's commands: what the pool serves, texts and passages from files, dead letters, metrics of the queues.

They need what a producer has, and the exporter its extra. What a command prints for people goes to standard error where
standard output holds its result.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np
from celery.exceptions import CeleryError
from celery.exceptions import TimeoutError as NoAnswer

from embedq import tasks
from embedq.core.command_line import CONTEXT, EXIT_DONE, EXIT_FAILED, examples, needs
from embedq.core.errors import InvalidInput, OperatorError
from embedq.tasks.datasets.commands import embed_files, names
from embedq.tasks.dead import DeadLetters, Letter, dead_letters
from embedq.tasks.server_errors import reaching_the_server

#: Texts of one job of `embed`: enough that a job's overhead vanishes, few enough for steady progress.
_TEXTS_PER_JOB = 256

#: Bytes of its texts, as UTF-8: with long texts that number would be minutes of a CPU, or more than a job may hold.
_BYTES_PER_JOB = 1024 * 1024

#: Seconds between two lines of progress where there is no terminal.
_LINE_EVERY_S = 10.0

#: Jobs sent ahead of the answers, so that every worker is busy and the queue stays short for others.
_MAX_JOBS_AHEAD = 32

#: A bulk load gives way to interactive jobs.
_BULK_PRIORITY = 9

#: Seconds without an answer after which a command gives up.
_TIMEOUT_S = 600

#: Characters of one value of a dead letter that are printed.
_MAX_SHOWN = 200

_FILE = click.Path(path_type=Path)


@contextmanager
def _server() -> Iterator[None]:
    """Convert what the libraries below raise without a server, or without an answer, into errors of one line."""
    try:
        with reaching_the_server():
            yield
    except NoAnswer:
        raise OperatorError(
            f"a job had no answer for {_TIMEOUT_S} s; `embedq status` shows whether workers run, `embedq models` what they serve"
        ) from None
    except CeleryError as error:
        raise OperatorError(f"a job was not done: {type(error).__name__}") from None


@click.command(context_settings=CONTEXT, epilog=examples("embedq models"))
def models() -> None:
    """List the models that workers serve.

    A line for each: its alias, what it can do, the dimensions of its vectors, the longest sequence, its precision,
    where it was loaded from, whether it takes jobs that name no model, and the version of its workers. A model stays listed when its workers
    stop: its queues outlive them.
    """
    with _server():
        announced = tasks.embed.registry.all()
    for alias, model in sorted(announced.items()):
        default = f"  default for {' and '.join(model.default_for)}" if model.default_for else ""
        version = f"  embedq {_shown(model.version)}" if model.version else ""
        kinds = " and ".join(model.kinds)
        precision = f"  {_shown(model.precision)}" if model.precision else ""
        click.echo(
            f"{alias}  {kinds}  {model.dimensions} dimensions  {model.max_length} tokens{precision}  {model.source}{default}{version}"
        )
    if not announced:
        click.echo("no worker has announced a model; `embedq workers` starts one", err=True)


@click.command(context_settings=CONTEXT, epilog=examples("embedq forget minilm"))
@click.argument("alias")
def forget(alias: str) -> None:
    """Withdraw a model that no worker will serve again.

    Producers are then refused at the call, and another model may be the default. A worker that still serves ALIAS
    announces it again when it starts.
    """
    with _server():
        found = tasks.embed.registry.forget(alias)
    click.echo(f"{alias}: forgotten" if found else f"{alias}: no worker had announced it")


@click.command(
    context_settings=CONTEXT,
    epilog=examples(
        "embedq embed texts.txt vectors.npy --model bge-m3", "embedq embed docs.jsonl vectors/ --text body --keep id"
    ),
)
@click.argument("texts", type=_FILE)
@click.argument("vectors", type=_FILE)
@click.option("--model", metavar="ALIAS", help="The model to use.  [default: the pool's default]")
@click.option(
    "--text", default="text", show_default=True, help='Into a folder: a column, or a template "{title}: {body}".'
)
@click.option("--keep", default="", callback=names, help="Into a folder: columns to copy, id,url.")
@click.option(
    "--key", default="", callback=names, help="Into a folder: columns that name a row in the list of failed ones."
)
@click.option("--rows-per-part", type=int, help="Into a folder: rows of one file.  [default: 20,000]")
@click.option("--dtype", type=click.Choice(["float32", "float16", "ubinary"]), default="float32", show_default=True)
@click.option("--add", is_flag=True, help="Into a folder: take new files of the source into the dataset there.")
def embed(texts: Path, vectors: Path, model: str | None, **given: Any) -> None:
    """Embed a file of texts into a .npy file, or files of rows into a folder.

    TEXTS is UTF-8, one text per line; lines end with a line feed and nothing else. VECTORS becomes an array (texts, dimensions), and appears whole or not at all.

    If VECTORS is a folder, TEXTS may be a file, folder or glob of Parquet, JSONL, CSV, Arrow or text, and VECTORS becomes
    a dataset like those of `embedq dataset`: started again, it goes on where it ended. This machine reads and writes;
    texts and vectors travel through the queue.
    """
    if vectors.suffix != ".npy":
        _embed_rows(str(texts), str(vectors), model=model, **given)
        return
    lines = _lines(texts)
    # Opened before the work begins: a folder that cannot be written to must not cost an hour of computing.
    _check_target(vectors)
    part = vectors.with_name(vectors.name + ".part")
    try:
        with part.open("wb") as file, _server():
            _embed_into(file, lines, model)
        part.replace(vectors)
    finally:
        part.unlink(missing_ok=True)


@needs("datasets", "pyarrow", "fsspec")
def _embed_rows(source: str, target: str, **given: Any) -> None:
    embed_files((source,), target, **given)


def _embed_into(file: BinaryIO, texts: list[str], model: str | None) -> None:
    parts: list[np.ndarray] = []
    with shown_progress(len(texts), "texts") as advance:
        for embeddings in _embed_in_order(texts, model):
            parts.append(embeddings.dense)
            advance(len(embeddings))
    np.save(file, np.concatenate(parts) if parts else np.empty((0, 0), np.float32))


def _check_target(path: Path) -> None:
    """OperatorError if no file can be written there, in one line that says why."""
    if not path.parent.is_dir():
        raise OperatorError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise OperatorError(f"{path} cannot be written: it is a folder")


def _embed_in_order(texts: list[str], model: str | None) -> Iterator[Any]:
    """Send jobs ahead of the answers, and return the answers in the order of the texts."""
    options = {"model": model} if model else {}
    waiting: deque[Any] = deque()
    for part in jobs_of(texts):
        waiting.append(tasks.embed.apply_async((part,), options, priority=_BULK_PRIORITY))
        if len(waiting) >= _MAX_JOBS_AHEAD:
            yield _answer(waiting.popleft())
    while waiting:
        yield _answer(waiting.popleft())


def jobs_of(texts: list[str]) -> Iterator[list[str]]:
    """Cut texts into jobs, in order, within the limits of number and bytes; a larger text has a job of its own."""
    max_bytes = min(_BYTES_PER_JOB, tasks.config.wire["max_bytes_per_job"])
    max_texts = min(_TEXTS_PER_JOB, tasks.config.wire["max_texts_per_job"])
    part: list[str] = []
    num_bytes = 0
    for text in texts:
        size = len(text.encode())
        if part and (len(part) == max_texts or num_bytes + size > max_bytes):
            yield part
            part, num_bytes = [], 0
        part.append(text)
        num_bytes += size
    if part:
        yield part


@contextmanager
def shown_progress(total: int, noun: str) -> Iterator[Callable[[int], None]]:
    """Show on standard error how much is done: a bar on a terminal, elsewhere a line now and then and one at the end.

    Yields the function to call with how many more are done. Without rich, which comes with the extra `worker`, a terminal
    gets the lines.
    """
    if sys.stderr.isatty() and find_spec("rich"):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn(noun), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total)
            yield lambda more: bar.advance(task, more)
        return
    lines = _Lines(total, noun)
    yield lines.advance
    lines.show()


class _Lines:
    """Progress in lines, for logs and pipes."""

    def __init__(self, total: int, noun: str) -> None:
        self._done, self._total, self._noun = 0, total, noun
        self._shown_s = time.monotonic()

    def advance(self, more: int) -> None:
        self._done += more
        if time.monotonic() - self._shown_s >= _LINE_EVERY_S and self._done < self._total:
            self.show()

    def show(self) -> None:
        self._shown_s = time.monotonic()
        click.echo(f"{self._done:,} of {self._total:,} {self._noun}", err=True)


@click.command(context_settings=CONTEXT, epilog=examples('embedq rerank "how do plants drink?" passages.txt --top-k 3'))
@click.argument("query")
@click.argument("passages", type=_FILE)
@click.option("--model", metavar="ALIAS", help="The model to use.  [default: the pool's default]")
@click.option("--top-k", type=int, default=10, show_default=True, metavar="K", help="Print the best K passages.")
def rerank(query: str, passages: Path, model: str | None, top_k: int) -> None:
    """Rank a file of passages for a query.

    PASSAGES is UTF-8, one passage per line; lines end with a line feed and nothing else. Prints score and passage, the best first.
    """
    lines = _lines(passages)
    with _server():
        ranking = _answer(tasks.rerank.delay(query, lines, model=model, top_k=top_k))
    for index, score in ranking:
        click.echo(f"{score:8.4f}  {_printable(lines[index])}")


def _lines(path: Path) -> list[str]:
    """The lines of a text file: what is between line feeds, whatever else it contains. InvalidInput if it is not UTF-8.

    A carriage return before a line feed belongs to the end of the line, and the last line needs no line feed. As `wc -l` and
    `head` count, so that row i of the vectors is line i: Python's own `splitlines` cuts at form feeds and U+2028 as well.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{path} is not UTF-8: the byte at {error.start:,} cannot be read; convert it, for example by "
            "`iconv -f LATIN1 -t UTF-8`"
        ) from None
    lines = text.split("\n")
    if not lines[-1]:
        del lines[-1]
    return [line.removesuffix("\r") for line in lines]


def _printable(text: str) -> str:
    """The text on one line, and nothing that a terminal obeys."""
    return "".join(char if char.isprintable() else " " for char in text)


def _answer(job: Any) -> Any:
    """The job's result, taken out of Redis once it is here."""
    result = job.get(timeout=_TIMEOUT_S)
    job.forget()
    return result


@click.command(
    context_settings=CONTEXT, epilog=examples("embedq exporter", "embedq exporter --host 0.0.0.0 --port 9808")
)
@click.option("--port", type=int, default=9808, show_default=True, help="Port to listen at; 0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@needs("exporter")
def exporter(port: int, host: str) -> None:
    """Serve metrics of the queues to Prometheus.

    Run one for each server, also while no worker runs: two would count everything twice. Metrics are at /metrics,
    health at /healthz/live and /healthz/ready.
    """
    from embedq.tasks.exporter import run

    run(host, port)


#: What `cancel` says of a job, by what it was found as.
_CANCELLED_AS = {
    "waiting": "cancelled, it waited",
    "running": "cancelled, it ran",
    "done": "not cancelled: it has its answer",
    "unknown": "not found; it is dropped if a worker meets it",
}


@click.command(context_settings=CONTEXT, epilog=examples("embedq cancel 2fd1c0a2-5c1c-4f0e-9f6e-0f4a2c9d7b11"))
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
def cancel(ids: tuple[str, ...]) -> int:
    """Cancel jobs that wait or run.

    ID is a job's id, as Flower and the logs show it. Whoever waits for it gets TaskRevokedError at once, and its place is
    free. Prints a line for each; the exit code is 1 if one of them could not be cancelled.
    """
    with _server():
        found = tasks.cancel(ids)
    for job_id, word in found.items():
        click.echo(f"{_shown(job_id)}: {_CANCELLED_AS[word]}")
    return EXIT_DONE if {"waiting", "running"}.issuperset(found.values()) else EXIT_FAILED


@click.group(context_settings=CONTEXT, epilog=examples("embedq dead list", "embedq dead replay 1795264840084-0"))
def dead() -> None:
    """List, show, send again or drop dead letters.

    A dead letter is a message that no worker could read, or a job that ended every worker that took it.
    """


@dead.command("list")
def list_letters() -> None:
    """Print one line per dead letter: id, time, list, job, reason."""
    with _letters() as letters:
        is_empty = True
        for letter in letters.all():
            is_empty = False
            job, source, reason = map(_shown, (letter.headers.get("id", "no job id"), letter.source, letter.reason))
            click.echo(f"{letter.id}  {letter.buried:%Y-%m-%d %H:%M:%S}  {source}  {job}  {reason}")
    if is_empty:
        click.echo("there are no dead letters", err=True)


@dead.command("show", epilog=examples("embedq dead show 1795264840084-0", "embedq dead show all"))
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
def show_letters(ids: tuple[str, ...]) -> None:
    """Print everything about dead letters but their texts.

    ID is what `dead list` shows, or `all`.
    """
    with _letters() as letters:
        for letter in map(letters.get, _ids(letters, ids)):
            _print_letter(letter)


def _print_letter(letter: Letter) -> None:
    click.echo(f"{letter.id}: {_shown(letter.reason)}")
    click.echo(f"  buried     {letter.buried:%Y-%m-%d %H:%M:%S} UTC, from list {_shown(letter.source)}")
    click.echo(f"  message    {len(letter.message):,} bytes")
    if letter.version:
        click.echo(f"  worker     embedq {_shown(letter.version)}")
    for name, value in letter.headers.items():
        click.echo(f"  {name:<10} {_shown(value)}")
    for delivery in letter.deliveries:
        click.echo(f"  delivered  {delivery.taken:%Y-%m-%d %H:%M:%S} UTC to {_shown(delivery.worker)}")
    for line in letter.detail.splitlines():
        click.echo(f"  {_shown(line)}")


@dead.command("replay", epilog=examples("embedq dead replay 1795264840084-0", "embedq dead replay all"))
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
def replay_letters(ids: tuple[str, ...]) -> None:
    """Send dead letters again, with all their attempts.

    ID is what `dead list` shows, or `all`. Each goes to the end of the list it came from.
    """
    with _letters() as letters:
        for letter_id in _ids(letters, ids):
            click.echo(f"{letter_id}: sent again to {_shown(letters.replay(letter_id).source)}")


@dead.command("drop", epilog=examples("embedq dead drop 1795264840084-0", "embedq dead drop all"))
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
def drop_letters(ids: tuple[str, ...]) -> None:
    """Drop dead letters for good.

    ID is what `dead list` shows, or `all`.
    """
    with _letters() as letters:
        for letter_id in _ids(letters, ids):
            letters.drop(letter_id)
            click.echo(f"{letter_id}: dropped")


@contextmanager
def _letters() -> Iterator[DeadLetters]:
    with _server(), dead_letters() as letters:
        yield letters


def _ids(letters: DeadLetters, given: tuple[str, ...]) -> list[str]:
    return [letter.id for letter in letters.all()] if given == ("all",) else list(given)


def _shown(value: Any) -> str:
    """At most so much, on one line, and nothing that a terminal obeys: anybody may have written it."""
    return "".join(char if char.isprintable() else "?" for char in str(value)[:_MAX_SHOWN])
