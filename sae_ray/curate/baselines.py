"""Baselines: what a selection must beat, each from the same description as the default.

All return a score for every row of the pool, higher is better; `top` makes the first rows of it.
BM25 is SQLite's, TF-IDF and LSA are scikit-learn's. Methods that need the texts or a whole forward
of the model are fitted once for a pool.

Sources: RM3, Abdul-Jaleel et al. 2004. DSIR, Xie et al. 2023, "Data Selection for Language Models
via Importance Resampling". RDS+, Ivison et al. 2025, "Large-Scale Data Selection for Instruction
Tuning". MONA, "Task-Specific Data Selection via Monosemantic Neuronal Activations".
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer
from transformers import AutoModelForCausalLM

from sae_ray.chat import ChatTokenizer, Conversation, Unreadable
from sae_ray.curate.block import IndexBlock
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.seeds import STOP_WORDS, query_terms, strongest
from sae_ray.curate.space import unit

_WORD = re.compile(r"[^\W_]+")


def top(scores: Float32[np.ndarray, " num_rows"], num: int) -> Int64[np.ndarray, " n"]:
    """Return the best rows, ties to the earlier; a row of score 0 or less was not found at all."""
    order = np.argsort(-scores, kind="stable")[:num]
    return order[scores[order] > 0].astype(np.int64)


def random_scores(num_rows: int, seed: int) -> Float32[np.ndarray, " num_rows"]:
    """Return any rows."""
    return np.random.default_rng(seed).random(num_rows, dtype=np.float32)


def length_matched_scores(
    n_tokens: Int[np.ndarray, "num_rows 2"],
    like: Int64[np.ndarray, " n"],
    seed: int,
) -> Float32[np.ndarray, " num_rows"]:
    """Return any rows, as many of each length as in a selection: what length alone does.

    Rows are drawn without replacement within twenty equal bins of length; rows that are not drawn
    score 0.
    """
    rng = np.random.default_rng(seed)
    lengths = n_tokens.sum(1)
    edges = np.quantile(lengths, np.linspace(0, 1, 21)[1:-1])
    bins = np.searchsorted(edges, lengths)
    scores = np.zeros(len(lengths), dtype=np.float32)
    for one, count in Counter(bins[like].tolist()).items():
        drawn = rng.choice(np.flatnonzero(bins == one), count, replace=False)
        scores[drawn] = 1 + rng.random(count)
    return scores


def longest_scores(n_tokens: Int[np.ndarray, "num_rows 2"]) -> Float32[np.ndarray, " num_rows"]:
    """Return the longest rows: a strong baseline of instruction tuning."""
    return n_tokens.sum(1).astype(np.float32)


def bm25_scores(index: FeatureIndex, text: str) -> Float32[np.ndarray, " num_rows"]:
    """Return BM25 of the description's words over prompts and responses."""
    return index.lexical_scores(text)


def rm3_scores(
    index: FeatureIndex,
    text: str,
    *,
    num_documents: int = 10,
    num_terms: int = 20,
    original: float = 0.5,
) -> Float32[np.ndarray, " num_rows"]:
    """Return BM25 with feedback: the query plus the words that its first documents share.

    w(t) = 0.5 / |q| [t in q] + 0.5 Σ_d P(d) tf(t, d) / |d| over the 20 heaviest t, P(d) ∝ BM25.
    """
    terms = query_terms(text)
    seeds = strongest(index.lexical_scores(text), num_documents, 1.0)
    model: defaultdict[str, float] = defaultdict(float)
    for one, share in zip(index.conversations(seeds.rows), seeds.weights, strict=True):
        words = [w for w in _WORD.findall(one.text().lower()) if w not in STOP_WORDS]
        for word, count in Counter(words).items():
            model[word] += float(share) * count / len(words)
    heaviest = sorted(model.items(), key=lambda pair: (-pair[1], pair[0]))[:num_terms]
    mass = sum(weight for _, weight in heaviest) or 1.0
    weights = {word: (1 - original) * weight / mass for word, weight in heaviest}
    for term in terms:
        weights[term] = weights.get(term, 0.0) + original / len(terms)
    return index.lexical_scores(weights)


class DenseText:
    """LSA of a pool: TF-IDF reduced to 192 dimensions, as unit vectors in memory."""

    def __init__(self, texts: Iterable[str], *, dimensions: int = 192, seed: int = 0) -> None:
        self._tfidf = TfidfVectorizer(
            stop_words="english",
            sublinear_tf=True,
            max_features=50_000,
            dtype=np.float32,  # pyright: ignore[reportArgumentType]
        )
        sparse = self._tfidf.fit_transform(texts)
        dimensions = min(dimensions, min(sparse.shape) - 1)
        self._svd = TruncatedSVD(dimensions, random_state=seed, n_iter=3)
        self.rows = unit(self._svd.fit_transform(sparse).astype(np.float32))

    def scores(self, text: str) -> Float32[np.ndarray, " num_rows"]:
        """Return the cosine with the description."""
        query = self._svd.transform(self._tfidf.transform([text])).astype(np.float32)
        return self.rows @ unit(query)[0]

    def feedback_scores(
        self, lexical: Float32[np.ndarray, " num_rows"], num_seeds: int = 40
    ) -> Float32[np.ndarray, " num_rows"]:
        """Return the cosine with the centroid of the first rows by words, weighted."""
        seeds = strongest(lexical, num_seeds, 1.0)
        return self.rows @ unit(seeds.weights.astype(np.float32) @ self.rows[seeds.rows])


