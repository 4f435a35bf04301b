"""BERT, RoBERTa, XLM-R and CamemBERT, padded, as transformers computes them, without importing transformers.

Its imports take three seconds of every worker's start; reading these four types takes a tenth of one. Parts have the
names of transformers' modules, which are those of the weights in the files, so that either can stand for the other.
`load` reads a checkpoint only where nothing about it is unusual, and returns None otherwise: transformers then loads
it, or says why it cannot. Before the first one it checks on a tiny network that this machine's numbers are those
which transformers gave.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.errors import CannotLoadModel
from embedq.core.models.safetensors_files import weight_files
from embedq.core.models.weights import HARMLESS, place, round_weights

log = logging.getLogger(__name__)

#: Model type -> the name before all weights of the encoder in a file that also has a head.
_PREFIXES = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta.", "camembert": "roberta."}

#: What `config.json` must say, all of it whole numbers: a default of transformers' is never guessed.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "pad_token_id",
)

#: What it may say, if it says this. Anything else may change the numbers.
_USUAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "chunk_size_feed_forward": (0, None),
    "output_hidden_states": (False, None),
    "output_attentions": (False, None),
    "pruned_heads": ({}, None),
}

#: What it may say in any way: for training, for other heads, or about where it comes from.
_WITHOUT_EFFECT = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_probs_dropout_prob",
        "bos_token_id",
        "classifier_dropout",
        "directionality",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "gradient_checkpointing",
        "hidden_dropout_prob",
        "id2label",
        "initializer_range",
        "label2id",
        "layer_norm_eps",
        "model_type",
        "num_labels",
        "output_past",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "pooler_type",
        "problem_type",
        "sbert_ce_default_activation_function",
        "sentence_transformers",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)

_DTYPES = frozenset({"F32", "F16", "BF16"})

#: What `tiny_rows` is by transformers 5.23, for BERT and for the types that count positions as RoBERTa does.
#: `tests/test_bert.py` holds it against the installed one.
_FACTS = {
    True: (
        (-1.235790, 0.399606, -0.860237, 1.265551, -0.684360),
        (-1.232417, 0.399412, -0.862017, 1.265639, -0.683296),
    ),
    False: (
        (-1.232607, 0.399659, -0.860781, 1.273815, -0.689809),
        (-1.232542, 0.399499, -0.861365, 1.270973, -0.687514),
    ),
}

#: Largest difference from `_FACTS`. Sums in another order differ by a millionth; the smallest mistake, GELU by its
#: usual approximation, by 0.0001.
_TOLERANCE = 2e-5


class States(NamedTuple):
    """The result of an encoder, as transformers names it."""

    #: (num_sequences, longest, dim)
    last_hidden_state: torch.Tensor


class Logits(NamedTuple):
    """The result of a classifier, as transformers names it."""

    #: (num_sequences, num_labels)
    logits: torch.Tensor


class Bert(nn.Module):
    """The encoder, without a head."""

    def __init__(self, config: SimpleNamespace, has_pooler: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Layers(config)
        self.pooler = _Pooler(config) if has_pooler else None

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights."""
        return self.embeddings.word_embeddings.weight.dtype

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> States:
        """Ids and segments (num_sequences, longest) int64; the mask, of the same shape, is 0 at padding."""
        mask = None
        if attention_mask is not None:
            num_sequences, longest = attention_mask.shape
            mask = attention_mask.bool()[:, None, None, :].expand(num_sequences, 1, longest, longest)
        rows = self.embeddings(input_ids, token_type_ids)
        for layer in self.encoder.layer:
            rows = layer(rows, mask)
        return States(rows)


