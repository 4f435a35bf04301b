"""Tiny checkpoints in the forms that published ones have, made by sentence-transformers' own `save_pretrained`.

Random weights, wide enough that texts differ; the tokenizers of the golden cases. `FORMS` names each form, the class
of the library that loads it, and how it is made.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from tests import oracle, tiny_models

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

#: The golden cases whose tokenizers are used: each kind's vocabulary and padding follow below.
WORDPIECE, UNIGRAM, BYTES, QWEN = (
    "st_mean_pooling",
    "flagmodel_query_instruction",
    "st_modernbert",
    "st_qwen3_embedding",
)

_WORDPIECE: dict[str, Any] = {"vocab_size": 800, "pad_token_id": 0}
_UNIGRAM: dict[str, Any] = {"vocab_size": 420, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_BYTES: dict[str, Any] = {"vocab_size": 1150, "pad_token_id": 1145, "bos_token_id": 1143, "eos_token_id": 1144}
_QWEN: dict[str, Any] = {"vocab_size": 1150, "pad_token_id": 1140, "bos_token_id": None, "eos_token_id": 1142}

_CLASSIFIER = "AutoModelForSequenceClassification"
_CAUSAL = "AutoModelForCausalLM"

#: Writes the roles that a pair of sentence-transformers has, and the two of a text.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Form(NamedTuple):
    """One form of checkpoint."""

    #: The library's class that loads it.
    kind: str
    make: Callable[[Path], None]
    #: Settings that embedq is given, where the library's defaults are others than ours.
    model: Mapping[str, Any] = {}
    #: What the refusal says; None for a form that is served.
    refused: str | None = None


class Network(NamedTuple):
    """A type of network: its configuration, and the golden case whose tokenizer it has."""

    model_type: str
    case: str
    stated: dict[str, Any]

    def save(self, directory: Path, auto_class: str = "AutoModel", **more: Any) -> Path:
        """Write the network and its tokenizer; returns `directory`."""
        stated = SIZES | self.stated | more
        if self.stated.get("pad_token_id") == 1:  # positions are counted from behind the padding's id
            stated["max_position_embeddings"] += 2
        config = transformers.AutoConfig.for_model(self.model_type, **stated)
        tiny_models.save(directory, config, self.case, auto_class=auto_class)
        tiny_models.change(directory / "tokenizer_config.json", model_max_length=stated["max_position_embeddings"] - 2)
        return directory


_GQA = {"num_key_value_heads": 2, "head_dim": 16}
_SPECIAL = {"cls_token_id": 1143, "sep_token_id": 1144}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4}

#: Encoders by type.
ENCODERS = {
    one.model_type: one
    for one in (
        Network("albert", WORDPIECE, _WORDPIECE | {"embedding_size": 16}),
        Network("bert", WORDPIECE, _WORDPIECE),
        Network("camembert", UNIGRAM, _UNIGRAM),
        Network("data2vec-text", UNIGRAM, _UNIGRAM),
        Network("deberta", WORDPIECE, _WORDPIECE),
        Network(
            "deberta-v2",
            WORDPIECE,
            _WORDPIECE | {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]},
        ),
        Network("distilbert", WORDPIECE, _WORDPIECE | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
        Network("electra", WORDPIECE, _WORDPIECE | {"embedding_size": 16}),
        Network("ernie", WORDPIECE, _WORDPIECE),
        Network("eurobert", BYTES, _BYTES | {"num_key_value_heads": 2}),
        Network("gte", UNIGRAM, _UNIGRAM),
        Network("jina_embeddings_v3", UNIGRAM, _UNIGRAM),
        Network("luke", UNIGRAM, _UNIGRAM | {"entity_vocab_size": 10, "entity_emb_size": 8}),
        Network("megatron-bert", WORDPIECE, _WORDPIECE),
        Network("modernbert", BYTES, _BYTES | _SPECIAL | {"local_attention": 16}),
        Network("mpnet", WORDPIECE, _WORDPIECE | {"pad_token_id": 1}),
        Network("nomic_bert", WORDPIECE, _WORDPIECE),
        Network("rembert", WORDPIECE, _WORDPIECE | {"input_embedding_size": 16}),
        Network("roberta", UNIGRAM, _UNIGRAM),
        Network("roberta-prelayernorm", UNIGRAM, _UNIGRAM),
        Network("roformer", WORDPIECE, _WORDPIECE | {"embedding_size": 32}),
        Network("xlm-roberta", UNIGRAM, _UNIGRAM),
        Network("xlm-roberta-xl", UNIGRAM, _UNIGRAM),
        Network("t5", UNIGRAM, _UNIGRAM | _T5),
        Network("mt5", UNIGRAM, _UNIGRAM | _T5),
        Network("umt5", UNIGRAM, _UNIGRAM | _T5),
    )
}

#: Types that no list names: their padding is tried out when they are loaded.
OTHERS = {
    one.model_type: one
    for one in (
        Network("convbert", WORDPIECE, _WORDPIECE | {"embedding_size": 32}),
        Network("mobilebert", WORDPIECE, _WORDPIECE | {"embedding_size": 32, "intra_bottleneck_size": 32}),
        Network("nystromformer", WORDPIECE, _WORDPIECE | {"segment_means_seq_len": 16, "num_landmarks": 8}),
        Network("bert-generation", WORDPIECE, _WORDPIECE),
        Network("ibert", UNIGRAM, _UNIGRAM),
        Network("bloom", QWEN, _QWEN | {"n_layer": 2, "n_head": 4}),
        Network("gpt2", QWEN, _QWEN | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
        Network("opt", QWEN, _QWEN | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        Network("falcon", QWEN, _QWEN | {"num_kv_heads": 4}),
        Network("stablelm", QWEN, _QWEN | {"num_key_value_heads": 2}),
        Network("cohere", QWEN, _QWEN | {"num_key_value_heads": 2}),
        Network("olmo", QWEN, _QWEN | {"num_key_value_heads": 2}),
        Network("starcoder2", QWEN, _QWEN | {"num_key_value_heads": 2}),
    )
}

#: Decoders by type.
DECODERS = {
    one.model_type: one
    for one in (
        Network("gemma", QWEN, _QWEN | _GQA),
        Network("gemma2", QWEN, _QWEN | _GQA | {"sliding_window": 16, "query_pre_attn_scalar": 16}),
        Network("gemma3_text", QWEN, _QWEN | _GQA | {"sliding_window": 16, "query_pre_attn_scalar": 16}),
        Network("gpt_neox", QWEN, _QWEN),
        Network("granite", QWEN, _QWEN | {"num_key_value_heads": 2}),
        Network("lfm2", QWEN, _QWEN | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
        Network("llama", QWEN, _QWEN | _GQA),
        Network("mistral", QWEN, _QWEN | _GQA | {"sliding_window": None}),
        Network("mixtral", QWEN, _QWEN | {"num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None}),
        Network("olmo2", QWEN, _QWEN | {"num_key_value_heads": 2}),
        Network("phi3", QWEN, _QWEN | {"num_key_value_heads": 2, "sliding_window": None}),
        Network("qwen2", QWEN, _QWEN | {"num_key_value_heads": 2}),
        Network(
            "qwen2_moe",
            QWEN,
            _QWEN
            | {
                "num_key_value_heads": 2,
                "num_experts": 4,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
                "num_experts_per_tok": 2,
            },
        ),
        Network("qwen3", QWEN, _QWEN | _GQA),
        Network(
            "qwen3_moe", QWEN, _QWEN | _GQA | {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
        ),
        Network("smollm3", QWEN, _QWEN | {"num_key_value_heads": 2}),
    )
}


def save(name: str, directory: Path) -> Path:
    """Write the form of that name; returns `directory`."""
    FORMS[name].make(directory)
    return directory


def qwen3(directory: Path, auto_class: str = "AutoModel", template: str | None = None, **sizes: Any) -> Path:
    """A Qwen3 network and its tokenizer, with a chat template if one is given."""
    DECODERS["qwen3"].save(directory, auto_class, **({"max_position_embeddings": 256} | sizes))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
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
    """Draw the module's weights anew."""
    torch.manual_seed(seed)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.15)


