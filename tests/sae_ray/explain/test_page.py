import dataclasses
import datetime

import numpy as np
import pytest

from sae_ray.curate.concepts import rows_on
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.output import explain_rows
from sae_ray.curate.request import Request
from sae_ray.explain.curation import Curator, Outcome
from sae_ray.explain.page import fill_page
from sae_ray.explain.report import CurationReport, Refine

NAMES = {latent: f"name {latent}" for latent in range(0, 64, 2)}


@pytest.fixture(scope="module")
def asked() -> Request:
    return Request(task="Write songs for the piano", budget_examples=30, keep=("row-4", "row-7"))


@pytest.fixture(scope="module")
def outcome(small_index: FeatureIndex, asked: Request) -> Outcome:
    curator = Curator(small_index)
    curator.labels = NAMES
    return curator.answer(asked)


@pytest.fixture(scope="module")
def report(small_index: FeatureIndex, asked: Request, outcome: Outcome) -> CurationReport:
    chosen = outcome.selection
    rows = explain_rows(
        small_index, chosen.rows.tolist(), chosen.scores.tolist(), chosen.reasons, NAMES
    )
    today = datetime.date(2026, 3, 4)
    return fill_page(small_index, asked, outcome, rows, NAMES, Refine({"task": "t"}, "o"), today)


def test_the_head_counts_what_is_there(
    small_index: FeatureIndex, report: CurationReport, outcome: Outcome
) -> None:
    assert (report.created, report.budget) == ("4 March 2026", "30 examples")
    assert (report.num_pool, len(report.selected)) == (80, 30)
    assert report.pool_tokens == small_index.n_tokens.sum()
    assert report.selected_tokens == sum(row.n_tokens for row in report.selected)
    for counted in (report.scores, report.prompt_tokens, report.response_tokens):
        assert (sum(counted.pool), sum(counted.selection)) == (80, 30)
    assert report.scores.cut == min(row.score for row in report.selected)
    assert [share.pool for share in report.columns["shelf"]] == [0.25] * 4
    assert sum(share.selection for share in report.columns["shelf"]) == pytest.approx(1)


def test_chosen_rows_come_in_order_with_what_they_say(
    small_index: FeatureIndex, report: CurationReport, outcome: Outcome
) -> None:
    assert [row.rank for row in report.selected] == list(range(1, 31))
    assert [row.id for row in report.selected] == outcome.selection.ids
    said = small_index.conversations(outcome.selection.rows)
    for row, conversation in zip(report.selected, said, strict=True):
        shown = ["".join(piece.text for piece in turn.pieces) for turn in row.turns]
        assert shown == [message["content"] for message in conversation.messages]
    marked = [
        any(p.latent is not None for t in row.turns for p in t.pieces) for row in report.selected
    ]
    assert marked == [True] * 12 + [False] * 18


def test_a_row_is_shaded_where_its_own_reasons_fire(report: CurationReport) -> None:
    for row in report.selected[:12]:
        mine = {reason.latent for reason in row.reasons}
        shaded = {p.latent for turn in row.turns for p in turn.pieces if p.latent is not None}
        assert shaded <= mine
        first = row.reasons[0]
        spoken = "".join(p.text for turn in row.turns for p in turn.pieces)
        assert first.label == NAMES.get(first.latent)
        assert first.tokens[0].strip() in spoken


def test_random_rows_are_of_the_whole_pool_and_the_same_each_time(
    small_index: FeatureIndex, report: CurationReport
) -> None:
    assert len({row.id for row in report.random}) == 8
    assert all(row.rank is None for row in report.random)
    assert not {row.id for row in report.random} <= {row.id for row in report.selected}
    earned = {reason.latent for row in report.selected[:12] for reason in row.reasons}
    shaded = {p.latent for row in report.random for turn in row.turns for p in turn.pieces}
    assert 2 < len(shaded - {None}) <= len(earned)
    assert shaded - {None} <= earned


