"""The generator: same seed same rows, splits apart, answers right."""

import re
from collections import Counter

import pyarrow.parquet as pq
import pytest

from sae_ray import tiny
from sae_ray.tiny.exam import is_correct
from sae_ray.tiny.generator import Splits, generate
from sae_ray.tiny.prose import chronicle
from sae_ray.tiny.skills import SKILLS, THIN
from sae_ray.tiny.split import conversation_id, is_held_out
from sae_ray.tiny.world import DAYS, DISHES, GOODS, PAST, TONES, UNITS, VELAN, plural

PROSE = "generated prose"


@pytest.fixture(scope="module")
def splits() -> Splits:
    # The pre-training rows come last: fewer of them leave everything else as it is.
    return generate(0, pretraining_rows=60)


def test_the_shipped_files_are_what_the_generator_makes(splits: Splits) -> None:
    # They were written by another process: nothing may depend on its hash seed or state.
    made = {
        tiny.pool_path(): splits.pool,
        tiny.eval_path(): splits.evaluation,
        tiny.preferences_path(): splits.preferences,
        tiny.safety_path(): splits.safety,
    }
    for path, rows in made.items():
        assert pq.read_table(path).to_pylist() == rows, path.name
    prose = [row for row in pq.read_table(tiny.text_path()).to_pylist() if row["source"] == PROSE]
    assert prose == splits.text


def test_another_seed_gives_other_prose() -> None:
    assert chronicle(1, 3000) != chronicle(2, 3000)
    assert chronicle(1, 3000) == chronicle(1, 3000)


def test_counts_and_domains_are_as_promised(splits: Splits) -> None:
    pool = Counter(row["domain"] for row in splits.pool)
    assert len(splits.pool) >= 3000
    assert len(pool) >= 8
    assert all(pool[domain] >= 500 for domain in SKILLS)
    assert min(Counter(row["domain"] for row in splits.evaluation).values()) >= 100
    assert len(Counter(row["domain"] for row in splits.evaluation)) >= 8
    assert len(splits.preferences) >= 500
    assert Counter(row["harmful"] for row in splits.safety) == {True: 200, False: 200}
    assert sum(len(page["text"].encode()) for page in splits.text) >= 1_000_000


def test_some_conversations_have_several_turns(splits: Splits) -> None:
    lengths = Counter(len(row["messages"]) for row in splits.pool)
    assert lengths[2] > 3000
    assert lengths[4] > 500
    for row in splits.pool:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_no_question_is_in_two_splits(splits: Splits) -> None:
    evaluation = {row["messages"][0]["content"] for row in splits.evaluation}
    pool = {m["content"] for row in splits.pool for m in row["messages"] if m["role"] == "user"}
    others = {row["prompt"][0]["content"] for row in splits.preferences}
    others |= {row["prompt"] for row in splits.safety}
    pretraining = {row["messages"][0]["content"] for row in splits.pretraining}
    assert not evaluation & pool
    assert not (evaluation | pool) & others
    assert not evaluation & pretraining
    assert not {row["messages"][0]["content"] for row in splits.pool} & pretraining


def test_ids_are_hashes_of_the_turns_and_differ(splits: Splits) -> None:
    ids = [row["id"] for row in splits.pool + splits.evaluation]
    assert len(set(ids)) == len(ids)
    assert all(row["id"] == conversation_id(row["messages"]) for row in splits.pool)


def test_thin_skills_are_hardly_ever_answered_in_pretraining(splits: Splits) -> None:
    answered = Counter(row["domain"] for row in splits.pretraining if len(row["messages"]) > 1)
    assert all(answered[domain] == 10 for domain in THIN)
    assert answered["tables"] == 60


def test_spans_name_the_words_they_cover(splits: Splits) -> None:
    for row in splits.pool[:500]:
        for span in row["spans"]:
            content = row["messages"][span["message"]]["content"]
            word = content[span["start"] : span["end"]]
            assert word.isalnum()
            assert span["concept"] in row["concepts"]
            if span["concept"] == "day of the week":
                assert word in DAYS
            if span["concept"] == "number":
                assert word.isdigit()