#: Makes the modules behind a network from the width of its states.
Behind = Callable[[int], list[Any]]


def embedder(network: Path, target: Path, behind: Behind, **model: Any) -> None:
    """A SentenceTransformer over the network in a directory, saved by the library; the network's own files go."""
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
    shutil.rmtree(network)


def cross_encoder(network: Path, target: Path, **model: Any) -> None:
    """A CrossEncoder over a network in a directory, saved by the library; the network's own files go."""
    from sentence_transformers import CrossEncoder

    with oracle.quiet():
        made = CrossEncoder(str(network), device="cpu", model_kwargs={"dtype": torch.float32}, **model)
        made.save_pretrained(str(target), create_model_card=False)
    shutil.rmtree(network)


def _embedder(network: Network, behind: Behind, refused: str | None = None, **model: Any) -> Form:
    return Form(
        "SentenceTransformer",
        lambda path: embedder(network.save(path / "network"), path, behind, **model),
        refused=refused,
    )


def _changed(form: Form, change: Callable[[Path], Any], refused: str | None = None) -> Form:
    """The same with something changed after it was saved."""

    def make(path: Path) -> None:
        form.make(path)
        change(path)

    return Form(form.kind, make, form.model, refused)


def _classifier(network: Network, **model: Any) -> Form:
    return Form(
        "CrossEncoder",
        lambda path: cross_encoder(network.save(path / "network", _CLASSIFIER, num_labels=1), path, **model),
    )


