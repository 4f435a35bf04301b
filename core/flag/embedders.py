"""FlagEmbedding's embedders: encoders, language models and in-context models, and the base they share with BGE-M3.

They take FlagEmbedding's arguments and return (num_texts, dim) arrays or tensors, (dim,) for one string. Each call is
one call of `engine.embed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from embedq.core.checkpoint.prompts import PLAIN
from embedq.core.errors import InvalidInput
from embedq.core.flag.face import Devices, Face, checked
from embedq.core.results import Embeddings

if TYPE_CHECKING:
    import torch

#: One text, or several.
Texts = str | list[str]

#: The tokenizer keyword that FlagEmbedding documents. The width of padding changes no vector.
PADDING: Mapping[str, Any] = {"pad_to_multiple_of": None}

#: Keywords of every constructor beyond its parameters; the last is ours, see `EmbedderFace`.
MORE: Mapping[str, Any] = {
    "passage_instruction_for_retrieval": None,
    "passage_instruction_format": PLAIN,
    "round_weights_on_cpu": True,
}

#: Keywords of every `encode` beyond its parameters.
WRITTEN: Mapping[str, Any] = {"instruction": None, "instruction_format": PLAIN}

#: One dict of "instruct", "query", "response" per example.
Examples = list[dict[str, str]]


class EmbedderFace(Face):
    """Base of the embedders; each call is one call of `engine.embed`.

    On a CPU FlagEmbedding rounds the weights for `use_fp16` (its default) and `use_bf16`, and computes in float32.
    `round_weights_on_cpu=False` keeps the weights unrounded.
    """

    more: ClassVar[Mapping[str, Any]] = MORE
    #: Keywords of every call beyond its parameters.
    call_more: ClassVar[Mapping[str, Any]] = PADDING
    #: The supported poolings, and the default one.
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
        """Check the keywords of a call of `function`; `more` are its own, beyond its parameters and `call_more`."""
        return checked(function, given, {**more, **self.call_more})

    def _embed(
        self, texts: Texts, input_type: str, instruction: str | None, instruction_format: str, **options: Any
    ) -> Embeddings:
        """Call the engine. Without an instruction texts get none, even if the checkpoint has prompts."""
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
        """Torch's name of the dtype of FlagEmbedding's dense vectors; with mean pooling it is float32."""
        return "float32" if self.spec.pooling == "mean" else self.precision


class DenseFace(EmbedderFace):
    """The calls of embedders with one vector per text."""

    convert_to_numpy: bool

    def encode_queries(
        self,
        queries: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
        **given: Any,
    ) -> np.ndarray | torch.Tensor:
        """Embed queries with their instruction: (num_queries, dim) in their order, (dim,) for one string."""
        self._call(self.encode_queries, given)
        instruction, written = self.query_instruction_for_retrieval, self.query_instruction_format
        length = self._cut(max_length, self.query_max_length)
        found = self._embed(queries, "query", instruction, written, max_length=length, **self._of_queries())
        return self._vectors(found, queries, convert_to_numpy)

    def encode_corpus(
        self,
        corpus: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
        **given: Any,
    ) -> np.ndarray | torch.Tensor:
        """Embed passages with their instruction: (num_passages, dim) in their order, (dim,) for one string."""
        self._call(self.encode_corpus, given)
        instruction, written = self.passage_instruction_for_retrieval, self.passage_instruction_format
        length = self._cut(max_length, self.passage_max_length)
        found = self._embed(corpus, "document", instruction, written, max_length=length)
        return self._vectors(found, corpus, convert_to_numpy)

    def encode(
        self,
        sentences: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
        **given: Any,
    ) -> np.ndarray | torch.Tensor:
        """Embed texts as they are, or with `instruction` and `instruction_format`: (num_texts, dim)."""
        asked = self._call(self.encode, given, **WRITTEN)
        length = self._cut(max_length, self.passage_max_length)
        found = self._embed(sentences, "document", asked["instruction"], asked["instruction_format"], max_length=length)
        return self._vectors(found, sentences, convert_to_numpy)

    def _of_queries(self) -> dict[str, Any]:
        """Further options of `engine.embed` for queries."""
        return {}

    def _vectors(self, found: Embeddings, texts: Texts, convert_to_numpy: bool | None) -> np.ndarray | torch.Tensor:
        """Return an array, or a tensor on the device; for one string its single row."""
        assert found.dense is not None
        vectors: np.ndarray = found.dense[0] if isinstance(texts, str) else found.dense
        if self.convert_to_numpy if convert_to_numpy is None else convert_to_numpy:
            return vectors
        import torch

        return torch.from_numpy(vectors).to(self.target_devices[0], getattr(torch, self._dtype()))


class FlagModel(DenseFace):
    """An encoder with CLS or mean pooling."""

    family = "encoder"
    poolings = ("cls", "mean")
    DEFAULT_POOLING_METHOD = "cls"

    def __init__(
        self,
        model_name_or_path: str,
        normalize_embeddings: bool = True,
        use_fp16: bool = True,
        use_bf16: bool = False,
        query_instruction_for_retrieval: str | None = None,
        query_instruction_format: str = PLAIN,
        devices: Devices = None,
        pooling_method: str = "cls",
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        batch_size: int = 256,
        query_max_length: int = 512,
        passage_max_length: int = 512,
        convert_to_numpy: bool = True,
        truncate_dim: int | None = None,
        **given: Any,
    ) -> None:
        self._load(locals())


class FlagLLMModel(DenseFace):
    """A language model; a text's vector is the state of its last token."""

    family = "decoder"
    more: ClassVar[Mapping[str, Any]] = {"pooling_method": "last_token", **MORE}
    poolings = ("last_token",)
    DEFAULT_POOLING_METHOD = "last_token"

    def __init__(
        self,
        model_name_or_path: str,
        normalize_embeddings: bool = True,
        use_fp16: bool = True,
        use_bf16: bool = False,
        query_instruction_for_retrieval: str | None = None,
        query_instruction_format: str = "Instruct: {}\nQuery: {}",
        devices: Devices = None,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        batch_size: int = 256,
        query_max_length: int = 512,
        passage_max_length: int = 512,
        convert_to_numpy: bool = True,
        truncate_dim: int | None = None,
        **given: Any,
    ) -> None:
        self._load(locals())


