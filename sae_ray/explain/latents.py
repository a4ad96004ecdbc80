"""The page of a SAE's latents: what each stands for, where it is on, and what it writes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from markupsafe import Markup
from pydantic import JsonValue

from sae_ray.explain.filled import fill
from sae_ray.explain.shading import ShadedText, to_html
from sae_ray.sae.contexts import Context, LatentContexts
from sae_ray.sae.interpret import LatentFacts, TokenTexts
from sae_ray.sae.judge import Interval, Judgement
from sae_ray.sae.labels import Label

NUM_SHOWN = 60
"""Latents with a card: half those best understood, half drawn at random of the others."""
_STRONGEST, _SPREAD, _HARD = 3, 4, 1


@dataclasses.dataclass(frozen=True)
class Page:
    """All that the page says."""

    facts: Sequence[LatentFacts]
    labels: Sequence[Label]
    judgements: Mapping[int, Judgement]
    contexts: Callable[[int], LatentContexts]
    texts: TokenTexts
    counts: Mapping[str, JsonValue]

    @property
    def shown(self) -> list[int]:
        """Return the latents with a card: judged ones and those told apart best, then others."""
        alive = [one.latent for one in self.facts if one.density > 0]
        best = sorted(alive, key=self._rank)[: NUM_SHOWN // 2]
        rest = np.random.default_rng(0).permutation([i for i in alive if i not in set(best)])
        return best + sorted(rest[: NUM_SHOWN - len(best)].tolist())

    def html(self, latent: int) -> list[tuple[str, Markup]]:
        """Return some contexts of a latent, each with what it is an example of."""
        found, scale = self.contexts(latent), max(self.facts[latent].max_activation, 1e-6)
        middle = [part[len(part) // 2] for part in found.quantiles(_SPREAD) if part]
        shown = [
            *(("strongest", one) for one in found.strongest[:_STRONGEST]),
            *(("weaker", one) for one in middle[::-1]),
            *(("off, though a like latent is on", one) for one in found.hard[:_HARD]),
        ]
        return [(what, self._shaded(latent, one, scale)) for what, one in shown]

    def _shaded(self, latent: int, context: Context, scale: float) -> Markup:
        pieces = [
            ShadedText(self.texts[id].replace("\n", "⏎"), latent, value, value / scale, i == peak)
            if value > 0
            else ShadedText(self.texts[id].replace("\n", "⏎"))
            for peak in (context.peak if context.strength > 0 else -1,)
            for i, (id, value) in enumerate(
                zip(context.ids.tolist(), context.values.tolist(), strict=True)
            )
        ]
        return to_html(pieces, lambda _: self.labels[latent].label, lambda _: "l0")

    def _rank(self, latent: int) -> tuple[bool, float, int]:
        judged, label = self.judgements.get(latent), self.labels[latent]
        low = judged.detection.low if judged and judged.detection else 0.0
        return label.kind == "unlabelled", -(low or (label.auc or 0.0) / 2), latent


def render(page: Page, title: str) -> str:
    """Return the page as one file that needs no network."""
    values = {"page": page, "title": title, "counts": page.counts, "interval": _interval}
    return fill("latents.html.jinja", values, style="report.css", script=None)


def _interval(found: Interval | None) -> str:
    if found is None or found.share is None:
        return "–"
    return f"{found.share:.2f} [{found.low:.2f}, {found.high:.2f}] of {found.num}"