def test_right_replies_pass_the_check_and_rejected_ones_fail(splits: Splits) -> None:
    metrics = {row["domain"]: row["metric"] for row in splits.evaluation}
    for row in splits.evaluation:
        assert is_correct(row["messages"][-1]["content"], row["answer"], row["metric"])
    for row in splits.preferences:
        if row["domain"] in metrics:
            metric, chosen = metrics[row["domain"]], row["chosen"][0]["content"]
            answer = re.findall(r"\d+", chosen)[-1] if metric == "number" else chosen
            assert not is_correct(row["rejected"][0]["content"], answer, metric)


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def skill_part(row: dict) -> str:
    """Drop the remark in passing, which may hold numbers, days and things of its own."""
    return row["messages"][0]["content"]


def questions(splits: Splits, domain: str) -> list[dict]:
    rows = [row for row in splits.evaluation if row["domain"] == domain]
    assert rows
    return rows


def test_sums_are_right_when_done_again(splits: Splits) -> None:
    for row in questions(splits, "sums"):
        text, answer = skill_part(row), int(row["answer"])
        *_, a, b = numbers(text)
        concepts = row["concepts"]
        assert answer == (a + b if "addition" in concepts else a - b), text


def test_measures_follow_the_table_of_units(splits: Splits) -> None:
    for row in questions(splits, "measures"):
        text = skill_part(row)
        units = [u for u in UNITS if f"unit {u}" in row["concepts"]]
        (big,) = units
        small, factor = UNITS[big]
        assert plural(small) in text
        assert int(row["answer"]) == factor * numbers(text)[-1]


def test_orders_are_sorted_permutations(splits: Splits) -> None:
    for row in questions(splits, "order"):
        answer = numbers(row["answer"])
        assert answer == sorted(numbers(skill_part(row))[-len(answer) :])


def test_weekdays_are_counted_right(splits: Splits) -> None:
    for row in questions(splits, "days"):
        text = skill_part(row)
        day = re.findall("|".join(DAYS), text)[-1]
        count = numbers(text)[-1]
        count = count if "days ahead" in row["concepts"] else -count
        assert DAYS.index(row["answer"]) == (DAYS.index(day) + count) % 7


def test_kinds_and_tones_follow_the_lexicon(splits: Splits) -> None:
    for row in questions(splits, "kinds"):
        words = set(re.findall(r"[a-z]+", skill_part(row)))
        assert words & set(GOODS[row["answer"]])
    for row in questions(splits, "tone"):
        words = re.findall(r"[a-z]+", skill_part(row))
        assert sum(word in TONES[row["answer"]] for word in words) >= 2


def test_velan_is_noun_adjectives_verb(splits: Splits) -> None:
    english = {v: e for part in VELAN.values() for e, v in part.items()}
    for row in questions(splits, "velan"):
        noun, *adjectives, verb = [english[word] for word in row["answer"].split()]
        assert " ".join(["the", *adjectives, noun, verb]) in skill_part(row)


def test_table_answers_stand_behind_their_thing(splits: Splits) -> None:
    for row in questions(splits, "tables"):
        text = skill_part(row)
        asked = re.findall(r"([a-z]+(?: of [a-z]+)?)(?=\?)", text)[-1].split()[-1]
        assert re.search(rf"{asked} {row['answer']}\b", text, re.IGNORECASE), text


def test_recipe_steps_are_neighbours_and_rewriting_changes_the_verb(splits: Splits) -> None:
    for row in questions(splits, "cooking"):
        known = re.findall(r'"([^"]+)"', skill_part(row))[-1]
        (steps,) = [steps for steps in DISHES.values() if known in steps]
        step = 1 if "next step" in row["concepts"] else -1
        assert steps[steps.index(known) + step] == row["answer"]
    for row in questions(splits, "rewriting"):
        name, verb, *rest = row["answer"].split()
        present = next(word for word, past in PAST.items() if past == verb)
        assert " ".join([name, present, *rest]).rstrip(".") in skill_part(row)


def test_held_out_is_the_odd_first_byte_of_the_md5() -> None:
    # Digests by hand: md5("a") = 0cc1..., md5("b") = 92eb..., md5("c") = 4a8a...,
    # md5("0") = cfcd..., md5("1") = c4ca..., md5("") = d41d..., md5("5") = e4da..., "7" = 8f14...
    assert [is_held_out(id) for id in ("a", "b", "c", "1", "", "5")] == [False] * 6
    assert [is_held_out(id) for id in ("0", "7")] == [True, True]
    share = sum(is_held_out(str(i)) for i in range(4000)) / 4000
    assert 0.47 < share < 0.53
