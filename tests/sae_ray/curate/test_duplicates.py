import random

from hypothesis import given, settings
from hypothesis import strategies as st

from sae_ray.chat import Conversation
from sae_ray.curate.duplicates import NearDuplicates, contaminated, grams, num_copies

LONG = "a b c d e f g h i j k l m"  # thirteen words


def said(one: str, *texts: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(
        one, [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    )


def jaccard(a: str, b: str) -> float:
    one, other = grams(a, 5), grams(b, 5)
    return len(one & other) / len(one | other) if one | other else 0.0


def edited_texts(seed: int) -> list[str]:
    """Return texts of which many are others with a few words changed, cut or repeated."""
    rng = random.Random(seed)
    texts: list[str] = []
    for _ in range(60):
        words = [rng.choice("ABcde") + rng.choice("xyz") for _ in range(rng.randint(0, 60))]
        if texts and rng.random() < 0.6:
            words = rng.choice(texts).split()
            for _ in range(rng.randint(0, 3)):
                words.insert(rng.randint(0, len(words)), rng.choice("Qq"))
            words = words[rng.randint(0, 2) :]
        texts.append(rng.choice(" ,\n").join(words))
    return texts


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_near_copies_are_those_that_comparing_each_with_each_finds(
    seed: int, threshold: float
) -> None:
    seen, let_in = NearDuplicates(threshold), []
    for text in edited_texts(seed):
        copies = any(jaccard(text, other) >= threshold for other in let_in)
        assert seen.admit(text) is not copies
        let_in += [] if copies else [text]


def test_case_and_punctuation_do_not_make_a_text_another() -> None:
    assert num_copies(["One, two; three four FIVE six", "one two three\nfour five six!"]) == 1
    assert num_copies(["short", "Short.", "other", "", "", "...", "..."]) == 1


def test_a_row_is_contaminated_by_thirteen_words_in_a_row_and_not_by_twelve() -> None:
    question = "Tell me what the letters from the start of the alphabet are, please do"
    evaluation = [said("e1", question, f"well: {LONG}")]
    rows = [
        said("thirteen", f"before {LONG} after", "x"),
        said("twelve", f"before {LONG[:-2]} after", "x"),
        said("across turns", "a b c d e f", "g h i j k l m"),
        said("in another order", " ".join(reversed(LONG.split())), "x"),
    ]
    expected = {"e": ["thirteen", "across turns"], "empty": []}
    assert contaminated(rows, {"e": evaluation, "empty": []}) == expected


def test_a_shorter_question_counts_when_it_is_asked_word_for_word() -> None:
    evaluation = [said("e1", "What is seven plus eight?", "15"), said("e2", "Hello there", "Hi")]
    rows = [
        said("same", "What is seven plus eight?", "It is fifteen, since seven and eight are."),
        said("another", "What is seven plus nine?", "16"),
        said("longer", "Now then: what is seven plus eight?", "15"),
        said("too common", "Hello there", "Hello! What can I do for you today?"),
        said("in an answer", "Ask me something", "What is seven plus eight?"),
    ]
    assert contaminated(rows, {"e": evaluation}) == {"e": ["same"]}
