"""Files of rows: where their parts begin, what is read of them, and what is said of files that lie."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq.core.errors import BadSource, InvalidInput, StoreFailed
from embedq.tasks.datasets import sources
from embedq.tasks.datasets.sources import check_unchanged, cut, find_inputs, measured, read_rows, schema_of
from tests.dataset_files import FORMATS, csv, jsonl, parquet, table_of

ROWS_PER_PART = 250

TYPED = pa.schema([("id", pa.int64()), ("url", pa.string())])


def texts_of(path: Path, rows_per_part: int = ROWS_PER_PART) -> list[tuple[int, str]]:
    """(id, text) of every row, read part by part."""
    read = []
    for one in measured(find_inputs([str(path)]), rows_per_part):
        for part in range(one.num_parts):
            batches = [batch for _, batch in read_rows(one, part, ["id", "body", "url"], TYPED)]
            rows = [row for batch in batches for row in batch.to_pylist()]
            assert 0 < len(rows) == one.starts[part + 1] - one.starts[part] <= rows_per_part
            read += [(row["id"], row["body"] if isinstance(row["body"], str) else row["body"].decode()) for row in rows]
    return read


@pytest.mark.parametrize("write", FORMATS, ids=lambda one: one.__name__)
def test_every_format_gives_the_same_rows_in_the_same_order(
    write: Callable[[pa.Table, Path], Path], tmp_path: Path
) -> None:
    table = table_of(1234)
    expected = [(row["id"], row["body"]) for row in table.to_pylist()]
    assert texts_of(write(table, tmp_path / "rows")) == expected


@pytest.mark.parametrize("write", FORMATS, ids=lambda one: one.__name__)
def test_the_bounds_of_parts_do_not_matter(write: Callable[[pa.Table, Path], Path], tmp_path: Path) -> None:
    path = write(table_of(601), tmp_path / "rows")
    assert texts_of(path, 1) == texts_of(path, 600) == texts_of(path, 601) == texts_of(path, 10_000)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_parts_cover_all_rows_once_and_none_is_too_large(groups: list[int], rows_per_part: int) -> None:
    starts = cut(groups, rows_per_part)
    assert (starts[0], starts[-1]) == (0, sum(groups))
    sizes = [end - begin for begin, end in pairwise(starts)]
    assert all(0 < size <= rows_per_part for size in sizes)
    if max(groups, default=0) <= rows_per_part:  # no group was cut, and no two neighbours would fit into one part
        assert all(one + other > rows_per_part for one, other in pairwise(sizes))


def test_small_groups_share_a_part_and_large_ones_are_cut_evenly() -> None:
    assert cut([100, 100, 100, 100], 250) == [0, 200, 400]
    assert cut([1000], 300) == [0, 250, 500, 750, 1000]
    assert cut([], 10) == [0]


@pytest.mark.parametrize("ending", [b"", b"\n"])
def test_a_last_line_counts_with_or_without_its_end(ending: bytes, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n' * 9 + b'{"a": 1}' + ending)
    (one,) = measured(find_inputs([str(file)]), 4)
    assert one.starts == [0, 4, 8, 10]
    assert one.offsets == [0, 36, 72, 90 - (ending == b"")]


def test_an_empty_file_has_no_parts(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"")
    (tmp_path / "rows.csv").write_bytes(b"id,body\n")
    found = measured(find_inputs([str(tmp_path)]), 4)
    assert [one.num_parts for one in found] == [0, 0]


def test_lines_are_found_across_the_bounds_of_what_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(table_of(50), tmp_path / "rows")
    whole = measured(find_inputs([str(path)]), 7)
    for size in (1, 3, 100):
        monkeypatch.setattr(sources, "_CHUNK_BYTES", size)
        assert measured(find_inputs([str(path)]), 7) == whole


def test_a_folder_gives_its_files_by_name_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "_c.parquet", "notes.txt", "README.md"):
        (tmp_path / name).touch()
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "d.csv").touch()
    assert [Path(one.path).name for one in find_inputs([str(tmp_path)])] == [
        "a.parquet",
        "b.parquet",
        "d.csv",
        "notes.txt",
    ]
    assert [Path(one.path).name for one in find_inputs([f"{tmp_path}/*.parquet"])] == [
        "_c.parquet",
        "a.parquet",
        "b.parquet",
    ]


def test_sources_without_files_and_with_the_same_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no file to read"):
        find_inputs([str(tmp_path)])
    with pytest.raises(StoreFailed, match="no such file"):
        find_inputs([str(tmp_path / "absent.parquet")])
    (tmp_path / "a.csv").touch()
    with pytest.raises(InvalidInput, match=r"same file.*a\.csv"):
        find_inputs([str(tmp_path), str(tmp_path / "a.csv")])


def test_a_folder_with_a_state_that_datasets_did_not_save_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    for state in ("{", "[]", "{}", '{"_data_files": [{}]}'):
        (tmp_path / "state.json").write_text(state)
        with pytest.raises(BadSource, match=r"state\.json is not what `datasets` saves"):
            find_inputs([str(tmp_path)])


def test_a_value_of_csv_may_be_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    long = "x" * 3_000_000
    path = csv(pa.table({"id": [0, 1, 2], "body": ["a", long, "b"], "url": ["", "", ""]}), tmp_path / "rows")
    (one,) = measured(find_inputs([str(path)]), 10)
    assert schema_of(one, ["id"]) == pa.schema([("id", pa.int64())])
    assert texts_of(path) == [(0, "a"), (1, long), (2, "b")]


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    path = parquet(table_of(100), tmp_path / "rows")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadSource, match=r"rows\.parquet cannot be read"):
        measured(find_inputs([str(path)]), 10)


def test_a_parquet_file_with_broken_pages_is_named_with_its_rows(tmp_path: Path) -> None:
    path = parquet(table_of(1000), tmp_path / "rows")
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xaa" * 1996
    path.write_bytes(content)
    (one,) = measured(find_inputs([str(path)]), 400)
    with pytest.raises((BadSource, StoreFailed), match=r"rows\.parquet, rows 0 to 300, cannot be read"):
        list(read_rows(one, 0, ["id", "body", "url"], TYPED))


def test_a_line_that_is_too_long_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"body": "a"}\n' * 3 + b'{"body": "' + b"x" * 50_000_000 + b'"}\n{"body": "a"}\n')
    with pytest.raises(BadSource, match=r"rows\.jsonl, row 3: the line has more than 16,777,216 bytes"):
        measured(find_inputs([str(path)]), 10)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"id": 1, "url": "a", "body": "\xff\xfe"}', "broken UTF-8"),
        (b'{"id": 1, "url": "a", "body": ', "no JSON at character 31"),
        (b"[1]", "a list, not an object"),
        (b'{"id": "one", "url": "a", "body": "b"}', "column 'id' holds a str"),
    ],
)
def test_a_wrong_line_is_named_with_its_row(line: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 1, "url": "a", "body": "b"}\n' * 5 + line + b"\n")
    (one,) = measured(find_inputs([str(path)]), 4)
    with pytest.raises(BadSource, match=rf"rows\.jsonl, row 5: .*{words}"):
        list(read_rows(one, 1, ["id", "body", "url"], TYPED))


def test_a_file_that_changed_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    path = parquet(table_of(10), tmp_path / "rows")
    (one,) = measured(find_inputs([str(path)]), 10)
    check_unchanged(one)
    parquet(table_of(11), tmp_path / "rows")
    with pytest.raises(BadSource, match=r"rows\.parquet has changed"):
        check_unchanged(one)
    path.unlink()
    with pytest.raises(BadSource, match=r"rows\.parquet is gone"):
        check_unchanged(one)


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    (one,) = measured(find_inputs([str(parquet(table_of(10), tmp_path / "rows"))]), 10)
    with pytest.raises(InvalidInput, match="no column 'text'; it has id, body, url"):
        schema_of(one, ["text"])


def test_a_parquet_file_is_read_without_its_other_columns_and_groups(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(table_of(900).append_column("big", pa.array(["x" * 10_000] * 900)), path, row_group_size=300)
    (one,) = measured(find_inputs([str(path)]), 300)
    ((row, batch),) = read_rows(one, 1, ["id"], pa.schema([("id", pa.int64())]))
    assert (row, batch.num_rows, batch.schema.names) == (300, 300, ["id"])
