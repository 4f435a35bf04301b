"""`Face`, the base of FlagEmbedding's classes: translates their arguments and owns an engine with one model.

A constructor's arguments become attributes of the same names. Knows nothing of embedding or reranking.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from embedq import core
from embedq.core.errors import InvalidInput
from embedq.core.options import check_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from embedq.core.checkpoint.spec import ModelSpec
    from embedq.core.engine import Engine
    from embedq.core.models import Model
    from embedq.core.settings import Precision

#: One device or several: "cuda:0", 0, ["cuda:0", "cuda:1"], [0, 1]; None chooses by what the machine has.
Devices = str | int | list[str] | list[int] | None

#: The alias of the only model.
_ALIAS = "model"


class Face:
    """A model with the arguments of one of FlagEmbedding's classes. A context manager.

    Every argument of the constructor becomes an attribute that may be changed between calls; changing those for loading
    (path, precision, device, pooling) has no effect. `close`, the end of `with`, or the loss of the last reference
    closes the engine.
    """

    #: Key of `core.models.FAMILIES`.
    family: ClassVar[str]
    #: Keywords of the constructor beyond its parameters, with their defaults, as in FlagEmbedding.
    more: ClassVar[Mapping[str, Any]] = {}

    model_name_or_path: str
    use_fp16: bool
    use_bf16: bool = False
    devices: Devices
    trust_remote_code: bool
    cache_dir: str | None
    batch_size: int

    #: transformers' tokenizer, once it was asked for.
    _files_tokenizer: PreTrainedTokenizerFast | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish waiting calls and close the engine; later calls raise DeviceFailure."""
        self.engine.close()

    def stop_self_pool(self) -> None:
        """Do nothing, because there are no processes to stop. Exists because programs call it."""

    @property
    def precision(self) -> str:
        """The precision in use, by torch's name."""
        return self.engine.models[_ALIAS].precision

    @property
    def device(self) -> str:
        """The device in use, by torch's name."""
        return self.engine.models[_ALIAS].device

    @property
    def model(self) -> Model:
        """The model in use, `core.models.Model`: not transformers' class, which FlagEmbedding's attribute of this name holds."""
        return self.engine.models[_ALIAS]

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """transformers' fast tokenizer of the checkpoint, as FlagEmbedding's attribute; changing it changes no result."""
        if self._files_tokenizer is None:
            from transformers import AutoTokenizer

            # Never the checkpoint's own code, and never the network: the directory is there.
            self._files_tokenizer = AutoTokenizer.from_pretrained(
                self.spec.path, trust_remote_code=False, local_files_only=True
            )
        return self._files_tokenizer

    @property
    def spec(self) -> ModelSpec:
        """The `ModelSpec` in use."""
        return self.engine.models[_ALIAS].spec

    def _load(self, arguments: dict[str, Any]) -> None:
        """Keep a constructor's `arguments` (its locals) as attributes, and load the model."""
        from embedq.core.devices import choose_device

        given = arguments.pop("given")
        vars(self).update({name: value for name, value in arguments.items() if name != "self"})
        vars(self).update(checked(type(self), given, self.more))
        device = choose_device(one_device(self.devices))
        #: The device in use, as FlagEmbedding lists those it was given.
        self.target_devices = [device]
        path = os.fspath(self.model_name_or_path)
        model = {"layout": "transformers", "family": self.family, "cache_dir": self.cache_dir, **self._settings(device)}
        precision: Precision = model.pop("precision")
        self.engine: Engine = core.load(path, alias=_ALIAS, device=device, precision=precision, model=model)
        weakref.finalize(self, _release, self.engine)
        if self.trust_remote_code and "auto_map" in self.spec.config:
            warnings.warn(
                f"{path} contains code of its own, which is never run: family {self.family!r} runs its weights",
                stacklevel=3,
            )

    def _settings(self, device: str) -> dict[str, Any]:
        """Translate the arguments for loading on `device` into fields of `core.settings.ModelSettings`."""
        raise NotImplementedError

    def _cut(self, max_length: int | None, default: int | None) -> int | None:
        """Return a call's own limit unchanged; the constructor's, lowered to the model's positions if it has fewer.

        The default limits exceed some models' positions; FlagEmbedding fails only for texts that are too long.
        """
        return max_length if max_length is not None or default is None else min(default, self.spec.max_length)


def checked(function: Callable[..., Any], given: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `more`, given or default. InvalidInput for any other, listing all."""
    unknown = next((name for name in given if name not in more), None)
    if unknown is None:
        return {**more, **given}
    owner = getattr(function, "__self__", None)  # set for methods, not for classes
    called = function.__name__ if owner is None else f"{type(owner).__name__}.{function.__name__}"
    parameters = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
    known = [one.name for one in parameters] + list(more)
    raise InvalidInput(f"{called} has no argument {unknown!r:.40}; it has {', '.join(known)}")


def pairs_of(given: Any) -> tuple[list[tuple[str, str]], bool]:
    """Read (query, passage) pairs from a list or a single bare pair; returns (pairs, whether it was a single one)."""
    is_one = isinstance(given, list | tuple | np.ndarray) and len(given) > 0 and isinstance(given[0], str)
    return check_pairs([given] if is_one else given), is_one


def one_device(devices: Devices) -> str:
    """The device to use, as `core.devices.choose_device` takes it; of several the first, with a warning."""
    if isinstance(devices, list | tuple):
        if not devices:
            raise InvalidInput("devices is an empty list; name one device, or leave it out")
        if len(devices) > 1:
            warnings.warn(
                f"of {len(devices)} devices only {devices[0]!r:.40} is used: one process uses one device, and "
                "`embedq workers` starts a process per device",
                stacklevel=4,
            )
        devices = devices[0]
    if devices is None:
        return "auto"
    if isinstance(devices, int) and not isinstance(devices, bool):
        from embedq.core.devices import VISIBILITY
        from embedq.core.devices import devices as present

        kind = present()[0].kind
        # A number means an accelerator; without one, `choose_device` raises.
        return f"{kind if VISIBILITY[kind] else 'cuda'}:{devices}"
    if not isinstance(devices, str):
        raise InvalidInput(f"devices must be a string, a number or a list of them; given {type(devices).__name__}")
    return devices


def _release(engine: Engine) -> None:
    with contextlib.suppress(RuntimeError):  # collected on the device thread, which cannot wait for its own end
        engine.close()
