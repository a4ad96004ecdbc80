from itertools import count

import numpy as np
import pytest

from sae_ray.chat import Conversation
from sae_ray.curate.scorer import Trace
from sae_ray.explain.shading import (
    Context,
    ShadedText,
    Turn,
    context,
    cut,
    distinct,
    fade,
    plain,
    shade,
    to_html,
    word_end,
)

CHAT = Conversation(
    "a",
    [
        {"role": "user", "content": "How many  apples?\nTom has 3."},
        {"role": "assistant", "content": "Tom has 3 apples 🍎 left"},
    ],
)


def trace(texts: list[str], on: dict[int, list[float]], num_latents: int = 2) -> Trace:
    latents = np.zeros((len(texts), num_latents), dtype=np.float32)
    for token, values in on.items():
        latents[token] = values
    return Trace(texts, latents)


def text_of(turns: list[Turn]) -> list[str]:
    return ["".join(piece.text for piece in turn.pieces) for turn in turns]


def marks(turns: list[Turn]) -> list[list[tuple[str, int]]]:
    return [[(p.text, p.latent) for p in turn.pieces if p.latent is not None] for turn in turns]


TOKENS = ["How", " many", "  ", "apples", "?", "\n", "Tom", " has", " 3", "."]
TOKENS += ["Tom", " has", " 3", " apples", " �", "�", "�", " left"]


@pytest.mark.parametrize(
    "texts",
    [
        TOKENS,
        [t.strip() for t in TOKENS],  # tokenizers that drop spaces when they decode one token
        TOKENS[:11],  # cut off at the model's limit
        [*TOKENS, "not", "there"],
        [],
    ],
)
def test_the_text_that_is_shown_is_the_conversation_to_the_character(texts: list[str]):
    turns = shade(CHAT, trace(texts, {i: [1, 0] for i in range(len(texts))}), [7, 9], np.ones(2))
    assert text_of(turns) == [m["content"] for m in CHAT.messages]
    assert text_of(plain(CHAT)) == [m["content"] for m in CHAT.messages]
    assert [turn.role for turn in turns] == ["user", "assistant"]


def test_a_token_is_marked_in_the_turn_that_it_came_from_behind_bytes_without_text():
    turns = shade(CHAT, trace(TOKENS, {12: [2, 0], 17: [2, 0]}), [7, 9], np.ones(2))
    assert marks(turns) == [[], [("3", 7), ("left", 7)]]


def test_a_token_goes_to_the_latent_that_is_strongest_for_its_own_scale():
    turns = shade(
        CHAT, trace(TOKENS, {0: [4, 3], 1: [4, 1]}), [7, 9], np.array([8.0, 4.0], dtype=np.float32)
    )
    how, many = (piece for piece in turns[0].pieces if piece.latent is not None)
    assert (how.text, how.latent, how.activation, how.strength) == ("How", 9, 3.0, 0.75)
    assert (many.text, many.latent, many.activation, many.strength) == ("many", 7, 4.0, 0.5)


def test_faint_tokens_are_not_marked_and_strong_ones_are_at_most_full():
    turns = shade(CHAT, trace(TOKENS, {0: [0.05, 0], 1: [30, 0]}), [7, 9], np.ones(2))
    (piece,) = (p for t in turns for p in t.pieces if p.latent is not None)
    assert (piece.text, piece.strength) == ("many", 1.0)


def test_a_conversation_without_latents_is_left_unshaded():
    empty = Trace(TOKENS, np.zeros((len(TOKENS), 0), dtype=np.float32))
    assert marks(shade(CHAT, empty, [], np.zeros(0))) == [[], []]


def test_a_context_is_cut_at_words_round_its_peak_which_is_marked():
    words = [f"word{i}" for i in range(100)]
    chat = Conversation("long", [{"role": "user", "content": " ".join(words)}])
    found = context(chat, trace(words, {40: [1, 1], 50: [1, 5]}), [7, 9], 1, 5.0)
    assert found.id == "long"
    text = "".join(piece.text for piece in found.pieces)
    assert text.startswith("…")
    assert text.endswith("…")
    assert set(text.strip("…").split()) <= set(words)
    assert len(text) < 200
    (peak,) = (piece for piece in found.pieces if piece.peak)
    assert (peak.text, peak.latent, peak.activation, peak.strength) == ("word50", 9, 5.0, 1.0)


def test_a_short_context_is_shown_whole_on_one_line():
    found = context(CHAT, trace(TOKENS, {3: [0, 1]}), [7, 9], 1, 1.0)
    text = "".join(piece.text for piece in found.pieces)
    assert text == "How many  apples? ⏎ Tom has 3. ⏎ Tom has 3 apples 🍎 left"


def test_a_latent_that_is_nowhere_on_has_a_context_without_a_peak():
    found = context(CHAT, trace(TOKENS, {}), [7, 9], 0, 1.0)
    assert not any(piece.peak for piece in found.pieces)
    nothing = Conversation("empty", [])
    assert context(nothing, trace([], {}), [7, 9], 0, 1.0).pieces == []


def test_contexts_that_repeat_one_before_are_left_out():
    texts = ["the cat sat on the mat", "the cat sat on a mat", "dogs bark at night", "one two"]
    contexts = [Context(t, [ShadedText(t)]) for t in texts]
    assert [c.id for c in distinct(contexts, 4)] == [texts[0], texts[2], texts[3]]
    assert [c.id for c in distinct(contexts, 2)] == [texts[0], texts[2]]


def test_cutting_keeps_every_character_once():
    pieces = [ShadedText("abc"), ShadedText("defg", 1, 2.0, 0.5), ShadedText("h")]
    whole = "abcdefgh"
    for at in range(9):
        parts = [*cut(pieces, 0, at), *cut(pieces, at, 8)]
        assert "".join(piece.text for piece in parts) == whole
        assert "".join(p.text for p in parts if p.latent == 1) == "defg"


def test_a_word_end_is_at_a_space_unless_the_word_is_very_long():
    pieces = [ShadedText("some wo"), ShadedText("rds here")]
    assert word_end(pieces, 8) == 4
    assert word_end([ShadedText("x" * 100)], 50) == 50


def test_fading_takes_the_shading_and_leaves_the_text():
    pieces = [ShadedText("a", 1, 1.0, 0.2), ShadedText("b", 1, 4.0, 0.8)]
    assert fade(pieces, 0.5) == [ShadedText("a"), pieces[1]]


def test_html_is_escaped_and_like_neighbours_become_one_mark():
    numbers = count()
    pieces = [
        ShadedText("<i>&"),
        ShadedText("a", 3, 1.0, 0.5),
        ShadedText("b<", 3, 1.25, 0.5),
        ShadedText("c", 3, 1.5, 1.0, peak=True),
    ]
    html = to_html(pieces, lambda latent: f'"{latent}>', lambda _: f"l{next(numbers)}")
    assert html == (
        '&lt;i&gt;&amp;<mark class="l0 s3" title="&#34;3&gt; · 1.25">ab&lt;</mark>'
        '<mark class="l1 s5 peak" title="&#34;3&gt; · 1.50">c</mark>'
    )
