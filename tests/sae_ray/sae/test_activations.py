"""FAST activations: each instance as if alone, each token once a pass, a stream that resumes."""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_ray.errors import PoolError
from sae_ray.lm import HookPoint, LanguageModel
from sae_ray.sae.activations import ActivationStream, Feed, Shard, read_sequences
from sae_ray.sae.buffer import TokenBatch
from sae_ray.sae.sequences import CONVERSATION, POSITION, TOKEN, Arrangement, Lanes, instance_of

SITES = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z")
POINTS = [HookPoint.parse(f"blocks.1.{site}") for site in SITES]
POINT = HookPoint.parse("blocks.1.hook_resid_post")


def instances(num: int = 30, seed: int = 0) -> list[Lanes]:
    rng = np.random.default_rng(seed)
    return [
        instance_of(rng.integers(4, 300, size=n), conversation=number)
        for number, n in enumerate(rng.integers(2, 40, size=num))
    ]


def shards(rows: Sequence[Lanes], size: int = 10) -> list[Shard]:
    def cut(begin: int) -> Sequence[Lanes]:
        return rows[begin : begin + size]

    return [functools.partial(cut, begin) for begin in range(0, len(rows), size)]


@pytest.fixture
def model(tiny_lm: Path) -> LanguageModel:
    return LanguageModel.load(tiny_lm, [POINT])


def test_a_batch_gives_each_instance_what_it_has_alone_at_every_site(any_tiny_lm: Path) -> None:
    model = LanguageModel.load(any_tiny_lm, POINTS)
    rows = instances(8)
    together = read_sequences(model, rows)
    for point in POINTS:
        alone = torch.cat([read_sequences(model, [row])[point] for row in rows])
        assert together[point].shape == alone.shape
        assert (together[point] - alone).abs().max() <= 1e-4
        assert alone.std() > 0.01


def test_a_masked_piece_is_what_the_instance_alone_gives(model: LanguageModel) -> None:
    rows = instances(6)
    stream = ActivationStream(
        model, shards(rows), Arrangement("bt_f_masked", block_tokens=24), tokens_per_forward=96
    )
    read = one_pass(stream)
    whole = {row[0, CONVERSATION]: read_sequences(model, [row])[POINT] for row in rows}
    num_equal = 0
    for batch in read:
        for lane, x in zip(batch.lanes.tolist(), batch.activations[POINT], strict=True):
            row = rows[lane[CONVERSATION]]
            at = lane[POSITION]
            if len(row) <= 24 and row[at, TOKEN] == lane[TOKEN]:
                num_equal += torch.allclose(x, whole[lane[CONVERSATION]][at], atol=1e-4)
    assert num_equal > sum(map(len, rows)) / 4


def test_blocks_see_what_stands_before(model: LanguageModel) -> None:
    """The same token at the same place of its instance, alone and behind another instance."""
    rows = instances(2)
    (block,) = Arrangement("bt_f", block_tokens=100).arrange(rows)
    together = read_sequences(model, [block])[POINT][len(rows[0]) :]
    alone = read_sequences(model, [rows[1]])[POINT]
    assert (together - alone).abs().max() > 0.1


def one_pass(stream: ActivationStream) -> list[TokenBatch]:
    batches: list[TokenBatch] = []
    for batch in stream:
        if stream.cursor.num_passes:
            break
        batches.append(batch)
    return batches


def pairs(batches: Sequence[TokenBatch]) -> list[tuple[int, int]]:
    return [(lane[CONVERSATION], lane[POSITION]) for b in batches for lane in b.lanes.tolist()]


def test_each_pass_reads_every_token_once_in_another_order(model: LanguageModel) -> None:
    rows = instances()
    stream = ActivationStream(model, shards(rows), tokens_per_forward=128)
    batches = list(itertools.islice(stream, 200))
    per_pass = sum(map(len, rows))
    seen = pairs(batches)
    expected = {(row[0, CONVERSATION], at) for row in rows for at in range(len(row))}
    for begin in (0, per_pass):
        assert set(seen[begin : begin + per_pass]) == expected
    assert seen[:per_pass] != seen[per_pass : 2 * per_pass]
    assert stream.counts.tokens == len(seen)


