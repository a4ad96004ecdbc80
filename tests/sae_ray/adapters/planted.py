"""A planted world: superposed features of which some change with the label, and estimators."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
D, N, R = 64, 256, 6
TASK = np.arange(R)
LOUD = np.arange(R, R + 8)
NUISANCE = np.arange(R + 8, R + 8 + R)


@dataclasses.dataclass(frozen=True)
class World:
    """Unit Gaussian features, four times as many as dimensions.

    `corr`: each task feature drags a loud one on half of the time it is on. `confound`: as many
    nuisance features change with the label as task features do.
    """

    dictionary: Array
    rates: Array
    corr: bool = False
    confound: bool = False

    @classmethod
    def make(cls, seed: int, *, corr: bool = False, confound: bool = False) -> "World":
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((N, D))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        rates = rng.uniform(0.005, 0.025, N)
        rates[LOUD] = 0.3
        rates[TASK] = 0.02
        rates[NUISANCE] = 0.02
        return cls(rows, rates, corr, confound)

    @property
    def span(self) -> Array:
        return np.linalg.qr(self.dictionary[TASK].T)[0]

    def codes(self, rng: np.random.Generator, num: int, *, task: bool, nuisance: bool) -> Array:
        rates = self.rates.copy()
        rates[TASK] = 0.20 if task else 0.02
        if nuisance:
            rates[NUISANCE] = 0.20
        on = rng.random((num, N)) < rates
        if self.corr:
            drags = rng.random((num, R)) < 0.5
            on[:, LOUD[:R]] |= on[:, TASK] & drags
        size = np.abs(1 + 0.3 * rng.standard_normal((num, N)))
        size[:, LOUD] *= 2
        return on * size  # pyright: ignore[reportReturnType]

    def sample(self, seed: int, num: int) -> tuple[Array, Array]:
        """Return codes of `num` positive and as many reference examples."""
        rng = np.random.default_rng((seed, 1))
        positive = self.codes(rng, num, task=True, nuisance=self.confound)
        return positive, self.codes(rng, num, task=False, nuisance=False)

    def states(self, codes: Array, seed: int) -> Array:
        noise = np.random.default_rng((seed, 2)).standard_normal((len(codes), D))
        return codes @ self.dictionary + 0.02 * noise


def captured(U: Array, world: World) -> float:
    """Share of the task's span that a basis holds: 1 is all of it."""
    Q = np.linalg.qr(U)[0]
    return float(np.square(Q.T @ world.span).sum() / R)


def residual(u: Array, world: World) -> float:
    """Length of what one direction leaves of the span: never below sqrt(r - 1)."""
    u = u / np.linalg.norm(u)
    return float(np.linalg.norm(world.span - np.outer(u, u @ world.span)))


def pca(states: Array) -> Array:
    return np.linalg.svd(states - states.mean(0), full_matrices=False)[2][:R].T


def contrastive_pca(positive: Array, reference: Array) -> Array:
    """Directions whose variance grows most: the direct estimator that needs no SAE."""
    values, vectors = np.linalg.eigh(np.cov(positive.T) - np.cov(reference.T))
    return vectors[:, np.argsort(-np.abs(values))[:R]]