def _pooled(mode: Any, *more: str) -> Behind:
    """A Pooling, and the modules of these names behind it."""

    def behind(width: int) -> list[Any]:
        from sentence_transformers.base.modules import Dense, Normalize
        from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling

        modules: list[Any] = [Pooling(width, mode)]
        width *= 1 if isinstance(mode, str) else len(mode)
        for name in more:
            if name == "normalize":
                modules.append(Normalize())
            elif name == "layer norm":
                modules.append(LayerNorm(width))
            elif name == "dropout":
                modules.append(Dropout(0.3))
            else:
                out = {"narrow": 24, "wide": 48, "residual": width, "narrow residual": 20}[name]
                modules.append(Dense(width, out, activation_function=torch.nn.GELU(), use_residual="residual" in name))
                width = out
        return modules

    return behind


def _of_tokens(width: int) -> list[Any]:
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    tokens = "token_embeddings"
    return [Dense(width, 24, module_input_name=tokens), Normalize(module_input_name=tokens), Pooling(24, "mean")]


def _bert_dense_normalize(width: int) -> list[Any]:
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    return [Pooling(width, "mean"), Dense(width, width), Normalize()]


def _ettin(path: Path, network: Network, mode: str) -> None:
    """Transformer, Pooling, Dense, LayerNorm, Dense: a score out of a pooled state."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

    with oracle.quiet():
        transformer = Transformer(str(network.save(path / "network")), model_kwargs={"dtype": torch.float32})
        behind = [
            Pooling(32, mode),
            Dense(32, 32, activation_function=torch.nn.GELU()),
            LayerNorm(32),
            Dense(32, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
        ]
        for module in behind:
            widen(module)
        made = CrossEncoder(modules=[transformer, *behind], device="cpu", num_labels=1)
        made.save_pretrained(str(path), create_model_card=False)
    shutil.rmtree(path / "network")


def _logit_score(
    path: Path, template: str | None, answers: Sequence[int], network: str = "qwen3", **model: Any
) -> None:
    """A language model whose logits of one or two tokens are the score."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    saved = DECODERS[network].save(path / "network", _CAUSAL, max_position_embeddings=256)
    if template is not None:
        (saved / "chat_template.jinja").write_text(template)
    with oracle.quiet():
        transformer = Transformer(str(saved), transformer_task="text-generation", model_kwargs={"dtype": torch.float32})
        made = CrossEncoder(
            modules=[transformer, LogitScore(answers[0], answers[1] if len(answers) > 1 else None)],
            device="cpu",
            **model,
        )
        made.save_pretrained(str(path), create_model_card=False)
    shutil.rmtree(saved)


