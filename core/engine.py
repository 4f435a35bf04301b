"""The engine: calls become jobs, jobs become batches, batches become results.

A calling thread encodes its texts, lets them wait for batches in the device loop, and sleeps until
its job is done. Many callers at once is the normal case: that is how jobs come to share a batch.

    embed, rerank  →  _compute: encode  →  DeviceLoop: schedule, forward, deliver  →  vectors or scores
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, cast

import numpy as np

from core import scoring, vectors
from core.checks import EmbedOptions, RerankOptions, check_pairs, check_text, check_texts
from core.device_loop import DeviceLoop, Job
from core.errors import InvalidInput, InvalidSettings, UnknownModel
from core.models import Embedder, Model, Reranker
from core.results import Embeddings, Ranking
from core.sequence import Sequence, Tokens, Wanted
from core.settings import Settings
from core.warm_up import warm_up

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
        """Tokens of one forward pass: as set or usual for the device, less what its memory took off since."""
        return self._loop.scheduler.max_batch_tokens

    def embed(self, texts: list[str], *, priority: int = 0, **given: Any) -> Embeddings:
        """Embed `texts`; options as in `core.checks.EmbedOptions`.

        `Embeddings.dense` is (num_texts, dim) in the order of the texts. InvalidInput or
        UnknownModel for a wrong call; DeviceFailure if the pass failed.
        """
        texts, chosen = check_texts("texts", texts), EmbedOptions.checked(given)
        model = cast(Embedder, self._model(chosen.model, self.default_embed, "embed"))
        rows = self._embed(model, texts, model.wanted(chosen), chosen, priority)
        normalize = model.spec.normalize if chosen.normalize is None else chosen.normalize
        dense, ranges, colbert = None, None, None
        if "dense" in rows:
            pooled = _stack(rows["dense"], model.spec.dimensions)
            dense, ranges = vectors.finish(pooled, chosen.dimensions, normalize, chosen.dtype)
        if "colbert" in rows:
            colbert = [vectors.finish(row, chosen.dimensions, normalize, "float32")[0] for row in rows["colbert"]]
        return Embeddings(dense, colbert, rows.get("sparse"), ranges, model.spec.alias)

    def rerank(self, query: str, passages: list[str], *, priority: int = 0, **given: Any) -> Ranking:
        """Score each passage against `query`; options as in `core.checks.RerankOptions`.

        A reranker gives its logit. An embedding model gives the cosine of the two vectors, or what
        `mode` says. Of several layers the last decides the order.
        """
        query, passages = check_text("query", query), check_texts("passages", passages)
        chosen = RerankOptions.checked(given)
        model = self._model(chosen.model, self.default_rerank, "rerank")
        layers = self._scores(model, [(query, passage) for passage in passages], chosen, priority)
        order = np.argsort(-layers[-1], kind="stable")[: chosen.top_k].astype(np.int32)
        return Ranking(layers[-1], order, model.spec.alias, layers if len(layers) > 1 else None)

    def score(self, pairs: list[tuple[str, str]], *, priority: int = 0, **given: Any) -> np.ndarray:
        """Score (query, passage) pairs; options as in `core.checks.RerankOptions`, `top_k` aside.

        (num_pairs,) float32 in the order of the pairs; (num_layers, num_pairs) for several layers.
        """
        checked = check_pairs(pairs)
        chosen = RerankOptions.checked(given)
        model = self._model(chosen.model, self.default_rerank, "rerank")
        layers = self._scores(model, checked, chosen, priority)
        return layers if len(layers) > 1 else layers[0]

    def warm_up(self) -> None:
        """Run every model, so that the first job does not pay for first use, and fit the budget to free memory."""
        limits = self.max_batch_tokens, self.settings.max_batch_sequences
        self._loop.limit_batch_tokens(warm_up(self.models.values(), *limits))

    def close(self) -> None:
        """Finish what waits, then end the device thread. Later calls are refused."""
        self._loop.close()

    def _scores(self, model: Model, pairs: list[tuple[str, str]], chosen: RerankOptions, priority: int) -> np.ndarray:
        """(num_layers, num_pairs) float32, ascending layers; one layer where a model knows no others."""
        wanted = model.wanted(chosen)
        if model.spec.is_embedder:
            layers = self._score_by_embedding(cast(Embedder, model), pairs, wanted, chosen, priority)[np.newaxis]
        else:
            reranker = cast(Reranker, model)
            rows = self._compute(
                model, len(pairs), wanted, priority, lambda part: reranker.encode_pairs(pairs[part], chosen)
            )["score"]
            layers = _stack(rows, max(1, len(wanted.cutoff_layers))).T  # (num_layers, num_pairs)
        if chosen.normalize:
            layers = np.exp(-np.logaddexp(0, -layers))  # the sigmoid, without overflow for logits below -88
        return np.ascontiguousarray(layers)

    def _score_by_embedding(
        self, model: Embedder, pairs: list[tuple[str, str]], wanted: Wanted, chosen: RerankOptions, priority: int
    ) -> np.ndarray:
        """(num_pairs,) scores from the two texts' own rows, each different text computed once."""
        sides = []
        for side, input_type in enumerate(("query", "document")):
            texts = list(dict.fromkeys(pair[side] for pair in pairs))
            options = EmbedOptions(
                input_type=input_type,
                instruction=chosen.passage_instruction if side else chosen.query_instruction,
                instruction_format=chosen.passage_instruction_format if side else chosen.query_instruction_format,
                max_length=chosen.max_length if side else chosen.query_max_length or chosen.max_length,
            )
            rows = self._embed(model, texts, wanted, options, priority)
            if "colbert" in rows:
                rows["colbert"] = [vectors.normalized(row) for row in rows["colbert"]]
            place = {text: index for index, text in enumerate(texts)}
            sides.append({name: [values[place[pair[side]]] for pair in pairs] for name, values in rows.items()})
        return scoring.score(sides[0], sides[1], chosen.mode or "dense", chosen.weights)

    def _embed(
        self, model: Embedder, texts: list[str], wanted: Wanted, chosen: EmbedOptions, priority: int
    ) -> dict[str, list[Any]]:
        """Each output's rows as the model gives them, in the order of `texts`."""
        return self._compute(model, len(texts), wanted, priority, lambda part: model.encode_texts(texts[part], chosen))

    def _compute(
        self, model: Model, num_rows: int, wanted: Wanted, priority: int, encode: Callable[[slice], list[Tokens]]
    ) -> dict[str, list[Any]]:
        """Encode a job slice by slice, let it wait for batches, and return its rows in order."""
        job, key = Job(num_rows, wanted), (model.spec.alias, wanted)
        try:
            for start in range(0, num_rows, _ENCODE_SLICE):
                if job.done.done():
                    break  # an earlier slice failed; what follows cannot change the answer
                encoded = encode(slice(start, start + _ENCODE_SLICE))
                arrived_s = time.monotonic()
                self._loop.submit(
                    Sequence(tokens, job, start + index, key, priority, arrived_s)
                    for index, tokens in enumerate(encoded)
                )
            return job.done.result()
        except BaseException:
            self._loop.withdraw(job)  # one sequence failed, or a later slice was bad: the others need not run
            raise

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
            raise InvalidInput(f"model {chosen} is a reranker: it cannot embed")
        return model


def _defaults(models: Mapping[str, Model], settings: Settings) -> tuple[str | None, str | None]:
    """(alias for embed, alias for rerank): as set, else the only one that can."""
    embedders = [alias for alias, model in models.items() if model.spec.is_embedder]
    rerankers = [alias for alias, model in models.items() if not model.spec.is_embedder] or embedders
    if settings.default_embed not in (None, "none", *embedders):
        raise InvalidSettings(f"default_embed is {settings.default_embed!r}, a reranker, which cannot embed")
    return _default(settings.default_embed, embedders), _default(settings.default_rerank, rerankers)


def _default(wanted: str | None, candidates: list[str]) -> str | None:
    if wanted is None:
        return candidates[0] if len(candidates) == 1 else None
    return None if wanted == "none" else wanted


def _stack(rows: list[np.ndarray], dimensions: int) -> np.ndarray:
    """(num_rows, dim); np.stack has no answer for no rows."""
    return np.stack(rows) if rows else np.empty((0, dimensions), np.float32)
