import dataclasses
import gzip
import hashlib
import json
import logging
import pickle
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from sae_ray.chat import Conversation, Message
from sae_ray.errors import PoolError
from sae_ray.pool import plan, read
from sae_ray.rows import ROLES, count_reasons
from sae_ray.tables import Slice

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=40)
SPOKEN = TEXT.filter(lambda text: bool(text.strip()))


def _turn(role: str) -> st.SearchStrategy[Message]:
    content = SPOKEN if role in ("user", "assistant") else TEXT
    return content.map(lambda text: Message(role=role, content=text))


MESSAGES = st.lists(st.sampled_from(ROLES).flatmap(_turn), max_size=4).flatmap(
    lambda turns: _turn("assistant").map(lambda last: [*turns, last])
)
IDS = st.text(string.ascii_letters + "äß😀 ", min_size=1, max_size=8)
ROWS = st.lists(st.tuples(IDS, MESSAGES), min_size=1, max_size=9)


def _row(i: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "ja"}]
    return {"messages": turns}


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _read_all(source: str, rows_per_shard: int = 2048) -> list[Conversation]:
    slices = plan(source, rows_per_shard=rows_per_shard).slices
    return [conversation for part in slices for conversation in read(part).conversations]


@settings(max_examples=40, deadline=None, database=None)
@given(ROWS, st.integers(1, 10), st.booleans())
def test_any_valid_conversation_comes_back_as_it_was(
    given_rows: list[tuple[str, list[Message]]], rows_per_shard: int, ascii_only: bool
) -> None:
    conversations = [Conversation(id, messages) for id, messages in given_rows]
    rows = [dataclasses.asdict(conversation) for conversation in conversations]
    with tempfile.TemporaryDirectory() as folder:
        lines, table = Path(folder, "pool.jsonl"), Path(folder, "pool.parquet")
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
        lines.write_bytes(text.encode())
        _write(table, rows)
        assert _read_all(str(lines), rows_per_shard) == conversations
        assert _read_all(str(table), rows_per_shard) == conversations


@pytest.mark.parametrize("name", ["pool.jsonl", "pool.parquet"])
@pytest.mark.parametrize("rows_per_shard", [1, 2, 3, 7, 50])
def test_slices_cover_every_row_once_and_in_order(
    tmp_path: Path, name: str, rows_per_shard: int
) -> None:
    _write(tmp_path / "a" / name, [_row(i) for i in range(7)])
    _write(tmp_path / "b" / name, [_row(i) for i in range(7, 12)])
    planned = plan(str(tmp_path), rows_per_shard=rows_per_shard)
    parts = [read(part) for part in planned.slices]
    assert [part.index for part in planned.slices] == list(range(len(planned.slices)))
    assert [row for part in parts for row in part.rows] == list(range(12))
    assert planned.num_rows == 12
    said = [c.messages[0]["content"] for part in parts for c in part.conversations]
    assert said == [f"question {i}" for i in range(12)]


def test_a_row_without_an_id_has_the_same_one_in_every_file_type(tmp_path: Path) -> None:
    rows = [_row(i) for i in range(5)]
    from_lines = _read_all(_write(tmp_path / "pool.jsonl", rows))
    assert from_lines == _read_all(_write(tmp_path / "pool.parquet", rows))
    assert len({conversation.id for conversation in from_lines}) == 5


def test_a_slice_survives_json_and_pickle(tmp_path: Path) -> None:
    part = plan(_write(tmp_path / "pool.jsonl", [_row(0)])).slices[0]
    assert Slice(**json.loads(json.dumps(dataclasses.asdict(part)))) == part
    assert pickle.loads(pickle.dumps(part)) == part


