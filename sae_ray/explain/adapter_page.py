"""The page of an adapter: what its training changed, how sure that is, and in words."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from markupsafe import Markup

from sae_ray.experts.card import ExpertCard
from sae_ray.explain.agreement import Agreement
from sae_ray.explain.attribution import MAX_GAP, Attribution
from sae_ray.explain.drift import TRUE_FROM, Drift
from sae_ray.explain.filled import fill
from sae_ray.explain.verification import Checked, Curve, Verification

WIDTH, HEIGHT = 640.0, 160.0
_IN_WORDS = 4
_NUM_DRIFTED = 10
_CHECKS = {"checked", "is_verified"}
_MIN_DENSITY = 1e-4


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A latent that was checked, with what it is called and whether that is still true."""

    point: str
    latent: int
    label: str
    share: float
    """Of the whole effect, what it does alone; on the rows that check."""
    checked: Checked
    is_beyond_chance: bool
    drift: float | None
    """Correlation of its activations before and after; None where it is silent."""
    is_verified: bool

    @classmethod
    def of(
        cls,
        checked: Checked,
        place: tuple[str, int],
        found: Attribution,
        verification: Verification,
        labels: Mapping[str, Mapping[int, str]],
        drifts: Mapping[str, Drift],
    ) -> "Ranked":
        """Join what is known of a latent."""
        point, latent = place
        correlation = float(drifts[point].correlation[latent])
        return cls(
            point=point,
            latent=latent,
            label=labels.get(point, {}).get(latent, "unlabelled"),
            share=checked.added_in.mean / (verification.effect.mean or 1e-30),
            checked=checked,
            is_beyond_chance=bool(found.beyond_chance[checked.number]),
            drift=None if np.isnan(correlation) else correlation,
            is_verified=checked in verification.verified,
        )

    @property
    def name(self) -> str:
        """Return what it is called in words."""
        return f"latent {self.latent}" if self.label == "unlabelled" else f"“{self.label}”"


@dataclasses.dataclass(frozen=True)
class Pushed:
    """Rows that were trained on and asked for a latent."""

    point: str
    latent: int
    label: str
    share: float
    """Of the rows looked at, those that pushed it the way it went."""
    rows: list[tuple[str, float, str]]
    """Id, nats a unit of the edit, and what the row says."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """A held-out row: its own reply shaded, and the likeliest answers before and after."""

    prompt: str
    gains: Markup
    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class Line:
    """One order's curve as a picture."""

    order: str
    kept: str
    removed: str
    num_enough: int | None
    num_latents: int


