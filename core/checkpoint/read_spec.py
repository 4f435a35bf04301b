"""Reads from a model directory's files how to run it, as a `ModelSpec`.

Reads two layouts: sentence-transformers (`modules.json` names pooling, normalising, prompts and the length limit) and a
plain transformers directory (`config.json` alone). Never runs code from the directory and never reads a pickle. Knows
nothing of devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from embedq.core.checkpoint import families
from embedq.core.checkpoint.adapter import Adapter, read_adapter
from embedq.core.checkpoint.chat import read_chat
from embedq.core.checkpoint.files import check_weights, find, read_json
from embedq.core.checkpoint.module_chain import (
    Chain,
    read_chain,
    read_scoring_chain,
    read_sparse_chain,
    read_static_chain,
)
from embedq.core.checkpoint.network_types import UNLIMITED, Sizes, read_sizes, tokenizer_limit
from embedq.core.checkpoint.published_models import BY_FAMILY, RERANKER_PROMPTS, ModelDefaults, defaults_of
from embedq.core.checkpoint.saved_modules import Saved, TransformerFile, read_saved
from embedq.core.checkpoint.spec import RERANKERS, ModelSpec
from embedq.core.errors import CannotLoadModel
from embedq.core.settings import ModelSettings

#: Tokens for calls without `max_length`, by family, as in the models' own libraries. The weights allow far more, but
#: then every over-long passage would cost a language model's full context.
_USUAL_LENGTHS = {"llm_reranker": 512, "layerwise_reranker": 512, "lightweight_reranker": 512, "qwen3_reranker": 8_192}

#: Pooling by family where neither directory nor name states it; other families use the last token.
_USUAL_POOLINGS = {"encoder": "mean", "m3": "cls"}

#: Names for which sentence-transformers leaves the prompt out of the pooling, whatever their files say.
_INSTRUCTORS = frozenset(f"hkunlp/instructor-{size}" for size in ("base", "large", "xl"))

#: Keys of `config.json` by which sentence-transformers marks what its CrossEncoder saved.
_CROSS_ENCODER_KEYS = ("sentence_transformers", "sbert_ce_default_activation_function")


@dataclass(frozen=True, slots=True)
class _Read:
    """What was read of a directory with a network, for what is left to decide."""

    alias: str
    path: Path
    family: str
    config: dict[str, Any]
    sizes: Sizes
    saved: Saved | None
    settings: ModelSettings

    @property
    def home(self) -> Path:
        """Directory of the tokenizer's files: those of an adapter are beside it, not beside its base."""
        return self.saved.modules[0].path if self.saved else self.path

    @property
    def transformer(self) -> TransformerFile:
        return self.saved.transformer if self.saved else TransformerFile()


def read_spec(alias: str, settings: ModelSettings) -> ModelSpec:
    """Find the checkpoint (downloading a hub name), verify it, and read how to run it.

    Settings override the tables of published names, and those override the directory's own files. CannotLoadModel names
    what is missing or unsupported, and where.
    """
    root = find(settings.path, settings.revision, settings.cache_dir)
    try:
        saved = read_saved(root) if settings.layout is None else None
        if saved is not None:
            families.check_kind(saved)
        path = saved.modules[0].path if saved and saved.modules else root  # once in 0_Transformer
        adapter = read_adapter(path, settings.cache_dir)
        base = adapter.base if adapter else path
        check_weights(base, settings.sha256)
        if saved is not None and families.of_saved(saved) == "static":
            spec = _read_static(alias, path, saved, settings)
        else:
            config = read_json(base / "config.json")
            if config is None:
                raise CannotLoadModel(f"{base} has no config.json, so it is not a transformers checkpoint")
            spec = _with_adapter(_read(alias, base, config, saved, settings), adapter, path)
        return spec if spec.path == root else replace(spec, root=root)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CannotLoadModel(
            f"a configuration file of {root} does not have the expected form: {error!r:.200}"
        ) from error


def _with_adapter(spec: ModelSpec, adapter: Adapter | None, path: Path) -> ModelSpec:
    """The same with the adapter in `path`, and with the tokenizer beside the adapter if there is one."""
    if adapter is None:
        return spec
    if spec.family in families.OWN_NETWORKS:
        raise CannotLoadModel(f"{path} has an adapter (adapter_config.json), which family {spec.family} does not merge")
    has_tokenizer = (path / "tokenizer.json").is_file()
    return replace(spec, adapter=adapter, tokenizer_path=path if has_tokenizer else None)


