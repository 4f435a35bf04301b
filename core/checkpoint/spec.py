"""`ModelSpec`: how to run one checkpoint and how to write texts for it. Plain data: no files, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from embedq.core.checkpoint.adapter import Adapter
from embedq.core.checkpoint.chat import Chat
from embedq.core.checkpoint.prompts import PLAIN, write
from embedq.core.checkpoint.saved_modules import SavedModule
from embedq.core.options import EmbedOptions, RerankOptions

#: Families that score pairs and have no vectors.
RERANKERS = frozenset(
    {"cross_encoder", "llm_reranker", "layerwise_reranker", "lightweight_reranker", "qwen3_reranker"}
    | {"logit_score", "pooled_reranker"}
)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Describes how to run one checkpoint."""

    #: Name that jobs, queues, logs and metrics use.
    alias: str
    #: Directory of the network's files.
    path: Path
    #: Which class of `core.models` runs it; a key of `core.models.FAMILIES`.
    family: str
    #: How to pool a text's hidden states into one vector, several ways joined by "+"; None for rerankers.
    pooling: str | None
    #: Whether vectors are scaled to length 1 unless a call says otherwise.
    normalize: bool
    #: Most tokens per sequence, special tokens included, a prompt behind the texts excluded.
    max_length: int
    #: Components of a vector; 1 for rerankers.
    dimensions: int
    pad_token_id: int
    #: Components of a token's last hidden state.
    hidden_size: int = 0
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
    #: Tokens per text by input type, for calls without `max_length`.
    lengths: dict[str, int] = field(default_factory=dict)
    #: The end of an over-long text to cut off, "left" or "right"; None for the tokenizer files' choice.
    truncation_side: str | None = None
    #: Whether the pooling counts the prompt's tokens.
    include_prompt: bool = True
    #: How to compare two vectors: "cosine", "dot", "euclidean" or "manhattan".
    similarity: str = "cosine"
    #: The chat template that texts pass through; None for texts as they are.
    chat: Chat | None = None
    #: sentence-transformers' modules between the network and the pooling, and behind the pooling.
    token_modules: tuple[SavedModule, ...] = ()
    #: Tokens whose logits make the score of a language model: the first's, less the second's if there are two.
    answers: tuple[int, ...] = ()
    modules: tuple[SavedModule, ...] = ()
    #: An adapter to merge into the weights.
    adapter: Adapter | None = None
    #: Directory of the checkpoint, if the network lies in a folder of it or is an adapter's base; None for `path`.
    root: Path | None = None
    #: Directory of the tokenizer's files; None for `path`.
    tokenizer_path: Path | None = None
    #: Dtype to round weights to before using them in another; None keeps them.
    weights_rounded_to: str | None = None
    #: What its files hold and how they are read (`core.checkpoint.revision`); empty if it was not loaded from files.
    revision: str = ""

    @property
    def is_embedder(self) -> bool:
        return self.family not in RERANKERS

    def write(self, texts: list[str], options: EmbedOptions) -> list[str]:
        """Write the call's instruction, or else the checkpoint's instruction or prompt, around each text."""
        instruction, form = self.instruction(options)
        if instruction is None:
            return texts
        # The usual case by itself: it is a third quicker, and thousands of texts may come in one call.
        return [instruction + text for text in texts] if form == PLAIN else write(texts, instruction, form)

    def instruction(self, options: EmbedOptions) -> tuple[str | None, str]:
        """The call's instruction, or else the checkpoint's instruction or prompt, and the format that joins it to a text."""
        kind = options.input_type or ""
        form = options.instruction_format or (self.passage_format if kind == "document" else self.query_format)
        own = {"query": self.query_instruction, "document": self.passage_instruction}.get(kind)
        instruction = own if options.instruction is None else options.instruction
        if instruction is not None:
            return instruction, form
        # As sentence-transformers: the default prompt is for calls without an input type.
        return (self.prompts.get(kind, "") if kind else self.default_prompt) or None, PLAIN

    def pair_instruction(self, options: RerankOptions) -> tuple[str | None, str]:
        """The instruction of a pair's query, and the format that joins it to the query."""
        own = self.query_instruction if options.query_instruction is None else options.query_instruction
        return own, options.query_instruction_format or self.query_format

    def write_pairs(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[tuple[str, str]]:
        """Write the call's instructions, or else the model's own, around queries and passages."""
        passage = self.passage_instruction if options.passage_instruction is None else options.passage_instruction
        passage_form = options.passage_instruction_format or self.passage_format
        queries = write([query for query, _ in pairs], *self.pair_instruction(options))
        passages = write([text for _, text in pairs], passage, passage_form)
        return list(zip(queries, passages, strict=True))
