"""FlagEmbedding's rerankers: cross-encoders, and language models with one head or many.

They take FlagEmbedding's arguments and return a list of floats, also for one pair; for several layers, a list of such
lists. Each call is one call of `engine.score`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from embedq.core.checkpoint.prompts import PLAIN
from embedq.core.errors import InvalidInput
from embedq.core.flag.face import Devices, Face, checked, pairs_of

#: Keywords of every `compute_score`; None takes the constructor's value.
_CALL: Mapping[str, Any] = {"batch_size": None, "query_max_length": None, "max_length": None, "normalize": None}

#: Keywords for language models.
_PROMPTED: Mapping[str, Any] = {**_CALL, "prompt": None}

#: Keywords by which FlagEmbedding encodes pairs in separate processes; ignored, because Rust threads encode ours.
_LOADING: Mapping[str, Any] = {"use_dataloader": False, "num_workers": None}


class RerankerFace(Face):
    """Base of the rerankers; each call is one call of `engine.score`."""

    #: Keywords of `compute_score`.
    call_more: ClassVar[Mapping[str, Any]] = _CALL

    query_instruction_for_rerank: str | None
    query_instruction_format: str
    passage_instruction_for_rerank: str | None
    passage_instruction_format: str
    query_max_length: int | None
    max_length: int
    normalize: bool
    peft_path: str | None = None

    def compute_score(self, sentence_pairs: Any, **given: Any) -> list[Any]:
        """Score one (query, passage) pair or a list of them: floats in the order of the pairs.

        For several layers, one list per layer in ascending order. No pairs return [].
        """
        asked = checked(self.compute_score, given, self.call_more)
        pairs, _ = pairs_of(sentence_pairs)
        if not pairs:
            return []
        scores: list[Any] = self.engine.score(pairs, **self._options(asked)).tolist()
        return scores

    def _settings(self, device: str) -> dict[str, Any]:
        if self.peft_path is not None:
            raise InvalidInput("peft_path is not supported: merge the adapter into the checkpoint once, and load that")
        # On a CPU FlagEmbedding ignores use_fp16, but not use_bf16.
        is_fp16 = self._is_fp16() and device != "cpu"
        return {"precision": "float16" if is_fp16 else "bfloat16" if self.use_bf16 else "float32"}

    def _is_fp16(self) -> bool:
        return self.use_fp16

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Translate a call's keywords into options of `engine.score`. Without an instruction none is written."""
        query, passage = self.query_instruction_for_rerank, self.passage_instruction_for_rerank
        return {
            "max_length": self._cut(asked["max_length"], self.max_length),
            "query_max_length": self._or_own("query_max_length", asked),
            "normalize": self._or_own("normalize", asked),
            "query_instruction": query or "",
            "query_instruction_format": PLAIN if query is None else self.query_instruction_format,
            "passage_instruction": passage or "",
            "passage_instruction_format": PLAIN if passage is None else self.passage_instruction_format,
        }

    def _or_own(self, name: str, asked: dict[str, Any]) -> Any:
        return getattr(self, name) if asked[name] is None else asked[name]


class FlagReranker(RerankerFace):
    """An encoder that reads query and passage together."""

    family = "cross_encoder"

    def __init__(
        self,
        model_name_or_path: str,
        use_fp16: bool = False,
        query_instruction_for_rerank: str | None = None,
        query_instruction_format: str = PLAIN,
        passage_instruction_for_rerank: str | None = None,
        passage_instruction_format: str = PLAIN,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        devices: Devices = None,
        batch_size: int = 128,
        query_max_length: int | None = None,
        max_length: int = 512,
        normalize: bool = False,
        **given: Any,
    ) -> None:
        self._load(locals())


class FlagLLMReranker(RerankerFace):
    """A language model asked for Yes or No; the score is its logit of Yes."""

    family = "llm_reranker"
    call_more: ClassVar[Mapping[str, Any]] = {**_PROMPTED, **_LOADING}

    prompt: str | None

    def __init__(
        self,
        model_name_or_path: str,
        peft_path: str | None = None,
        use_fp16: bool = False,
        use_bf16: bool = False,
        query_instruction_for_rerank: str | None = "A: ",
        query_instruction_format: str = PLAIN,
        passage_instruction_for_rerank: str | None = "B: ",
        passage_instruction_format: str = PLAIN,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
        devices: Devices = None,
        prompt: str | None = None,
        batch_size: int = 128,
        query_max_length: int | None = None,
        max_length: int = 512,
        normalize: bool = False,
        **given: Any,
    ) -> None:
        self._load(locals())

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        return super()._options(asked) | {"prompt": self._or_own("prompt", asked)}


