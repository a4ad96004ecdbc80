"""HiddenSpace: mean hidden states, centred and partly whitened, as unit vectors.

A few directions hold most of the variance of a residual stream, and they are about length and
position more than about the task. Whitening halfway (p = 1/4 on standard deviations squared) evens
them out without blowing up noise. Everything is fitted on the background rows.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Float32

from sae_ray.curate.block import IndexBlock, Segment

MAX_COMPONENTS = 256
_POWER = 0.25
_SHRINKAGE = 0.02
_RIDGE = 2.0


@dataclasses.dataclass(frozen=True)
class HiddenSpace:
    """x -> unit((x - mean) @ basis)."""

    mean: Float32[np.ndarray, " d_in"]
    basis: Float32[np.ndarray, "d_in r"]
    centre: Float32[np.ndarray, " r"]
    """Mean of the background's unit vectors."""
    metric: Float32[np.ndarray, "r r"]
    """Inverse of their covariance, with a ridge of twice its mean eigenvalue."""

    @classmethod
    def fit(cls, background: IndexBlock) -> "HiddenSpace":
        """Fit on background rows.

        basis = V diag((e + 0.02 mean(e)) ** -1/4), where the covariance is V diag(e) V'.
        """
        hidden = background.hidden_mean().astype(np.float64)
        mean = hidden.mean(0)
        x = hidden - mean
        if len(x) >= x.shape[1]:
            energy, vectors = np.linalg.eigh(x.T @ x / len(x))
        else:
            energy, left = np.linalg.eigh(x @ x.T / len(x))
            vectors = x.T @ left / np.sqrt(np.maximum(energy * len(x), 1e-12))
        top = np.argsort(-energy, kind="stable")[:MAX_COMPONENTS]
        energy, vectors = np.maximum(energy[top], 0), vectors[:, top]
        scale = (energy + _SHRINKAGE * energy.mean() + 1e-12) ** -_POWER
        vectors = vectors * scale
        units = unit(x @ vectors)
        centre = units.mean(0)
        covariance = (units - centre).T @ (units - centre) / len(units)
        ridge = _RIDGE * np.trace(covariance) / len(covariance) + 1e-12
        metric = np.linalg.inv(covariance + ridge * np.eye(len(covariance)))
        return cls(*(a.astype(np.float32) for a in (mean, vectors, centre, metric)))

    def project(self, block: IndexBlock, segment: Segment = "all") -> Float32[np.ndarray, "n r"]:
        """Return unit vectors of rows."""
        return unit((block.hidden_mean(segment) - self.mean) @ self.basis)


def unit(x: Float[np.ndarray, "*batch d"]) -> Float[np.ndarray, "*batch d"]:
    """Scale vectors to length 1, and leave zeros alone."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
