import dataclasses
import json

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from sae_ray.curate.concepts import groups_of, log_odds, rows_on
from sae_ray.curate.evidence import ProfileSettings, lexical_evidence
from sae_ray.curate.profile import Profile, build_profile
from sae_ray.curate.score import contributions, score_pool
from sae_ray.curate.seeds import query_terms, spellings
from sae_ray.errors import TaskError
from tests.sae_ray.curate.planted import D_SAE, PARENTS, Planted

TASK = "Bake bread: dough, flour and an oven"
WORDS_ALONE = ProfileSettings(description_weight=0.0)
UNPRUNED = dataclasses.replace(WORDS_ALONE, min_weight=0.0)


@pytest.fixture
def profile(planted: Planted) -> Profile:
    return build_profile(TASK, planted.index, settings=WORDS_ALONE)


def test_a_task_known_by_a_few_words_is_found_whole(planted: Planted, profile: Profile) -> None:
    # Words alone find a third of the rows: the rest come by their latents and hidden states.
    words = planted.index.lexical_scores(TASK)
    assert planted.recall("baking", words) < 0.6
    assert planted.recall("baking", score_pool(planted.index, profile).total) >= 0.9


def test_the_heaviest_latents_are_those_planted(profile: Profile) -> None:
    parent = PARENTS["baking"]
    assert {one.latent for one in profile.latents[:2]} == {parent, parent + 2}
    assert profile.latents[0].weight == 1
    assert profile.latents[0].evidence["lexical"] > 3


def test_a_child_that_absorbs_its_parent_is_in_its_group(absorbed: Planted) -> None:
    parent = PARENTS["baking"]
    grouped = build_profile(TASK, absorbed.index, settings=WORDS_ALONE, decoder=absorbed.decoder)
    group = {one.latent: one.group for one in grouped.latents}
    assert group[parent] == group[parent + 1] != group[parent + 2]


def test_another_tasks_profile_finds_nothing(planted: Planted, profile: Profile) -> None:
    for scorer in ("fused", "latents", "hidden"):
        assert planted.recall("chess", score_pool(planted.index, profile, scorer).total) < 0.2


def test_shuffled_weights_find_nothing(planted: Planted, profile: Profile) -> None:
    rng = np.random.default_rng(0)
    elsewhere = 9 + rng.permutation(D_SAE - 10)[: len(profile.latents)]
    latents = tuple(
        dataclasses.replace(one, latent=int(other))
        for one, other in zip(profile.latents, elsewhere, strict=False)
    )
    shuffled = dataclasses.replace(profile, latents=latents)
    assert planted.recall("baking", score_pool(planted.index, shuffled, "latents").total) < 0.25


def test_every_scorer_finds_the_task(planted: Planted, profile: Profile) -> None:
    for scorer in ("latents", "hidden", "jaccard", "max", "cosine"):
        found = planted.recall("baking", score_pool(planted.index, profile, scorer).total)
        assert found > 0.5, (scorer, found)


def test_a_profile_survives_json_exactly(planted: Planted, profile: Profile) -> None:
    again = Profile.from_json(profile.to_json())
    assert again == profile
    assert_array_equal(
        score_pool(planted.index, again).total, score_pool(planted.index, profile).total
    )
    old = json.dumps({**json.loads(profile.to_json()), "schema_version": 0})
    with pytest.raises(TaskError, match="schema_version 0"):
        Profile.from_json(old)


def test_the_same_question_gets_the_same_profile(planted: Planted, profile: Profile) -> None:
    again = build_profile(TASK, planted.index, settings=WORDS_ALONE)
    assert again.to_json() == profile.to_json()


def test_kept_rows_outweigh_what_the_words_found(planted: Planted) -> None:
    keep = [planted.index.ids[i] for i in np.flatnonzero(planted.relevant("chess"))[:5]]
    profile = build_profile(TASK, planted.index, keep=keep, settings=WORDS_ALONE)
    total = score_pool(planted.index, profile).total
    assert planted.recall("chess", total) > 0.8
    weights = {seed.channel: 0.0 for seed in profile.seeds}
    for seed in profile.seeds:
        weights[seed.channel] += seed.weight
    assert weights["keep"] > 0.7


