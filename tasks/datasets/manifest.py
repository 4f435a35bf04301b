"""The manifest of a dataset: what was asked and what was found, kept in the target beside the parts.

    target/part-000000-<id>.parquet     one object per part, in the order of the rows
    target/_embedq/manifest.json        this
    target/_embedq/failed/<part>.jsonl  rows of a part that have no vector, and why
    target/_embedq/cancelled            there while the run is cancelled
    target/_embedq/writing/             what is being written on a file system

The id, and with it every part's name, follows from the manifest's content: two who ask the same ask for the same
objects. Equal manifests are one run; unequal ones never share a target.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from string import Formatter
from typing import Any, NamedTuple

from embedq.core.errors import BadSource, InvalidInput
from embedq.tasks.datasets.sources import Input
from embedq.tasks.datasets.stores import META, Store

MANIFEST, CANCELLED = f"{META}/manifest.json", f"{META}/cancelled"

FAILED = f"{META}/failed"

#: Of the objects written: raised when parts of this code's would not be what earlier code wrote.
FORMAT = 1

#: Bytes of a manifest that are read: a hundred thousand files, or parts, take some 20 MB.
_MAX_BYTES = 256 * 1024 * 1024

#: Ids as `with_id` makes them. Names of objects begin with one, so that another could lead out of the target.
_ID = re.compile(r"[0-9a-f]{32}")


class Part(NamedTuple):
    """A range of rows of one file: one job, one object."""

    number: int
    #: Place of its file among the manifest's inputs, and its place in the file.
    input: int
    within: int
    first_row: int
    end_row: int

    @property
    def num_rows(self) -> int:
        return self.end_row - self.first_row


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that make a row's text or pair, and those that are kept."""

    #: A column, or a template of several: "{title}\\n{body}". None for pairs.
    text: str | None = None
    query: str | None = None
    passage: str | None = None
    keep: tuple[str, ...] = ()
    #: Columns that name a row in the list of failed ones.
    key: tuple[str, ...] = ()

    @property
    def of_text(self) -> list[str]:
        """The columns that are computed from."""
        if self.text is None:
            return [str(self.query), str(self.passage)]
        return template_columns(self.text) if "{" in self.text else [self.text]

    @property
    def to_read(self) -> list[str]:
        """All columns that a worker reads, each once."""
        return [*dict.fromkeys([*self.of_text, *self.keep, *self.key])]

    @property
    def typed(self) -> list[str]:
        """Columns whose types are fixed when the dataset is planned."""
        return [
            name for name in dict.fromkeys([*self.keep, *self.key]) if name not in self.of_text or name in self.keep
        ]


def template_columns(template: str) -> list[str]:
    """The columns that a template names, each once. InvalidInput for anything but plain {names}."""
    try:
        found = [(name, spec, how) for _, name, spec, how in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InvalidInput(f"the template of the text cannot be read: {error}; write a brace as {{{{ or }}}}") from None
    for name, spec, how in found:
        if not name or spec or how or any(sign in name for sign in ".[]!:"):
            raise InvalidInput(f"a template holds column names in braces and nothing else there; given {{{name:.60}}}")
    if not found:
        raise InvalidInput("a template must name at least one column in braces")
    return [*dict.fromkeys(name for name, _, _ in found)]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The request for a dataset, and the files found for it."""

    #: "embed" or "rerank".
    kind: str
    sources: tuple[str, ...]
    #: Alias, source, revision and content hash, as workers announce them.
    model: dict[str, str]
    #: Of the call, as `core.options` has them, without the model.
    options: dict[str, Any]
    columns: Columns
    rows_per_part: int
    #: Types of the kept columns, as Arrow writes a schema, in base64.
    schema: str
    embedq: str
    inputs: tuple[Input, ...] = ()
    format: int = FORMAT
    #: Of the first manifest in the target; `--add` keeps it.
    id: str = ""
    #: Raised by `--add`, so that workers read the manifest again.
    edition: int = 1
    _parts: list[Part] = field(default_factory=list, compare=False, repr=False)

    @property
    def parts(self) -> list[Part]:
        """All parts, in the order of the rows."""
        if not self._parts and self.inputs:
            self._parts[:] = list(_parts_of(self.inputs))  # at once: another thread must never see some of them
        return self._parts

    @property
    def num_rows(self) -> int:
        return sum(one.num_rows for one in self.inputs)

    def name(self, number: int) -> str:
        """The object of a part."""
        return f"part-{number:06d}-{self.id[:8]}.parquet"

    def failed_name(self, number: int) -> str:
        """The object that lists a part's failed rows."""
        return f"{FAILED}/part-{number:06d}-{self.id[:8]}.jsonl"

    def number_of(self, name: str) -> int | None:
        """The part that an object is; None if it is none of this manifest's."""
        digits, _, rest = name.removeprefix("part-").partition("-")
        if not name.startswith("part-") or not digits.isdecimal() or rest != f"{self.id[:8]}.parquet":
            return None
        return int(digits) if int(digits) < len(self.parts) and name == self.name(int(digits)) else None

    def to_bytes(self) -> bytes:
        """As it lies in the target."""
        return json.dumps(self._plain(), ensure_ascii=False, indent=1).encode()

    def with_id(self) -> Manifest:
        """The same, named by its content."""
        content = json.dumps(self._plain() | {"id": "", "edition": 1}, ensure_ascii=False, sort_keys=True)
        return replace(self, id=hashlib.sha256(content.encode()).hexdigest()[:32])

    def _plain(self) -> dict[str, Any]:
        fields = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("_parts", "columns", "inputs")
        }
        return fields | {"columns": asdict(self.columns), "inputs": [one.to_map() for one in self.inputs]}


