"""Checks what a user asks of a dataset, and makes its manifest. Reads sources and target; sends nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import embedq
from embedq.core.errors import InvalidInput, UnknownModel
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.tasks.calls import embed as embed_task
from embedq.tasks.datasets.manifest import MANIFEST, Columns, Manifest, added, differences, from_bytes, read_manifest
from embedq.tasks.datasets.schemas import schema_to_text
from embedq.tasks.datasets.sources import Input, check_text_type, find_inputs, measured, schema_of
from embedq.tasks.datasets.stores import META, Store, locate

if TYPE_CHECKING:
    import pyarrow

ROWS_PER_PART = 20_000

#: The same where every token of a text has a vector: a part is held in memory until it is written.
ROWS_PER_COLBERT_PART = 500

#: A part is some seconds of work at least, or its bookkeeping is most of it; and it fits into memory.
_MIN_ROWS, _MAX_ROWS = 1, 1_000_000

#: Names that the vectors' columns take.
_TAKEN = frozenset({"dense", "sparse_ids", "sparse_weights", "colbert", "score"})

#: Options of a call that mean nothing for rows of a dataset.
_NOT_FOR_ROWS = ("timings", "top_k", "cutoff_layers")


@dataclass(frozen=True, slots=True)
class Question:
    """A user's request, checked."""

    kind: str
    sources: tuple[str, ...]
    target: str
    columns: Columns
    model: str | None
    rows_per_part: int
    options: dict[str, Any]


def question(
    kind: str,
    source: str | Iterable[str],
    target: str,
    columns: Columns,
    model: str | None,
    rows_per_part: int | None,
    options: dict[str, Any],
) -> Question:
    """Check what was asked. InvalidInput says which argument is wrong, what it may be, and what was given."""
    sources = (source,) if isinstance(source, str) else tuple(source)
    given = {name: value for name, value in options.items() if value is not None}
    if unfit := next((name for name in _NOT_FOR_ROWS if name in given), None):
        raise InvalidInput(f"{unfit} means nothing for a dataset, whose rows each have one answer")
    checked = (EmbedOptions if kind == "embed" else RerankOptions).checked({**given, "model": model})
    if getattr(checked, "dtype", "") == "int8":
        raise InvalidInput(
            "int8 vectors of a dataset could not be compared: their ranges would be each part's own. "
            "Ask for float16 or ubinary, or quantise the finished dataset with ranges of the whole"
        )
    is_colbert = "colbert" in getattr(checked, "outputs", ())
    rows = rows_per_part or (ROWS_PER_COLBERT_PART if is_colbert else ROWS_PER_PART)
    if type(rows) is not int or not _MIN_ROWS <= rows <= _MAX_ROWS:
        raise InvalidInput(
            f"rows_per_part must be a whole number from {_MIN_ROWS} to {_MAX_ROWS:,}; given {rows!r:.40}"
        )
    _check_columns(columns)
    plain = {name: _plain(getattr(checked, name)) for name in given}
    return Question(kind, tuple(map(str, sources)), str(target), columns, model, rows, plain)


def plan(asked: Question, is_adding: bool = False) -> tuple[Manifest, Manifest | None]:
    """(the manifest that was asked for, the one in the target or None). Nothing is written.

    InvalidInput if the target holds a dataset that differs, naming each difference; BadSource for a file that cannot
    be read.
    """
    store = Store(locate(asked.target))
    old = read_manifest(store)
    if old is None:
        _check_empty(store)
    inputs = _measured(asked, old)
    schema = _schema(inputs, asked.columns)
    new = Manifest(
        kind=asked.kind,
        sources=tuple(str(locate(source)) for source in asked.sources),
        model=_model(asked.kind, asked.model),
        options=asked.options,
        columns=asked.columns,
        rows_per_part=asked.rows_per_part,
        schema=schema_to_text(schema),
        embedq=embedq.__version__,
        inputs=tuple(inputs),
    ).with_id()
    if old is None:
        return new, None
    if is_adding:
        return added(old, new), old
    _refuse_differences(old, new, store)
    return old, old


def write(manifest: Manifest, old: Manifest | None, store: Store) -> Manifest:
    """Put the manifest into the target; the one that is there if another starter was faster with an equal one."""
    if old is not None:
        if manifest is not old:
            store.replace(MANIFEST, lambda file: file.write(manifest.to_bytes()))
        return manifest
    if store.create(MANIFEST, lambda file: file.write(manifest.to_bytes())):
        return manifest
    content = store.read(MANIFEST)
    assert content is not None, "a manifest was refused as taken, and is not there"
    there = from_bytes(content, f"{store.location}/{MANIFEST}")
    _refuse_differences(there, manifest, store)
    return there