def test_a_fingerprint_follows_the_contents_not_the_place(tmp_path: Path) -> None:
    rows = [_row(i) for i in range(5)]
    first = plan(_write(tmp_path / "a.jsonl", rows)).fingerprint
    assert plan(_write(tmp_path / "elsewhere/b.jsonl", rows), rows_per_shard=2).fingerprint == first
    assert plan(_write(tmp_path / "a.jsonl", [*rows[:4], _row(9)])).fingerprint != first


def test_bad_rows_are_rejected_by_number_with_their_reason(tmp_path: Path) -> None:
    lines = [json.dumps({**_row(i), "id": i}) for i in range(6)]
    lines[1] = lines[1][:-10]
    lines[2] = json.dumps({"id": "two", "messages": [{"role": "user", "content": "\ud800"}]})
    lines[4] = json.dumps({"id": "four\x00", "messages": []})
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(lines))
    slices = plan(str(path), rows_per_shard=2).slices
    parts = [read(part) for part in slices]
    assert [row for part in parts for row in part.rows] == [0, 3, 5]
    assert [c.id for part in parts for c in part.conversations] == ["0", "3", "5"]
    rejected = [row for part in parts for row in part.rejected]
    assert [(row.row, row.id) for row in rejected] == [(1, None), (2, "two"), (4, "four\\x00")]
    assert count_reasons(rejected) == {
        "not valid JSON": 1,
        "lone surrogate in the text": 1,
        "no messages": 1,
    }


def test_kept_columns_stay_beside_their_conversations(tmp_path: Path) -> None:
    rows = [{**_row(0), "source": "a", "n": 1}, {"messages": [], "source": "b"}, _row(2)]
    for name in ("pool.jsonl", "pool.parquet"):
        planned = plan(_write(tmp_path / name, rows))
        assert planned.columns == ("messages", "source", "n")
        columns = read(planned.slices[0], keep_columns=["source", "n"]).columns
        assert columns == {"source": ["a", ""], "n": ["1", ""]}


def test_a_folder_leaves_notes_and_hidden_files_alone(tmp_path: Path) -> None:
    _write(tmp_path / "data/part-1.parquet", [_row(1)])
    _write(tmp_path / "data/part-0.parquet", [_row(0)])
    _write(tmp_path / ".cache/old.parquet", [_row(8)])
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "_SUCCESS").write_text("")
    assert [c.messages[0]["content"][-1] for c in _read_all(str(tmp_path))] == ["0", "1"]


def test_a_glob_takes_what_it_matches_in_order(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        _write(tmp_path / f"part-{i}.jsonl", [_row(i)])
    _write(tmp_path / "other.jsonl", [_row(9)])
    found = _read_all(str(tmp_path / "part-*.jsonl"))
    assert [c.messages[0]["content"][-1] for c in found] == ["0", "1", "2"]


def test_an_empty_file_of_a_folder_adds_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    _write(tmp_path / "b.jsonl", [_row(0)])
    assert plan(str(tmp_path)).num_rows == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pool.jsonl", b"", "holds no rows"),
        ("pool.jsonl", b"not json\nat all", "none of its first 2 lines is a JSON object"),
        ("pool.jsonl", b'[\n{"messages": []},\n{"messages": []}\n]\n', "is one JSON list: .* jq"),
        ("pool.jsonl", b'{"text": "x", "label": 1}\n', "has the columns text, label: needed are"),
        ("pool.jsonl", b'{"messages": []}'.decode().encode("utf-16"), "neither Parquet nor JSONL"),
        ("pool.csv", b"prompt,response\nx,y\n", "neither Parquet nor JSONL"),
        ("pool.parquet", b"", "is no Parquet file"),
        ("pool.parquet", b'{"messages": []}', "is no Parquet file .* begins with PAR1"),
        ("pool.parquet", b"PAR1 and then nothing more", "cannot be read"),
    ],
)
def test_a_pool_that_is_none_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PoolError, match=message):
        plan(str(tmp_path / name))


def test_a_parquet_pool_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "pool.parquet", [{"text": "x"}])
    with pytest.raises(PoolError, match=r"has the columns text: .* messages; conversations"):
        plan(path)


