import json
from typing import Any

import pytest

from sae_ray.rows import BadRow, Rejected, content_id, count_reasons, excerpt, to_conversation

TURNS = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
SHAREGPT = [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"conversations": SHAREGPT},
        {"prompt": "What is 2 + 2?", "completion": "4"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"prompt": "What is 2 + 2?", "response": "4"},
        {"instruction": "What is 2 + 2?", "output": "4"},
        {"instruction": "What is 2 + 2?", "input": "", "output": "4"},
        {"instruction": "What is 2 + 2?", "input": None, "output": "4"},
        {"messages": TURNS, "prompt": "another form beside it", "response": "is not read"},
        {"messages": [{**turn, "tool_calls": None, "name": "x"} for turn in TURNS], "id": None},
    ],
)
def test_every_form_of_a_conversation_reads_the_same(row: dict[str, Any]) -> None:
    conversation = to_conversation(row)
    assert conversation.messages == TURNS
    assert conversation.id == content_id(conversation.messages)


def test_an_input_stands_behind_its_instruction() -> None:
    row = {"instruction": "Add these.", "input": "2 and 2", "output": "4"}
    assert to_conversation(row).messages[0]["content"] == "Add these.\n\n2 and 2"


def test_a_content_id_is_sixteen_fixed_hex_digits() -> None:
    # A constant: indexes on disk name their rows by it.
    assert to_conversation({"messages": TURNS}).id == "802f5501e66d54dc"
    assert to_conversation({"prompt": "What is 2 + 2?", "response": "5"}).id != "802f5501e66d54dc"


@pytest.mark.parametrize(
    ("given", "read"), [("a b", "a b"), (7, "7"), (7.0, "7"), (0, "0"), ("ü", "ü")]
)
def test_a_given_id_is_kept_as_text(given: object, read: str) -> None:
    assert to_conversation({"messages": TURNS, "id": given}).id == read


@pytest.mark.parametrize("given", [None, "", float("nan")])
def test_a_missing_id_is_made_from_the_content(given: object) -> None:
    assert to_conversation({"messages": TURNS, "id": given}).id == "802f5501e66d54dc"


def _said(content: object, role: object = "user") -> dict[str, object]:
    return {"messages": [{"role": role, "content": content}, TURNS[1]]}


@pytest.mark.parametrize(
    ("row", "reason", "where"),
    [
        ({"text": "x"}, "no known columns", "text"),
        ({"messages": []}, "no messages", "messages"),
        ({"messages": None}, "no messages", "messages"),
        ({"prompt": None, "response": "4"}, "no messages", "prompt"),
        ({"messages": "hello"}, "messages are not a list", "hello"),
        ({"messages": ["hello"]}, "a message is not an object", "messages[0]: hello"),
        (_said("x", "narrator"), "unknown role", "narrator"),
        (_said("x", None), "unknown role", "None"),
        (_said("x", ["user"]), "unknown role", "user"),
        (_said([{"type": "image"}]), "content is not text", "image"),
        (_said(None), "content is not text", "messages[0].content"),
        (_said(4), "content is not text", "4"),
        ({"instruction": "x", "input": 3, "output": "y"}, "content is not text", "input: 3"),
        (_said(""), "empty user turn", "turn 0"),
        (_said(" \n\t"), "empty user turn", "turn 0"),
        ({"prompt": "x", "completion": ""}, "empty assistant turn", "turn 1"),
        ({"instruction": "", "input": "", "output": "y"}, "empty user turn", "turn 0"),
        ({"messages": TURNS[:1]}, "no assistant turn", "user"),
        (_said("a\x00b"), "NUL character", "a\\x00b"),
        (_said("a\ud800b"), "lone surrogate", "a\\ud800b"),
        (_said("x" * 1_000_001), "a turn is longer than 1,000,000 characters", "1,000,001"),
        ({"messages": [{**TURNS[1], "tool_calls": [{"f": 1}]}]}, "tool calls", "'f': 1"),
        ({"messages": TURNS, "id": [1]}, "id is neither", "[1]"),
        ({"messages": TURNS, "id": True}, "id is neither", "True"),
        ({"messages": TURNS, "id": 1.5}, "id is neither", "1.5"),
        ({"messages": TURNS, "id": "\ud800"}, "lone surrogate", "\\ud800"),
        ({"messages": TURNS, "id": "x" * 513}, "id is longer", "xxx"),
    ],
)
def test_a_bad_row_says_why_and_where(row: dict[str, Any], reason: str, where: str) -> None:
    with pytest.raises(BadRow) as caught:
        to_conversation(row)
    assert caught.value.reason.startswith(reason)
    assert where in caught.value.excerpt


def test_a_reason_does_not_vary_with_the_row() -> None:
    reasons = set()
    for role in ("narrator", "moderator"):
        with pytest.raises(BadRow) as caught:
            to_conversation(_said("x", role))
        reasons.add(caught.value.reason)
    assert len(reasons) == 1


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_an_empty_turn_of_nobody_is_kept(role: str) -> None:
    row = {"messages": [{"role": role, "content": ""}, *TURNS]}
    assert to_conversation(row).messages[0] == {"role": role, "content": ""}


def test_the_longest_turn_can_be_set() -> None:
    assert to_conversation(_said("x" * 1_000_000)).messages[0]["content"] == "x" * 1_000_000
    with pytest.raises(BadRow, match="longer than 10 characters"):
        to_conversation({"messages": TURNS}, max_chars=10)


@pytest.mark.parametrize("value", ["\x00\ud800\n" * 200, {"a": ["\ud800"]}, b"\xff", None])
def test_an_excerpt_of_anything_can_be_stored_and_printed(value: object) -> None:
    text = excerpt(value)
    assert text.isprintable()
    assert 0 < len(text.encode()) <= 200


def test_an_excerpt_of_deep_nesting_does_not_overflow() -> None:
    nested: list[Any] = []
    for _ in range(10_000):
        nested = [nested]
    assert excerpt(nested) == "a deeply nested list"
    with pytest.raises(BadRow, match="not an object"):
        to_conversation({"messages": nested})


def test_reasons_are_counted_most_frequent_first() -> None:
    reasons = ["blank line", "no messages", "no messages"]
    rows = [Rejected(i, None, reason, "") for i, reason in enumerate(reasons)]
    assert json.dumps(count_reasons(rows)) == '{"no messages": 2, "blank line": 1}'