@dataclasses.dataclass(frozen=True)
class AdapterPage:
    """All that the page says."""

    card: ExpertCard
    attribution: Attribution | None
    """None of an adapter that changes weights."""
    places: Sequence[tuple[str, int]]
    """Hook point and number in the SAE of each latent that was scored."""
    verification: Verification | None
    ranked: Sequence[Ranked]
    pushed: Sequence[Pushed]
    drifts: Mapping[str, Drift]
    labels: Mapping[str, Mapping[int, str]]
    answered: Sequence[Answered]
    num_ranking: int
    num_checking: int
    agreements: Sequence[Agreement] = ()
    """Of every pair, where experts of other seeds are named."""

    @property
    def verified(self) -> list[Ranked]:
        """Return the latents whose part in the change is borne out."""
        return [one for one in self.ranked if one.is_verified]

    @property
    def summary(self) -> str:
        """Say in words what changed: of latents that were verified, and of no others."""
        if self.attribution is None or self.verification is None:
            return (
                f"This adapter ({self.card.adapter}) changes weights, not latents: what the "
                "latents do before and after is told below, and none of them is said to be the "
                "cause."
            )
        effect = self.verification.effect
        what = "margin of the chosen reply" if self.card.objective == "dpo" else "held-out replies"
        how = f"{effect.mean:+.2f} nats a row [{effect.low:+.2f}, {effect.high:+.2f}]"
        if effect.low <= 0 <= effect.high:
            return f"On {what} the adapter makes {how}: no change beyond its interval to explain."
        if not self.verified:
            return (
                f"On {what} the adapter makes {how}. No single latent is verified to be behind "
                "it: leaving out or adding in any of the first ones alone does not bear its score "
                "out."
            )
        first = self.verified[:_IN_WORDS]
        told = ", ".join(f"{one.name} ({one.share:.0%})" for one in first)
        num, share = len(self.verified), self.verification.kept_by_verified
        return (
            f"On {what} the adapter makes {how}. {num} latent{'s' * (num > 1)} "
            f"{'are' if num > 1 else 'is'} verified to be behind it, alone with {share:.0%} of the "
            f"change: {told}{', and others' * (num > len(first))}."
        )

    @property
    def warnings(self) -> list[str]:
        """Say what to know before trusting it."""
        found = []
        if self.attribution and self.attribution.gap > MAX_GAP:
            found.append(
                f"scores add up to the change but for {self.attribution.gap:.0%} of it, at "
                f"{self.attribution.num_points} points of the path (at most {MAX_GAP:.0%} are "
                "wanted): latents switch on and off along it"
            )
        doubtful = [one for one in self.verified if one.drift is not None and one.drift < TRUE_FROM]
        found += [
            f"{one.name} rises and falls otherwise than before (correlation {one.drift:.2f}): its "
            "label, which was found on the base, may be true no more"
            for one in doubtful
        ]
        return found

    @property
    def curves(self) -> list[Line]:
        """Return the curves of all orders."""
        found = self.verification.curves if self.verification else []
        return [
            Line(
                one.order,
                _points(one, one.kept),
                _points(one, one.removed),
                one.num_enough,
                one.counts[-1],
            )
            for one in found
        ]

    def drifted(self, point: str) -> list[tuple[int, str, float, float, float]]:
        """Return the latents whose means moved most: number, label, density, means."""
        one = self.drifts[point]
        moved = np.abs(one.mean_after - one.mean) * _heard(one)
        order = np.argsort(-moved, kind="stable")[:_NUM_DRIFTED]
        names = self.labels.get(point, {})
        return [
            (
                int(i),
                names.get(int(i), "unlabelled"),
                float(one.density[i]),
                float(one.mean[i]),
                float(one.mean_after[i]),
            )
            for i in order
        ]

    def share_true(self, point: str) -> float:
        """Return the share of latents, of those that are on, whose labels go on being true."""
        one = self.drifts[point]
        heard = _heard(one)
        return float((one.correlation[heard] >= TRUE_FROM).mean()) if heard.any() else 1.0

    def rows(self) -> list[dict[str, Any]]:
        """Return a row a latent, with all that is known of it."""
        scores = self._scores()
        checked = {self.places[one.number]: one for one in self._checked()}
        found = []
        for point, one in self.drifts.items():
            names = self.labels.get(point, {})
            for latent in range(len(one.density)):
                mine = checked.get((point, latent))
                found.append(
                    {
                        "hook_point": point,
                        "latent": latent,
                        "label": names.get(latent, "unlabelled"),
                        "score_nats": scores.get((point, latent)),
                        "left_out_nats": mine.left_out.mean if mine else None,
                        "added_in_nats": mine.added_in.mean if mine else None,
                        "verified": mine.is_verified if mine else None,
                        "density": float(one.density[latent]),
                        "density_after": float(one.density_after[latent]),
                        "mean": float(one.mean[latent]),
                        "mean_after": float(one.mean_after[latent]),
                        "correlation": float(one.correlation[latent]),
                        "kept": float(one.kept[latent]),
                    }
                )
        return found

    def _scores(self) -> dict[tuple[str, int], float]:
        if self.attribution is None:
            return {}
        each = self.attribution.scores / self.attribution.num_units
        return dict(zip(self.places, each.tolist(), strict=True))

    def _checked(self) -> list[Checked]:
        one = self.verification
        return [*one.top, *one.drawn] if one else []

    def to_json(self) -> dict[str, Any]:
        """Return the facts of the page in plain values."""
        found = self.attribution
        return {
            "expert": {"name": self.card.name, "id": self.card.id, "adapter": self.card.adapter},
            "summary": self.summary,
            "warnings": self.warnings,
            "num_ranking": self.num_ranking,
            "num_checking": self.num_checking,
            "attribution": found
            and {
                "effect_nats": found.effect,
                "gap": found.gap,
                "num_points": found.num_points,
                "num_beyond_chance": int(found.beyond_chance.sum()),
            },
            "verification": self.verification and self.verification.to_json(),
            "places": [
                {"number": one.number, "hook_point": point, "latent": latent}
                for one in self._checked()
                for point, latent in [self.places[one.number]]
            ],
            "latents": [
                {
                    **{k: v for k, v in dataclasses.asdict(one).items() if k not in _CHECKS},
                    "verified": one.is_verified,
                }
                for one in self.ranked
            ],
            "pushed_by": [dataclasses.asdict(one) for one in self.pushed],
            "agreements": [dataclasses.asdict(one) for one in self.agreements],
            "drift": {
                point: {
                    "num_tokens": one.num_tokens,
                    "share_true": self.share_true(point),
                    "most": self.drifted(point),
                }
                for point, one in self.drifts.items()
            },
            "answers": [
                {"prompt": one.prompt, "before": one.before, "after": one.after}
                for one in self.answered
            ],
        }


def _heard(one: Drift) -> Bool[np.ndarray, " d_sae"]:
    """Say which latents are on at more than a stray token, before or after."""
    return (one.density > _MIN_DENSITY) | (one.density_after > _MIN_DENSITY)


def render(page: AdapterPage) -> str:
    """Return the page as one file that needs no network."""
    values = {"page": page, "card": page.card, "width": WIDTH, "height": HEIGHT}
    return fill("adapter.html.jinja", values, style="report.css", script=None)


def _points(curve: Curve, shares: Sequence[float]) -> str:
    """Draw shares of the effect, none to all, over the logarithm of how many latents."""
    x = np.log2(curve.counts)
    across = x / max(float(x[-1]), 1e-9) * WIDTH
    up = HEIGHT * (1 - np.clip(shares, -0.1, 1.1))
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up, strict=True))
