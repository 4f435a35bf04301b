"""`ModelSpec`: how to run one checkpoint and how to write texts for it. Plain data: no files, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from embedq.core.checkpoint.prompts import PLAIN, write
from embedq.core.options import EmbedOptions, RerankOptions

#: Families that score pairs and have no vectors.
RERANKERS = frozenset({"cross_encoder", "llm_reranker", "layerwise_reranker", "lightweight_reranker", "qwen3_reranker"})


@dataclass(frozen=True, slots=True)
class DenseModule:
    """A projection after the pooling, as sentence-transformers defines it."""

    #: Directory of its weights.
    path: Path
    in_features: int
    out_features: int
    has_bias: bool
    #: Name of a torch module, as `modules.json`'s own files write it: "torch.nn.modules.activation.Tanh".
    activation: str


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """How to run one checkpoint."""

    #: Name that jobs, queues, logs and metrics use.
    alias: str
    path: Path
    #: Which class of `core.models` runs it; a key of `core.models.FAMILIES`.
    family: str
    #: How to pool a text's hidden states into one vector; None for rerankers.
    pooling: str | None
    #: Whether vectors are scaled to length 1 unless a call says otherwise.
    normalize: bool
    #: Most tokens per sequence, special tokens included, a prompt behind the texts excluded.
    max_length: int
    #: Components of a vector; 1 for rerankers.
    dimensions: int
    pad_token_id: int
    #: The content of `config.json`, for the families that build their own network.
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    #: Prompt per input type ("query", "document"), and the one used when a call names none.
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    #: Instructions to write around queries and passages, unless a call has its own.
    query_instruction: str | None = None
    passage_instruction: str | None = None
    query_format: str = PLAIN
    passage_format: str = PLAIN
    #: In-context models: the format of an example, and the text after the query.
    examples_format: str = "<instruct>{}\n<query>{}\n<response>{}"
    suffix: str = "\n<response>"
    examples: tuple[dict[str, str], ...] = ()
    #: Which text of an over-long pair is cut: the passage, or the longer of the two.
    pair_truncation: Literal["passage", "longest"] = "passage"
    #: Most tokens for calls without `max_length`; None for the model's `max_length`.
    default_length: int | None = None
    #: Number of positions in the weights, prompt included; None for `max_length`.
    num_positions: int | None = None
    #: Layered rerankers: see `core.settings.ModelSettings`.
    heads_by: Literal["layer", "request"] | None = None
    #: Whether to strip white space around texts, and to lower-case them, before tokenizing.
    strip: bool = False
    lower: bool = False
    dense_modules: tuple[DenseModule, ...] = ()
    #: Dtype to round weights to before using them in another; None keeps them.
    weights_rounded_to: str | None = None
    #: What its files hold and how they are read (`core.checkpoint.revision`); empty if it was not loaded from files.
    revision: str = ""

    @property
    def is_embedder(self) -> bool:
        return self.family not in RERANKERS

    def write(self, texts: list[str], options: EmbedOptions) -> list[str]:
        """Write the call's instruction, or else the checkpoint's instruction or prompt, around each text."""
        is_document = options.input_type == "document"
        own_format = self.passage_format if is_document else self.query_format
        if options.instruction is not None:
            return write(texts, options.instruction, options.instruction_format or own_format)
        own = {"query": self.query_instruction, "document": self.passage_instruction}.get(options.input_type or "")
        if own is not None:
            return write(texts, own, options.instruction_format or own_format)
        # As sentence-transformers: a type without a prompt of its own gets the default one.
        prompt = self.prompts.get(options.input_type or "", self.default_prompt)
        return [prompt + text for text in texts] if prompt else texts

    def write_pairs(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[tuple[str, str]]:
        """Write the call's instructions, or else the model's own, around queries and passages."""
        query = options.query_instruction if options.query_instruction is not None else self.query_instruction
        passage = options.passage_instruction if options.passage_instruction is not None else self.passage_instruction
        queries = write(
            [query_text for query_text, _ in pairs], query, options.query_instruction_format or self.query_format
        )
        passages = write(
            [text for _, text in pairs], passage, options.passage_instruction_format or self.passage_format
        )
        return list(zip(queries, passages, strict=True))