def _read(alias: str, path: Path, config: dict[str, Any], saved: Saved | None, settings: ModelSettings) -> ModelSpec:
    listed = defaults_of(settings.path)
    # A CrossEncoder's modules say more than a name, which may have been given to another conversion.
    told = families.of_saved(saved) if saved else None
    family = settings.family or told or (listed.family if listed else families.of_files(path, config, saved))
    families.check(path, family, config, saved)
    sizes = read_sizes(path, config)
    read = _Read(alias, path, family, config, sizes, saved, settings)
    if family in RERANKERS:
        return _read_reranker(read)
    return _read_embedder(read, listed or BY_FAMILY.get(family, ModelDefaults(family)))


def _read_embedder(read: _Read, listed: ModelDefaults) -> ModelSpec:
    family, sizes, saved, settings, transformer = read.family, read.sizes, read.saved, read.settings, read.transformer
    chain = Chain() if saved is None else read_sparse_chain(saved) if family == "splade" else read_chain(saved)
    pooling = settings.pooling or "+".join(chain.poolings) or listed.pooling
    pooling = pooling or _USUAL_POOLINGS.get(family, "last_token")
    width = chain.width(sizes.hidden, len(pooling.split("+")))
    truncate_dim = saved.truncate_dim if saved else None
    limit = _limit(read)
    max_length = _max_length(read, limit)
    usual = settings.max_length or _usual_length(read, limit)
    lengths = {} if settings.max_length else {k: _possible(v, sizes) for k, v in transformer.lengths.items()}
    modules, is_normalized = chain.behind, chain.is_normalized if saved else True
    if truncate_dim is not None and is_normalized:  # normalised first, then cut: shorter than 1, as the library has it
        assert chain.last is not None
        modules, is_normalized = (*modules, chain.last), False
    return ModelSpec(
        alias=read.alias,
        path=read.path,
        family=family,
        pooling=pooling,
        normalize=is_normalized if settings.normalize is None else settings.normalize,
        max_length=max_length,
        default_length=usual if usual < max_length else None,
        dimensions=sizes.num_words if family == "splade" else min(width, truncate_dim or width),
        pad_token_id=sizes.pad_token_id,
        hidden_size=sizes.hidden,
        config=read.config,
        prompts=_prompts(saved),
        default_prompt=saved.default_prompt if saved else "",
        query_format=settings.query_format or listed.query_format,
        strip=settings.strip,
        lower=transformer.lower,
        lengths=lengths,
        truncation_side=transformer.truncation_side,
        include_prompt=chain.include_prompt and settings.path not in _INSTRUCTORS,
        similarity=(saved.similarity if saved else None) or "cosine",
        chat=read_chat(read.home, transformer) if saved else None,
        token_modules=chain.before,
        modules=modules,
        weights_rounded_to=settings.weights_rounded_to,
        **_given(
            settings,
            "query_instruction",
            "passage_instruction",
            "passage_format",
            "examples_format",
            "suffix",
            "examples",
        ),
    )


def _read_static(alias: str, path: Path, saved: Saved, settings: ModelSettings) -> ModelSpec:
    """A table of vectors, which has no network and so no `config.json` of one."""
    families.check(path, settings.family or "static", {}, saved)
    chain = read_static_chain(saved)
    width = chain.width(_table_width(path / "model.safetensors"), 1)
    is_cut = saved.truncate_dim is not None and chain.is_normalized
    return ModelSpec(
        alias=alias,
        path=path,
        family="static",
        pooling="mean",
        normalize=chain.is_normalized and not is_cut if settings.normalize is None else settings.normalize,
        max_length=settings.max_length or UNLIMITED,
        dimensions=min(width, saved.truncate_dim or width),
        pad_token_id=0,
        prompts=_prompts(saved),
        default_prompt=saved.default_prompt,
        strip=settings.strip,
        similarity=saved.similarity or "cosine",
        modules=chain.all if is_cut else chain.behind,
        **_given(settings, "query_instruction", "passage_instruction", "query_format", "passage_format"),
    )


def _table_width(file: Path) -> int:
    """Values of a row of a StaticEmbedding's table, by its name of sentence-transformers or of model2vec."""
    names = ("embedding.weight", "embeddings")
    try:
        with safe_open(file, framework="numpy") as weights:
            for name in names:
                if name in weights.keys():  # noqa: SIM118 (a file is no mapping)
                    return int(weights.get_slice(name).get_shape()[1])
    except (OSError, SafetensorError) as error:
        raise CannotLoadModel(f"{file} cannot be read as safetensors: {error}") from None
    raise CannotLoadModel(f"{file} has no table of vectors; looked for {' and '.join(names)}")