def estimate(manifest: Manifest) -> dict[str, int]:
    """Parts, rows, and bytes of the vectors, as far as they can be known before."""
    options = manifest.options
    width = options.get("dimensions") or int(manifest.model.get("dimensions") or 0)
    size = {"float16": 2.0, "ubinary": 1 / 8}.get(options.get("dtype") or "float32", 4.0)
    per_row = 4.0 if manifest.kind == "rerank" else width * size
    return {"parts": len(manifest.parts), "rows": manifest.num_rows, "bytes": int(manifest.num_rows * per_row)}


def _refuse_differences(old: Manifest, new: Manifest, store: Store) -> None:
    if changed := differences(old, new):
        raise InvalidInput(
            f"{store.location} holds another dataset: {'; '.join(changed[:5])[:1500]}"
            f"{f'; and {len(changed) - 5} more' if len(changed) > 5 else ''}. Start it as it was, take another target, "
            "or add new files with --add"
        )


def _measured(asked: Question, old: Manifest | None) -> list[Input]:
    """The files found, with their parts; those that an old manifest knows are not read again."""
    found = find_inputs(list(asked.sources))
    known = {one.path: one for one in old.inputs} if old and old.rows_per_part == asked.rows_per_part else {}
    new = [one for one in found if not _is_same(one, known.get(one.path))]
    fresh = {one.path: one for one in measured(new, asked.rows_per_part)}
    return [fresh.get(one.path) or known[one.path] for one in found]


def _is_same(one: Input, known: Input | None) -> bool:
    return known is not None and (one.size, one.version) == (known.size, known.version)


def _schema(inputs: list[Input], columns: Columns) -> pyarrow.Schema:
    """Types of the kept columns and keys, the same in every file."""
    import pyarrow as pa

    typed = columns.typed
    if wrong := next((name for name in columns.keep if name in _TAKEN), None):
        raise InvalidInput(f"column {wrong!r} cannot be kept under its name, which a column of the results has")

    def of_file(one: Input) -> pyarrow.Schema:
        # A text may be missing in the first lines of JSONL, from which its columns are taken.
        schema = schema_of(one, typed if one.format == "jsonl" else columns.to_read)
        check_text_type(one, schema, columns.of_text)
        return pa.schema([pa.field(name, schema.field(name).type) for name in typed])

    with ThreadPoolExecutor(16) as threads:
        # Files without rows may have no columns, and no row would miss them.
        schemas = list(threads.map(of_file, (one for one in inputs if one.num_rows)))
    return _agreed(inputs, schemas, typed)


def _agreed(inputs: list[Input], schemas: list[Any], names: Sequence[str]) -> pyarrow.Schema:
    import pyarrow as pa

    if not schemas:
        return pa.schema([(name, pa.string()) for name in names])
    has_own_types = any(one.format in ("parquet", "arrow") for one in inputs)
    try:
        return pa.unify_schemas(schemas, promote_options="default" if has_own_types else "permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InvalidInput(f"the files' columns have different types: {str(error).splitlines()[0]:.300}") from None


def _model(kind: str, alias: str | None) -> dict[str, str]:
    """The model as workers announce it. UnknownModel if none does: what it holds would not be known."""
    embed_task.registry.check(kind, alias)
    known = embed_task.registry.all()
    chosen = alias or next((name for name, one in known.items() if kind in one.default_for), None)
    if chosen not in known:
        raise UnknownModel(
            f"no worker has announced {'a default model' if alias is None else repr(alias)} for {kind}; start one, so that "
            "the dataset can say which weights it was made with"
        )
    one = known[chosen]
    return {
        "alias": one.alias,
        "source": one.source,
        "revision": one.revision,
        "content": one.content,
        "reading": one.reading,
        "dimensions": str(one.dimensions),
    }


def _check_empty(store: Store) -> None:
    others = [name for name in store.entries() if not name.startswith(META)]
    if others:
        raise InvalidInput(
            f"{store.location} holds {len(others):,} objects and no manifest ({others[0]:.100}); take an empty target"
        )


def _check_columns(columns: Columns) -> None:
    named = [*columns.of_text, *columns.keep, *columns.key]
    if wrong := next((name for name in named if not isinstance(name, str) or not name or name == "None"), None):
        raise InvalidInput(f"a column's name must be a string of at least one character; given {wrong!r:.40}")


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value
