"""What the embedding faces share: FlagEmbedding's precision, instructions and lengths as options of `engine.embed`.

In: a constructor's arguments; texts with the instruction and format they are to get. Out: `Embeddings`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from embedq.core.checkpoint.prompts import PLAIN
from embedq.core.errors import InvalidInput
from embedq.core.flag.face import Face, checked
from embedq.core.results import Embeddings

#: One text, or several.
Texts = str | list[str]

#: Of keywords that FlagEmbedding hands to its tokenizer, the one its users are told to give. How wide a
#: batch is padded changes no vector.
PADDING: Mapping[str, Any] = {"pad_to_multiple_of": None}

#: What every constructor takes beyond its parameters; the last is ours, see `Embedder`.
MORE: Mapping[str, Any] = {
    "passage_instruction_for_retrieval": None,
    "passage_instruction_format": PLAIN,
    "round_weights_on_cpu": True,
}

#: What every `encode` takes beyond its parameters.
WRITTEN: Mapping[str, Any] = {"instruction": None, "instruction_format": PLAIN}


class Embedder(Face):
    """A face whose calls become `engine.embed`.

    On a CPU FlagEmbedding takes `use_fp16` (its default) and `use_bf16` as rounding the weights, and computes in
    float32. `round_weights_on_cpu` False keeps the weights as they are.
    """

    more: ClassVar[Mapping[str, Any]] = MORE
    #: What every call takes beyond its parameters.
    call_more: ClassVar[Mapping[str, Any]] = PADDING
    #: How hidden states may become a vector, and how they do where no argument says it.
    poolings: ClassVar[tuple[str, ...]]
    DEFAULT_POOLING_METHOD: ClassVar[str]

    normalize_embeddings: bool
    query_instruction_for_retrieval: str | None
    query_instruction_format: str
    passage_instruction_for_retrieval: str | None
    passage_instruction_format: str
    pooling_method: str
    query_max_length: int
    passage_max_length: int
    truncate_dim: int | None
    round_weights_on_cpu: bool

    def _settings(self, device: str) -> dict[str, Any]:
        if self.pooling_method not in self.poolings:
            raise InvalidInput(
                f"pooling_method of {type(self).__name__} must be one of {', '.join(self.poolings)}; "
                f"given {self.pooling_method!r:.40}"
            )
        half = "bfloat16" if self.use_bf16 else "float16" if self.use_fp16 else None
        if device == "cpu":
            rounded = half if self.round_weights_on_cpu else None
            return {"pooling": self.pooling_method, "precision": "float32", "weights_rounded_to": rounded}
        return {"pooling": self.pooling_method, "precision": half or "float32"}

    def _call(self, function: Callable[..., Any], given: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """The keywords of a call of `function`; `more` are its own, beyond its parameters and `call_more`."""
        return checked(function, given, {**more, **self.call_more})

    def _embed(
        self, texts: Texts, input_type: str, instruction: str | None, instruction_format: str, **options: Any
    ) -> Embeddings:
        """One call of the engine. No instruction must mean none, whatever prompts the checkpoint brings."""
        size = self.spec.dimensions
        asked: dict[str, Any] = {
            "input_type": input_type,
            "instruction": instruction or "",
            "instruction_format": PLAIN if instruction is None else instruction_format,
            "normalize": self.normalize_embeddings,
            "dimensions": None if self.truncate_dim is None else min(self.truncate_dim, size),
            "dtype": "float16" if self._dtype() == "float16" else "float32",
        }
        return self.engine.embed([texts] if isinstance(texts, str) else texts, **(asked | options))

    def _dtype(self) -> str:
        """Torch's name of the dtype in which FlagEmbedding returns dense vectors; means are float32."""
        return "float32" if self.spec.pooling == "mean" else self.precision
