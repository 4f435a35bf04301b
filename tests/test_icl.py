"""In-context decoders beyond the golden vectors: where examples come from, and what has no room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedq import core
from embedq.core.checkpoint.prompts import write_example
from embedq.core.engine import Engine
from embedq.core.errors import InvalidInput, InvalidSettings
from embedq.core.options import EmbedOptions
from tests.conftest import GOLDEN

DIRECTORY = GOLDEN / "flagiclmodel" / "model"

EXAMPLE = {"instruct": "Find the answer.", "query": "what is bread", "response": "Bread is baked dough."}


def load(**model: Any) -> Any:
    return core.load(str(DIRECTORY), precision="float32", device="cpu", model={"family": "icl"} | model)


def written(engine: Engine, text: str, **options: Any) -> str:
    """The text that the model reads, without the special tokens around it."""
    model: Any = engine.models["model"]
    (tokens,) = model.encode_texts([text], EmbedOptions(**options))
    return model._tokenizer.decode(tokens.ids.tolist()[1:-1])


def test_a_query_stands_behind_its_examples_and_before_the_suffix() -> None:
    with load(query_instruction="Look.", examples=[EXAMPLE]) as engine:
        assert written(engine, "why rain", input_type="query") == (
            "<instruct>Find the answer.\n<query>what is bread\n<response>Bread is baked dough.\n\n"
            "<instruct>Look.\n<query>why rain\n<response>"
        )


@pytest.mark.parametrize("input_type", [None, "document"])
def test_what_is_no_query_is_read_as_it_is(input_type: str | None) -> None:
    with load(query_instruction="Look.", examples=[EXAMPLE]) as engine:
        assert written(engine, "rain falls", input_type=input_type) == "rain falls"


def test_a_call_brings_its_own_examples_and_instruction() -> None:
    with load(query_instruction="Look.", examples=[EXAMPLE]) as engine:
        own = ({"query": "a", "response": "b"},)
        assert written(engine, "c", input_type="query", examples=own, instruction="Seek.") == (
            "<instruct>Seek.\n<query>a\n<response>b\n\n<instruct>Seek.\n<query>c\n<response>"
        )
        assert written(engine, "c", input_type="query", examples=()) == "<instruct>Look.\n<query>c\n<response>"


def test_braces_in_texts_are_only_braces() -> None:
    strange = {"instruct": "{} {0} {0.__class__}", "query": "{}", "response": "%s {}"}
    with load(examples=[strange]) as engine:
        assert written(engine, "{}", input_type="query", instruction="{}") == (
            "<instruct>{} {0} {0.__class__}\n<query>{}\n<response>%s {}\n\n<instruct>{}\n<query>{}\n<response>"
        )


def test_a_format_needs_its_three_places() -> None:
    with pytest.raises(InvalidSettings, match=r"examples_format .* must contain {} 3 times, given 2 times"):
        load(examples_format="{} {}", examples=[EXAMPLE])
    with pytest.raises(InvalidInput, match="3 times"):
        write_example("{} {}", *EXAMPLE.values())


def test_a_long_query_gives_way_and_examples_and_suffix_stay() -> None:
    with load(examples=[EXAMPLE]) as engine:
        for max_length in (None, 512, 40):
            text = written(engine, "why does it rain " * 500, input_type="query", max_length=max_length)
            assert text.startswith("<instruct>Find the answer.")
            assert text.endswith("\n<response>")
        vectors = engine.embed(["rain " * 5000], input_type="query").dense
    assert np.isfinite(vectors).all()


def test_a_query_without_room_is_refused() -> None:
    long = EXAMPLE | {"response": "bread " * 600}
    with load() as engine:
        with pytest.raises(InvalidInput, match=r"beside \d+ of examples; model model takes 512"):
            engine.embed(["a"], input_type="query", examples=[long])
        with pytest.raises(InvalidInput, match="max_length is 5"):
            engine.embed(["a"], input_type="query", max_length=5)


def test_a_rerank_reads_query_with_examples_and_passages_without() -> None:
    passages = ["Bread is baked dough.", "Rain falls.", "A boat leaves."]
    with load(query_instruction="Look.", examples=[EXAMPLE]) as engine:
        query = engine.embed(["why rain"], input_type="query").dense[0]
        scores = engine.rerank("why rain", passages).scores
        np.testing.assert_allclose(scores, engine.embed(passages, input_type="document").dense @ query, atol=1e-5)


def test_a_directory_named_as_published_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "bge-en-icl").symlink_to(DIRECTORY)
    with core.load(str(tmp_path / "bge-en-icl"), device="cpu") as engine:
        spec = engine.models["model"].spec
    assert (spec.family, spec.pooling, spec.query_format) == ("icl", "last_token", "<instruct>{}\n<query>{}")
