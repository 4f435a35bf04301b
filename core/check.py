"""`embedq check DIRECTORY` prints how a model would be run and the files that say so, and checks its numbers.

Loads the model on a CPU in float32. With `--against sentence-transformers`, where that is installed, it holds the
vectors or scores of a few texts against the library's.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from embedq.core.command_line import CONTEXT, EXIT_DONE, EXIT_FAILED, examples, needs
from embedq.core.errors import InvalidInput

if TYPE_CHECKING:
    from embedq.core.engine import Engine

#: Short and long, cased, in several scripts, and none at all: what tokenizers and poolings differ in.
TEXTS = [
    "A ferry leaves at seven.",
    "",
    "The garden of the lighthouse is small, and nobody has counted its roses. " * 40,
    "Der Leuchtturm steht auf der Insel.",
    "Паром уходит в семь часов вечера.",
    "灯塔的花园很小，渡轮七点出发。",
    "حديقة المنارة صغيرة",
]

#: The largest difference that two ways of computing the same may have in float32: of components of vectors of length
#: 1, and of scores in the unit of the largest one.
TOLERANCE = 1e-4


@click.command(
    context_settings=CONTEXT,
    epilog=examples(
        "embedq check /srv/models/mine",
        "embedq check /srv/models/mine --against sentence-transformers",
        "embedq check /srv/models/mine --family encoder",
    ),
)
@click.argument("directory")
@click.option("--family", metavar="NAME", help="Run it as this family, as the setting of that name.")
@click.option("--against", type=click.Choice(["sentence-transformers"]), help="Compare a few texts with this library.")
@needs("worker")
def check(directory: str, family: str | None, against: str | None) -> int:
    """Say how a model would be run, and why not.

    DIRECTORY is a model's directory, or its name on the hub. Prints what it is, how it would be run and the file each
    line was read from; then loads it on the CPU, which checks its weights. Ends with 1 if it is refused, or differs
    from the library.
    """
    from embedq import core
    from embedq.core.checkpoint.read_spec import read_spec
    from embedq.core.checkpoint.report import report
    from embedq.core.settings import ModelSettings

    settings = ModelSettings(path=directory, family=family)
    lines = report(read_spec("model", settings), settings)
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    for line in lines:
        click.echo(f"{line.name:<{widths[0]}}  {line.value:<{min(widths[1], 70)}}  {line.source}")
    with core.load(directory, device="cpu", precision="float32", model={"family": family}) as engine:
        click.echo("its weights fit, and it runs")
        return EXIT_DONE if against is None else _compare(engine)


def _compare(engine: Engine) -> int:
    """Print the largest difference to sentence-transformers; returns the exit code."""
    try:
        import sentence_transformers
    except ImportError:
        raise InvalidInput("--against needs the package sentence-transformers, which is not installed") from None
    spec = engine.models["model"].spec
    if spec.is_embedder and "dense" not in engine.models["model"].outputs:
        raise InvalidInput(f"--against compares vectors and scores; family {spec.family} has weights of words instead")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    library = sentence_transformers.SentenceTransformer if spec.is_embedder else sentence_transformers.CrossEncoder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library(str(spec.root or spec.path), device="cpu", model_kwargs={"dtype": "float32"})
        largest = _of_vectors(engine, model) if spec.is_embedder else _of_scores(engine, model)
    is_equal = largest <= TOLERANCE
    click.echo(
        f"largest difference to sentence-transformers {sentence_transformers.__version__}: {largest:.1e} over "
        f"{len(TEXTS)} texts, which is {'equal' if is_equal else f'more than {TOLERANCE:.0e}'}"
    )
    return EXIT_DONE if is_equal else EXIT_FAILED


def _of_vectors(engine: Engine, model: Any) -> float:
    """Over plain texts, queries and documents, of components of vectors scaled to length 1."""
    largest = 0.0
    for kind, encode in ((None, model.encode), ("query", model.encode_query), ("document", model.encode_document)):
        ours = np.asarray(engine.embed(TEXTS, input_type=kind, normalize=True))
        theirs = np.asarray(encode(TEXTS, normalize_embeddings=True, batch_size=1))
        if ours.shape != theirs.shape:
            return float("inf")
        largest = max(largest, float(np.abs(ours - theirs).max()))
    return largest


def _of_scores(engine: Engine, model: Any) -> float:
    """Over pairs of the first text with all, of logits."""
    import torch

    pairs = [(TEXTS[0], text) for text in TEXTS]
    ours = engine.score(pairs)
    theirs = model.predict(pairs, batch_size=1, activation_fn=torch.nn.Identity())
    return float(np.abs(ours - theirs).max()) / max(1.0, float(np.abs(theirs).max()))
