"""Baselines against their formulas, written out by hand."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import AutoModelForCausalLM

from sae_ray.chat import ChatTokenizer, Conversation, Tokens
from sae_ray.curate.baselines import (
    DenseText,
    FinalStates,
    HashedNgrams,
    length_matched_scores,
    longest_scores,
    mona_scores,
    random_scores,
    rds_scores,
    rm3_scores,
    top,
)
from sae_ray.curate.seeds import STOP_WORDS
from tests.sae_ray.curate.planted import Planted

TEXTS = [
    "the baker kneads dough and the oven bakes bread",
    "bread and dough rise in the warm oven",
    "flour makes dough",
    "a sailor hoists the sail on the mast",
    "the mast holds a sail in the wind",
    "wind fills every sail of the harbour",
    "harbour boats wait for wind",
]


def test_the_best_rows_come_first_and_rows_not_found_never() -> None:
    scores = np.array([0, 2, 1, 2, -1, 0.5], dtype=np.float32)
    assert top(scores, 3).tolist() == [1, 3, 2]
    assert top(scores, 6).tolist() == [1, 3, 2, 5]


def test_random_rows_depend_on_the_seed_alone() -> None:
    draws = [top(random_scores(1000, seed), 100).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_length_matched_rows_have_the_lengths_of_the_selection() -> None:
    rng = np.random.default_rng(0)
    n_tokens = rng.integers(1, 500, (2000, 2))
    lengths = n_tokens.sum(1)
    like = np.argsort(-lengths, kind="stable")[:200]
    drawn = top(length_matched_scores(n_tokens, like, 1), 200)
    assert len(set(drawn.tolist())) == 200
    edges = np.quantile(lengths, np.linspace(0, 1, 21)[1:-1])
    assert_array_equal(
        np.sort(np.searchsorted(edges, lengths[drawn])),
        np.sort(np.searchsorted(edges, lengths[like])),
    )
    # Among rows of one length it is a draw: the very same rows would be no baseline.
    half = like[::2]
    other = top(length_matched_scores(n_tokens, half, 1), 100)
    assert 30 < len(set(other.tolist()) & set(half.tolist())) < 70
    assert top(longest_scores(n_tokens), 200).tolist() == like.tolist()


def test_feedback_adds_the_words_that_the_first_rows_share(planted: Planted) -> None:
    index = planted.index
    first = top(index.lexical_scores("bake bread"), 10)
    shares = index.lexical_scores("bake bread")[first].astype(np.float64)
    shares /= shares.sum()
    model: Counter[str] = Counter()
    for share, one in zip(shares, index.conversations(first), strict=True):
        words = [w for w in re.findall(r"[a-z0-9]+", one.text().lower()) if w not in STOP_WORDS]
        for word, count in Counter(words).items():
            model[word] += share * count / len(words)
    heaviest = sorted(model, key=lambda word: (-model[word], word))[:20]
    mass = sum(model[word] for word in heaviest)
    weights = {word: 0.5 * model[word] / mass for word in heaviest}
    for word in ("bake", "bread"):
        weights[word] = weights.get(word, 0) + 0.25
    expected = sum(weight * index.lexical_scores({word: 1.0}) for word, weight in weights.items())
    assert_allclose(rm3_scores(index, "bake bread"), expected, rtol=1e-4, atol=1e-6)
    # Words that the sentence lacks bring in rows that the sentence does not find.
    assert len(top(rm3_scores(index, "bake bread"), 1200)) > len(
        top(index.lexical_scores("bake bread"), 1200)
    )


def test_lsa_is_the_cosine_in_the_largest_directions_of_tfidf() -> None:
    dense = DenseText(TEXTS, dimensions=3)
    tfidf = TfidfVectorizer(stop_words="english", sublinear_tf=True)
    matrix = sparse.csr_array(tfidf.fit_transform(TEXTS)).toarray()
    directions = np.linalg.svd(matrix)[2][:3].T
    rows = matrix @ directions
    query = sparse.csr_array(tfidf.transform(["warm bread"])).toarray()[0] @ directions
    expected = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    assert_allclose(dense.scores("warm bread"), expected, atol=1e-4)
    # "flour makes dough" shares no word with the query: it comes by the company it keeps.
    assert dense.scores("warm bread")[2] > dense.scores("warm bread")[3:].max() + 0.3


def test_lsa_with_feedback_is_the_cosine_with_the_weighted_first_rows() -> None:
    dense = DenseText(TEXTS, dimensions=5)
    lexical = np.array([0, 0, 0, 3, 1, 0, 0], dtype=np.float32)
    centroid = 0.75 * dense.rows[3] + 0.25 * dense.rows[4]
    expected = dense.rows @ centroid / np.linalg.norm(centroid)
    assert_allclose(dense.feedback_scores(lexical), expected, atol=1e-5)
    assert_allclose(np.linalg.norm(dense.rows, axis=1), 1, atol=1e-5)


def grams(text: str) -> list[str]:
    words = re.findall(r"\w\w+", text)
    return [*words, *(f"{a} {b}" for a, b in zip(words, words[1:], strict=False))]


def test_dsir_is_the_log_ratio_of_target_and_pool_with_gumbel_noise() -> None:
    num_buckets = 2**20  # no collisions, so that buckets are n-grams
    lexical = np.array([3, 1, 0, 0, 0, 0, 0], dtype=np.float32)
    found = HashedNgrams(TEXTS, num_buckets=num_buckets).scores(lexical, seed=5)
    pool = Counter(gram for text in TEXTS for gram in grams(text))
    size = pool.total() + num_buckets
    target: defaultdict[str, float] = defaultdict(float)
    for share, text in zip((0.75, 0.25), TEXTS, strict=False):
        for gram in grams(text):
            target[gram] += share
    mass = sum(target.values())
    weights = []
    for text in TEXTS:
        q = {gram: (pool[gram] + 1) / size for gram in grams(text)}
        weights.append(
            sum(np.log((target[g] / mass + q[g]) / 2) - np.log(q[g]) for g in grams(text))
        )
    expected = np.array(weights) + np.random.default_rng(5).gumbel(size=len(TEXTS))
    assert_allclose(found - found[6], expected - expected[6], rtol=1e-4, atol=1e-4)
    assert (found > 0).all()


def test_dsir_without_a_target_is_a_draw() -> None:
    fitted = HashedNgrams(TEXTS)
    nothing = np.zeros(len(TEXTS), dtype=np.float32)
    noise = np.random.default_rng(3).gumbel(size=len(TEXTS))
    assert_allclose(fitted.scores(nothing, seed=3), noise - noise.min() + 1, atol=1e-4)


def test_rds_embeds_with_weights_that_grow_along_the_conversation(
    tiny_lm_of: Callable[[str], Path],
) -> None:
    path = str(tiny_lm_of("llama"))
    texts = ["orders", "count the orders of each customer since May", "a query " * 20]
    conversations = [
        Conversation(str(i), [{"role": "user", "content": t}]) for i, t in enumerate(texts)
    ]
    together = FinalStates(path, batch_tokens=10**6)(conversations)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = ChatTokenizer.load(path).tokenize(conversations, 512)
    for found, one in zip(together, tokens, strict=True):
        assert isinstance(one, Tokens)
        ids = torch.tensor([one.ids.tolist()])
        with torch.inference_mode():
            states = model(ids, output_hidden_states=True).hidden_states[-1][0].numpy()
        weights = np.arange(1, len(states) + 1)
        expected = (weights[:, None] * states).sum(0) / weights.sum()
        assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-5)
    assert_allclose(FinalStates(path, batch_tokens=1)(conversations), together, atol=1e-5)


def test_rds_lets_queries_take_turns() -> None:
    rows = np.array([[1, 0], [0.9, 0.1], [0.8, 0.6], [0, 1]], dtype=np.float32)
    queries = np.array([[1, 0], [0.8, 0.6]], dtype=np.float32)
    # The second query's turn: row 2 is its nearest. The first's: row 0 is gone, row 1 is next.
    assert top(rds_scores(rows, queries), 4).tolist() == [0, 2, 1, 3]
    # Alone, the first query goes by its own order.
    assert top(rds_scores(rows, queries[:1]), 4).tolist() == [0, 1, 2, 3]


def test_mona_is_the_generalised_jaccard_of_row_means(planted: Planted) -> None:
    queries = planted.index.take([3, 700])
    means = np.concatenate([b.pooled("mean").toarray() for b in planted.index.blocks()])
    prototype = (means[3] + means[700]) / 2
    expected = np.minimum(means, prototype).sum(1) / np.maximum(means, prototype).sum(1)
    assert_allclose(mona_scores(planted.index, queries), expected, rtol=1e-4)
    assert mona_scores(planted.index, planted.index.take([3]))[3] == pytest.approx(1, abs=1e-4)
