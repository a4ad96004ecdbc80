import json
from pathlib import Path

from sae_ray.adapters.examples import read_examples, read_pairs, split
from sae_ray.chat import ChatTokenizer


def test_what_is_learnt_is_the_replies_and_the_tokens_that_end_them(
    tiny_lm: Path, tmp_path: Path
) -> None:
    tokenizer = ChatTokenizer.load(tiny_lm)
    turns = [("user", "Hi."), ("assistant", "Ho."), ("user", "So?"), ("assistant", "Yes.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    (row,) = read_examples(str(path), tokenizer, max_tokens=256).rows
    assert tokenizer.tokenizer.decode(row.ids[row.learnt]) == "Ho.<|im_end|>Yes.<|im_end|>"
    other = [*messages[:3], {"role": "assistant", "content": "No."}]
    path.write_text(json.dumps({"chosen": messages, "rejected": other}))
    (pair,) = read_pairs(str(path), tokenizer, max_tokens=256).rows
    for one, said in ((pair.chosen, "Yes."), (pair.rejected, "No.")):
        assert tokenizer.tokenizer.decode(one.ids[one.learnt]) == f"{said}<|im_end|>"


def test_equal_replies_and_long_ones_are_no_pairs(tiny_lm: Path, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "pairs.jsonl", ChatTokenizer.load(tiny_lm)
    pair = {"prompt": "a", "chosen": "same", "rejected": "same"}
    rows = [pair, pair | {"rejected": "word " * 100}, pair | {"rejected": "other"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_pairs(str(path), tokenizer, max_tokens=64)
    assert [row.reason for row in found.rejected] == [
        "chosen and rejected are the same",
        "reply longer than the context",
    ]
    assert len(found.rows) == 1


def test_held_out_rows_depend_on_ids_alone(tiny_lm: Path, tiny_pool: Path) -> None:
    tokenizer = ChatTokenizer.load(tiny_lm)
    rows = read_examples(str(tiny_pool), tokenizer, max_tokens=256).rows
    train, held = ({row.id for row in part} for part in split(rows, 8, seed=0))
    assert len(held) == 8
    assert train.isdisjoint(held)
    assert {row.id for row in split(rows[::-1], 8, seed=0)[1]} == held
    assert {row.id for row in split(rows, 8, seed=1)[1]} != held