def test_what_is_cut_is_counted(model: LanguageModel) -> None:
    rows = instances()
    stream = ActivationStream(
        model, shards(rows), Arrangement("fast", max_tokens=20), tokens_per_forward=128
    )
    read = one_pass(stream)
    over = [len(row) - 20 for row in rows if len(row) > 20]
    tokens = sum(map(len, read))
    assert tokens == sum(map(len, rows)) - sum(over)
    # The batch that begins the next pass has been read, and its shard counted.
    assert stream.counts.cut_instances == len(over), "the same are cut in every pass"
    state = stream.state_dict()["counts"]
    assert state["cut_tokens"] >= sum(over)
    assert 0 < stream.counts.padding_share < 0.3


def test_an_empty_shard_is_passed_over_but_not_all_of_them(model: LanguageModel) -> None:
    rows = instances(5)
    stream = ActivationStream(model, [lambda: [], *shards(rows), lambda: []])
    assert sum(map(len, one_pass(stream))) == sum(map(len, rows))
    with pytest.raises(PoolError, match="none of the 2 shards"):
        next(ActivationStream(model, [lambda: [], lambda: []]))


def test_the_seed_decides_what_is_read_and_when(model: LanguageModel) -> None:
    def some(seed: int) -> list[tuple[int, int]]:
        stream = ActivationStream(model, shards(instances()), tokens_per_forward=128, seed=seed)
        return pairs(list(itertools.islice(stream, 8)))

    assert some(0) == some(0)
    assert some(0) != some(1)


@pytest.mark.parametrize("num_before", [1, 4, 11, 17])
@pytest.mark.parametrize("regime", ["fast", "bt_f", "bt_f_masked"])
def test_a_feed_goes_on_from_anothers_state_to_the_bit(
    model: LanguageModel, regime, num_before: int
) -> None:
    def feed() -> Feed:
        stream = ActivationStream(
            model, shards(instances()), Arrangement(regime, block_tokens=32), tokens_per_forward=128
        )
        return Feed(stream, batch_tokens=50, buffer_batches=4)

    whole = feed()
    for _ in range(num_before):
        next(whole)
    state = whole.state_dict()
    expected = [next(whole) for _ in range(25)]
    resumed = feed()
    resumed.load_state_dict(state)
    for one in expected:
        other = next(resumed)
        assert torch.equal(one.lanes, other.lanes)
        assert torch.equal(one.activations[POINT], other.activations[POINT])
    assert isinstance(resumed.stream, ActivationStream)
    assert isinstance(whole.stream, ActivationStream)
    assert resumed.stream.counts == whole.stream.counts


def test_a_sample_takes_nothing_out(model: LanguageModel) -> None:
    def batches(use: Callable[[Feed], object]) -> list[tuple[int, int]]:
        stream = ActivationStream(model, shards(instances()), tokens_per_forward=128)
        feed = Feed(stream, batch_tokens=32, buffer_batches=3)
        use(feed)
        return pairs(list(itertools.islice(feed, 5)))

    assert batches(lambda feed: feed.sample()) == batches(lambda feed: None)


def test_batches_hold_real_activations_at_every_hook_point(tiny_lm: Path) -> None:
    model = LanguageModel.load(tiny_lm, POINTS)
    rows = instances()
    known = read_sequences(model, rows)
    tokens = ((row[0, CONVERSATION], at) for row in rows for at in range(len(row)))
    place = {token: i for i, token in enumerate(tokens)}
    stream = ActivationStream(model, shards(rows), tokens_per_forward=128)
    for batch in itertools.islice(Feed(stream, batch_tokens=32, buffer_batches=3), 6):
        index = torch.tensor([place[pair] for pair in pairs([batch])])
        for point in POINTS:
            distance = (batch.activations[point] - known[point][index]).abs().max()
            assert distance <= 1e-4
