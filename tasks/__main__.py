"""`python -m embedq.tasks`: the producer's command line.

python -m embedq.tasks models                              what the pool serves
python -m embedq.tasks forget ALIAS                        withdraw a model that is gone for good
python -m embedq.tasks embed TEXTS.txt VECTORS.npy         one text per line -> (num_texts, dim)
python -m embedq.tasks rerank "a question" PASSAGES.txt    one passage per line -> the best of them
python -m embedq.tasks dead list|show|replay|drop          what no worker could do anything with
python -m embedq.tasks exporter --port 9808                what waits in the queues, for Prometheus
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embedq import tasks
from embedq.core.errors import EmbedqError, InvalidSettings
from embedq.tasks import dead

#: Texts of one job of `embed`: enough that a job's overhead vanishes, few enough for steady progress.
_TEXTS_PER_JOB = 256

#: Jobs sent ahead of the answers, so that every worker is busy and the queue stays short for others.
_MAX_JOBS_AHEAD = 32

#: A bulk load gives way to interactive jobs.
_BULK_PRIORITY = 9

#: Seconds without an answer after which a command gives up.
_TIMEOUT_S = 600


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    try:
        asked.run(asked)
    except (EmbedqError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def _models(_: argparse.Namespace) -> None:
    for alias, model in sorted(tasks.embed.registry.all().items()):
        default = f"  default for {' and '.join(model.default_for)}" if model.default_for else ""
        kinds = " and ".join(model.kinds)
        print(f"{alias}  {kinds}  {model.dimensions} dimensions  {model.max_length} tokens  {model.source}{default}")


def _forget(asked: argparse.Namespace) -> None:
    found = tasks.embed.registry.forget(asked.alias)
    print(f"{asked.alias}: forgotten" if found else f"{asked.alias}: no worker had announced it")


def _embed(asked: argparse.Namespace) -> None:
    texts = asked.texts.read_text(encoding="utf-8").splitlines()
    rows: list[np.ndarray] = []
    for vectors in _embed_in_order(texts, asked.model):
        rows.extend(vectors.dense)
        print(f"\r{len(rows):,} of {len(texts):,} texts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    # Whole or not at all: a file that is half a result looks like a result.
    part = asked.vectors.with_name(asked.vectors.name + ".part")
    with part.open("wb") as file:
        np.save(file, np.stack(rows) if rows else np.empty((0, 0), np.float32))
    part.replace(asked.vectors)


def _embed_in_order(texts: list[str], model: str | None) -> Iterator[Any]:
    """Send jobs ahead of the answers, and give the answers in the order of the texts."""
    options = {"model": model} if model else {}
    waiting: deque[Any] = deque()
    for start in range(0, len(texts), _TEXTS_PER_JOB):
        part = texts[start : start + _TEXTS_PER_JOB]
        waiting.append(tasks.embed.apply_async((part,), options, priority=_BULK_PRIORITY))
        if len(waiting) >= _MAX_JOBS_AHEAD:
            yield _answer(waiting.popleft())
    while waiting:
        yield _answer(waiting.popleft())


def _rerank(asked: argparse.Namespace) -> None:
    passages = asked.passages.read_text(encoding="utf-8").splitlines()
    ranking = _answer(tasks.rerank.delay(asked.query, passages, model=asked.model, top_k=asked.top_k))
    for index, score in ranking:
        print(f"{score:8.4f}  {passages[index]}")


def _exporter(asked: argparse.Namespace) -> None:
    try:
        from embedq.tasks import exporter
    except ModuleNotFoundError as error:
        raise InvalidSettings(f"the exporter needs the extra embedq[exporter]: {error}") from None
    exporter.run(asked.host, asked.port)


def _answer(job: Any) -> Any:
    """The job's result, taken out of Redis once it is here."""
    result = job.get(timeout=_TIMEOUT_S)
    job.forget()
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m embedq.tasks", description="Send jobs and look at what the pool serves."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    models = commands.add_parser("models", help="list the models that workers have announced")
    models.set_defaults(run=_models)
    forget = commands.add_parser("forget", help="withdraw a model that no worker will serve again")
    forget.add_argument("alias")
    forget.set_defaults(run=_forget)
    embed = commands.add_parser("embed", help="embed a file of texts, one per line, into a .npy file")
    embed.add_argument("texts", type=Path)
    embed.add_argument("vectors", type=Path)
    embed.add_argument("--model")
    embed.set_defaults(run=_embed)
    rerank = commands.add_parser("rerank", help="score a file of passages, one per line, against a query")
    rerank.add_argument("query")
    rerank.add_argument("passages", type=Path)
    rerank.add_argument("--model")
    rerank.add_argument("--top-k", type=int, default=10)
    rerank.set_defaults(run=_rerank)
    exporter = commands.add_parser("exporter", help="serve metrics of the queues, one for each installation")
    exporter.add_argument("--port", type=int, default=9808, help="0 takes a free one (default: %(default)s)")
    exporter.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    exporter.set_defaults(run=_exporter)
    dead.add_commands(commands.add_parser("dead", help="dead letters: list, show, send again, drop"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
