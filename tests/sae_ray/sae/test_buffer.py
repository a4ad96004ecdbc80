"""The mixing buffer: no token is lost or doubled, all are mixed, and none stays for long."""

import torch

from sae_ray.lm import HookPoint
from sae_ray.sae.buffer import MixingBuffer, TokenBatch

POINTS = [HookPoint.parse(f"blocks.{layer}.hook_resid_post") for layer in (0, 1)]


def tokens(begin: int, end: int) -> TokenBatch:
    """Tokens that carry their number in every lane and, times a hook point's own, as activation."""
    numbers = torch.arange(begin, end, dtype=torch.int32)
    lanes = numbers.unsqueeze(1).repeat(1, 4)
    return TokenBatch(
        lanes, {point: numbers.unsqueeze(1).float() * (i + 1) for i, point in enumerate(POINTS)}
    )


def pump(buffer: MixingBuffer, begin: int, num: int, at_once: int) -> list[TokenBatch]:
    """Put `num` tokens in, a few at once, and draw whenever a batch is there."""
    drawn: list[TokenBatch] = []
    for start in range(begin, begin + num, at_once):
        buffer.put(tokens(start, min(begin + num, start + at_once)))
        while buffer.is_full:
            drawn.append(buffer.take())
    return drawn


def numbers(batches: list[TokenBatch]) -> list[int]:
    return torch.cat([batch.lanes[:, 0] for batch in batches]).tolist()


def test_nothing_is_lost_and_nothing_comes_twice() -> None:
    buffer = MixingBuffer(10, 5, seed=0)
    out = numbers(pump(buffer, 0, 397, at_once=37))
    assert len(out) == len(set(out)) == 350
    state = buffer.state_dict()
    held = set(state["room"]["lanes"][:, 0].tolist())
    # 397 in, 350 out: 47 are there, and the three free places still hold what left them.
    assert set(range(397)) - set(out) <= held
    assert len(state["free"]) == 3


def test_lanes_and_activations_stay_together() -> None:
    for batch in pump(MixingBuffer(10, 5, seed=0), 0, 300, at_once=23):
        for i, point in enumerate(POINTS):
            expected = batch.lanes[:, 0].float() * (i + 1)
            assert torch.equal(batch.activations[point][:, 0], expected)


def test_what_leaves_is_mixed_and_nothing_stays_long() -> None:
    out = torch.tensor(numbers(pump(MixingBuffer(50, 20, seed=0), 0, 20_000, at_once=100)))
    steps = (out[1:] - out[:-1]).abs()
    assert (steps == 1).float().mean() < 0.01
    assert steps.float().median() > 250
    # A token that came in as number n is the n-th that could leave; two rounds are 2,000.
    delay = torch.arange(len(out)) + 1000 - out
    assert delay.min() >= 0
    assert delay.max() <= 2000
    # Every batch holds tokens of all ages: a uniform over 1,000 has a spread of 289.
    spreads = out.view(-1, 50)[40:].float().std(dim=1)
    assert spreads.mean() > 280


def test_the_seed_decides() -> None:
    first, same, other = (
        numbers(pump(MixingBuffer(10, 5, seed=seed), 0, 200, at_once=40)) for seed in (0, 0, 1)
    )
    assert first == same
    assert first != other


def test_a_buffer_goes_on_from_another_ones_state() -> None:
    whole = MixingBuffer(10, 5, seed=3)
    before = pump(whole, 0, 130, at_once=65)
    whole.put(tokens(130, 195))
    before.append(whole.take())  # in the middle of what waits
    state = whole.state_dict()
    rest = numbers([whole.take(), *pump_rest(whole)])
    resumed = MixingBuffer(10, 5, seed=3)
    resumed.load_state_dict(state)
    assert numbers([resumed.take(), *pump_rest(resumed)]) == rest
    assert not set(numbers(before)) & set(rest)


def pump_rest(buffer: MixingBuffer) -> list[TokenBatch]:
    drawn: list[TokenBatch] = []
    while buffer.is_full:
        drawn.append(buffer.take())
    return drawn + pump(buffer, 195, 200, at_once=40)