def _read_reranker(read: _Read) -> ModelSpec:
    family, sizes, saved, settings, transformer = read.family, read.sizes, read.saved, read.settings, read.transformer
    if family == "cross_encoder" and sizes.num_labels != 1:
        raise CannotLoadModel(
            f"{read.path} has {sizes.num_labels} labels; a reranker gives one score, so it must have exactly 1"
        )
    limit = _limit(read)
    length = _max_length(read, limit)
    usual = _USUAL_LENGTHS.get(family) if settings.max_length is None else None
    told: dict[str, Any] = dict(RERANKER_PROMPTS.get(family, {}))
    if saved is not None:
        told |= {"query_instruction": saved.default_prompt or None} | _of_modules(family, saved)
    if family == "cross_encoder" and (saved is not None or any(name in read.config for name in _CROSS_ENCODER_KEYS)):
        told |= {"pair_truncation": "longest"}  # as the library that it was trained with
    names = (
        "query_instruction",
        "passage_instruction",
        "query_format",
        "passage_format",
        "pair_truncation",
        "heads_by",
    )
    return ModelSpec(
        alias=read.alias,
        path=read.path,
        family=family,
        **({"pooling": None} | told | _given(settings, *names)),
        normalize=False,
        max_length=length,
        dimensions=1,
        pad_token_id=sizes.pad_token_id,
        hidden_size=sizes.hidden,
        config=read.config,
        default_length=min(usual, length) if usual else None,
        num_positions=max(length, limit),
        lower=transformer.lower,
        truncation_side=transformer.truncation_side,
        chat=read_chat(read.home, transformer) if saved else None,
    )


def _of_modules(family: str, saved: Saved) -> dict[str, Any]:
    """Fields of `ModelSpec` that the modules of a CrossEncoder state: they make its score."""
    if family == "logit_score":
        module = saved.modules[1]
        module.refuse_other_keys({"true_token_id", "false_token_id", "module_input_name"})
        if module.config.get("module_input_name", "causal_logits") != "causal_logits":
            raise CannotLoadModel(f"{module.path}/config.json reads something else than causal_logits")
        answers = (module.config["true_token_id"], module.config.get("false_token_id"))
        return {"answers": tuple(int(one) for one in answers if one is not None), "pair_truncation": "longest"}
    if family == "pooled_reranker":
        chain = read_scoring_chain(saved)
        given = {"token_modules": chain.before, "modules": chain.behind, "include_prompt": chain.include_prompt}
        return given | {"pooling": "+".join(chain.poolings), "pair_truncation": "longest"}
    return {}


def _given(settings: ModelSettings, *names: str) -> dict[str, Any]:
    """Those of `names` that are set, with their values."""
    return {name: value for name in names if (value := getattr(settings, name)) is not None}


def _prompts(saved: Saved | None) -> dict[str, str]:
    """Prompt by input type. Only a call that names no type gets the default one, as the library has it."""
    prompts = dict(saved.prompts) if saved else {}
    for older in ("passage", "corpus"):  # older names for the same thing
        if older in prompts:
            prompts.setdefault("document", prompts[older])
    return {"query": "", "document": ""} | prompts if prompts else {}


def _limit(read: _Read) -> int:
    """Tokens of a text that the weights have positions for, or fewer where the tokenizer's own limit is shorter.

    What sentence-transformers states goes before the tokenizer's limit, and, where places are computed and not looked
    up, before the number of positions.
    """
    if read.settings.layout == "transformers":
        return read.sizes.positions
    files = read_json(read.home / "tokenizer_config.json") or {}
    limit = min(read.sizes.positions, tokenizer_limit(files) or UNLIMITED)
    stated = read.transformer.max_length
    return limit if stated is None else max(limit, _possible(stated, read.sizes))


def _possible(length: int, sizes: Sizes) -> int:
    """`length`, or the number of positions if the weights have a table of fewer."""
    return min(length, sizes.positions) if sizes.has_table else length


def _max_length(read: _Read, limit: int) -> int:
    """Tokens of a text: as set, else as stated, else as many as there can be."""
    of_types = [_possible(length, read.sizes) for length in read.transformer.lengths.values()]  # may exceed the others
    longest = max([limit, *of_types])
    asked = read.settings.max_length
    if asked is not None and asked > longest:
        raise CannotLoadModel(
            f"max_length of model {read.alias!r} is set to {asked}; its weights have positions for {longest} tokens"
        )
    return asked or max([_usual_length(read, limit), *of_types])


def _usual_length(read: _Read, limit: int) -> int:
    """Tokens of a text of no type, where nothing is set."""
    return min(read.transformer.max_length or limit, limit)
