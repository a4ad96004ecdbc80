"""The lexical index ranks by BM25, whatever the words and wherever the file."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_ray.curate.lexical import LexicalIndex, build
from sae_ray.errors import ArtifactError

TEXTS = [
    ("solve the sum of sums", "the answer is four"),
    ("write a query", "select orders from customers"),
    ("naïve café 日本語", "orders orders orders"),
    ("", ""),
    ("a query of a query", "answer"),
]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> LexicalIndex:
    path = tmp_path_factory.mktemp("lexical") / "lexical.sqlite"
    build(path, TEXTS)
    return LexicalIndex(path, len(TEXTS))


def bm25(term: str) -> np.ndarray:
    """BM25 of one word that no stemming touches, both columns as one text, k1 1.2 and b 0.75."""
    texts = [Counter(f"{prompt} {response}".split()) for prompt, response in TEXTS]
    lengths = np.array([sum(text.values()) for text in texts])
    counts = np.array([text[term] for text in texts])
    found = (counts > 0).sum()
    idf = math.log((len(TEXTS) - found + 0.5) / (found + 0.5))
    return idf * counts * 2.2 / (counts + 1.2 * (0.25 + 0.75 * lengths / lengths.mean()))


@pytest.mark.parametrize("term", ["four", "café", "write", "日本語"])
def test_scores_are_bm25(index, term):
    np.testing.assert_allclose(index.scores({term: 1.0}), bm25(term), rtol=1e-5)


def test_words_are_stemmed_and_rows_without_any_score_nothing(index):
    scores = index.scores("Summing customers")
    assert (scores > 0).tolist() == [True, True, False, False, False]
    assert (index.scores("the of a") == 0).all()


def test_weights_multiply_and_terms_add(index):
    weighted = index.scores({"query": 2.0, "orders": 0.5, "answer": 0.5})
    expected = 2 * index.scores({"query": 1.0}) + 0.5 * (
        index.scores({"orders": 1.0}) + index.scores({"answer": 1.0})
    )
    np.testing.assert_allclose(weighted, expected, rtol=1e-5)


def test_a_sentence_counts_each_of_its_words_once(index):
    expected = index.scores({"query": 1.0, "orders": 1.0})
    np.testing.assert_allclose(index.scores("query orders, query: ORDERS"), expected)


@given(
    st.text(max_size=30) | st.lists(st.sampled_from('"*:^()-+ NEAR AND OR NOT {} \0')).map("".join)
)
@settings(max_examples=60, deadline=None)
def test_no_query_is_taken_for_syntax(index, query):
    assert index.scores(query).shape == (len(TEXTS),)
    assert index.scores({query: 1.0, "orders": 1.0})[2] > 0


def test_thousands_of_terms_are_read(index):
    terms = {f"word{i}": 1.0 for i in range(5000)} | {"orders": 1.0}
    np.testing.assert_allclose(index.scores(terms), index.scores({"orders": 1.0}))


def test_the_same_rows_make_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        build(tmp_path / name, iter(TEXTS * 300))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_folder_name_will_do(tmp_path, monkeypatch):
    folder = tmp_path / "a folder? #1 100%41"
    folder.mkdir()
    build(folder / "lexical.sqlite", TEXTS)
    assert LexicalIndex(folder / "lexical.sqlite", len(TEXTS)).scores("query").any()
    monkeypatch.chdir(folder)
    assert LexicalIndex(Path("lexical.sqlite"), len(TEXTS)).scores("query").any()


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "lexical.sqlite").write_bytes(b"no database at all, for sure" * 100)
    with pytest.raises(
        ArtifactError, match=r"lexical\.sqlite cannot be read: .*; delete the index"
    ):
        LexicalIndex(tmp_path / "lexical.sqlite", 5).scores("query")


def test_requests_are_searched_where_people_say_them(tmp_path: Path) -> None:
    """In the first and last words of a prompt, and not in what the request is about."""
    filler = " ".join(["passage"] * 40)
    texts = [
        (f"translate this {filler}", "orders"),
        (f"{filler} now translate", "orders"),
        (f"{filler} translate {filler}", "translate"),
        ("translate", "orders"),
    ]
    build(tmp_path / "lexical.sqlite", texts)
    index = LexicalIndex(tmp_path / "lexical.sqlite", len(texts))
    assert ((index.scores("translate", "request") > 0) == [True, True, False, True]).all()
    assert (index.scores("translate") > 0).all()
    assert not index.scores("orders", "request").any()
