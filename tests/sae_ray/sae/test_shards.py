"""Shards of instances: every row is an instance, held out, a repeat, or rejected with a reason."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_ray.chat import ChatTokenizer, Kind
from sae_ray.errors import PoolError
from sae_ray.pool import plan
from sae_ray.rows import PLAIN_FORMS
from sae_ray.sae.sequences import CONVERSATION, KIND, TOKEN
from sae_ray.sae.shards import InstanceReader


@pytest.fixture
def tokenizer(tiny_tokenizer) -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer)


@pytest.fixture
def pool(tmp_path: Path, make_pool) -> Path:
    """Sixty rows; then broken JSON, no assistant turn, an id that was there before."""
    path = make_pool(tmp_path / "pool.jsonl", 60)
    asked = {"id": "lonely", "messages": [{"role": "user", "content": "anyone?"}]}
    twin = {"id": "row-0", "messages": [
        {"role": "user", "content": "again"}, {"role": "assistant", "content": "yes"}
    ]}  # fmt: skip
    with path.open("a") as file:
        file.write("{broken\n" + json.dumps(asked) + "\n" + json.dumps(twin) + "\n")
    return path


def test_every_row_is_read_or_rejected_and_numbered_through_the_pool(pool, tokenizer) -> None:
    reader = InstanceReader(tokenizer)
    slices = plan(str(pool), rows_per_shard=16).slices
    instances = [one for shard in reader.shards(slices) for one in shard()]
    numbers = [int(one[0, CONVERSATION]) for one in instances]
    assert numbers == [*range(60), 62]
    assert all(len(set(one[:, CONVERSATION].tolist())) == 1 for one in instances)
    assert {row: one.reason for row, one in reader.rejected.items()} == {
        60: "not valid JSON",
        61: "no assistant turn to learn from",
    }
    assert sum(reader.rows_in.values()) == 63
    # A second pass reads the same and counts nothing twice.
    again = [one for shard in reader.shards(slices) for one in shard()]
    assert all((a == b).all() for a, b in zip(instances, again, strict=True))
    assert len(reader.rejected) == 2
    other = InstanceReader(tokenizer)
    other.load_state_dict(reader.state_dict())
    assert other.rejected == reader.rejected
    assert other.rows_in == reader.rows_in


def test_held_out_rows_and_repeats_are_not_trained_on(pool, tokenizer) -> None:
    def is_held_out(id: str) -> bool:
        return id.endswith("3")

    reader = InstanceReader(tokenizer, is_held_out=is_held_out, repeats=frozenset([5, 62]))
    slices = plan(str(pool), rows_per_shard=16).slices
    trained = {int(x[0, CONVERSATION]) for shard in reader.shards(slices) for x in shard()}
    held_out = {int(x[0, CONVERSATION]) for x in reader.held_out(slices, 100)}
    assert held_out == {3, 13, 23, 33, 43, 53}
    assert trained == set(range(60)) - held_out - {5}
    assert len(reader.held_out(slices, 2)) == 2


def test_held_out_prompts_end_before_the_first_answer(tmp_path: Path, tokenizer) -> None:
    def said(*roles: str) -> list[dict[str, str]]:
        return [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]

    rows = [
        {"id": "kept", "messages": said("user", "assistant")},
        {"id": "out-1", "messages": said("system", "user", "assistant", "user", "assistant")},
        {"id": "out-2", "messages": said("assistant", "user", "assistant")},
        {"id": "out-3", "messages": said("user", "assistant")},
    ]
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    reader = InstanceReader(tokenizer, is_held_out=lambda id: id.startswith("out"))
    slices = plan(str(path), rows_per_shard=16).slices
    assert reader.held_out_prompts(slices, 9) == [said("system", "user"), said("user")]
    assert reader.held_out_prompts(slices, 1) == [said("system", "user")]
    assert reader.held_out_prompts(slices, 0) == []


def test_a_row_that_the_template_refuses_is_rejected(pool, tiny_tokenizer) -> None:
    tokenizer = ChatTokenizer(tiny_tokenizer)
    refuses = "{% if 'Q7 ' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.template = refuses + tokenizer.template
    reader = InstanceReader(tokenizer)
    (part, *_) = plan(str(pool), rows_per_shard=16).slices
    assert [int(one[0, CONVERSATION]) for one in reader.read(part)] == [
        n for n in range(16) if n != 7
    ]
    assert reader.rejected[7].reason.startswith("chat template")
    assert reader.rejected[7].id == "row-7"


def test_too_many_bad_rows_stop_with_their_reasons(tmp_path: Path, make_pool, tokenizer) -> None:
    path = make_pool(tmp_path / "pool.jsonl", 300)
    with path.open("a") as file:
        file.write("{broken\n" * 50)
    reader = InstanceReader(tokenizer)
    shards = reader.shards(plan(str(path), rows_per_shard=128).slices)
    with pytest.raises(PoolError, match="50 of the first 350 rows .*not valid JSON: 50"):
        [shard() for shard in shards]


def test_plain_text_has_no_template(tmp_path: Path, pool, tokenizer) -> None:
    path = tmp_path / "text.parquet"
    rows = [{"text": "the orders of the day"}, {"text": " "}, {"text": None}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(PoolError, match="has the columns text"):
        plan(str(path))
    reader = InstanceReader(tokenizer, plain_text=True)
    (part,) = plan(str(path), forms=PLAIN_FORMS).slices
    (one,) = reader.read(part)
    assert tokenizer.tokenizer.decode(one[:, TOKEN]) == "the orders of the day"
    reasons = {row: found.reason for row, found in reader.rejected.items()}
    assert reasons[1] == "text is empty"
    assert reasons.keys() == {1, 2}
    # Of conversations it takes what was said.
    reader = InstanceReader(tokenizer, plain_text=True)
    first = reader.read(plan(str(pool), forms=PLAIN_FORMS).slices[0])[0]
    assert tokenizer.tokenizer.decode(first[:, TOKEN]).startswith("Q0 ")
    assert Kind.SPECIAL not in first[:, KIND]