def test_dropped_rows_turn_the_profile_away(planted: Planted) -> None:
    # A sentence that means two tasks alike, until the rows of one are dropped.
    both = "Bread dough and oven; a sail, a mast and a harbour"
    drop = [planted.index.ids[i] for i in np.flatnonzero(planted.relevant("sailing"))[:5]]
    before = build_profile(both, planted.index, settings=WORDS_ALONE)
    after = build_profile(both, planted.index, drop=drop, settings=WORDS_ALONE)
    gained = [
        planted.recall("baking", score_pool(planted.index, profile).total)
        for profile in (before, after)
    ]
    assert gained[1] > gained[0] + 0.1
    assert min(seed.weight for seed in after.seeds) < 0


def test_given_rows_are_a_channel_of_their_own(planted: Planted) -> None:
    given = planted.index.take(np.flatnonzero(planted.relevant("chess"))[:20])
    profile = build_profile("zebra", planted.index, examples=given, settings=WORDS_ALONE)
    assert {seed.channel for seed in profile.seeds} == {"example"}
    assert all(seed.row is None for seed in profile.seeds)
    assert not profile.abstained
    assert planted.recall("chess", score_pool(planted.index, profile).total) >= 0.95


def test_words_whose_rows_were_all_dropped_found_nothing(planted: Planted) -> None:
    profile = build_profile(TASK, planted.index, settings=WORDS_ALONE)
    found = [planted.index.ids[i] for i in np.flatnonzero(planted.index.request_scores(TASK))]
    assert {seed.channel for seed in profile.seeds} == {"lexical"}
    after = build_profile(TASK, planted.index, drop=found, settings=WORDS_ALONE)
    assert {seed.channel for seed in after.seeds} == {"drop"}
    assert after.abstained


def test_labels_lift_the_latents_that_they_name(planted: Planted, profile: Profile) -> None:
    labels = {40: "flour and dough", 41: "harbours"}
    labelled = build_profile(TASK, planted.index, labels=labels, settings=UNPRUNED)
    weight = {one.latent: one.weight for one in labelled.latents}
    assert weight[40] > {one.latent: one.weight for one in profile.latents}.get(40, 0) + 0.1
    named = next(one for one in labelled.latents if one.latent == 40)
    assert named.label == "flour and dough"
    assert named.evidence["labels"] == pytest.approx(2 / 5)


def test_latents_of_the_template_are_left_out(planted: Planted) -> None:
    # The last latent fires on template tokens almost alone.
    labels = {D_SAE - 1: "dough", D_SAE - 2: "dough"}
    settings = dataclasses.replace(WORDS_ALONE, label_weight=0.0)
    profile = build_profile(TASK, planted.index, labels=labels, settings=settings)
    assert D_SAE - 1 not in {one.latent for one in profile.latents}


def test_words_that_no_row_holds_abstain_and_say_so(planted: Planted) -> None:
    profile = build_profile("Zebra quagga", planted.index, settings=WORDS_ALONE)
    assert profile.abstained
    assert "no row of the pool holds a word" in profile.why[0]
    assert "--keep" in profile.why[0]
    assert np.isfinite(score_pool(planted.index, profile).total).all()


def test_rows_found_that_are_not_alike_abstain_until_rows_are_kept(planted: Planted) -> None:
    vague = " ".join(f"word{i}" for i in range(12))
    profile = build_profile(vague, planted.index, settings=WORDS_ALONE)
    assert profile.abstained
    assert profile.agreement < 0.2
    assert f"{profile.agreement:.0%} are alike to the model (35% are asked for" in profile.why[0]
    keep = [planted.index.ids[i] for i in np.flatnonzero(planted.relevant("chess"))[:5]]
    kept = build_profile(vague, planted.index, keep=keep, settings=WORDS_ALONE)
    assert not kept.abstained
    assert "disagree" in kept.warnings[0]


def test_rows_of_one_kind_agree(planted: Planted, profile: Profile) -> None:
    assert profile.agreement > 0.4
    assert not profile.abstained


