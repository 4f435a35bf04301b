"""Tiny checkpoints in the forms that published ones have, made by sentence-transformers' own `save_pretrained`.

Random weights, wide enough that texts differ; the tokenizers of the golden cases.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import oracle, tiny_models

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

#: Tokenizers by kind: the golden case that has one, the size of its vocabulary, its padding.
WORDPIECE, UNIGRAM, BYTES, QWEN = (
    "st_mean_pooling",
    "flagmodel_query_instruction",
    "st_modernbert",
    "st_qwen3_embedding",
)


def save(name: str, directory: Path) -> Path:
    """Write the form of that name; returns `directory`."""
    FORMS[name](directory)
    return directory


def into_folder(path: Path) -> None:
    """The layout of the first versions: the network in a folder of its own."""
    folder = path / "0_Transformer"
    folder.mkdir()
    for file in list(path.iterdir()):
        if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            shutil.move(file, folder / file.name)
    modules = tiny_models.read(path / "modules.json")
    modules[0]["path"] = "0_Transformer"
    tiny_models.write(path / "modules.json", modules)


def widen(module: torch.nn.Module, seed: int = 7) -> None:
    """Draw the module's matrices anew."""
    torch.manual_seed(seed)
    for weight in module.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)


def embedder(network: Path, target: Path, behind: Callable[[int], list[Any]], **model: Any) -> None:
    """A SentenceTransformer over the network in a directory, saved by the library."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    with oracle.quiet():
        transformer = Transformer(str(network), model_kwargs={"dtype": torch.float32})
        modules = [transformer, *behind(transformer.get_embedding_dimension())]
        for module in modules[1:]:
            widen(module)
        SentenceTransformer(modules=modules, device="cpu", **model).save_pretrained(
            str(target), create_model_card=False
        )


def _bert_dense_normalize(directory: Path) -> None:
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig

    network = tiny_models.save(directory / "network", BertConfig(vocab_size=800, **SIZES), WORDPIECE)
    embedder(network, directory, lambda width: [Pooling(width, "mean"), Dense(width, width), Normalize()])
    shutil.rmtree(network)


#: Writes the roles that a pair of sentence-transformers has, and the two of a text.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen3(directory: Path, auto_class: str = "AutoModel", template: str | None = None, **sizes: Any) -> Path:
    """A Qwen3 network and its tokenizer, with a chat template if one is given."""
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=1150,
        pad_token_id=1140,
        num_key_value_heads=2,
        head_dim=16,
        **(SIZES | {"max_position_embeddings": 256} | sizes),
    )
    tiny_models.save(directory, config, QWEN, auto_class=auto_class)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def _qwen3_chat(directory: Path) -> None:
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    network = qwen3(directory / "network", template=CHAT_TEMPLATE)
    embedder(network, directory, lambda width: [Pooling(width, "lasttoken"), Normalize()])
    shutil.rmtree(network)


def cross_encoder(network: Path, target: Path, **model: Any) -> None:
    """A CrossEncoder over a sequence classifier in a directory, saved by the library."""
    from sentence_transformers import CrossEncoder

    with oracle.quiet():
        made = CrossEncoder(str(network), num_labels=1, device="cpu", model_kwargs={"dtype": torch.float32}, **model)
        made.save_pretrained(str(target), create_model_card=False)
    shutil.rmtree(network)


_CLASSIFIER = "AutoModelForSequenceClassification"


def _bert_cross_encoder(directory: Path) -> None:
    from transformers import BertConfig

    config = BertConfig(vocab_size=800, num_labels=1, **SIZES)
    cross_encoder(tiny_models.save(directory / "network", config, WORDPIECE, auto_class=_CLASSIFIER), directory)


def _qwen3_chat_cross_encoder(directory: Path) -> None:
    cross_encoder(qwen3(directory / "network", _CLASSIFIER, CHAT_TEMPLATE, num_labels=1), directory)


FORMS: dict[str, Callable[[Path], None]] = {
    "bert dense normalize": _bert_dense_normalize,
    "qwen3 chat": _qwen3_chat,
    "bert cross encoder": _bert_cross_encoder,
    "qwen3 chat cross encoder": _qwen3_chat_cross_encoder,
}
