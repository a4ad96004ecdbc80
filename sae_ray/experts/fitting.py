"""Fitting: from prompts of experts and of nobody to what a router decides by.

How like members of e a prompt x is:  c_e(x) = mean of the k highest cosines with them
nobody's prompts, b, count against:   l_e(x) = c_e(x) - 2 max(0, c_b(x) - c_e(x))
on a scale of its own:                s_e(x) = (l_e(x) - low_e) / (mid_e - low_e)

where 4 % of e's own prompts lie below low_e and half of them below mid_e, each half of them held
against the other. The base answers where s_e(x) < t_e for all e. t_e is 0, or as much higher as it
takes that no more background prompts leave the base than split conformal prediction allows for 5 %
(Vovk et al. 2005); it is raised where that costs an expert the fewest of its own prompts. This
choice is made on the same prompts, so that for new ones the 5 % hold nearly, and not by a theorem.

    kind        members                     which expert         trained
    zero_shot   8 centroids, 32 of nobody's highest s_e - t_e    nothing
    knn         all prompts, k = 3          highest s_e - t_e    nothing
    logistic    all prompts, k = 3          a classifier of the  multinomial logistic regression,
                                            prompts              with the background as a class

Cosines are between mean hidden states in the `HiddenSpace` of the background. With the first two
kinds an expert's s_e depends on its own prompts and on the background alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32
from scipy.cluster.vq import kmeans2
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from sae_ray.curate.space import unit
from sae_ray.errors import RegistryError

Kind = Literal["zero_shot", "knn", "logistic"]

LEAVING = 0.05
"""Share of background prompts that may leave the base."""
LOST = 0.04
"""Share of an expert's own prompts that may stay with the base for being unlike the others."""
NUM_CENTROIDS = 8
NUM_NOBODYS = 32
"""Centroids of the background, which is of many kinds."""
CONTRAST = 2.0
"""What a prompt loses for being more like nobody's prompts than like an expert's."""
NEAREST = 3
CLASSIFIER_WEIGHT = 0.1
"""What a unit of log odds between experts takes from s, for the logistic kind."""
CLAIMED = 0.5
"""s above which a prompt of a mixed background is taken to be an expert's own."""
MIN_PROMPTS = 16
MIN_BACKGROUND = 40
_REGULARISATION = 10.0

Units = Float32[np.ndarray, "_ r"]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A multinomial logistic regression; its last class is the background."""

    coefficients: Float32[np.ndarray, "classes r"]
    intercepts: Float32[np.ndarray, " classes"]

    @classmethod
    def fit(cls, members: Sequence[Units], background: Units) -> "Classifier":
        """Train on prompts of every expert, and of nobody; every class weighs the same."""
        groups = [*members, background]
        labels = np.repeat(np.arange(len(groups)), [len(one) for one in groups])
        model = LogisticRegression(C=_REGULARISATION, max_iter=1000, class_weight="balanced")
        model.fit(np.concatenate(groups), labels)
        coefficients, intercepts = model.coef_, model.intercept_
        if len(groups) == 2:  # scikit-learn keeps one row of two: that of the second class
            coefficients, intercepts = (np.concatenate([-w, w]) for w in (coefficients, intercepts))
        as_saved = (np.ascontiguousarray(w, dtype=np.float32) for w in (coefficients, intercepts))
        return cls(*as_saved)

    def lag(self, units: Units) -> Float32[np.ndarray, "n experts"]:
        """Return how far each expert's log probability lies behind that of the likeliest class."""
        logits = units @ self.coefficients.T + self.intercepts
        return (logits - logits.max(1, keepdims=True))[:, :-1]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What decides; arrays by expert are in the experts' order."""

    kind: Kind
    members: tuple[Units, ...]
    nobodys: Units
    """Members of the background."""
    low: Float32[np.ndarray, " experts"]
    mid: Float32[np.ndarray, " experts"]
    classifier: Classifier | None
    thresholds: Float32[np.ndarray, " experts"]
    temperature: float = 1.0

    def scores(self, units: Units) -> Float32[np.ndarray, "n experts"]:
        """Return s - t of prompts for every expert: the base answers where all are negative."""
        scores = (self._likeness(units) - self.low) / (self.mid - self.low)
        if self.classifier is not None:
            lag = CLASSIFIER_WEIGHT * self.classifier.lag(units)
            scores = scores.max(1, keepdims=True) + lag
        return (scores - self.thresholds).astype(np.float32)

    def log_probabilities(
        self, scores: Float[np.ndarray, "n experts"]
    ) -> Float[np.ndarray, "n experts_and_base"]:
        """Return log softmax of (s_1 - t_1, ..., s_n - t_n, 0) / temperature; the base is last."""
        base = np.zeros((len(scores), 1))
        return log_softmax(np.concatenate([scores, base], axis=1) / self.temperature, axis=1)

    def pull(self, units: Float32[np.ndarray, " r"], expert: int) -> Float32[np.ndarray, " r"]:
        """Return the direction that speaks for an expert at a prompt.

        It is the mean of the members that l_e compares with; with a classifier, the expert's
        coefficients less the background's.
        """
        if self.classifier is not None:
            return self.classifier.coefficients[expert] - self.classifier.coefficients[-1]
        members = self.members[expert]
        nearest = np.argsort(-(members @ units), kind="stable")[: _nearest(self.kind)]
        return members[nearest].mean(0)

    def _likeness(self, units: Units) -> Float32[np.ndarray, "n experts"]:
        k = _nearest(self.kind)
        like = np.stack([_likeness(units, one, k) for one in self.members], axis=1)
        nobodys = _likeness(units, self.nobodys, k)[:, None]
        return like - CONTRAST * np.maximum(0, nobodys - like)