def test_one_row_agrees_with_nothing(planted: Planted) -> None:
    row = int(np.flatnonzero(planted.relevant("chess"))[0])
    keep = [planted.index.ids[row]]
    given = planted.index.take([row])
    for alone in (
        build_profile("zebra", planted.index, keep=keep, settings=WORDS_ALONE),
        build_profile("zebra", planted.index, keep=keep, examples=given, settings=WORDS_ALONE),
    ):
        assert alone.agreement == 0
        assert alone.abstained


def test_bad_tasks_and_ids_are_refused_in_three_parts(planted: Planted) -> None:
    with pytest.raises(TaskError, match="the task is empty: say in a sentence"):
        build_profile("  \n ", planted.index)
    with pytest.raises(TaskError, match="1001 characters: at most 1000"):
        build_profile("x" * 1001, planted.index)
    with pytest.raises(TaskError, match="keep='row-12000' is no row.*row-1200?'"):
        build_profile(TASK, planted.index, keep=["row-12000"])
    with pytest.raises(TaskError, match="in keep and in drop"):
        build_profile(TASK, planted.index, keep=["row-1"], drop=["row-1"])


def test_reasons_name_the_concepts_of_the_row(planted: Planted, profile: Profile) -> None:
    rows = np.flatnonzero(planted.relevant("baking"))[:10]
    thresholds = planted.index.stats.on_threshold
    reasons = contributions(planted.index.take(rows), profile, thresholds)
    first = {one[0][0] for one in reasons if one}
    assert first <= {PARENTS["baking"], PARENTS["baking"] + 2}
    for one in reasons:
        assert sum(share for _, share in one) <= 1 + 1e-6
        assert [share for _, share in one] == sorted((share for _, share in one), reverse=True)


def test_log_odds_grow_with_the_evidence_and_vanish_without(planted: Planted) -> None:
    index = planted.index
    on = rows_on(index.background, index.stats.on_threshold)
    rate = np.asarray(on.mean(axis=0), dtype=np.float64).ravel()
    everything = np.full(len(index.background), 1 / len(index.background))
    assert np.abs(log_odds(on, everything, 1000.0, rate)).max() < 0.2
    right = np.flatnonzero(planted.relevant("baking"))
    seeds = rows_on(index.take(right), index.stats.on_threshold)
    even = np.full(len(right), 1 / len(right))
    few, many = (log_odds(seeds, even, mass, rate)[PARENTS["baking"]] for mass in (2.0, 50.0))
    assert 0 < few < many


def test_reading_which_latents_are_on_leaves_the_block_alone(planted: Planted) -> None:
    block = planted.index.background
    before = block.indptr.copy()
    on = rows_on(block, planted.index.stats.on_threshold)
    assert_array_equal(block.indptr, before)
    dense = block.pooled("mean").toarray() > planted.index.stats.on_threshold
    assert_array_equal(on.toarray().astype(bool), dense)


def test_latents_of_the_same_rows_are_one_group(planted: Planted) -> None:
    on = rows_on(planted.index.background, planted.index.stats.on_threshold).toarray()
    on[:, 50] = on[:, 51]
    sparse = rows_on(planted.index.background, planted.index.stats.on_threshold)
    assert len(set(groups_of(np.array([50, 51, 52]), type(sparse)(on), None))) == 2


def test_words_are_looked_for_in_other_spellings() -> None:
    assert query_terms("Summarise the News, and news again") == ["again", "news", "summarise"]
    assert "summarize" in spellings("summarise")
    assert "color" in spellings("colour")
    assert "math" in spellings("maths")


def test_rows_with_more_of_the_words_come_first(planted: Planted) -> None:
    evidence = lexical_evidence(planted.index, TASK)
    bm25 = planted.index.lexical_scores(TASK)
    assert ((evidence > 0) == (bm25 > 0)).all()
    held = evidence > 0
    assert (evidence[held] <= bm25[held] * 1.5).all()
    assert evidence[planted.relevant("baking")].mean() > evidence.mean()