class LayerWiseFlagLLMReranker(RerankerFace):
    """A MiniCPM with a head on every layer.

    If layers are requested in another than ascending order, FlagEmbedding applies the head of one layer to the state of
    another: states ascend, heads follow the request. `heads_by="layer"` applies each layer's own head.
    """

    family = "layerwise_reranker"
    more: ClassVar[Mapping[str, Any]] = {"heads_by": "request"}
    call_more: ClassVar[Mapping[str, Any]] = {**_PROMPTED, **_LOADING, "cutoff_layers": None}

    heads_by: str
    prompt: str | None
    cutoff_layers: list[int] | int | None

    def __init__(
        self,
        model_name_or_path: str,
        peft_path: str | None = None,
        use_fp16: bool = False,
        use_bf16: bool = False,
        query_instruction_for_rerank: str | None = "A: ",
        query_instruction_format: str = PLAIN,
        passage_instruction_for_rerank: str | None = "B: ",
        passage_instruction_format: str = PLAIN,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
        devices: Devices = None,
        cutoff_layers: list[int] | int | None = None,
        prompt: str | None = None,
        batch_size: int = 128,
        query_max_length: int | None = None,
        max_length: int = 512,
        normalize: bool = False,
        **given: Any,
    ) -> None:
        self._load(locals())

    def _settings(self, device: str) -> dict[str, Any]:
        return super()._settings(device) | {"heads_by": self.heads_by}

    def _is_fp16(self) -> bool:
        # Without a half precision FlagEmbedding uses fp16, which the published checkpoint was made with.
        return self.use_fp16 or not self.use_bf16

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        own = {name: self._or_own(name, asked) for name in ("prompt", "cutoff_layers")}
        return super()._options(asked) | own


class LightWeightFlagLLMReranker(RerankerFace):
    """A Gemma-2 with heads on many layers, which can average a passage's tokens between layers.

    FlagEmbedding applies the first head to the first requested layer, the second to the second, whatever layers they
    were trained for. `heads_by="layer"` applies each layer's own head.
    """

    family = "lightweight_reranker"
    more: ClassVar[Mapping[str, Any]] = {"heads_by": "request"}
    #: `compress_layer` is the older name of `compress_layers`.
    call_more: ClassVar[Mapping[str, Any]] = {
        **_PROMPTED,
        "cutoff_layers": None,
        "compress_layers": None,
        "compress_ratio": None,
        "compress_layer": None,
    }

    heads_by: str
    prompt: str | None
    cutoff_layers: list[int] | None
    compress_layers: list[int]
    compress_ratio: int

    def __init__(
        self,
        model_name_or_path: str,
        peft_path: str | None = None,
        use_fp16: bool = False,
        use_bf16: bool = False,
        query_instruction_for_rerank: str | None = "A: ",
        query_instruction_format: str = PLAIN,
        passage_instruction_for_rerank: str | None = "B: ",
        passage_instruction_format: str = PLAIN,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
        devices: Devices = None,
        cutoff_layers: list[int] | None = None,
        compress_layers: list[int] = [8],  # noqa: B006  # as there, and never changed
        compress_ratio: int = 1,
        prompt: str | None = None,
        batch_size: int = 128,
        query_max_length: int | None = None,
        max_length: int = 512,
        normalize: bool = False,
        **given: Any,
    ) -> None:
        self._load(locals())

    def _settings(self, device: str) -> dict[str, Any]:
        return super()._settings(device) | {"heads_by": self.heads_by}

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        own = {name: self._or_own(name, asked) for name in ("prompt", "cutoff_layers", "compress_ratio")}
        layers = asked["compress_layer"]
        if layers is None:
            layers = self._or_own("compress_layers", asked)
        # The first layer, and layers that do not exist, compress nothing in FlagEmbedding.
        own["compress_layers"] = [layer for layer in layers if 0 < layer < self.spec.config["num_hidden_layers"]]
        return super()._options(asked) | own
