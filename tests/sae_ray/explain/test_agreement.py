"""Experts of other seeds: the same agree wholly, strangers by chance, others are not compared."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_ray.adapters.attach import AdapterSpec, attach
from sae_ray.curate.sources import fingerprint
from sae_ray.errors import ConfigError
from sae_ray.experts.card import ExpertCard
from sae_ray.experts.files import record_files
from sae_ray.explain.agreement import Agreement, Contender, agreed, require_alike, unseen_by
from sae_ray.explain.attribution import Attribution
from sae_ray.explain.tuned import Tuned
from tests.sae_ray.explain.planted import edit_of, rows_said_by


@pytest.fixture
def contender(tiny_lm, whole, tmp_path: Path):
    def make(name: str, sae: str, seed: int, trained=()) -> Contender:
        model = attach(whole(tiny_lm), AdapterSpec(kind="steering", sae=(sae,)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            edit_of(model).steering.copy_(0.2 * torch.randn(64, generator=generator))
        folder = tmp_path / f"{name}-expert" / "adapter"
        model.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        card = ExpertCard(
            name=name, description="", adapter="steering", objective="sft", base=str(tiny_lm),
            base_sha256=fingerprint("lm", str(tiny_lm)), files=record_files(str(folder)),
            num_parameters=64, share=0.1, measures=[],
        )  # fmt: skip
        saes = {"blocks.1.hook_resid_post": sae}
        tuned = Tuned.of(str(folder.parent), card, str(tiny_lm), saes)
        return Contender(str(folder.parent), card, tuned, trained)

    return make


def attribution(scores: list[float]) -> Attribution:
    values = np.array(scores)
    return Attribution(values, np.abs(values), float(values.sum()), 12, 8, 1.0)


def test_overlap_and_correlation_are_those_of_hand() -> None:
    one = attribution([5.0, 4, 3, 2, 1, 0.5, 0.4, 0.3, 0.2, 0.1])
    other = attribution([5.0, 0.1, 4, 3, 2, 1, 0.5, 0.4, 0.3, 0.2])
    found = Agreement.of(("a", "b"), (one, other), 2)
    assert (found.overlap, found.expected, found.num_top, found.num_rows) == (0.5, 0.2, 2, 12)
    # One latent falls from second to last, and eight others rise by one.
    assert found.rank_correlation == pytest.approx(1 - 6 * (8**2 + 8) / 990)
    # Two of ten drawn twice: none in common in 28 of 45 draws, one in 16, two in one (2 %).
    assert found.chance == 0.5
    assert Agreement.of(("a", "b"), (one, one), 50).expected == 1
    assert Agreement.of(("a", "b"), (one, attribution([1.0] * 10)), 2).rank_correlation == 0


def test_an_expert_agrees_with_itself_and_not_with_a_stranger(
    contender, sae_at, whole, tiny_lm
) -> None:
    sae = sae_at("blocks.1.hook_resid_post")
    rows = rows_said_by(whole(tiny_lm), 24, 0)
    three = [contender("one", sae, 0), contender("one", sae, 0), contender("two", sae, 1)]
    asked: list[Tuned] = []

    @contextlib.contextmanager
    def workers(tuned: Tuned):
        asked.append(tuned)
        yield None

    steps, work = [], agreed(three, rows, 8, workers)
    while True:
        try:
            steps.append(next(work))
        except StopIteration as end:
            same, *strangers = end.value
            break
    assert [step[1:3] for step in steps] == [(0, 3), (1, 3), (2, 3)]
    assert [one.files for one in asked] == [one.tuned.files for one in three]
    assert (same.rank_correlation, same.overlap) == (pytest.approx(1.0), 1.0)
    assert (same.num_rows, same.num_top, same.expected) == (24, 8, 0.125)
    for one in strangers:
        assert one.rank_correlation < 0.6
        assert one.overlap < 0.8
        assert one.one.startswith("one (")
        assert one.other.startswith("two (")


def test_what_cannot_be_compared_is_refused(contender, sae_at) -> None:
    low, high = sae_at("blocks.1.hook_resid_post"), sae_at("blocks.1.hook_resid_post", 1)
    card = contender("one", low, 0).card
    point = "blocks.1.hook_resid_post"

    def compare(other: ExpertCard, **saes: str) -> None:
        places = {point: low}, saes or {point: low}
        require_alike(("mine", "yours"), (card, other), places)  # pyright: ignore[reportArgumentType]

    compare(card)
    changes = {"base": {"base_sha256": "0" * 64}, "kind of adapter": {"adapter": "scale"}}
    changes["objective"] = {"objective": "dpo"}
    for what, change in changes.items():
        with pytest.raises(ConfigError, match=f"yours has another {what} .* than mine"):
            compare(card.model_copy(update=change))
    with pytest.raises(ConfigError, match="yours has another SAE "):
        compare(card, **{point: high})
    with pytest.raises(ConfigError, match="yours has another hook point "):
        compare(card, **{"blocks.2.hook_resid_post": low})
    lora = card.model_copy(update={"adapter": "lora"})
    with pytest.raises(ConfigError, match="of kind lora, has none"):
        require_alike(("mine", "yours"), (lora, lora), ({}, {}))


def test_rows_that_any_was_trained_on_are_left_out_whatever_they_are_called(
    contender, sae_at, whole, tiny_lm
) -> None:
    sae, rows = sae_at("blocks.1.hook_resid_post"), rows_said_by(whole(tiny_lm), 30, 0)
    renamed = [type(row)("other", row.ids, row.learnt) for row in rows]
    two = [contender("one", sae, 0, renamed[:7]), contender("two", sae, 1, renamed[5:20])]
    assert [row.id for row in unseen_by(two, rows)] == [f"row-{i}" for i in range(20, 30)]
    three = [*two, contender("three", sae, 2, renamed[29:])]
    with pytest.raises(ConfigError, match=r"was trained on 1 of the 10 rows .* of the 9 left 10"):
        unseen_by(three, rows)
