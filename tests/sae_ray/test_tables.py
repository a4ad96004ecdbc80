import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_ray import tables
from sae_ray.errors import PoolError
from sae_ray.rows import BadRow
from sae_ray.tables import Slice, cut, read_rows

LOCAL = fsspec.filesystem("file")


def _row(i: int) -> dict[str, str]:
    return {"id": str(i), "prompt": f"question {i}", "response": "ja"}


def _cut(path: Path, rows_per_slice: int = 2048) -> list[Slice]:
    return cut(LOCAL, str(path), rows_per_slice).slices


def _ids(slices: list[Slice]) -> list[object]:
    rows = [row for part in slices for row in read_rows(part)]
    return [row.reason if isinstance(row, BadRow) else row["id"] for row in rows]


def _lines(num_rows: int, end: str = "\n") -> str:
    return "".join(json.dumps(_row(i)) + end for i in range(num_rows))


@pytest.mark.parametrize("rows_per_slice", [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 4096])
def test_lines_are_cut_the_same_wherever_chunks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_slice: int, chunk_bytes: int
) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text(_lines(7))
    whole = _cut(path, rows_per_slice)
    monkeypatch.setattr(tables, "_CHUNK_BYTES", chunk_bytes)
    assert _cut(path, rows_per_slice) == whole
    assert [part.num_rows for part in whole] == [
        min(rows_per_slice, 7 - at) for at in range(0, 7, rows_per_slice)
    ]
    assert _ids(whole) == [str(i) for i in range(7)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("rows_per_slice", [2, 3, 100])
def test_line_ends_and_byte_order_marks_do_not_matter(
    tmp_path: Path, end: str, last: bool, mark: str, rows_per_slice: int
) -> None:
    text = _lines(6, end)
    path = tmp_path / "pool.jsonl"
    path.write_bytes((mark + (text if last else text.removesuffix(end))).encode())
    slices = _cut(path, rows_per_slice)
    assert sum(part.num_rows for part in slices) == 6
    assert _ids(slices) == [str(i) for i in range(6)]


def test_a_bad_line_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 200_000)
    bad = [
        b'{"id": "half',
        b"",
        b"  \r",
        b"[1]",
        b'{"id": "\xff"}',
        b"[" * 100_000,
        b'{"id": "' + b"x" * 200_000 + b'"}',
        b'{"id": ' + b"9" * 5_000 + b"}",
    ]
    good = json.dumps(_row(1)).encode()
    path = tmp_path / "pool.jsonl"
    path.write_bytes(b"\n".join(line for one in bad for line in (one, good)) + b"\n\n")
    assert _ids(_cut(path, 3)) == [
        *["not valid JSON", "1", "blank line", "1", "blank line", "1", "not a JSON object", "1"],
        *["not valid UTF-8", "1", "JSON nested too deeply", "1"],
        *["line is longer than 200,000 bytes", "1", "not valid JSON", "1", "blank line"],
    ]


def test_an_endless_line_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 1000)
    chunks = [b"x" * 100] * 1000 + [b"\nshort"]
    assert [len(line) for line in tables._lines(chunks)] == [1001, 5]


@pytest.mark.parametrize("group_rows", [1, 4, 10, 1000])
@pytest.mark.parametrize("rows_per_slice", [1, 3, 4, 9, 1000])
@pytest.mark.parametrize("step", [1, -1, 2])
def test_parquet_slices_are_read_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_rows: int, rows_per_slice: int, step: int
) -> None:
    monkeypatch.setattr(tables, "_BATCH_ROWS", 5)
    path = tmp_path / "pool.parquet"
    pq.write_table(pa.Table.from_pylist([_row(i) for i in range(23)]), path, group_rows)
    slices = _cut(path, rows_per_slice)
    assert [part.start for part in slices] == list(range(0, 23, rows_per_slice))
    order = [*slices[::step], *(slices[1::2] if step == 2 else [])]
    expected = [str(i) for part in order for i in range(part.start, part.stop)]
    assert _ids(order) == expected


def test_a_slice_of_a_huge_row_group_does_not_hold_the_group(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i:08d}" * 500, "response": "ja"} for i in range(8_000)]
    path = tmp_path / "pool.parquet"
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, path, len(rows), compression="none", use_dictionary=False)
    group_bytes = table.nbytes
    del table
    held = pa.total_allocated_bytes()
    taken = sum(1 for part in _cut(path, 500)[:2] for _ in read_rows(part))
    assert taken == 1000
    assert pa.total_allocated_bytes() - held < group_bytes / 2


def test_only_columns_of_forms_and_those_kept_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pool.parquet"
    pq.write_table(pa.Table.from_pylist([{**_row(0), "source": "here", "image": b"0"}]), path)
    part = _cut(path)[0]
    assert list(read_rows(part)) == [_row(0)]
    assert list(read_rows(part, ["source", "absent"])) == [{**_row(0), "source": "here"}]


def test_parquet_text_that_is_not_utf8_costs_only_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xed\xa0\x80", b"fine"])
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    path = tmp_path / "pool.parquet"
    pq.write_table(pa.table({"id": ["0", "1", "2"], "prompt": text, "response": text}), path)
    assert _ids(_cut(path)) == ["0", "not valid UTF-8", "2"]


@pytest.mark.parametrize("name", ["pool.jsonl", "pool.parquet"])
def test_a_file_that_changed_since_it_was_cut_is_refused(tmp_path: Path, name: str) -> None:
    def write(num_rows: int) -> None:
        if name == "pool.jsonl":
            (tmp_path / name).write_text(_lines(num_rows))
        else:
            pq.write_table(
                pa.Table.from_pylist([_row(i) for i in range(num_rows)]), tmp_path / name
            )

    write(3)
    part = _cut(tmp_path / name)[0]
    write(20)
    with pytest.raises(PoolError, match="is not the file that was planned"):
        list(read_rows(part))
    (tmp_path / name).unlink()
    with pytest.raises(PoolError, match="cannot be read"):
        list(read_rows(part))


def test_large_files_are_told_apart_by_size_and_both_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pool.bin"
    monkeypatch.setattr(tables, "_HASHED_LOCAL_BYTES", 100)
    monkeypatch.setattr(tables, "_CHUNK_BYTES", 8)
    hashes = set()
    for content in (b"a" * 200, b"a" * 201, b"b" + b"a" * 199, b"a" * 199 + b"b"):
        path.write_bytes(content)
        hashes.add(tables.hash_file(LOCAL, str(path)))
    assert len(hashes) == 4