def test_rows_to_judge_start_at_the_top_and_were_not_judged_before(
    report: CurationReport, asked: Request
) -> None:
    candidates = report.refine.candidates
    assert [one.why for one in candidates] == ["top"] * 4 + ["undecided"] * (len(candidates) - 4)
    ids = [one.row.id for one in candidates]
    assert len(set(ids)) == len(ids) == 20
    assert not set(ids) & set(asked.keep)
    assert (report.refine.kept, report.refine.settings) == (asked.keep, {"task": "t"})


def test_each_concept_is_one_card_with_its_shares(
    small_index: FeatureIndex, report: CurationReport, outcome: Outcome
) -> None:
    latents = outcome.profile.latents
    members = [latent for card in report.latents for latent in (card.latent, *card.grouped)]
    assert sorted(members) == sorted(one.latent for one in latents)
    assert len(report.latents) == len({one.group for one in latents})
    thresholds = small_index.stats.on_threshold
    pool = rows_on(small_index.background, thresholds).toarray()
    chosen = rows_on(small_index.take(outcome.selection.rows), thresholds).toarray()
    for card in report.latents:
        assert card.label == NAMES.get(card.latent)
        assert card.strong_in == pytest.approx(
            (pool[:, card.latent].mean(), chosen[:, card.latent].mean())
        )


def test_contexts_are_the_strongest_of_the_background(
    small_index: FeatureIndex, report: CurationReport
) -> None:
    background = small_index.background
    said = small_index.conversations(background.rows)
    traces = small_index.scorer.traces(said, np.arange(small_index.d_sae))
    # What is strongest at a blank is shown at the strongest token that can be seen.
    seen = [np.array([bool(text.strip()) for text in trace.texts]) for trace in traces]
    peaks = [trace.latents[here].max(0) for trace, here in zip(traces, seen, strict=True)]
    checked = 0
    for card in report.latents[:24]:
        strongest = background.pooled("max").toarray()[:, card.latent]
        shown = [background.ids.index(context.id) for context in card.contexts]
        assert set(shown) <= set(np.argsort(-strongest, kind="stable")[:6].tolist())
        for row, context in zip(shown, card.contexts, strict=True):
            (peak,) = [piece for piece in context.pieces if piece.peak]
            assert peak.latent == card.latent
            assert peak.activation == pytest.approx(peaks[row][card.latent], rel=1e-4)
        checked += len(card.contexts)
    assert checked > 24


def test_what_to_know_first_is_on_the_page(
    small_index: FeatureIndex, asked: Request, outcome: Outcome
) -> None:
    unsure = dataclasses.replace(
        outcome,
        profile=dataclasses.replace(outcome.profile, abstained=True, why=("mixed: two kinds",)),
        scores=dataclasses.replace(outcome.scores, length_correlation=0.7),
        selection=dataclasses.replace(outcome.selection, num_over_quota=3),
        contaminated={"exam.jsonl": ["row-1", "row-2", "row-3", "row-4"]},
        budget_examples=33,
    )
    limited = asked.model_copy(update={"quota_column": "shelf", "quota": 0.5})
    today = datetime.date(2026, 3, 4)
    page = fill_page(small_index, limited, unsure, [], NAMES, Refine({}, "o"), today)
    assert [(one.level, one.text) for one in page.notices] == [
        ("stop", "mixed: two kinds"),
        ("caution", "scores go with length (rank correlation 0.70): look whether the task does"),
        (
            "caution",
            "3 of 33 rows are missing: every other row of the pool was dropped, nearly copies a "
            "chosen one or passes the quota, or the next one does not fit budget_tokens",
        ),
        (
            "caution",
            "4 selected rows repeat what exam.jsonl holds (row-1, row-2, row-3, ...): drop them "
            "before you measure with it",
        ),
        ("note", "3 rows gave way, so that no shelf has over 50% of the selection"),
    ]