def _splade(path: Path, network: Network, strategy: str, activation: str, **model: Any) -> None:
    """A masked language model whose logits are weights of words."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    saved = network.save(path / "network", "AutoModelForMaskedLM")
    with oracle.quiet():
        transformer = Transformer(str(saved), transformer_task="fill-mask", model_kwargs={"dtype": torch.float32})
        pooling = SpladePooling(strategy, activation)  # type: ignore[arg-type]
        made = SparseEncoder(modules=[transformer, pooling], device="cpu", **model)
        made.save_pretrained(str(path), create_model_card=False)
    shutil.rmtree(saved)


def _static(path: Path, *, is_normalized: bool, model2vec: str = "", **model: Any) -> None:
    """A table of vectors; as model2vec saves it, plain or with a mapping and weights of tokens."""
    from safetensors.torch import save_file
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(oracle.GOLDEN / WORDPIECE / "model" / "tokenizer.json"))
    embedding = StaticEmbedding(tokenizer, embedding_dim=32)
    widen(embedding)
    with oracle.quiet():
        made = SentenceTransformer(modules=[embedding, *([Normalize()] * is_normalized)], device="cpu", **model)
        made.save_pretrained(str(path), create_model_card=False)
    if model2vec:
        file = next(path.rglob("model.safetensors"))
        table = embedding.embedding.weight.detach().clone()
        state = {"embeddings": table}
        if model2vec == "quantized":
            state = {
                "embeddings": table[:100].clone(),
                "mapping": torch.arange(len(table)) % 100,
                "weights": torch.linspace(0, 1, len(table)),
            }
        save_file(state, file)


def _plain(network: Network, auto_class: str = "AutoModel", **stated: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        network.save(path, auto_class, **stated)

    return make


_BERT, _MODERN, _QWEN3 = ENCODERS["bert"], ENCODERS["modernbert"], DECODERS["qwen3"]
_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_PROMPTS: dict[str, Any] = {
    "prompts": {"query": "Represent this: ", "document": "text: "},
    "default_prompt_name": "query",
}


def _forms() -> dict[str, Form]:
    forms = {
        "bert dense normalize": _embedder(_BERT, _bert_dense_normalize),
        "qwen3 chat": Form(
            "SentenceTransformer",
            lambda path: embedder(
                qwen3(path / "network", template=CHAT_TEMPLATE), path, _pooled("lasttoken", "normalize")
            ),
        ),
        "bert cross encoder": _classifier(_BERT),
        "qwen3 chat cross encoder": Form(
            "CrossEncoder",
            lambda path: cross_encoder(qwen3(path / "network", _CLASSIFIER, CHAT_TEMPLATE, num_labels=1), path),
        ),
    }
    for name, network in ENCODERS.items():
        forms[f"{name}, mean, normalized"] = _embedder(network, _pooled("mean", "normalize"))
        forms[f"{name}, first token"] = _embedder(network, _pooled("cls"))
    for name, network in DECODERS.items():
        forms[f"{name}, last token, normalized"] = _embedder(network, _pooled("lasttoken", "normalize"))
        forms[f"{name}, mean"] = _embedder(network, _pooled("mean"))
    for name, network in OTHERS.items():
        forms[f"{name}, mean, normalized"] = _embedder(
            network, _pooled("mean", "normalize"), refused=_REFUSED_TYPES.get(name)
        )
    for network, mode in itertools.product((_BERT, _MODERN, _QWEN3), _MODES):
        forms[f"{network.model_type}, pooling {mode}"] = _embedder(network, _pooled(mode))
    for modes in (["cls", "mean"], ["max", "mean", "lasttoken"], ["weightedmean", "mean_sqrt_len_tokens"]):
        forms[f"bert, poolings {' + '.join(modes)}"] = _embedder(_BERT, _pooled(modes, "normalize"))
    for more in (
        ["narrow"], ["wide", "normalize"], ["residual"], ["narrow residual", "normalize"], ["layer norm"], ["dropout"],
        ["dropout", "normalize"], ["narrow", "layer norm", "normalize"], ["normalize", "narrow"], ["wide", "dropout", "narrow"],
    ):  # fmt: skip
        forms[f"bert, mean, {', '.join(more)}"] = _embedder(_BERT, _pooled("mean", *more))
    forms["bert, Dense and Normalize of tokens"] = _embedder(_BERT, _of_tokens)
    forms |= _plain_forms() | _refused_forms() | _with_settings() | _rerankers() | _static_forms() | _sparse_forms()
    return forms


#: Types whose padding reaches into other texts.
_REFUSED_TYPES = {
    "convbert": "padding changes them",
    "mobilebert": "padding changes them",
    "nystromformer": "which fails on texts of up to 126 tokens",
}


def _rename(old: str, new: str, path: Path) -> None:
    (path / old).rename(path / new)


def _plain_forms() -> dict[str, Form]:
    """Directories of transformers alone, and older layouts of the library."""
    forms: dict[str, Form] = {}
    for name in ("bert", "distilbert", "modernbert", "mpnet", "nomic_bert", "xlm-roberta"):
        make = _plain(ENCODERS[name])
        forms[f"{name}, without modules.json"] = Form("SentenceTransformer", make, {"normalize": False})
    normalized = _embedder(_BERT, _pooled("mean", "normalize"))
    forms["bert, network in 0_Transformer"] = _changed(normalized, into_folder)
    for name in ("roberta", "distilbert", "xlnet"):
        forms[f"bert, sentence_{name}_config.json"] = _changed(
            normalized,
            partial(_rename, "sentence_bert_config.json", f"sentence_{name}_config.json"),
        )
    forms["bert, masked language model, without modules.json"] = Form(
        "SparseEncoder", _plain(_BERT, "AutoModelForMaskedLM"), refused="is a masked language model"
    )
    forms["bert, masked language model, family splade"] = Form(
        "SparseEncoder", _plain(_BERT, "AutoModelForMaskedLM"), {"family": "splade"}
    )
    for labels in (2, 3):
        forms[f"bert, CrossEncoder of {labels} labels"] = Form(
            "CrossEncoder", _plain(_BERT, _CLASSIFIER, num_labels=labels), refused=f"has {labels} labels"
        )
    return forms


def _save_modules(path: Path, library: str, make: Callable[[], list[Any]]) -> None:
    """Save a model of modules that stand for a class of them."""
    import sentence_transformers

    with oracle.quiet():
        getattr(sentence_transformers, library)(modules=make(), device="cpu").save_pretrained(
            str(path), create_model_card=False
        )


def _of_modules(library: str, make: Callable[[Path], list[Any]], refused: str) -> Form:
    return Form(library, lambda path: _save_modules(path, library, lambda: make(path)), refused=refused)


def _transformer(path: Path, **more: Any) -> Any:
    from sentence_transformers.base.modules import Transformer

    return Transformer(str(_BERT.save(path.parent / "network")), model_kwargs={"dtype": torch.float32}, **more)


def _refused_forms() -> dict[str, Form]:
    """Modules of the library that no family runs, and what only other programs read."""
    normalized = _embedder(_BERT, _pooled("mean", "normalize"))
    own = {
        "a Pooling of its own": (1, "my_pooling.Pooling"),
        "a Transformer of its own": (0, "custom_st.Transformer"),
    }
    stored = {
        "ONNX only": ("onnx/model.onnx", "weights for ONNX"),
        "pickle only": ("pytorch_model.bin", "embedq convert"),
        "GGUF only": ("model.gguf", "llama.cpp (GGUF)"),
    }
    return {
        **_refused_modules(),
        **{
            f"bert, {name}": _changed(normalized, partial(_set_class, *asked), f"names the class {asked[1]!r}")
            for name, asked in own.items()
        },
        **{
            f"bert, {name}": _changed(normalized, partial(store_as, file), said)
            for name, (file, said) in stored.items()
        },
        "bert, no tokenizer.json": _changed(
            normalized, lambda path: (path / "tokenizer.json").unlink(), "has no tokenizer.json"
        ),
    }


def store_as(file: str, path: Path) -> None:
    """Have an empty file of another format instead of safetensors."""
    (path / "model.safetensors").unlink()
    (path / file).parent.mkdir(exist_ok=True)
    (path / file).write_bytes(b"")


def _set_class(number: int, name: str, path: Path) -> None:
    modules = tiny_models.read(path / "modules.json")
    modules[number]["type"] = name
    tiny_models.write(path / "modules.json", modules)


def _refused_modules() -> dict[str, Form]:
    from sentence_transformers.sentence_transformer import modules as st
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    dense = "SentenceTransformer"
    return {
        "bert, WeightedLayerPooling": _of_modules(
            dense,
            lambda path: [_transformer(path), st.WeightedLayerPooling(32, 2, 1), st.Pooling(32, "mean")],
            "lists Transformer, WeightedLayerPooling, Pooling",
        ),
        "bert, CNN": _of_modules(
            dense, lambda path: [_transformer(path), st.CNN(32, 8), st.Pooling(24, "mean")], "lists Transformer, CNN"
        ),
        "bert, LSTM": _of_modules(
            dense, lambda path: [_transformer(path), st.LSTM(32, 8), st.Pooling(16, "mean")], "lists Transformer, LSTM"
        ),
        "BoW": _of_modules(dense, lambda path: [st.BoW(["a", "ferry"])], "lists BoW"),
        "bert, CSR (SparseAutoEncoder)": _of_modules(
            "SparseEncoder",
            lambda path: [_transformer(path), st.Pooling(32, "mean"), SparseAutoEncoder(32, 64, k=8)],
            "lists Transformer, Pooling, SparseAutoEncoder",
        ),
        "bert, MultiVectorEncoder": _multi_vector(),
        "bert, Router": _of_modules(dense, _routed, "lists Router"),
    }


def _multi_vector() -> Form:
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    tokens = "token_embeddings"

    def make(path: Path) -> list[Any]:
        dense = Dense(32, 16, bias=False, activation_function=torch.nn.Identity(), module_input_name=tokens)
        return [_transformer(path), dense, MultiVectorMask(), Normalize(module_input_name=tokens)]

    return _of_modules("MultiVectorEncoder", make, "is a MultiVectorEncoder of sentence-transformers")


def _routed(path: Path) -> list[Any]:
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer.modules import Pooling

    return [
        Router.for_query_document([_transformer(path), Pooling(32, "mean")], [_transformer(path), Pooling(32, "cls")])
    ]


def _with_settings() -> dict[str, Form]:
    """Forms whose own configuration states prompts, a dimension or a similarity."""
    normalized = _pooled("mean", "normalize")
    return {
        "bert, prompts": _embedder(_BERT, normalized, **_PROMPTS),
        "modernbert, prompts": _embedder(_MODERN, normalized, **_PROMPTS),
        "qwen3, prompts": _embedder(_QWEN3, _pooled("lasttoken", "normalize"), **_PROMPTS),
        "bert, truncate_dim": _embedder(_BERT, normalized, truncate_dim=10),
        "bert, truncate_dim, not normalized": _embedder(_BERT, _pooled("mean"), truncate_dim=10),
        **{
            f"bert, similarity {name}": _embedder(_BERT, _pooled("mean"), similarity_fn_name=name)
            for name in ("dot", "euclidean", "manhattan")
        },
        "qwen3 chat, prompts": Form(
            "SentenceTransformer",
            lambda path: embedder(
                qwen3(path / "network", template=CHAT_TEMPLATE), path, _pooled("lasttoken", "normalize"), **_PROMPTS
            ),
        ),
    }


def _rerankers() -> dict[str, Form]:
    forms: dict[str, Form] = {}
    types = "albert bert camembert deberta deberta-v2 distilbert electra ernie gte modernbert mpnet rembert roberta xlm-roberta xlm-roberta-xl"
    for name in types.split():
        forms[f"{name}, CrossEncoder"] = _classifier(ENCODERS[name])
    for name in ("llama", "qwen2", "qwen3", "gemma", "mistral"):
        forms[f"{name}, CrossEncoder"] = _classifier(DECODERS[name])
    forms["bert, CrossEncoder, prompts"] = _classifier(_BERT, prompts={"web": "find: "}, default_prompt_name="web")
    for network, mode in itertools.product((_MODERN, _BERT), ("cls", "mean")):
        forms[f"{network.model_type}, CrossEncoder of modules, {mode}"] = Form(
            "CrossEncoder", partial(_ettin, network=network, mode=mode)
        )
    for (template, what), answers in itertools.product(
        ((CHAT_TEMPLATE, ", chat template"), (None, "")), ((70, 71), (70,))
    ):
        forms[f"qwen3, LogitScore of {len(answers)}{what}"] = Form(
            "CrossEncoder", partial(_logit_score, template=template, answers=answers)
        )
    for name in ("llama", "qwen2", "mistral", "gemma2"):
        forms[f"{name}, LogitScore, chat template"] = Form(
            "CrossEncoder", partial(_logit_score, template=CHAT_TEMPLATE, answers=(70, 71), network=name)
        )
    forms["qwen3, LogitScore, an instruction as prompt"] = Form(
        "CrossEncoder",
        lambda path: _logit_score(
            path, CHAT_TEMPLATE, (70, 71), prompts={"web": "Judge it."}, default_prompt_name="web"
        ),
    )
    return forms


def _sparse_forms() -> dict[str, Form]:
    forms: dict[str, Form] = {}
    for name in ("bert", "distilbert", "modernbert", "xlm-roberta"):
        forms[f"{name}, SPLADE"] = Form(
            "SparseEncoder", partial(_splade, network=ENCODERS[name], strategy="max", activation="relu")
        )
    for strategy, activation in (("sum", "relu"), ("max", "log1p_relu")):
        forms[f"bert, SPLADE, {strategy} of {activation}"] = Form(
            "SparseEncoder",
            partial(_splade, network=_BERT, strategy=strategy, activation=activation),
        )
    forms["bert, SPLADE, max_active_dims"] = Form(
        "SparseEncoder", lambda path: _splade(path, _BERT, "max", "relu", max_active_dims=9)
    )
    forms["bert, SPLADE, prompts"] = Form("SparseEncoder", lambda path: _splade(path, _BERT, "max", "relu", **_PROMPTS))
    return forms


def _static_forms() -> dict[str, Form]:
    return {
        "StaticEmbedding": Form("SentenceTransformer", lambda path: _static(path, is_normalized=False)),
        "StaticEmbedding, normalized": Form("SentenceTransformer", lambda path: _static(path, is_normalized=True)),
        "StaticEmbedding, prompts": Form(
            "SentenceTransformer", lambda path: _static(path, is_normalized=True, **_PROMPTS)
        ),
        "StaticEmbedding, truncate_dim": Form(
            "SentenceTransformer", lambda path: _static(path, is_normalized=True, truncate_dim=8)
        ),
        "model2vec": Form("SentenceTransformer", lambda path: _static(path, is_normalized=True, model2vec="plain")),
        "model2vec, quantized": Form(
            "SentenceTransformer", lambda path: _static(path, is_normalized=True, model2vec="quantized")
        ),
    }


FORMS: dict[str, Form] = _forms()
