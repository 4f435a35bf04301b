"""`modules.json` of an embedder -> its modules in order: those for each token, the pooling, those behind it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from embedq.core.checkpoint.saved_modules import Saved, SavedModule, pooling_of
from embedq.core.errors import CannotLoadModel

#: Keys of the modules' own configurations.
_KEYS: dict[str, set[str]] = {
    "Dense": {"in_features", "out_features", "bias", "activation_function", "use_residual"}
    | {"module_input_name", "module_output_name"},
    "LayerNorm": {"dimension"},
    "Normalize": {"module_input_name", "module_output_name"},
    "Dropout": {"dropout"},  # for training alone
}

#: Classes that may work on each token, and on the pooled vector.
_OF_TOKENS = ("Dense", "Normalize")
_OF_VECTORS = ("Dense", "LayerNorm", "Dropout", "Normalize")

_TOKENS, _VECTOR = "token_embeddings", "sentence_embedding"


@dataclass(frozen=True, slots=True)
class Chain:
    """The modules that follow the network."""

    before: tuple[SavedModule, ...] = ()
    poolings: tuple[str, ...] = ()
    include_prompt: bool = True
    #: A Normalize at the very end is left out here: that is done on the host, unless a call does not want it.
    behind: tuple[SavedModule, ...] = ()
    last: SavedModule | None = None

    @property
    def is_normalized(self) -> bool:
        """Returns True if Normalize is the last module."""
        return self.last is not None

    @property
    def all(self) -> tuple[SavedModule, ...]:
        """The modules that follow the pooling, Normalize included."""
        return self.behind if self.last is None else (*self.behind, self.last)

    def width(self, hidden: int, num_poolings: int) -> int:
        """Components of a vector, where a token's state has `hidden`."""
        return width_behind(self.behind, width_behind(self.before, hidden) * num_poolings)


def width_behind(modules: Iterable[SavedModule], width: int) -> int:
    """Values that `modules` give of `width`."""
    for module in modules:
        width = int(module.config["out_features"]) if module.name == "Dense" else width
    return width


def read_chain(saved: Saved) -> Chain:
    """The modules of an embedder. CannotLoadModel for a class, an order or a key that is not supported."""
    names = saved.names
    if names[:1] != ["Transformer"] or names.count("Pooling") != 1 or saved.transformer.task != "feature-extraction":
        raise saved.refuse(f"supported is Transformer, Pooling, then any of {', '.join(_OF_VECTORS)}")
    place = names.index("Pooling")
    before, pooling, behind = saved.modules[1:place], saved.modules[place], saved.modules[place + 1 :]
    for module in before:
        _check(saved, module, _OF_TOKENS, _TOKENS)
    for module in behind:
        _check(saved, module, _OF_VECTORS, _VECTOR)
    if saved.transformer.query_expansion is not None:
        raise saved.refuse("query_expansion of its Transformer is for models with a vector per token")
    return Chain(before, pooling_of(pooling), bool(pooling.config.get("include_prompt", True)), *_split(behind))


def read_sparse_chain(saved: Saved) -> Chain:
    """The SpladePooling of a SparseEncoder, which reads logits and no states."""
    pooling = saved.modules[1]
    pooling.refuse_other_keys(
        {"pooling_strategy", "activation_function", "embedding_dimension", "word_embedding_dimension"}
    )
    for name, known in (("pooling_strategy", ("max", "sum")), ("activation_function", ("relu", "log1p_relu"))):
        if pooling.config.get(name, known[0]) not in known:
            raise CannotLoadModel(
                f"{pooling.path}/config.json has {name} {pooling.config[name]!r:.80}; supported are {known}"
            )
    return Chain(behind=(replace(pooling, config={**pooling.config, "max_active_dims": saved.max_active_dims}),))


def read_static_chain(saved: Saved) -> Chain:
    """The modules behind a StaticEmbedding, which makes the vector of a text itself."""
    for module in saved.modules[1:]:
        _check(saved, module, _OF_VECTORS, _VECTOR)
    return Chain((), (), True, *_split(saved.modules[1:]))


def read_scoring_chain(saved: Saved) -> Chain:
    """The modules of a CrossEncoder with a pooling, the last of which is a Dense that writes its one value as the score."""
    *_, last = saved.modules
    config = dict(last.config)
    if last.name != "Dense" or config.get("module_output_name") != "scores" or config.get("out_features") != 1:
        raise saved.refuse("the last must be a Dense with module_output_name scores and 1 of out_features")
    scoring = SavedModule(last.name, last.path, config | {"module_output_name": config.get("module_input_name")})
    chain = read_chain(replace(saved, modules=(*saved.modules[:-1], scoring)))
    return replace(chain, behind=chain.all, last=None)


def _split(behind: tuple[SavedModule, ...]) -> tuple[tuple[SavedModule, ...], SavedModule | None]:
    """The modules that change a vector, and apart from them a Normalize that is the last."""
    working = [module for module in behind if module.name != "Dropout"]
    last = working.pop() if working and working[-1].name == "Normalize" else None
    return tuple(working), last


def _check(saved: Saved, module: SavedModule, classes: tuple[str, ...], feature: str) -> None:
    """CannotLoadModel unless `module` is of one of `classes`, and reads and writes `feature`."""
    if module.name not in classes:
        where = "behind the Pooling" if feature == _VECTOR else "before the Pooling"
        raise saved.refuse(f"supported {where} is any of {', '.join(classes)}")
    module.refuse_other_keys(_KEYS[module.name])
    _check_features(module, feature)
    if module.name == "Dense" and not {"in_features", "out_features"} <= module.config.keys():
        raise CannotLoadModel(
            f"{module.path}/config.json does not say in_features and out_features of the Dense module"
        )


def _check_features(module: SavedModule, feature: str) -> None:
    config: Any = module.config
    read = config.get("module_input_name") or _VECTOR
    written = config.get("module_output_name") or read
    if {read, written} != {feature}:
        raise CannotLoadModel(
            f"{module.path}/config.json reads {read!s:.80} and writes {written!s:.80}: something else than {feature}, "
            "which a module at its place must read and write"
        )
