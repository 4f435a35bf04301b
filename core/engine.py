"""The engine: calls become jobs, jobs become batches, batches become results.

A calling thread encodes its texts, lets them wait for batches in the device loop, and sleeps until
its job is done. Many callers at once is the normal case: that is how jobs come to share a batch.

    embed, rerank  →  _compute: encode  →  DeviceLoop: schedule, forward, deliver  →  vectors or scores
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from core import vectors
from core.checks import EmbedOptions, RerankOptions, check_text, check_texts
from core.device_loop import DeviceLoop, Job
from core.errors import InvalidInput, InvalidSettings, UnknownModel
from core.models import Model
from core.results import Embeddings, Ranking
from core.scheduler import Sequence
from core.settings import Settings
from core.tokenizer import Tokens

#: Texts encoded before the first of them may be computed: small enough that the device starts
#: early on a large job, large enough to keep the tokenizer's threads busy.
_ENCODE_SLICE = 256


class Engine:
    """Models on one device, shared by any number of calling threads. A context manager."""

    def __init__(self, models: Mapping[str, Model], settings: Settings) -> None:
        self.models = dict(models)
        self.settings = settings
        self.default_embed, self.default_rerank = _defaults(self.models, settings)
        self._loop = DeviceLoop(self.models, settings)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def max_batch_tokens(self) -> int:
        """Tokens of one forward pass, as settings and models gave it."""
        return self._loop.scheduler.max_batch_tokens

    def embed(self, texts: list[str], *, priority: int = 0, **given: Any) -> Embeddings:
        """Embed `texts`; options as in `core.checks.EmbedOptions`.

        `Embeddings.dense` is (num_texts, dim) in the order of the texts. InvalidInput or
        UnknownModel for a wrong call; DeviceFailure if the pass failed.
        """
        texts, chosen = check_texts("texts", texts), EmbedOptions.checked(given)
        model = self._model(chosen.model, self.default_embed, "embed")
        _check_model_can(model, chosen)
        rows = self._compute(
            model,
            len(texts),
            frozenset(chosen.outputs),
            priority,
            lambda part: model.encode_texts(texts[part], chosen),
        )
        dense, ranges = None, None
        if "dense" in rows:
            pooled = _stack(rows["dense"], model.spec.dimensions)
            normalize = model.spec.normalize if chosen.normalize is None else chosen.normalize
            dense, ranges = vectors.finish(pooled, chosen.dimensions, normalize, chosen.dtype)
        return Embeddings(dense, rows.get("colbert"), ranges, model.spec.alias)

    def rerank(self, query: str, passages: list[str], *, priority: int = 0, **given: Any) -> Ranking:
        """Score each passage against `query`; options as in `core.checks.RerankOptions`.

        A cross-encoder gives its logit. An embedding model gives the cosine of the two vectors, or
        with mode="colbert" the MaxSim of their tokens.
        """
        query, passages = check_text("query", query), check_texts("passages", passages)
        chosen = RerankOptions.checked(given)
        model = self._model(chosen.model, self.default_rerank, "rerank")
        if model.spec.is_embedder:
            scores = self._score_by_embedding(model, query, passages, chosen, priority)
        elif chosen.mode is not None:
            raise InvalidInput(
                f"mode {chosen.mode!r} is for embedding models; {model.spec.alias} is a cross-encoder, which has one way to score"
            )
        else:
            scores = self._score_pairs(model, query, passages, chosen, priority)
        if chosen.normalize:
            scores = np.exp(-np.logaddexp(0, -scores))  # the sigmoid, without overflow for logits below -88
        order = np.argsort(-scores, kind="stable")[: chosen.top_k].astype(np.int32)
        return Ranking(scores, order, model.spec.alias)

    def warm_up(self) -> None:
        """Run every model once on a full batch, so that the first job does not pay for first use."""
        for model in self.models.values():
            length = min(model.spec.max_length, 512)
            count = max(1, min(self.max_batch_tokens // length, self.settings.max_batch_sequences))
            ids = np.full(length, int(model.spec.pad_token_id == 0), np.int32)  # 0 or 1: every vocabulary has both
            batch = [Sequence(ids, np.zeros_like(ids), None, row) for row in range(count)]
            model.forward(batch, model.outputs)

    def close(self) -> None:
        """Finish what waits, then end the device thread. Later calls are refused."""
        self._loop.close()

    def _score_pairs(
        self, model: Model, query: str, passages: list[str], chosen: RerankOptions, priority: int
    ) -> np.ndarray:
        """(num_passages,) logits of a cross-encoder."""
        rows = self._compute(
            model,
            len(passages),
            frozenset({"score"}),
            priority,
            lambda part: model.encode_pairs(query, passages[part], chosen),
        )
        return np.array(rows["score"], np.float32)

    def _score_by_embedding(
        self, model: Model, query: str, passages: list[str], chosen: RerankOptions, priority: int
    ) -> np.ndarray:
        """(num_passages,) cosines or MaxSims; the query is row 0 of the job, so all share batches."""
        output = chosen.mode or "dense"
        _check_output(model, output)
        as_query = EmbedOptions(input_type="query", max_length=chosen.max_length)
        as_document = EmbedOptions(input_type="document", max_length=chosen.max_length)

        def encode(part: slice) -> list[Tokens]:
            first = model.encode_texts([query], as_query) if part.start == 0 else []
            return first + model.encode_texts(passages[max(0, part.start - 1) : part.stop - 1], as_document)

        rows = self._compute(model, 1 + len(passages), frozenset({output}), priority, encode)[output]
        if output == "colbert":
            return np.array([vectors.max_sim(rows[0], row) for row in rows[1:]], np.float32)
        scaled = vectors.normalized(_stack(rows, model.spec.dimensions))
        scores: np.ndarray = scaled[1:] @ scaled[0]
        return scores

    def _compute(
        self,
        model: Model,
        num_rows: int,
        outputs: frozenset[str],
        priority: int,
        encode: Callable[[slice], list[Tokens]],
    ) -> dict[str, list[np.ndarray]]:
        """Encode a job slice by slice, let it wait for batches, and return its rows in order."""
        job = Job(num_rows, outputs)
        try:
            for start in range(0, num_rows, _ENCODE_SLICE):
                tokens = encode(slice(start, start + _ENCODE_SLICE))
                arrived_s = time.monotonic()
                key = (model.spec.alias, outputs)
                self._loop.submit(
                    Sequence(one.ids, one.type_ids, job, start + index, key, priority, arrived_s)
                    for index, one in enumerate(tokens)
                )
        except BaseException:
            self._loop.withdraw(job)  # a later slice was bad: the first ones need not run
            raise
        return job.done.result()

    def _model(self, alias: str | None, default: str | None, kind: str) -> Model:
        chosen = alias or default
        if chosen is None:
            raise UnknownModel(
                f"{kind} needs model=…: there is no default for it; this worker serves {', '.join(self.models)}"
            )
        if chosen not in self.models:
            raise UnknownModel(f"unknown model {chosen!r:.40}; this worker serves {', '.join(self.models)}")
        model = self.models[chosen]
        if kind == "embed" and not model.spec.is_embedder:
            raise InvalidInput(f"model {chosen} is a cross-encoder: it can rerank but not embed")
        return model


def _defaults(models: Mapping[str, Model], settings: Settings) -> tuple[str | None, str | None]:
    """(alias for embed, alias for rerank): as set, else the only one that can."""
    embedders = [alias for alias, model in models.items() if model.spec.is_embedder]
    rerankers = [alias for alias, model in models.items() if not model.spec.is_embedder] or embedders
    if settings.default_embed not in (None, "none", *embedders):
        raise InvalidSettings(f"default_embed is {settings.default_embed!r}, a cross-encoder, which cannot embed")
    return _default(settings.default_embed, embedders), _default(settings.default_rerank, rerankers)


def _default(wanted: str | None, candidates: list[str]) -> str | None:
    if wanted is None:
        return candidates[0] if len(candidates) == 1 else None
    return None if wanted == "none" else wanted


def _check_model_can(model: Model, chosen: EmbedOptions) -> None:
    """Refuse what this model cannot do. InvalidInput says what it can."""
    for output in chosen.outputs:
        _check_output(model, output)
    if chosen.dimensions is not None and chosen.dimensions > model.spec.dimensions:
        raise InvalidInput(
            f"dimensions may be up to {model.spec.dimensions} for model {model.spec.alias}; given {chosen.dimensions}"
        )


def _check_output(model: Model, output: str) -> None:
    if output not in model.outputs:
        raise InvalidInput(
            f"model {model.spec.alias} has no {output!r} output; it has {', '.join(sorted(model.outputs))}"
        )


def _stack(rows: list[np.ndarray], dimensions: int) -> np.ndarray:
    """(num_rows, dim); np.stack has no answer for no rows."""
    return np.stack(rows) if rows else np.empty((0, dimensions), np.float32)