def test_a_parquet_pool_of_no_rows_is_refused(tmp_path: Path) -> None:
    schema = pa.schema([("prompt", pa.string()), ("response", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "pool.parquet")
    with pytest.raises(PoolError, match="holds no rows"):
        plan(str(tmp_path / "pool.parquet"))


@pytest.mark.parametrize(
    "source",
    ["", "{}/pool.jsonl", "{}/pool*.parquet", "{}/nowhere", "./nowhere/pool.parquet", "{}@train"],
)
def test_a_missing_pool_is_named(tmp_path: Path, source: str) -> None:
    given = source.format(tmp_path / "absent")
    with pytest.raises(PoolError, match="does not exist") as caught:
        plan(given, staging=str(tmp_path / "staging"))
    assert repr(given) in str(caught.value)


def test_an_unknown_protocol_is_named(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="nosuch"):
        plan("nosuch://bucket/pool.parquet")


def test_a_folder_must_hold_one_kind_of_pool(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="holds no pool"):
        plan(str(tmp_path))
    _write(tmp_path / "a.jsonl", [_row(0)])
    _write(tmp_path / "b.parquet", [_row(0)])
    with pytest.raises(PoolError, match=r"holds Parquet and JSONL files: .*/\*\.parquet"):
        plan(str(tmp_path))


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on an S3 server of this machine, reached by environment variables alone."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    S3FileSystem.clear_instance_cache()
    name = hashlib.md5(str(tmp_path).encode()).hexdigest()  # buckets outlive the server
    fsspec.filesystem("s3").mkdir(name)
    yield f"s3://{name}"
    S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.slow
def test_a_pool_on_s3_reads_like_one_on_disk(tmp_path: Path, bucket: str) -> None:
    rows = [{**_row(i), "id": f"row {i}"} for i in range(7)]
    s3 = fsspec.filesystem("s3")
    for name in ("pool.parquet", "pool.jsonl"):
        local = _write(tmp_path / name, rows)
        s3.put(local, f"{bucket}/data/{name}")
        remote = plan(f"{bucket}/data/{name}", rows_per_shard=3)
        assert remote.fingerprint == plan(local).fingerprint
        assert _read_all(f"{bucket}/data/{name}", 3) == _read_all(local)
        assert all(part.path == f"{bucket}/data/{name}" for part in remote.slices)
    assert _read_all(f"{bucket}/data/*.jsonl") == _read_all(local)
    s3.rm(f"{bucket}/data/pool.jsonl")
    assert _read_all(f"{bucket}/data") == _read_all(local)
    # Another machine adds a file: listings kept from before must not hide it.
    S3FileSystem(skip_instance_cache=True).put(
        f"{tmp_path}/pool.parquet", f"{bucket}/data/z.parquet"
    )
    assert plan(f"{bucket}/data").num_rows == 14


@pytest.mark.slow
def test_a_pool_on_s3_can_be_staged_on_s3(tmp_path: Path, bucket: str) -> None:
    text = "".join(json.dumps(_row(i)) + "\n" for i in range(3))
    fsspec.filesystem("s3").pipe(f"{bucket}/pool.jsonl.gz", gzip.compress(text.encode()))
    planned = plan(f"{bucket}/pool.jsonl.gz", staging=f"{bucket}/staging")
    assert [len(read(part).rows) for part in planned.slices] == [3]
    assert planned.slices[0].path.startswith(f"{bucket}/staging/")


@pytest.mark.slow
def test_a_pool_on_s3_that_is_not_there_or_out_of_reach_is_named(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PoolError, match="does not exist"):
        plan(f"{bucket}/absent.parquet")
    with pytest.raises(PoolError, match="no-such-bucket"):
        plan("s3://no-such-bucket/pool.parquet")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(PoolError, match="cannot be read .*credentials"):
        plan(f"{bucket}/pool.parquet")
