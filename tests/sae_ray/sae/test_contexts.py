"""Contexts: the strongest are the strongest, the spread is a fair sample, what is off is off."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_ray.chat import Kind
from sae_ray.lm import LanguageModel
from sae_ray.sae import contexts as module
from sae_ray.sae.contexts import ContextGatherer, Piece, Room, decoder_neighbours, read_pieces
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.sequences import instance_of

D_SAE = 6
WIDTH = 8
NUM = 400


def pieces(num: int = NUM, seed: int = 0) -> list[Piece]:
    """Conversations of distinct tokens; latents 0 and 1 share a direction and often their places.

    Latent 5 is on everywhere, and latent 4 nowhere.
    """
    rng = np.random.default_rng(seed)
    found = []
    for number in range(num):
        length = int(rng.integers(3, 40))
        ids = number * 100 + np.arange(length)
        latents = rng.random((length, D_SAE)) * (rng.random((length, D_SAE)) < 0.1)
        latents[:, 1] = np.where(rng.random(length) < 0.5, latents[:, 0], 0)
        latents[:, 4] = 0
        latents[:, 5] = 1 + rng.random(length)
        kinds = np.where(np.arange(length) == 0, Kind.SPECIAL, Kind.CONTENT)
        lanes = instance_of(ids, kinds, conversation=number)
        found.append(Piece(lanes, torch.from_numpy(latents.astype(np.float32))))
    return found


def directions() -> torch.Tensor:
    rows = torch.eye(D_SAE, 8)
    rows[1] = 0.9 * rows[0] + 0.1 * rows[1]
    return rows


@pytest.fixture(scope="module")
def gathered() -> ContextGatherer:
    return ContextGatherer(directions(), Room(5, 120, 5, 50, WIDTH)).gather(pieces())


def test_the_strongest_are_the_strongest_of_all(gathered: ContextGatherer) -> None:
    for latent in (0, 1, 2, 3, 5):
        peaks = sorted((float(one.latents[:, latent].max()) for one in pieces()), reverse=True)
        kept = gathered.contexts(latent).strongest
        assert [one.strength for one in kept] == pytest.approx(peaks[:5])


def test_a_context_is_the_text_round_its_peak_with_the_activations_there(
    gathered: ContextGatherer,
) -> None:
    of = {int(one.lanes[0, 0]): one for one in pieces()}
    for one in gathered.contexts(2).spread + gathered.contexts(2).strongest:
        piece = of[one.conversation]
        at = slice(one.position, one.position + len(one.ids))
        assert one.ids.tolist() == piece.lanes[at, 2].tolist()
        assert one.values.tolist() == pytest.approx(piece.latents[at, 2].tolist())
        assert one.strength == pytest.approx(float(piece.latents[:, 2].max()))
        assert len(one.ids) == min(WIDTH, len(piece.lanes))


def test_the_spread_is_a_sample_of_every_quantile(gathered: ContextGatherer) -> None:
    peaks = np.array([float(one.latents[:, 5].max()) for one in pieces()])
    parts = gathered.contexts(5).quantiles(4)
    assert [len(part) for part in parts] == [30, 30, 30, 30]
    ranks = [[(peaks < one.strength).mean() for one in part] for part in parts]
    assert [np.mean(one) for one in ranks] == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.12)
    assert sorted(sum(ranks, [])) == sum(ranks, [])


def test_hard_and_easy_ones_are_off_and_hard_ones_near(gathered: ContextGatherer) -> None:
    of = {int(one.lanes[0, 0]): one for one in pieces()}
    assert len(gathered.contexts(1).hard) == 5
    for latent in (0, 1):
        found = gathered.contexts(latent)
        assert len(found.easy) > 10
        for one in found.hard + found.easy:
            at = slice(one.position, one.position + len(one.ids))
            assert not of[one.conversation].latents[at, latent].any()
            assert not one.values.any()
        for one in found.hard:
            at = slice(one.position, one.position + len(one.ids))
            assert of[one.conversation].latents[at, 1 - latent].any()
    always = gathered.contexts(5)
    assert always.hard == always.easy == []
    never = gathered.contexts(4)
    assert never.strongest == never.spread == []
    assert len(never.easy) == 50


def test_what_is_kept_depends_on_the_seed_and_not_on_the_order() -> None:
    def kept(order: int, seed: int) -> list:
        one = ContextGatherer(directions(), Room(5, 20, 5, 50, WIDTH), seed)
        one.gather(pieces()[::order])
        return [
            [(c.conversation, c.position, c.values.tolist()) for c in part]
            for latent in range(D_SAE)
            for found in (one.contexts(latent),)
            for part in (found.strongest, found.spread, found.hard, found.easy)
        ]

    assert kept(1, 0) == kept(-1, 0)
    assert kept(1, 0) != kept(1, 1)


def test_contexts_that_agree_up_to_the_peak_are_one_among_the_strongest() -> None:
    latents = torch.zeros(6, 1)
    latents[2] = 3.0
    gatherer = ContextGatherer(torch.ones(1, 4), Room(4, 4, 1, 4, WIDTH))
    for number, last in enumerate((10, 11, 12)):
        # The same three tokens, and then something else.
        gatherer.add(Piece(instance_of([1, 2, 3, last, 5, 6], conversation=number), latents))
    gatherer.add(Piece(instance_of([1, 9, 3, 4, 5, 6], conversation=3), latents))
    found = gatherer.contexts(0)
    assert [one.ids[1] for one in found.strongest] == [2, 9]
    assert len(found.spread) == 4


def test_counts_are_by_token_kind(gathered: ContextGatherer) -> None:
    assert gathered.num_tokens[Kind.SPECIAL] == NUM
    assert gathered.num_tokens.sum() == sum(len(one.lanes) for one in pieces())
    first = sum(float(one.latents[0, 2]) > 0 for one in pieces())
    assert gathered.num_on[Kind.SPECIAL, 2] == first
    assert gathered.num_on[:, 5].sum() == gathered.num_tokens.sum()


def test_neighbours_are_the_likest_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(module, "_CHUNK", 16)
    indices, cosines = decoder_neighbours(rows, 3)
    unit = rows / rows.norm(dim=-1, keepdim=True)
    likeness = (unit @ unit.T).fill_diagonal_(-2)
    expected = likeness.topk(3)
    assert indices.tolist() == expected.indices.tolist()
    assert cosines == pytest.approx(expected.values.numpy(), abs=1e-6)


def test_pieces_hold_what_each_conversation_has_alone(
    tiny_lm: Path, make_tiny_sae: Callable[[Path], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "PIECE_TOKENS", 16)
    encoder = LatentEncoder.load(make_tiny_sae(tmp_path / "sae"))
    model = LanguageModel.load(tiny_lm, [encoder.hook_point])
    rng = np.random.default_rng(0)
    instances = [
        instance_of(rng.integers(4, 300, size=length), conversation=number)
        for number, length in enumerate((5, 40, 33, 16))
    ]
    found: dict[int, list[Piece]] = {}
    for piece in read_pieces(model, encoder, instances):
        assert len(piece.lanes) <= 16
        found.setdefault(int(piece.lanes[0, 0]), []).append(piece)
    for number, instance in enumerate(instances):
        alone = model.read(torch.from_numpy(instance[None, :, 2]).long())[encoder.hook_point][0]
        together = torch.cat([piece.latents for piece in found[number]])
        torch.testing.assert_close(together, encoder.encode(alone), atol=1e-4, rtol=1e-4)