def fit(kind: Kind, names: Sequence[str], prompts: Sequence[Units], background: Units) -> Fitted:
    """Fit all that decides.

    Args:
        kind: how it decides.
        names: of the experts, for errors.
        prompts: of every expert, as unit vectors.
        background: prompts that no expert should answer, the first half of which trains the
            classifier, if there is one; the second half sets the threshold.

    Raises:
        RegistryError: there are too few prompts.
    """
    _require_enough(names, prompts, background)
    trained, held = background[: len(background) // 2], background[len(background) // 2 :]
    halves = [(one[::2], one[1::2]) for one in prompts]
    first = _unscaled(kind, [a for a, _ in halves], trained)
    second = _unscaled(kind, [b for _, b in halves], trained)
    likeness = [
        np.concatenate([first._likeness(b)[:, e], second._likeness(a)[:, e]])
        for e, (a, b) in enumerate(halves)
    ]
    low = np.array([np.quantile(one, LOST) for one in likeness], dtype=np.float32)
    mid = np.array([np.median(one) for one in likeness], dtype=np.float32)
    mid = np.maximum(mid, low + 1e-3)
    scaled = [dataclasses.replace(one, low=low, mid=mid) for one in (first, second)]
    own = [np.concatenate([scaled[0].scores(b), scaled[1].scores(a)]) for a, b in halves]
    fitted = dataclasses.replace(_unscaled(kind, prompts, trained), low=low, mid=mid)
    away = fitted.scores(held)
    thresholds = _thresholds([one[:, e] for e, one in enumerate(own)], away)
    fitted = dataclasses.replace(fitted, thresholds=thresholds)
    own = [one - thresholds for one in own]
    return dataclasses.replace(fitted, temperature=_temperature(fitted, own, away - thresholds))


def unclaimed(fitted: Fitted, background: Units) -> np.ndarray:
    """Return which background prompts no expert takes for one of its own: True where none does."""
    return (fitted.scores(background) + fitted.thresholds).max(1) < CLAIMED


def _unscaled(kind: Kind, prompts: Sequence[Units], background: Units) -> Fitted:
    """Fit on prompts; l is still on no scale."""
    members, nobodys = tuple(prompts), background
    if kind == "zero_shot":
        members = tuple(_centroids(one, NUM_CENTROIDS) for one in prompts)
        nobodys = _centroids(background, NUM_NOBODYS)
    classifier = Classifier.fit(prompts, background) if kind == "logistic" else None
    zeros = np.zeros(len(prompts), dtype=np.float32)
    return Fitted(kind, members, nobodys, zeros, zeros + 1, classifier, zeros)


def _nearest(kind: Kind) -> int:
    return 1 if kind == "zero_shot" else NEAREST


def _likeness(units: Units, members: Units, k: int) -> Float32[np.ndarray, " n"]:
    return np.sort(units @ members.T, axis=1)[:, -k:].mean(1)


def _centroids(units: Units, most: int) -> Units:
    """Return unit vectors of the centres that k-means finds, from a fixed seed."""
    num = min(most, len(units) // 2)
    _, which = kmeans2(units.astype(np.float64), num, seed=0, minit="++")  # pyright: ignore
    centres = [units[which == i].mean(0) for i in range(num) if (which == i).any()]
    return unit(np.stack(centres)).astype(np.float32)


def _thresholds(
    own: Sequence[Float[np.ndarray, " n"]], away: Float[np.ndarray, "m experts"]
) -> Float32[np.ndarray, " experts"]:
    """Return t: raised one background prompt at a time, where the fewest own prompts are lost."""
    allowed = max(0, len(away) - int(np.ceil((len(away) + 1) * (1 - LEAVING))))
    thresholds = np.zeros(len(own))
    while True:
        ahead = away - thresholds
        taker, gone = ahead.argmax(1), ahead.max(1) >= 0
        if gone.sum() <= allowed:
            return thresholds.astype(np.float32)
        raised = {e: away[gone & (taker == e), e].min() + 1e-5 for e in np.unique(taker[gone])}
        lost = {e: ((own[e] >= thresholds[e]) & (own[e] < t)).mean() for e, t in raised.items()}
        cheapest = min(raised, key=lambda e: (lost[e], e))
        thresholds[cheapest] = raised[cheapest]


def _temperature(
    fitted: Fitted,
    own: Sequence[Float[np.ndarray, "n experts"]],
    away: Float[np.ndarray, "m experts"],
) -> float:
    """Return the temperature at which what is known of these prompts is likeliest.

    Every expert's prompts together weigh as much as the background. Source: Guo et al. 2017.
    """
    groups = [*own, away]

    def loss(log_temperature: float) -> float:
        tried = dataclasses.replace(fitted, temperature=float(np.exp(log_temperature)))
        each = [tried.log_probabilities(one)[:, e].mean() for e, one in enumerate(groups)]
        return -float(np.mean(each))

    return float(np.exp(minimize_scalar(loss, bounds=(-4, 3), method="bounded").x))  # pyright: ignore


def _require_enough(names: Sequence[str], prompts: Sequence[Units], background: Units) -> None:
    if not names:
        raise RegistryError(
            "there is no expert to route to: at least one must be in use; train one, or activate "
            "one with jobs/registry.py"
        )
    for name, one in zip(names, prompts, strict=True):
        if len(one) < MIN_PROMPTS:
            raise RegistryError(
                f"expert {name} has {len(one)} prompts to be known by: {MIN_PROMPTS} are the "
                "least; make it from more rows"
            )
    if len(background) < MIN_BACKGROUND:
        raise RegistryError(
            f"the background holds {len(background)} prompts that no expert claims: "
            f"{MIN_BACKGROUND} are the least; give other or more conversations"
        )