class FlagPseudoMoEModel(FlagLLMModel):
    """A language model with domains. Without domains in the checkpoint, naming one changes nothing."""

    call_more: ClassVar[Mapping[str, Any]] = {"domain_for_pseudo_moe": None, "domain": None, **PADDING}

    domain_for_pseudo_moe: str | None

    def __init__(
        self,
        model_name_or_path: str,
        normalize_embeddings: bool = True,
        use_fp16: bool = False,
        use_bf16: bool = True,
        query_instruction_for_retrieval: str | None = None,
        query_instruction_format: str = "Instruct: {}\nQuery: {}",
        devices: Devices = None,
        trust_remote_code: bool = True,
        cache_dir: str | None = None,
        batch_size: int = 256,
        query_max_length: int = 512,
        passage_max_length: int = 512,
        convert_to_numpy: bool = True,
        truncate_dim: int | None = None,
        domain_for_pseudo_moe: str | None = None,
        **given: Any,
    ) -> None:
        self._load(locals())

    def _call(self, function: Callable[..., Any], given: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        asked = super()._call(function, given, **more)
        domain = asked["domain_for_pseudo_moe"] or asked["domain"] or self.domain_for_pseudo_moe
        if domain is not None and "auto_map" in self.spec.config:
            raise InvalidInput(
                f"domain {domain!r:.40} cannot be chosen: {self.model_name_or_path} routes by domain in its own code, "
                "which embedq never runs"
            )
        return asked

    def _dtype(self) -> str:
        """FlagEmbedding normalises in float32 and returns normalised vectors in float32."""
        return "float32" if self.normalize_embeddings else super()._dtype()


class FlagICLModel(DenseFace):
    """A language model that reads examples before each query and a suffix after it."""

    family = "icl"
    more: ClassVar[Mapping[str, Any]] = {"pooling_method": "last_token", **MORE}
    poolings = ("last_token",)
    DEFAULT_POOLING_METHOD = "last_token"

    suffix: str
    examples_for_task: Examples | None
    examples_instruction_format: str

    def __init__(
        self,
        model_name_or_path: str,
        normalize_embeddings: bool = True,
        use_fp16: bool = True,
        use_bf16: bool = False,
        query_instruction_for_retrieval: str | None = None,
        query_instruction_format: str = "<instruct>{}\n<query>{}",
        suffix: str = "\n<response>",
        devices: Devices = None,
        examples_for_task: Examples | None = None,
        examples_instruction_format: str = "<instruct>{}\n<query>{}\n<response>{}",
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        batch_size: int = 256,
        query_max_length: int = 512,
        passage_max_length: int = 512,
        convert_to_numpy: bool = True,
        truncate_dim: int | None = None,
        **given: Any,
    ) -> None:
        self._load(locals())
        self.set_examples()

    def set_examples(self, examples_for_task: Examples | None = None) -> None:
        """Use these examples from now on; None: those of the constructor."""
        self._examples = tuple(self.examples_for_task or () if examples_for_task is None else examples_for_task)

    def stop_self_query_pool(self) -> None:
        """Do nothing; see `stop_self_pool`."""

    def _settings(self, device: str) -> dict[str, Any]:
        own = {"suffix": self.suffix, "examples_format": self.examples_instruction_format}
        return super()._settings(device) | own

    def _of_queries(self) -> dict[str, Any]:
        return {"examples": self._examples}
