"""The page of an expert: what it was trained on, how it went, and what it gained and lost."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sae_ray.experts.card import ExpertCard
from sae_ray.explain.filled import fill

_WIDTH, _HEIGHT = 640.0, 160.0
NAMES = {
    "held_out_loss": "loss on held-out rows, nats a token",
    "held_out_accuracy": "held-out pairs ranked right",
    "held_out_margin_nats": "margin of the chosen reply, nats",
    "general_loss": "loss on general text, nats a token",
}
"""What measures are called on the page."""
_CURVES = {
    "loss": "training loss",
    "held_out_loss": "held-out loss",
    "general_loss": "loss on general text",
    "grad_norm": "gradient norm",
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One figure over the steps, as points of a picture."""

    title: str
    points: str
    low: float
    high: float
    last_step: int


@dataclasses.dataclass(frozen=True)
class Page:
    """All that the page says."""

    card: ExpertCard
    curves: Sequence[Mapping[str, float]]
    examples: Sequence[str]
    """Some rows as the model reads them."""
    num_train: int
    num_held_out: int
    num_tokens: int
    """Learnt from in a pass over the rows."""
    rejected: Mapping[str, int]
    best_step: int
    stopped_early: bool
    settings: Mapping[str, Any]

    @property
    def drawn(self) -> list[Curve]:
        """Return the curves that have two points or more."""
        found = [_curve(title, name, self.curves) for name, title in _CURVES.items()]
        return [one for one in found if one is not None]

    @property
    def verdict(self) -> str:
        """Say in a sentence whether it is better than its base."""
        if self.card.beats_base:
            return "It beats its base on rows that it never saw, beyond the interval."
        return "It does not beat its base beyond the interval: it stays a candidate."

    @property
    def forgets(self) -> str | None:
        """Say whether general text has become less likely, beyond the interval."""
        general = next((m for m in self.card.measures if m.name == "general_loss"), None)
        if general is None or general.high >= 0:
            return None
        return (
            f"It has lost {-general.gain:.3f} nats a token on general text "
            f"[{-general.high:.3f}, {-general.low:.3f}]: lower learning_rate, fewer steps, or "
            "retain_weight with conversations to retain."
        )


def render(page: Page) -> str:
    """Return the page as one file that needs no network."""
    values = {"page": page, "card": page.card, "names": NAMES}
    return fill("finetuning.html.jinja", values, style="report.css", script=None)


def _curve(title: str, name: str, rows: Sequence[Mapping[str, float]]) -> Curve | None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if len(points) < 2:
        return None
    steps, values = zip(*points, strict=True)
    low, high, last = min(values), max(values), max(steps)
    span = (high - low) or 1.0
    drawn = " ".join(
        f"{_WIDTH * step / (last or 1):.1f},{_HEIGHT * (1 - (value - low) / span):.1f}"
        for step, value in points
    )
    return Curve(title, drawn, low, high, int(last))
