"""Study: trials beside their base on rows that chose nothing, and finalists over their seeds."""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.stats
from jaxtyping import Float, Int64

from sae_ray.adapters.recipe import Objective
from sae_ray.adapters.trial import Judged, TrialRecord
from sae_ray.errors import TrainingError
from sae_ray.evaluate.expert import compare
from sae_ray.experts.card import Measure

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Finalist:
    """Settings trained to the end with several seeds."""

    seeds: list[TrialRecord]
    """Runs that came to their end."""
    num_failed: int
    """Runs that did not: where there are any, it comes after all that have none."""
    chooses: float
    """Mean loss over seeds of the rows that choose."""
    gain: Measure
    """Over the base: intervals over rows and seeds."""
    over_default: Measure | None
    """Over the default LoRA; None for itself, or where that has failed."""

    @property
    def trial(self) -> TrialRecord:
        """Return the first of its runs."""
        return self.seeds[0]


def finished(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return those that went to their end and may be chosen."""
    return [one for one in records if one.status == "finished" and one.best is not None]


def measured(record: TrialRecord, objective: Objective) -> list[Measure]:
    """Compare a trial at its best with its base; nothing where it has no best."""
    if record.base is None or record.best is None or record.chosen is None:
        return []
    return compare(record.base.look(0), record.best.look(record.chosen.step), objective)


def ranked(records: Sequence[TrialRecord], num: int) -> list[TrialRecord]:
    """Return the best by the rows that choose, the best first; ended early or not."""
    found = [one for one in records if one.status != "failed" and one.loss is not None]
    return sorted(found, key=lambda one: (one.loss, one.number))[:num]


def finalists(
    groups: Sequence[list[TrialRecord]], default: list[TrialRecord], objective: Objective
) -> list[Finalist]:
    """Compare settings over their seeds, the best first by the rows that choose.

    Args:
        groups: the runs of each of the best settings, one a seed.
        default: those of the default LoRA, which is compared like the others.
        objective: what was learnt.

    Raises:
        TrainingError: no run came to its end.
    """
    reference = _best_of(finished(default))
    found = []
    for runs in (default, *groups):
        seeds = finished(runs)
        if not seeds:
            continue
        bases = [one.base for one in seeds[:1] if one.base is not None]
        after = _best_of(seeds)
        pairs = runs is not default and bool(reference)
        found.append(
            Finalist(
                seeds=seeds,
                num_failed=len(runs) - len(seeds),
                chooses=float(np.mean([one.loss for one in seeds if one.loss is not None])),
                gain=over_seeds(bases, after, objective),
                over_default=over_seeds(reference, after, objective) if pairs else None,
            )
        )
    if not found:
        reasons = sorted({one.reason for runs in (default, *groups) for one in runs if one.reason})
        raise TrainingError(
            f"no finalist came to its end ({'; '.join(reasons[:3])}): give another space"
        )
    return sorted(found, key=lambda one: (one.num_failed, one.chooses, one.trial.number))


def _best_of(records: Sequence[TrialRecord]) -> list[Judged]:
    return [one.best for one in records if one.best is not None]


def over_seeds(before: list[Judged], after: list[Judged], objective: Objective) -> Measure:
    """Return how much better one is than another, each in several runs on the same rows.

    Intervals are 95 %, of Student's t: the variance over rows (paired, by bootstrap) and those over
    the runs of either side are added, with Welch and Satterthwaite's degrees of freedom; a
    bootstrap of three runs would be too sure. A single run says nothing of seeds, and adds none.
    """
    sides = [_tables(runs, objective) for runs in (before, after)]
    num_rows = sides[0][0].shape[1]
    draws = np.random.default_rng(0).integers(num_rows, size=(_RESAMPLES, num_rows))
    everything = np.arange(num_rows)[None]
    means, drawn, parts = [], [], []
    for values, weights in sides:
        each = _of_rows(values, weights, everything)[:, 0]
        means.append(float(each.mean()))
        drawn.append(_of_rows(values, weights, draws).mean(0))
        if len(each) > 1:
            parts.append((float(each.var(ddof=1)) / len(each), len(each) - 1))
    parts.append((float((drawn[1] - drawn[0]).var(ddof=1)), num_rows - 1))
    variance = sum(one for one, _ in parts)
    below = sum(one**2 / df for one, df in parts if df > 0)
    reach = 0.0
    if variance > 0:
        reach = float(scipy.stats.t.ppf(0.975, variance**2 / below)) * variance**0.5
    sign = 1.0 if objective == "dpo" else -1.0
    gain = sign * (means[1] - means[0])
    return Measure(
        name="held_out_accuracy" if objective == "dpo" else "held_out_loss",
        base=means[0],
        expert=means[1],
        gain=gain,
        low=gain - reach,
        high=gain + reach,
        num_rows=num_rows,
    )


def _tables(
    runs: list[Judged], objective: Objective
) -> tuple[Float[np.ndarray, "runs rows"], Float[np.ndarray, "runs rows"]]:
    """Return the value of each row and its weight: nats and tokens, or right pairs and ones."""
    nats = np.array([[one[0] for one in run.held_out] for run in runs])
    if objective == "dpo":
        right = (nats[:, 1::2] > nats[:, ::2]).astype(float)
        return right, np.ones_like(right)
    return nats, np.array([[float(one[1]) for one in run.held_out] for run in runs])


def _of_rows(
    values: Float[np.ndarray, "runs rows"],
    weights: Float[np.ndarray, "runs rows"],
    draws: Int64[np.ndarray, "draws m"],
) -> Float[np.ndarray, "runs draws"]:
    """Return each run's weighted mean over the rows drawn."""
    return values[:, draws].sum(-1) / np.maximum(1, weights[:, draws].sum(-1))


_SCHEMA = pa.schema(
    [
        ("number", pa.int64()), ("role", pa.string()), ("status", pa.string()),
        ("point", pa.string()), ("seed", pa.int64()), ("layer", pa.string()),
        ("component", pa.string()), ("loss", pa.float64()), ("best_step", pa.int64()),
        ("steps", pa.int64()), ("total_steps", pa.int64()), ("gain", pa.float64()),
        ("gain_low", pa.float64()), ("gain_high", pa.float64()), ("general_gain", pa.float64()),
        ("divergence", pa.float64()), ("num_parameters", pa.int64()), ("seconds", pa.float64()),
        ("reason", pa.string()),
    ]
)  # fmt: skip


def table_of(records: Sequence[TrialRecord], gains: Mapping[int, list[Measure]]) -> bytes:
    """Return a table with a row a trial, as Parquet."""
    rows = []
    for one in records:
        named = {measure.name: measure for measure in gains[one.number]}
        first = gains[one.number][0] if gains[one.number] else None
        general = named.get("general_loss")
        rows.append(
            {
                **one.model_dump(include=set(_SCHEMA.names) - {"point"}),
                "point": json.dumps(one.point, sort_keys=True),
                "loss": one.loss,
                "best_step": one.chosen and one.chosen.step,
                "steps": one.glances[-1].step if one.glances else 0,
                "total_steps": one.glances[-1].total if one.glances else None,
                "gain": first and first.gain,
                "gain_low": first and first.low,
                "gain_high": first and first.high,
                "general_gain": general and general.gain,
                "divergence": one.chosen and one.chosen.divergence,
                "seconds": one.seconds,
            }
        )
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), sink, compression="zstd")
    return sink.getvalue()
