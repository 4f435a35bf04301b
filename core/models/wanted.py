"""What a call wants of a model's forward pass, and what is refused. Shared by the families."""

from __future__ import annotations

from core.checks import EmbedOptions, RerankOptions
from core.errors import InvalidInput
from core.sequence import Wanted
from core.spec import ModelSpec

#: Options of a rerank that only some rerankers understand.
_SPECIAL = ("prompt", "cutoff_layers", "compress_layers", "compress_ratio")

#: What each way of scoring with an embedding model needs of its forward pass.
_MODE_OUTPUTS = {
    "dense": frozenset({"dense"}),
    "sparse": frozenset({"sparse"}),
    "colbert": frozenset({"colbert"}),
    "weighted": frozenset({"dense", "sparse", "colbert"}),
}


def of_embedder(spec: ModelSpec, outputs: frozenset[str], options: EmbedOptions | RerankOptions) -> Wanted:
    """For a model that embeds, also when it is asked to rerank."""
    if isinstance(options, RerankOptions):
        refuse(spec, options, _SPECIAL)
        wanted = _MODE_OUTPUTS[options.mode or "dense"]
    else:
        wanted = frozenset(options.outputs)
        if options.dimensions is not None and options.dimensions > spec.dimensions:
            raise InvalidInput(
                f"dimensions may be up to {spec.dimensions} for model {spec.alias}; given {options.dimensions}"
            )
    for output in sorted(wanted - outputs):
        raise InvalidInput(f"model {spec.alias} has no {output!r} output; it has {', '.join(sorted(outputs))}")
    return Wanted(wanted)


def refuse(spec: ModelSpec, options: RerankOptions, names: tuple[str, ...]) -> None:
    """InvalidInput if a call uses one of the options that this family does not know."""
    for name in names:
        if getattr(options, name) is not None:
            raise InvalidInput(f"option {name} means nothing to model {spec.alias}, a {spec.family.replace('_', ' ')}")
