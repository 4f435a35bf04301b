"""Turns a call's options into the outputs requested of a pass, and refuses unsupported ones. Shared by the families."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.errors import InvalidInput
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Wanted

#: Rerank options that only some rerankers support.
_SPECIAL = ("prompt", "cutoff_layers", "compress_layers", "compress_ratio")

#: Rerank options of which a reranker has none, unless its family says so.
REFUSED = ("mode", "weights", *_SPECIAL)

#: Outputs that each mode of scoring with an embedding model needs.
_MODE_OUTPUTS = {
    "dense": frozenset({"dense"}),
    "sparse": frozenset({"sparse"}),
    "colbert": frozenset({"colbert"}),
    "weighted": frozenset({"dense", "sparse", "colbert"}),
}


def of_embedder(
    spec: ModelSpec,
    outputs: frozenset[str],
    options: EmbedOptions | RerankOptions,
    reasons: Mapping[str, str] | None = None,
) -> Wanted:
    """The request to an embedding model, by an embedding or a reranking call. `reasons`: why it may lack an output."""
    if isinstance(options, RerankOptions):
        refuse(spec, options, _SPECIAL)
        wanted = _MODE_OUTPUTS[options.mode or usual_mode(outputs)]
    else:
        wanted = frozenset(options.outputs)
        if options.dimensions is not None and options.dimensions > spec.dimensions:
            raise InvalidInput(
                f"dimensions may be up to {spec.dimensions} for model {spec.alias}; given {options.dimensions}"
            )
    for output in sorted(wanted - outputs):
        reason = f": {reasons[output]}" if reasons and output in reasons else ""
        raise InvalidInput(f"model {spec.alias} has no {output!r} output{reason}; it has {', '.join(sorted(outputs))}")
    return _of_outputs(wanted)


def of_reranker(spec: ModelSpec, options: EmbedOptions | RerankOptions, refused: tuple[str, ...] = REFUSED) -> Wanted:
    """The request to a reranker with one score per pair. InvalidInput if the call uses one of the options `refused`."""
    assert isinstance(options, RerankOptions)
    refuse(spec, options, refused)
    return _of_outputs(frozenset({"score"}))


def usual_mode(outputs: frozenset[str]) -> str:
    """The way of scoring for calls without `mode`: by vectors, if the model has them."""
    return "dense" if "dense" in outputs else min(outputs)


@cache
def _of_outputs(outputs: frozenset[str]) -> Wanted:
    """One object per set of outputs, so that dictionaries find it by identity, without comparing."""
    return Wanted(outputs)


def refuse(spec: ModelSpec, options: RerankOptions, names: tuple[str, ...]) -> None:
    """InvalidInput if a call uses one of the options `names`, which this family does not support."""
    for name in names:
        if getattr(options, name) is not None:
            raise InvalidInput(f"option {name} means nothing to model {spec.alias}, a {spec.family.replace('_', ' ')}")


def layers_of(spec: ModelSpec, layers: tuple[int, ...], options: RerankOptions) -> tuple[int, ...]:
    """The layers that a call requests, ascending, out of a layered model's `layers`; the last if it names none."""
    asked = options.cutoff_layers
    if asked is None:
        return layers[-1:]
    for layer in asked or ("none",):
        if layer not in layers:
            raise InvalidInput(
                f"cutoff_layers must be layers with a head, for model {spec.alias} {_ranges(layers)}; given {layer}"
            )
    return tuple(sorted(set(asked)))


def _ranges(layers: tuple[int, ...]) -> str:
    """Describe evenly spaced numbers: "8 to 40", "20 to 40 in steps of 4"."""
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    return f"{layers[0]} to {layers[-1]}" + (f" in steps of {step}" if step > 1 else "")
