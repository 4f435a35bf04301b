"""Files of rows: found, measured once when a dataset is planned, and read range by range by workers.

    Parquet        footers say how many rows each row group has
    JSONL, CSV, text  one pass over the bytes finds where every part begins; inside a compressed file, in what it unpacks to
    Arrow IPC      the file's or stream's own batches, as in a folder that Hugging Face's `datasets` saved

Pure reading: knows no target, queue or model. pyarrow is imported where it is used.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from embedq.core.errors import BadSource, InvalidInput
from embedq.tasks.datasets.stores import Location, entry_of, failing, file_system, locate, open_location, version_of

if TYPE_CHECKING:
    import pyarrow

#: What a file is, by the end of its name; a compression may follow.
FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

#: Bytes of one line of JSONL or CSV: as much text as a job may have.
MAX_LINE_BYTES = 16 * 1024 * 1024

#: Bytes read in one go where a file is searched for lines, and rows of a batch that a worker reads.
_CHUNK_BYTES, BATCH_ROWS = 1024 * 1024, 1024

#: Lines from which the types of JSONL's kept columns are taken.
_SAMPLE_LINES = 1000

#: Files measured side by side: each costs a round trip or two to its store.
_NUM_THREADS = 16

_NEWLINE, _QUOTE = 10, 34


@dataclass(frozen=True, slots=True)
class Input:
    """One file of a dataset, as it was when it was planned."""

    path: str
    size: int
    version: str
    format: str
    compression: str | None = None
    #: First row of each part, and at the end the number of rows.
    starts: list[int] = field(default_factory=list)
    #: JSONL and CSV: the byte at which each of `starts` begins, in the unpacked file. Empty for others.
    offsets: list[int] = field(default_factory=list)
    #: CSV: names of its columns.
    header: list[str] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return self.starts[-1] if self.starts else 0

    @property
    def num_parts(self) -> int:
        return max(0, len(self.starts) - 1)

    def to_map(self) -> dict[str, Any]:
        """Plain values, without what is empty."""
        return {name: value for name, value in asdict(self).items() if value not in (None, [])}


def find_inputs(sources: list[str]) -> list[Input]:
    """The files of paths, folders and globs, not yet measured: those of one source by name, sources in their order.

    InvalidInput for a source without files of a known format, and for a file that is found twice.
    """
    found = [one for source in sources for one in _of_source(locate(source))]
    times = Counter(one.path for one in found)
    if twice := next((path for path, number in times.items() if number > 1), None):
        raise InvalidInput(f"two sources name the same file, {twice:.300}")
    return found


def measured(inputs: list[Input], rows_per_part: int) -> list[Input]:
    """The same with the begin of each part. BadSource names a file that cannot be read."""
    with ThreadPoolExecutor(min(_NUM_THREADS, max(1, len(inputs)))) as threads:
        return list(threads.map(partial(_measured, rows_per_part=rows_per_part), inputs))


def schema_of(one: Input, columns: list[str]) -> pyarrow.Schema:
    """The types of some columns of a file. InvalidInput if it has none of a name."""
    with _naming(one.path):
        schema = _SCHEMAS[one.format](one)
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise InvalidInput(
            f"{one.path:.300} has no column {missing[0]!r:.60}; it has {', '.join(schema.names)[:300] or 'none'}"
        )
    import pyarrow as pa

    return pa.schema([schema.field(name) for name in columns])


def check_text_type(one: Input, schema: pyarrow.Schema, columns: list[str]) -> None:
    """InvalidInput if a column of a typed file cannot hold texts."""
    if one.format not in ("parquet", "arrow"):
        return  # values of lines have types of their own: each is checked when it is read
    for name in columns:
        kind = str(schema.field(name).type)
        if not any(word in kind for word in ("string", "utf8", "null")):
            raise InvalidInput(f"column {name!r:.60} of {one.path:.300} holds {kind:.60}, not texts")


def check_unchanged(one: Input) -> None:
    """BadSource if the file is not the one that was planned."""
    now = entry_of(_location(one))
    if now is None or (now.size, now.version) != (one.size, one.version):
        what = (
            "is gone"
            if now is None
            else f"has changed: {one.size:,} bytes, {one.version}; now {now.size:,} bytes, {now.version}"
        )
        raise BadSource(f"{one.path:.300} {what}. Rows read now would not be those that were planned")


def read_rows(
    one: Input, part: int, columns: list[str], kept: pyarrow.Schema
) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """(row number, batch) after batch of the rows of the file's part number `part`, with these columns.

    `kept` are columns whose types must be as planned. BadSource names file and row where they are not, or the file
    cannot be read; StoreFailed where its store does not answer.
    """
    first, last = one.starts[part], one.starts[part + 1]
    row = first
    for batch in _reading(one, part, columns, kept):
        yield row, batch
        row += batch.num_rows
    if row != last:
        raise BadSource(f"{one.path:.300} ends at row {row:,}; rows up to {last:,} were planned")


def _reading(one: Input, part: int, columns: list[str], kept: pyarrow.Schema) -> Iterator[pyarrow.RecordBatch]:
    with _naming(one.path, one.starts[part], one.starts[part + 1]):
        yield from _READERS[one.format](one, part, columns, kept)


@contextmanager
def _naming(path: str, first: int | None = None, last: int | None = None) -> Iterator[None]:
    """Errors of reading as BadSource or StoreFailed that name the file and the rows."""
    import pyarrow as pa

    rows = "" if first is None else f", rows {first:,} to {last:,},"
    try:
        with failing(f"{path:.300}{rows} cannot be read"):
            yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, UnicodeDecodeError) as error:
        words = str(error).splitlines()[0] if isinstance(error, pa.ArrowException) else "broken UTF-8"
        raise BadSource(f"{path:.300}{rows} cannot be read: {words:.300}") from None


# -- finding --------------------------------------------------------------------------------------------------------


def _of_source(location: Location) -> list[Input]:
    files = file_system(location.protocol)
    with failing(f"{location} cannot be listed"):
        is_pattern = any(sign in location.path for sign in "*?[")
        if is_pattern:
            infos = list(files.glob(location.path, detail=True).values())
        elif files.isdir(location.path):
            infos = _of_folder(files, location)
        else:
            infos = [files.info(location.path)]
    infos = [info for info in infos if info["type"] == "file"]
    inputs = [one for info in infos if (one := _input(location, info))]
    if not inputs:
        raise InvalidInput(
            f"{location} holds no file to read; names end in {' '.join(FORMATS)}, compressed ones in .gz or .zst as well"
        )
    return inputs if location.path in (one.path for one in inputs) else _in_order(inputs)


def _of_folder(files: Any, location: Location) -> list[dict[str, Any]]:
    """The files below a folder; of one that `datasets` saved, those that its state names."""
    state = f"{location.path}/state.json"
    if files.exists(state) and files.exists(f"{location.path}/dataset_info.json"):
        try:
            described = json.loads(files.cat_file(state))
            names, has_index = [one["filename"] for one in described["_data_files"]], described.get("_indices_files")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise BadSource(f"{location}: state.json is not what `datasets` saves") from None
        if has_index:
            raise InvalidInput(f"{location} selects its rows by an index; save it again after flatten_indices()")
        return [files.info(f"{location.path}/{name}") for name in names]
    found = files.find(location.path, detail=True)
    return [info for path, info in found.items() if not _is_hidden(path[len(location.path) :])]


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/") if part)


def _in_order(inputs: list[Input]) -> list[Input]:
    return sorted(inputs, key=lambda one: one.path)


def _input(location: Location, info: dict[str, Any]) -> Input | None:
    """A file of a known format; None for others."""
    name = str(info["name"]).lower()
    compression = next((how for end, how in COMPRESSIONS.items() if name.endswith(end)), None)
    plain = name.rpartition(".")[0] if compression else name
    known = next((what for end, what in FORMATS.items() if plain.endswith(end)), None)
    if known is None or (compression and known not in ("jsonl", "csv", "text")):
        return None
    path = str(Location(location.protocol, str(info["name"])))
    return Input(path, int(info["size"]), version_of(info), known, compression)


def _location(one: Input) -> Location:
    protocol, separator, rest = one.path.partition("://")
    return Location(protocol, rest) if separator else Location("file", one.path)


# -- measuring ------------------------------------------------------------------------------------------------------


def _measured(one: Input, rows_per_part: int) -> Input:
    with _naming(one.path):
        starts, offsets, header = _MEASURES[one.format](one, rows_per_part)
    return Input(one.path, one.size, one.version, one.format, one.compression, starts, offsets, header)


def cut(groups: list[int], rows_per_part: int) -> list[int]:
    """First row of each part, and at the end the number of rows, of a file whose groups have so many rows.

    Whole groups are put together up to `rows_per_part`; a larger one is cut evenly.
    """
    starts, row, in_part = [0], 0, 0
    for size in groups:
        if in_part and in_part + size > rows_per_part:
            starts.append(row)
            in_part = 0
        if size > rows_per_part:
            num_parts = -(-size // rows_per_part)
            starts += [row + size * number // num_parts for number in range(1, num_parts)]
            in_part = row + size - starts[-1]
        else:
            in_part += size
        row += size
    if row > starts[-1]:
        starts.append(row)
    return starts if row else [0]


def _measure_parquet(one: Input, rows_per_part: int) -> tuple[list[int], list[int], list[str]]:
    with _parquet(one) as file:
        metadata = file.metadata
        groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    return cut(groups, rows_per_part), [], []


def _measure_arrow(one: Input, rows_per_part: int) -> tuple[list[int], list[int], list[str]]:
    with closing(_arrow_batches(one)) as batches:
        groups = [batch.num_rows for batch in batches]
    return cut(groups, rows_per_part), [], []


def _measure_jsonl(one: Input, rows_per_part: int) -> tuple[list[int], list[int], list[str]]:
    starts, offsets = _line_starts(one, rows_per_part, 0, lambda chunk, is_inside: (chunk == _NEWLINE, False))
    return starts, offsets, []


def _measure_csv(one: Input, rows_per_part: int) -> tuple[list[int], list[int], list[str]]:
    import csv

    with _unpacked(one) as file:
        line = _first_line(file, one.path)
    header = next(csv.reader([line.decode("utf-8-sig")]), [])
    starts, offsets = _line_starts(one, rows_per_part, len(line), _ends_outside_quotes)
    return starts, offsets, header


def _ends_outside_quotes(chunk: np.ndarray, is_inside: bool) -> tuple[np.ndarray, bool]:
    """Find the bytes that end a row of CSV: a quoted value may hold line breaks. Also returns if the chunk ends in quotes."""
    inside = np.logical_xor.accumulate(np.concatenate([[is_inside], chunk == _QUOTE]))[1:]
    return (chunk == _NEWLINE) & ~inside, bool(inside[-1])


def _first_line(file: IO[bytes], path: str) -> bytes:
    line = file.readline(MAX_LINE_BYTES)
    while line.count(b'"') % 2 and (more := file.readline(MAX_LINE_BYTES)):
        line += more
        if len(line) > MAX_LINE_BYTES:
            raise BadSource(f"{path:.300}: its first row has more than {MAX_LINE_BYTES:,} bytes")
    return line


def _line_starts(
    one: Input, rows_per_part: int, begin: int, ends: Callable[[np.ndarray, bool], tuple[np.ndarray, bool]]
) -> tuple[list[int], list[int]]:
    """Rows and bytes at which parts begin, from the byte `begin` on; the last is the end."""
    starts, offsets, row, line_begin, position, is_inside, last = [0], [begin], 0, begin, begin, False, _NEWLINE
    with _unpacked(one) as file:
        _skip(file, begin)
        while chunk := file.read(_CHUNK_BYTES):
            array = np.frombuffer(chunk, np.uint8)
            at, is_inside = ends(array, is_inside)
            after = position + np.flatnonzero(at) + 1
            _check_lengths(one.path, row, line_begin, after, position + len(chunk))
            begun = after[rows_per_part - 1 - (row - starts[-1]) :: rows_per_part]
            starts += [starts[-1] + rows_per_part * (number + 1) for number in range(len(begun))]
            offsets += begun.tolist()
            row, line_begin = row + len(after), int(after[-1]) if len(after) else line_begin
            position, last = position + len(chunk), chunk[-1]
    row += position > line_begin or (last != _NEWLINE and position > begin)
    if row > starts[-1]:
        starts.append(row)
        offsets.append(position)
    return starts, offsets


def _check_lengths(path: str, row: int, line_begin: int, after: np.ndarray, position: int) -> None:
    lengths = np.diff(after, prepend=line_begin)
    open_bytes = position - (int(after[-1]) if len(after) else line_begin)
    too_long = np.flatnonzero(lengths > MAX_LINE_BYTES)
    if len(too_long) or open_bytes > MAX_LINE_BYTES:
        number = row + (int(too_long[0]) if len(too_long) else len(after))
        raise BadSource(f"{path:.300}, row {number:,}: the line has more than {MAX_LINE_BYTES:,} bytes")


# -- reading --------------------------------------------------------------------------------------------------------


@contextmanager
def _parquet(one: Input) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with (
        open_location(_location(one)) as opened,
        closing(pq.ParquetFile(opened, pre_buffer=False)) as file,
    ):
        yield file


def _read_parquet(one: Input, part: int, columns: list[str], kept: pyarrow.Schema) -> Iterator[pyarrow.RecordBatch]:
    """Group after group, because `Dataset.to_batches` keeps what it has read (arrow #39808)."""
    first, last = one.starts[part], one.starts[part + 1]
    with _parquet(one) as file:
        begin = 0
        for group in range(file.metadata.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            if begin < last and end > first:
                batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False)
                yield from _within(batches, begin, first, last)
            begin = end


def _read_arrow(one: Input, part: int, columns: list[str], kept: pyarrow.Schema) -> Iterator[pyarrow.RecordBatch]:
    with closing(_arrow_batches(one)) as batches:
        for batch in _within(batches, 0, one.starts[part], one.starts[part + 1]):
            yield from _sliced(batch.select(columns))


def _sliced(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    for start in range(0, batch.num_rows, BATCH_ROWS):
        yield batch.slice(start, BATCH_ROWS)


def _within(batches: Any, begin: int, first: int, last: int) -> Iterator[pyarrow.RecordBatch]:
    """Of batches whose first row has the number `begin`, the rows from `first` to before `last`."""
    for batch in batches:
        end = begin + batch.num_rows
        if begin < last and end > first:
            start = max(first - begin, 0)
            yield batch.slice(start, min(end, last) - begin - start)
        if end >= last:
            return
        begin = end


@contextmanager
def _arrow(one: Input) -> Iterator[Any]:
    """A reader of an IPC file, or of a stream, which is what `datasets` writes under the same name."""
    import pyarrow as pa

    location = _location(one)
    # Mapped where it can be: rows that are passed over are then never read.
    opened = pa.memory_map(location.path) if location.is_local else pa.PythonFile(open_location(location), mode="r")
    with opened:
        is_file = opened.read(6) == b"ARROW1"
        opened.seek(0)
        yield pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)


def _arrow_batches(one: Input) -> Generator[pyarrow.RecordBatch, None, None]:
    import pyarrow as pa

    with _arrow(one) as reader:
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from reader


def _read_jsonl(one: Input, part: int, columns: list[str], kept: pyarrow.Schema) -> Iterator[pyarrow.RecordBatch]:
    row, rows = one.starts[part], list[dict[str, Any]]()
    with _lines(one, part) as lines:
        for line in lines:
            rows.append(_parsed(one.path, row + len(rows), line))
            if len(rows) == BATCH_ROWS:
                yield _json_batch(one.path, row, rows, columns, kept)
                row, rows = row + len(rows), []
    if rows:
        yield _json_batch(one.path, row, rows, columns, kept)


def _read_text(one: Input, part: int, columns: list[str], kept: pyarrow.Schema) -> Iterator[pyarrow.RecordBatch]:
    """One column, `text`: a line each, without its end."""
    import pyarrow as pa

    kind = kept.field("text").type if "text" in kept.names else pa.binary()
    with _lines(one, part) as lines:
        while some := [line.rstrip(b"\r\n") for line in islice(lines, BATCH_ROWS)]:
            column = pa.array(some, pa.binary()).cast(kind)
            yield pa.RecordBatch.from_arrays([column for _ in columns], names=columns)


def _parsed(path: str, row: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        raise BadSource(f"{path:.300}, row {row:,}: broken UTF-8 at byte {error.start:,} of the line") from None
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos:,}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadSource(f"{path:.300}, row {row:,}: the line is no JSON{where}") from None
    if not isinstance(value, dict):
        raise BadSource(f"{path:.300}, row {row:,}: the line is a {type(value).__name__}, not an object")
    return value


def _json_batch(
    path: str, row: int, rows: list[dict[str, Any]], columns: list[str], kept: pyarrow.Schema
) -> pyarrow.RecordBatch:
    import pyarrow as pa

    arrays = []
    for name in columns:
        values = [one.get(name) for one in rows]
        if name in kept.names:
            arrays.append(_typed(path, row, name, values, kept.field(name).type))
        else:  # a text; what is none is marked, so that it can be told from a missing one
            arrays.append(pa.array([_as_text(value) for value in values], pa.binary()))
    return pa.RecordBatch.from_arrays(arrays, names=columns)


def _as_text(value: Any) -> bytes | None:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return None if value is None else NOT_TEXT + type(value).__name__.encode()


#: Begins the bytes that stand for a value that is no text; no UTF-8 begins so.
NOT_TEXT = b"\xff\xfe\xff"


def _typed(path: str, row: int, name: str, values: list[Any], kind: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        for number, value in enumerate(values):
            try:
                pa.array([value], kind)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
                raise BadSource(
                    f"{path:.300}, row {row + number:,}: column {name!r:.60} holds a {type(value).__name__}, "
                    f"and the first rows of the source hold {kind}"
                ) from None
        raise


def _read_csv(one: Input, part: int, columns: list[str], kept: pyarrow.Schema) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow as pa
    from pyarrow import csv

    types = {name: kept.field(name).type if name in kept.names else pa.binary() for name in columns}
    begin, end = one.offsets[part], one.offsets[part + 1]
    # Arrow refuses a row that is longer than a block.
    block_bytes = max(1, min(end - begin, MAX_LINE_BYTES))
    options = {
        "read_options": csv.ReadOptions(use_threads=False, column_names=one.header, block_size=block_bytes),
        "parse_options": csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
        "convert_options": csv.ConvertOptions(include_columns=columns, column_types=types),
    }
    with _unpacked(one) as file:
        _skip(file, begin)
        for batch in csv.open_csv(io.BufferedReader(_Range(file, end - begin), _CHUNK_BYTES), **options):
            yield from _sliced(batch)


@contextmanager
def _unpacked(one: Input) -> Iterator[Any]:
    """The file's bytes, unpacked if they are compressed."""
    import pyarrow as pa

    with open_location(_location(one)) as opened:
        if one.compression is None:
            yield opened
        else:
            with pa.CompressedInputStream(pa.PythonFile(opened, mode="r"), one.compression) as unpacked:
                yield _Stream(unpacked)


class _Stream(io.RawIOBase):
    """Arrow's stream as Python's own, which reads lines."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._stream.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


class _Range(io.RawIOBase):
    """The next so many bytes of a file."""

    def __init__(self, file: Any, num_bytes: int) -> None:
        self._file, self._left = file, num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._file.read(min(len(buffer), self._left))
        self._left -= len(found)
        buffer[: len(found)] = found
        return len(found)


def _skip(file: Any, num_bytes: int) -> None:
    """Go to a byte of a file just opened; what is compressed has to be unpacked up to there."""
    if not isinstance(file, _Stream):
        file.seek(num_bytes)
        return
    while num_bytes > 0 and (found := file.read(min(num_bytes, _CHUNK_BYTES))):
        num_bytes -= len(found)


@contextmanager
def _lines(one: Input, part: int) -> Iterator[Iterator[bytes]]:
    begin, end = one.offsets[part], one.offsets[part + 1]
    with _unpacked(one) as file:
        _skip(file, begin)
        lines = io.BufferedReader(_Range(file, end - begin), _CHUNK_BYTES)
        yield iter(partial(lines.readline, MAX_LINE_BYTES + 1), b"")


# -- types ----------------------------------------------------------------------------------------------------------


def _parquet_schema(one: Input) -> Any:
    with _parquet(one) as file:
        return file.schema_arrow


def _arrow_schema(one: Input) -> Any:
    with _arrow(one) as reader:
        return reader.schema


def _text_schema(one: Input) -> Any:
    import pyarrow as pa

    return pa.schema([("text", pa.string())])


def _jsonl_schema(one: Input) -> Any:
    """Types as the first lines show them; a column that none of them has is not there."""
    import pyarrow as pa

    rows = []
    with _unpacked(one) as file:
        for row, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")):
            rows.append(_parsed(one.path, row, line))
            if len(rows) == _SAMPLE_LINES:
                break
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([(name, _type_of(one.path, name, [row.get(name) for row in rows])) for name in names])


def _type_of(path: str, name: str, values: list[Any]) -> Any:
    import pyarrow as pa

    try:
        found = pa.infer_type(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
        return pa.null()  # values of several types; kept, it is refused at the first that does not fit
    return pa.string() if pa.types.is_null(found) else found


def _csv_schema(one: Input) -> Any:
    import pyarrow as pa

    if not one.header:
        return pa.schema([])
    try:
        return _csv_types(one, _CHUNK_BYTES)
    except pa.ArrowInvalid:  # a row longer than that, or a broken one, which is refused again
        return _csv_types(one, MAX_LINE_BYTES)


def _csv_types(one: Input, block_bytes: int) -> Any:
    """Types as the first block shows them."""
    import pyarrow as pa
    from pyarrow import csv

    options = {
        "read_options": csv.ReadOptions(use_threads=False, block_size=block_bytes),
        "parse_options": csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
    }
    with _unpacked(one) as file:
        try:
            return csv.open_csv(io.BufferedReader(file) if isinstance(file, _Stream) else file, **options).schema
        except pa.ArrowInvalid as error:
            if "Empty CSV" not in str(error):
                raise
            return pa.schema([(name, pa.string()) for name in one.header])


_MEASURES = {
    "parquet": _measure_parquet,
    "arrow": _measure_arrow,
    "jsonl": _measure_jsonl,
    "text": _measure_jsonl,
    "csv": _measure_csv,
}
_READERS = {"parquet": _read_parquet, "arrow": _read_arrow, "jsonl": _read_jsonl, "text": _read_text, "csv": _read_csv}
_SCHEMAS = {
    "parquet": _parquet_schema,
    "arrow": _arrow_schema,
    "jsonl": _jsonl_schema,
    "text": _text_schema,
    "csv": _csv_schema,
}
