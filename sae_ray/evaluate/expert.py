"""How an expert compares with its base: the same rows before and after, with paired intervals."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int64

from sae_ray.adapters.finetune import Look
from sae_ray.adapters.recipe import Objective
from sae_ray.adapters.replies import RowLoss
from sae_ray.experts.card import Measure

_RESAMPLES = 2000
_INTERVAL = (2.5, 97.5)

Statistic = Callable[[Int64[np.ndarray, "draws rows"]], Float[np.ndarray, " draws"]]
"""Of the rows drawn, as numbers: one figure a draw."""


def compare(before: Look, after: Look, objective: Objective) -> list[Measure]:
    """Return what the base and the expert make of rows that were not trained on.
    The first measure decides whether the expert is better: nats a token of held-out replies, or
    the share of held-out pairs whose chosen reply is found the likelier. Intervals are 95 %, by
    paired bootstrap over rows (Efron & Tibshirani 1993, ch. 13: percentile).
    """
    measures = []
    if objective == "dpo":
        base, expert = np.array(before.margins()), np.array(after.margins())
        ranked = [(margins > 0).astype(float) for margins in (base, expert)]
        measures.append(_measured("held_out_accuracy", *map(_mean_of, ranked), len(base)))  # pyright: ignore[reportCallIssue]
        both = _mean_of(base), _mean_of(expert)
        measures.append(_measured("held_out_margin_nats", *both, len(base)))
    else:
        both = _nats_of(before.held_out), _nats_of(after.held_out)
        measures.append(_measured("held_out_loss", *both, len(before.held_out), less=True))
    if before.general:
        both = _nats_of(before.general), _nats_of(after.general)
        measures.append(_measured("general_loss", *both, len(before.general), less=True))
    return measures


def _measured(
    name: str, base: Statistic, expert: Statistic, num_rows: int, *, less: bool = False
) -> Measure:
    """Take a figure of both, and the interval of what is gained; `less` where less is better."""
    sign = -1.0 if less else 1.0
    everything = np.arange(num_rows)[None]
    found = [float(one(everything)[0]) for one in (base, expert)]
    draws = np.random.default_rng(0).integers(num_rows, size=(_RESAMPLES, num_rows))
    low, high = np.percentile(sign * (expert(draws) - base(draws)), _INTERVAL)
    gain = sign * (found[1] - found[0])
    return Measure(
        name=name,
        base=found[0],
        expert=found[1],
        gain=gain,
        low=float(low),
        high=float(high),
        num_rows=num_rows,
    )


def _mean_of(values: Float[np.ndarray, " rows"]) -> Statistic:
    return lambda draws: values[draws].mean(1)


def _nats_of(rows: list[RowLoss]) -> Statistic:
    nats = np.array([row.nats for row in rows])
    tokens = np.array([row.num_tokens for row in rows], dtype=float)
    return lambda draws: nats[draws].sum(1) / np.maximum(1, tokens[draws].sum(1))