class Classifier(nn.Module):
    """An encoder, and a head that reads each sequence's first token."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        is_bert = config.model_type == "bert"
        self.base_model = Bert(config, has_pooler=is_bert)
        self.classifier = _linear(config.hidden_size, 1) if is_bert else _Head(config)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> Logits:
        """See `Bert.forward`."""
        rows = self.base_model(input_ids, attention_mask, token_type_ids).last_hidden_state
        pooler = self.base_model.pooler
        return Logits(self.classifier(pooler(rows) if pooler is not None else rows))


class _Embeddings(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.word_embeddings = _embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = _embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = _embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = _norm(config)
        if config.model_type != "bert":
            #: RoBERTa counts positions from behind the padding's id, and only tokens that are not padding.
            self.padding_idx = config.pad_token_id

    def forward(self, ids: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        padding_id = getattr(self, "padding_idx", None)
        if padding_id is None:
            places = torch.arange(ids.shape[1], device=ids.device)[None]
        else:
            is_counted = ids.ne(padding_id).int()
            places = (torch.cumsum(is_counted, dim=1).type_as(is_counted) * is_counted).long() + padding_id
        rows = self.word_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(ids) if types is None else types)
        normed: torch.Tensor = self.LayerNorm(rows + self.position_embeddings(places))
        return normed


class _Layers(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class _Layer(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = _Wide(config)
        self.output = _Added(config.intermediate_size, config)

    def forward(self, rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        attended = self.attention(rows, mask)
        normed: torch.Tensor = self.output(functional.gelu(self.intermediate.dense(attended)), attended)
        return normed


class _Attention(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.self = _SelfAttention(config)
        self.output = _Added(config.hidden_size, config)

    def forward(self, rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        normed: torch.Tensor = self.output(self.self(rows, mask), rows)
        return normed


class _SelfAttention(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self._width = config.hidden_size // config.num_attention_heads
        self.query, self.key, self.value = (_linear(config.hidden_size, config.hidden_size) for _ in range(3))

    def forward(self, rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        shape = (*rows.shape[:-1], -1, self._width)
        queries, keys, values = (part(rows).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(queries, keys, values, mask, scale=self._width**-0.5)
        return attended.transpose(1, 2).reshape(rows.shape)


class _Wide(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.dense = _linear(config.hidden_size, config.intermediate_size)


class _Added(nn.Module):
    """A product, added to what came in before, and normalised."""

    def __init__(self, in_features: int, config: SimpleNamespace) -> None:
        super().__init__()
        self.dense = _linear(in_features, config.hidden_size)
        self.LayerNorm = _norm(config)

    def forward(self, rows: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.LayerNorm(self.dense(rows) + before)
        return normed


class _Pooler(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.dense = _linear(config.hidden_size, config.hidden_size)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(rows[:, 0]))


class _Head(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.dense = _linear(config.hidden_size, config.hidden_size)
        self.out_proj = _linear(config.hidden_size, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out_proj(torch.tanh(self.dense(rows[:, 0, :])))
        return logits


# Built without numbers: those that torch would draw are overwritten, and drawing them on the meta device imports its
# compiler, which takes a second.


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


class _LayerNorm(nn.LayerNorm):
    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


def _linear(in_features: int, out_features: int) -> nn.Linear:
    return _Linear(in_features, out_features, device="meta")


def _embedding(count: int, dim: int) -> nn.Embedding:
    return _Embedding(count, dim, device="meta")


def _norm(config: SimpleNamespace) -> nn.LayerNorm:
    return _LayerNorm(config.hidden_size, eps=config.layer_norm_eps, device="meta")


def load(spec: ModelSpec, device: str, precision: str, is_classifier: bool = False) -> Bert | Classifier | None:
    """The checkpoint's network on the device; None where it is not of these types or anything about it is unusual.

    The files are mapped, and each weight goes to the device by itself, as in `core.models.weights.load`.
    """
    if not _is_usual(spec) or not _computes_as_transformers(str(spec.config["model_type"])):
        return None
    config = SimpleNamespace(**{"hidden_act": "gelu", **spec.config})
    network = Classifier(config) if is_classifier else Bert(config)
    weights = _read(spec, network)
    if weights is None:
        return None
    network.load_state_dict(weights, assign=True)
    place(network, device, getattr(torch, precision))
    round_weights(network, spec)
    return network.eval()


def _is_usual(spec: ModelSpec) -> bool:
    """Returns True if nothing in `config.json`, and no file beside it, can make transformers compute anything else."""
    config = spec.config
    has_adapter = spec.adapter is not None or (spec.path / "adapter_config.json").exists()
    if config.get("model_type") not in _PREFIXES or has_adapter:
        return False
    if not all(type(config.get(name)) is int and config[name] >= 0 for name in _SIZES):
        return False
    if not isinstance(config.get("layer_norm_eps"), float) or len(config.get("id2label") or "1") != 1:
        return False
    others = config.keys() - _WITHOUT_EFFECT - set(_SIZES)
    is_known = all(name in _USUAL and config[name] in _USUAL[name] for name in others)
    return is_known and config["num_attention_heads"] > 0 and config["hidden_size"] % config["num_attention_heads"] == 0


def _read(spec: ModelSpec, network: Bert | Classifier) -> dict[str, torch.Tensor] | None:
    """`network`'s weights by name, mapped; None unless they are all there in their shapes, and nothing that matters beside."""
    prefix = _PREFIXES[spec.config["model_type"]]
    needed = {name: list(weight.shape) for name, weight in network.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    try:
        for file, name in _listed(spec):
            own = _own_name(name, prefix, isinstance(network, Classifier))
            if own in needed and own not in found and file.get_slice(name).get_shape() == needed[own]:
                if file.get_slice(name).get_dtype() not in _DTYPES:
                    return None
                found[own] = file.get_tensor(name)
            elif own in needed or not HARMLESS.search(name):
                return None
    except (OSError, SafetensorError, CannotLoadModel):
        return None
    return found if found.keys() == needed.keys() else None


def _listed(spec: ModelSpec) -> Iterator[tuple[Any, str]]:
    """(file, name of a weight in it). OSError if a file does not say that it is PyTorch's."""
    for path in weight_files(spec.path):
        with safe_open(path, framework="pt", device="cpu") as file:
            if (file.metadata() or {}).get("format") != "pt":
                raise OSError
            for name in file.keys():  # noqa: SIM118 (a file is no mapping)
                yield file, name


def _own_name(name: str, prefix: str, is_classifier: bool) -> str:
    """The name here of a weight that a file calls `name`."""
    if not is_classifier:
        return name.removeprefix(prefix)
    return f"base_model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name


@cache
def _computes_as_transformers(model_type: str) -> bool:
    """Returns True if this machine computes `_FACTS`; otherwise logs a warning, and transformers' own module runs."""
    difference = (
        (tiny_rows(tiny(model_type), model_type) - torch.tensor(_FACTS[model_type == "bert"])).abs().max().item()
    )
    if difference <= _TOLERANCE:  # not "above": it may be NaN
        return True
    log.warning(
        "transformers loads this model, which takes longer: states here differ by %.2g from those it gave",
        difference,
        extra={"action": "not_as_transformers", "model_type": model_type},
    )
    return False


#: Sizes of `tiny`, and all that transformers needs to make the same.
TINY = dict(zip(_SIZES, (11, 8, 2, 2, 12, 12, 2, 1), strict=True)) | {"layer_norm_eps": 1e-6, "hidden_act": "gelu"}


def tiny(model_type: str) -> Classifier:
    """A network whose weights are a formula's."""
    network = Classifier(SimpleNamespace(model_type=model_type, **TINY))
    shapes = {name: weight.shape for name, weight in network.named_parameters()}
    network.load_state_dict(tiny_weights(shapes), assign=True)
    return network.eval()


def tiny_weights(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Numbers from -1 to 1 without a pattern, other ones for each weight and the same on every machine."""
    weights = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        count = torch.arange(1, shape.numel() + 1)
        weights[name] = ((count * count * 7919 + count * (number + 3) * 2741) % 10007).reshape(shape).float() / 5003 - 1
    return weights


@torch.inference_mode()
def tiny_rows(network: Any, model_type: str) -> torch.Tensor:
    """(2, 5): of two sequences, one padded, four components of the first token's state, and the logit."""
    ids = torch.tensor([[3, 5, 2, 1, 7, 4], [6, 9, 10, 0, 1, 1]])  # 1 is the padding, once within a text
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    types = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    states = network.base_model(**given).last_hidden_state
    return torch.cat([states[:, 0, ::2], network(**given).logits], dim=1)
