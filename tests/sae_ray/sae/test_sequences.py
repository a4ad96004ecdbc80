"""Regimes: what the model reads alone, token for token, and what is counted as cut."""

import itertools

import numpy as np
import pytest

from sae_ray.chat import ChatTokenizer, Conversation, Kind, Message, Unreadable
from sae_ray.errors import ConfigError
from sae_ray.sae.sequences import (
    CONVERSATION,
    KIND,
    POSITION,
    TOKEN,
    Arrangement,
    Lanes,
    chat_instances,
    instance_of,
    length_buckets,
    text_instances,
)


def instances(*lengths: int) -> list[Lanes]:
    ids = iter(range(1000))
    return [
        instance_of(list(itertools.islice(ids, length)), conversation=number)
        for number, length in enumerate(lengths)
    ]


def ids(sequences: list[Lanes]) -> list[list[int]]:
    return [one[:, TOKEN].tolist() for one in sequences]


def test_fast_reads_each_instance_alone_up_to_the_cap() -> None:
    arrangement = Arrangement("fast", max_tokens=4)
    rows = instances(3, 6, 0)
    assert ids(arrangement.arrange(rows)) == [[0, 1, 2], [3, 4, 5, 6]]
    assert [arrangement.num_cut(one) for one in rows] == [0, 2, 0]


def test_blocks_hold_every_token_in_order_whatever_the_instances() -> None:
    arrangement = Arrangement("bt_f", block_tokens=4)
    blocks = arrangement.arrange(instances(3, 6, 1))
    assert ids(blocks) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [one[:, POSITION].tolist() for one in blocks] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1]]
    assert [one[:, CONVERSATION].tolist() for one in blocks] == [[0, 0, 0, 1], [1] * 4, [1, 2]]
    assert [arrangement.num_cut(one) for one in instances(3, 6, 1)] == [0, 0, 0]


def test_masked_blocks_are_the_pieces_of_blocks() -> None:
    pieces = Arrangement("bt_f_masked", block_tokens=4).arrange(instances(3, 6, 1))
    assert ids(pieces) == [[0, 1, 2], [3], [4, 5, 6, 7], [8], [9]]
    assert [one[0, POSITION] for one in pieces] == [0] * 5


def test_plain_text_is_read_in_the_same_blocks() -> None:
    rows = instances(3, 6, 1)
    assert ids(Arrangement("bt_p", block_tokens=4).arrange(rows)) == ids(
        Arrangement("bt_f", block_tokens=4).arrange(rows)
    )


def test_arranging_leaves_the_instances_as_they_are() -> None:
    rows = instances(3, 6)
    before = [one.copy() for one in rows]
    Arrangement("bt_f", block_tokens=4).arrange(rows)
    assert all(np.array_equal(a, b) for a, b in zip(rows, before, strict=True))


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"max_tokens": 0}, "at least 1"), ({"block_tokens": -1}, "block_tokens=-1")],
)
def test_what_cannot_be_is_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Arrangement(**settings)


def test_template_tokens_are_known_by_their_place(tiny_tokenizer) -> None:
    messages: list[Message] = [
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "the <|im_end|>"},
    ]
    chats = [Conversation("a", messages), Conversation("b", [])]
    (one,), unreadable = chat_instances(ChatTokenizer(tiny_tokenizer), chats, first=7)
    assert [(name, type(why)) for name, why in unreadable] == [("b", Unreadable)]
    assert set(one[:, CONVERSATION]) == {7}
    assert one[:, POSITION].tolist() == list(range(len(one)))
    texts = tiny_tokenizer.convert_ids_to_tokens(one[:, TOKEN].tolist())
    kinds = dict.fromkeys(Kind, "")
    for text, kind in zip(texts, one[:, KIND], strict=True):
        kinds[Kind(kind)] += text + " "
    assert kinds[Kind.SPECIAL].split() == ["<|im_start|>", "<|im_end|>"] * 2
    assert kinds[Kind.ROLE].replace(" ", "") == "userassistant"
    # The role's word and the special token that somebody typed are content.
    assert "<|im_end|>" in kinds[Kind.CONTENT]
    assert kinds[Kind.CONTENT].replace(" ", "").startswith("user")


def test_plain_texts_carry_what_their_tokenizer_adds(tiny_tokenizer) -> None:
    first, second = text_instances(tiny_tokenizer, ["the orders <s>", "day"], first=3)
    assert tiny_tokenizer.decode(first[:, TOKEN]) == "the orders <s>"
    assert first[-1, KIND] == Kind.SPECIAL
    assert set(first[:-1, KIND]) == {Kind.CONTENT}
    assert set(second[:, CONVERSATION]) == {4}
    assert text_instances(tiny_tokenizer, []) == []


def test_buckets_hold_every_row_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(2, 40, size=200)
    groups = list(length_buckets(lengths, 128, np.random.default_rng(0)))
    assert sorted(itertools.chain(*groups)) == list(range(200))
    for group in groups:
        assert len(group) * lengths[group].max() <= 128
    first = [lengths[group[0]] for group in groups]
    assert first != sorted(first)
    assert first != sorted(first, reverse=True)


@pytest.mark.parametrize("num", [10, 1024])
def test_padding_stays_under_a_twentieth_in_few_batches(num: int) -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.8, size=num).astype(int) + 8
    groups = list(length_buckets(lengths, 8192, np.random.default_rng(0)))
    slots = sum(len(group) * lengths[group].max() for group in groups)
    assert 1 - lengths.sum() / slots <= 0.05
    assert len(groups) < num / 2 + 5 if num == 10 else len(groups) < 2 * lengths.sum() / 8192
