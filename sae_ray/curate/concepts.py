"""Concepts: latents more common among seeds than in the background, near-duplicates grouped.

A latent is *on* in a row when the row's mean of it is among the top fifth of the pool's: rows hold
about half of all latents, so that being above zero says nothing.
"""

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from sae_ray.curate.block import IndexBlock

PRIOR_ROWS = 10.0
"""Rows of background that the seeds' rates are mixed with: a few seeds prove little."""
SAME_DIRECTION = 0.6
SAME_ROWS = 0.5


def rows_on(block: IndexBlock, thresholds: Float32[np.ndarray, " d_sae"]) -> sparse.csr_array:
    """Return which latents are on in which rows, as a sparse 0/1 array [n, d_sae]."""
    means = block.pooled("mean")
    on = means.data > thresholds[means.indices]
    # New arrays: those of `means` are the block's own.
    indptr = np.concatenate([[0], np.cumsum(on)])[means.indptr]
    ones = np.ones(int(indptr[-1]), dtype=np.float32)
    return sparse.csr_array((ones, means.indices[on], indptr), shape=means.shape)


def log_odds(
    positive: sparse.csr_array,
    weights: Float64[np.ndarray, " n"],
    mass: float,
    reference: Float64[np.ndarray, " d_sae"],
) -> Float64[np.ndarray, " d_sae"]:
    """Return z-scores of the log odds that a latent is on in weighted rows against a reference.

    p = (m Σ w_i on_i + a q) / (m + a) for m rows' worth of weights and a prior of a = 10 rows at
    the reference rate q; z = (logit p - logit q) / sqrt(1 / (m p + 1) + 1 / (m (1 - p) + 1)).
    Source: Monroe et al. 2008, log odds with an informative Dirichlet prior.
    """
    q = np.clip(reference, 1e-3, 1 - 1e-3)
    rate = (positive.T @ weights) / max(float(weights.sum()), 1e-12)
    p = np.clip((mass * rate + PRIOR_ROWS * q) / (mass + PRIOR_ROWS), 1e-4, 1 - 1e-4)
    error = np.sqrt(1 / (mass * p + 1) + 1 / (mass * (1 - p) + 1))
    return (np.log(p / (1 - p)) - np.log(q / (1 - q))) / error


def groups_of(
    chosen: Int64[np.ndarray, " k"],
    background_on: sparse.csr_array,
    decoder: Float32[np.ndarray, "d_sae d_in"] | None,
) -> Int64[np.ndarray, " k"]:
    """Return a group number for each latent chosen: near-duplicates share one.

    Near-duplicates fire in the same background rows (Jaccard > 0.5), or write in the same direction
    (cosine > 0.6), as a parent and the child that absorbs it in some rows do. Chains do not join:
    each latent joins the first, heaviest one that it is near, so a group stays one concept.
    """
    near = _jaccard(background_on[:, chosen]) > SAME_ROWS
    if decoder is not None:
        rows = decoder[chosen] / np.maximum(np.linalg.norm(decoder[chosen], axis=1), 1e-9)[:, None]
        near |= rows @ rows.T > SAME_DIRECTION
    return _leaders(near)


def _jaccard(on: sparse.csr_array) -> Float64[np.ndarray, "k k"]:
    both = (on.T @ on).toarray().astype(np.float64)
    alone = np.diag(both)
    return both / np.maximum(alone[:, None] + alone[None, :] - both, 1)


def _leaders(near: Bool[np.ndarray, "k k"]) -> Int64[np.ndarray, " k"]:
    group = np.full(len(near), -1, dtype=np.int64)
    num = 0
    for i in range(len(near)):
        if group[i] < 0:
            group[near[i] & (group < 0)] = num
            group[i] = num
            num += 1
    return group


def num_clusters(similarity: Float32[np.ndarray, "n n"], threshold: float = 0.3) -> int:
    """Return how many clusters rows fall into when those above a cosine are joined."""
    return int(connected_components(sparse.csr_array(similarity > threshold), directed=False)[0])