class HashedNgrams:
    """DSIR of a pool: counts of words and pairs of words in 10,000 buckets, in memory."""

    def __init__(self, texts: Iterable[str], *, num_buckets: int = 10_000) -> None:
        hashing = HashingVectorizer(
            ngram_range=(1, 2),
            n_features=num_buckets,
            norm=None,  # pyright: ignore[reportArgumentType] (its stub forgets None)
            alternate_sign=False,
        )
        self.rows: sparse.csr_array = sparse.csr_array(hashing.transform(texts), dtype=np.float32)
        counts = np.asarray(self.rows.sum(axis=0), dtype=np.float64).ravel()
        self._pool = (counts + 1) / (counts.sum() + num_buckets)

    def scores(
        self, lexical: Float32[np.ndarray, " num_rows"], seed: int, num_seeds: int = 40
    ) -> Float32[np.ndarray, " num_rows"]:
        """Return log importance weights with Gumbel noise: the best are a draw without replacement.

        log w(d) = Σ_t n_t(d) (log p(t) - log q(t)), q over the pool and p over the first 40 rows by
        words, weighted and smoothed with one text's worth of q: a sentence has too few n-grams.
        """
        seeds = strongest(lexical, num_seeds, 1.0)
        target = self.rows[seeds.rows].T @ seeds.weights
        share = target / max(float(target.sum()), 1e-9)
        ratio = np.log((share + self._pool) / (self._pool * (1 + share.sum())))
        noise = np.random.default_rng(seed).gumbel(size=len(lexical))
        weights = self.rows @ ratio + noise
        return (weights - weights.min() + 1).astype(np.float32)


class FinalStates:
    """RDS+: position-weighted means of a model's last hidden states, the whole model run."""

    def __init__(self, path: str, *, max_tokens: int = 512, batch_tokens: int = 8192) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).eval()
        self._tokenizer = ChatTokenizer.load(path)
        self.max_tokens, self.batch_tokens = max_tokens, batch_tokens

    def __call__(self, conversations: Sequence[Conversation]) -> Float32[np.ndarray, "n d"]:
        """Return unit vectors: h = Σ_i i h_i / Σ_i i; zeros where a conversation is unreadable."""
        tokens = self._tokenizer.tokenize(conversations, self.max_tokens)
        ids = [[] if isinstance(one, Unreadable) else one.ids.tolist() for one in tokens]
        found = np.zeros((len(ids), self._model.config.hidden_size), dtype=np.float32)
        order = sorted((i for i in range(len(ids)) if ids[i]), key=lambda i: (len(ids[i]), i))
        while order:
            size = max(1, self.batch_tokens // len(ids[order[-1]]))
            order, batch = order[:-size], order[-size:]
            found[batch] = self._embed([ids[i] for i in batch])
        return unit(found)

    @torch.inference_mode()
    def _embed(self, batch: Sequence[Sequence[int]]) -> Float[np.ndarray, "n d"]:
        longest = max(len(one) for one in batch)
        ids = torch.tensor([[*one, *[0] * (longest - len(one))] for one in batch])
        weights = torch.tensor(
            [[*range(1, len(one) + 1), *[0] * (longest - len(one))] for one in batch],
            dtype=torch.float32,
        )
        # Right padding of a causal model needs no mask: no real token sees a padded one.
        states = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        weights = weights / weights.sum(1, keepdim=True)
        return torch.einsum("bl,bld->bd", weights, states).numpy()


def rds_scores(
    rows: Float32[np.ndarray, "num_rows d"], queries: Float32[np.ndarray, "q d"]
) -> Float32[np.ndarray, " num_rows"]:
    """Return RDS+: queries take turns, each the nearest row that is still there.

    A row's score falls with the turn at which it was taken; the first 1,000 turns count.
    """
    similar = rows @ queries.T
    nearest = [iter(np.argsort(-similar[:, q], kind="stable")) for q in range(len(queries))]
    scores = np.zeros(len(rows), dtype=np.float32)
    turns = min(1000, len(rows))
    for turn in range(turns):
        row = next(i for i in nearest[turn % len(queries)] if scores[i] == 0)
        scores[row] = turns - turn
    return scores


def mona_scores(index: FeatureIndex, queries: IndexBlock) -> Float32[np.ndarray, " num_rows"]:
    """Return MONA: generalised Jaccard of row means with the mean of the queries', all latents.

    J(a, b) = Σ min(a, b) / Σ max(a, b).
    """
    prototype = np.asarray(queries.pooled("mean").mean(axis=0), dtype=np.float32).ravel()
    found = []
    for block in index.blocks(means_only=True):
        means = block.pooled("mean")
        rows = np.repeat(np.arange(len(block)), np.diff(means.indptr))
        low = np.minimum(means.data, prototype[means.indices])
        both = np.bincount(rows, low, minlength=len(block))
        mass = np.bincount(rows, means.data, minlength=len(block))
        found.append(both / np.maximum(mass + prototype.sum() - both, 1e-9))
    return np.concatenate(found).astype(np.float32)