def from_bytes(content: bytes, where: str) -> Manifest:
    """A manifest as it lies in a target. BadSource if it is none."""
    try:
        given = json.loads(content)
        inputs = tuple(Input(**one) for one in given.pop("inputs"))
        columns = Columns(**{name: _tuple(value) for name, value in given.pop("columns").items()})
        made = Manifest(**{name: _tuple(value) for name, value in given.items()}, columns=columns, inputs=inputs)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadSource(f"{where} is no manifest of embedq's") from None
    if not isinstance(made.id, str) or not _ID.fullmatch(made.id):
        raise BadSource(f"{where} is no manifest of embedq's: its id must be 32 hexadecimal digits")
    if made.format != FORMAT:
        raise BadSource(f"{where} has format {made.format}; this embedq reads {FORMAT}")
    return made


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of a target; None if there is none. BadSource if it is none of ours, or too large to be one."""
    entry = store.entry(MANIFEST)
    if entry and entry.size > _MAX_BYTES:
        raise BadSource(f"{store.location}: a manifest may have {_MAX_BYTES:,} bytes; this has {entry.size:,}")
    content = store.read(MANIFEST) if entry else None
    return None if content is None else from_bytes(content, f"{store.location}/{MANIFEST}")


def differences(old: Manifest, new: Manifest) -> list[str]:
    """Every way in which a second start differs from the first, each in one line."""
    before, after = _flat(old), _flat(new)
    changed = [
        f"{name} was {_shown(before.get(name))} and is now {_shown(after.get(name))}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    return changed + _input_differences(old.inputs, new.inputs)


def added(old: Manifest, new: Manifest) -> Manifest:
    """The old manifest with the new one's further files behind its own.

    InvalidInput if anything else differs: a file that is gone or has changed included.
    """
    known = {one.path for one in old.inputs}
    more = tuple(one for one in new.inputs if one.path not in known)
    rest = replace(new, inputs=tuple(one for one in new.inputs if one.path in known), sources=old.sources, _parts=[])
    if changed := differences(old, rest):
        raise InvalidInput(f"--add takes new files and nothing else; {'; '.join(changed)[:1000]}")
    if not more:
        return old
    sources = tuple(dict.fromkeys([*old.sources, *new.sources]))
    return replace(old, inputs=(*old.inputs, *more), sources=sources, edition=old.edition + 1, _parts=[])


def _flat(manifest: Manifest) -> dict[str, Any]:
    plain = manifest._plain()
    flat = {name: plain[name] for name in ("kind", "sources", "rows_per_part", "schema", "embedq", "format")}
    for group in ("model", "options", "columns"):
        flat |= {f"{group}.{name}": value for name, value in plain[group].items()}
    as_read: dict[str, Any] = json.loads(json.dumps(flat))
    return as_read


def _input_differences(old: tuple[Input, ...], new: tuple[Input, ...]) -> list[str]:
    before, after = {one.path: one for one in old}, {one.path: one for one in new}
    changed = [
        f"{path:.300} was {before[path].size:,} bytes, {before[path].version}, and is now "
        f"{after[path].size:,} bytes, {after[path].version}"
        for path in before.keys() & after.keys()
        if (before[path].size, before[path].version) != (after[path].size, after[path].version)
    ]
    gone = [f"{path:.300} is no longer among the files" for path in before if path not in after]
    come = [f"{path:.300} is new" for path in after if path not in before]
    if not (changed or gone or come) and [*before] != [*after]:
        return ["the order of the files differs"]
    return changed + gone + come


def _parts_of(inputs: tuple[Input, ...]) -> Iterator[Part]:
    number = 0
    for place, one in enumerate(inputs):
        for within in range(one.num_parts):
            yield Part(number, place, within, one.starts[within], one.starts[within + 1])
            number += 1


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:200]
