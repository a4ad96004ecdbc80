"""Profile: a task as weighted latents and a direction, with the evidence for each.

    description ─ lexical ───────┐
                ─ own state ─────┤
    labels ──────────────────────┼─► seeds ─► latents by log odds, grouped; a hidden direction
    pseudo-queries, given rows ──┤
    keep / drop ─────────────────┘

Once some rows are given or kept they outweigh what the words found; dropped rows count against.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32

from sae_ray.curate.block import IndexBlock
from sae_ray.curate.concepts import groups_of, log_odds, rows_on
from sae_ray.curate.evidence import (
    Channel,
    ProfileSettings,
    agreement_of,
    direction_of,
    doubts_of,
    found_rows,
    given_channels,
    lexical_channel,
)
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.seeds import query_terms
from sae_ray.errors import TaskError

MAX_TASK_CHARS = 1000
LISTED_SHARE = 1e-3
"""Share of all seeds' weight from which a seed is listed; a person's rows weigh far more."""
SCHEMA_VERSION = 2


@dataclasses.dataclass(frozen=True)
class ProfileLatent:
    """One latent of a profile."""

    latent: int
    weight: float
    """1 for the heaviest."""
    prototype: float
    """Mean over the seeds of its row mean."""
    group: int
    """Near-duplicates share a group, and count once."""
    label: str | None
    evidence: dict[str, float]
    """Channel -> z-score of the log odds (labels: share of the description's words matched)."""


@dataclasses.dataclass(frozen=True)
class Seed:
    """One row that the profile rests on."""

    id: str
    row: int | None
    """Row number in the pool; None for a row from elsewhere."""
    channel: str
    weight: float
    """Share of all seeds' weight; negative for a dropped row."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """A task, ready to score rows with."""

    task: str
    latents: tuple[ProfileLatent, ...]
    seeds: tuple[Seed, ...]
    direction: tuple[float, ...]
    """Unit vector in the `HiddenSpace` of the index's background."""
    keep: tuple[str, ...]
    drop: tuple[str, ...]
    agreement: float
    """Share of the rows found that lie, says the model, where the others do; 0.05 by chance."""
    abstained: bool
    why: tuple[str, ...]
    """Reasons to abstain."""
    warnings: tuple[str, ...]
    settings: ProfileSettings
    schema_version: int = SCHEMA_VERSION

    @property
    def num_given(self) -> int:
        """Rows given or kept by a person."""
        return sum(seed.channel in ("keep", "example") for seed in self.seeds)

    def to_json(self) -> str:
        """Return the profile as JSON; floats survive exactly."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Profile":
        """Read a profile back.

        Raises:
            TaskError: it is not a profile of this version.
        """
        raw = json.loads(text)
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise TaskError(
                f"the profile has schema_version {version!r}: this release reads {SCHEMA_VERSION}; "
                "make it again from its task"
            )
        tuples = {
            name: tuple(raw[name]) for name in ("direction", "keep", "drop", "why", "warnings")
        }
        return cls(
            **{
                **raw,
                **tuples,
                "latents": tuple(ProfileLatent(**one) for one in raw["latents"]),
                "seeds": tuple(Seed(**one) for one in raw["seeds"]),
                "settings": ProfileSettings(**raw["settings"]),
            }
        )


def build_profile(
    task: str,
    index: FeatureIndex,
    *,
    examples: IndexBlock | None = None,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    pseudo_queries: IndexBlock | None = None,
    labels: Mapping[int, str] | None = None,
    decoder: Float32[np.ndarray, "d_sae d_in"] | None = None,
    settings: ProfileSettings | None = None,
) -> Profile:
    """Turn a description, and what a person added to it, into a profile.

    Args:
        task: what a model should get good at, in a sentence.
        index: the pool's index.
        examples: rows given, scored by `index.scorer`.
        keep: ids of rows of the pool that are right.
        drop: ids of rows of the pool that are wrong.
        pseudo_queries: conversations that a model wrote from the description, scored.
        labels: what latents stand for.
        decoder: the SAE's decoder, where it is at hand: groups latents by direction too.
        settings: how; the defaults if not given.

    Raises:
        TaskError: the task is empty or too long, or an id is not in the pool.
    """
    settings = settings or ProfileSettings()
    task = _checked(task)
    both = sorted(set(keep) & set(drop))
    if both:
        raise TaskError(f"{both[0]!r} is in keep and in drop: a row is one or the other; choose")
    kept, dropped = _rows(index, keep, "keep"), _rows(index, drop, "drop")
    space = index.space
    drops = index.take(dropped, means_only=True) if dropped else None
    channels = given_channels(index, kept, examples, pseudo_queries, settings)
    trusted = sum((channel.mass for channel in channels), start=0.0)
    found, weights, judged = found_rows(index, task, settings)
    if len(found):
        words = lexical_channel(found, weights, space, drops, channels, trusted)
        channels = [words, *channels] if words else channels
    own = index.describe(task) if settings.description_weight > 0 else None
    direction = direction_of(space, channels, own, drops, trusted, settings)
    agreement = agreement_of(space, index.background, channels, found.take(range(judged)))
    why, warnings = doubts_of(task, space, channels, agreement, trusted, settings)
    return Profile(
        task=task,
        latents=_latents(index, task, channels, own, drops, labels, decoder, settings),
        seeds=_seed_list(channels, drops),
        direction=tuple(float(x) for x in direction),
        keep=tuple(keep),
        drop=tuple(drop),
        agreement=agreement,
        abstained=bool(why),
        why=why,
        warnings=warnings,
        settings=settings,
    )


def _checked(task: str) -> str:
    task = " ".join(task.split())
    if not task:
        raise TaskError(
            "the task is empty: say in a sentence what a model should get good at, for example "
            '"Solve grade-school maths word problems"'
        )
    if len(task) > MAX_TASK_CHARS:
        raise TaskError(
            f"the task has {len(task)} characters: at most {MAX_TASK_CHARS} are allowed; say it in "
            "a sentence or two, and give more through examples"
        )
    return task


def _rows(index: FeatureIndex, ids: Sequence[str], name: str) -> list[int]:
    if not ids:
        return []
    wanted = set(ids)
    places = {one: row for row, one in enumerate(index.ids) if one in wanted}
    for one in ids:
        if one not in places:
            near = difflib.get_close_matches(one, index.ids, n=3, cutoff=0.0)
            raise TaskError(
                f"{name}={one!r} is no row of the pool: the nearest ids are "
                f"{', '.join(repr(other) for other in near)}; copy ids from the report"
            )
    return [places[one] for one in ids]


def _latents(
    index: FeatureIndex,
    task: str,
    channels: list[Channel],
    own: IndexBlock | None,
    drops: IndexBlock | None,
    labels: Mapping[int, str] | None,
    decoder: Float32[np.ndarray, "d_sae d_in"] | None,
    settings: ProfileSettings,
) -> tuple[ProfileLatent, ...]:
    thresholds = index.stats.on_threshold
    background = rows_on(index.background, thresholds)
    reference = np.asarray(background.mean(axis=0), dtype=np.float64).ravel()
    if drops is not None:
        wrong = np.asarray(rows_on(drops, thresholds).mean(axis=0), dtype=np.float64).ravel()
        reference = (reference + wrong) / 2
    sources = channels or ([Channel("description", own, False, np.ones(1), 1.0)] if own else [])
    if not sources:
        return ()
    blocks = IndexBlock.concatenate([source.block for source in sources])
    weights = np.concatenate([source.weights * source.mass for source in sources])
    mass = float(weights.sum())
    z = log_odds(rows_on(blocks, thresholds), weights, mass, reference)
    matches = _label_matches(task, labels, len(z))
    z = np.where(index.stats.template_share > settings.max_template_share, 0.0, np.maximum(z, 0))
    score = z + settings.label_weight * z.max(initial=0.0) * matches
    chosen = np.argsort(-score, kind="stable")[: settings.max_latents].astype(np.int64)
    chosen = chosen[score[chosen] > settings.min_weight * score.max(initial=0.0)]
    group = groups_of(chosen, background, decoder)
    prototype = np.asarray(blocks.pooled("mean").T @ (weights / mass)).ravel()
    shown = [*channels, *([Channel("description", own, False, np.ones(1), 1.0)] if own else [])]
    by_channel = {
        one.name: log_odds(
            rows_on(one.block, thresholds), one.weights, max(one.mass, 1.0), reference
        )
        for one in shown
    }
    by_channel |= {"labels": matches} if labels else {}
    return tuple(
        ProfileLatent(
            latent=int(latent),
            weight=float(score[latent] / score[chosen[0]]),
            prototype=float(prototype[latent]),
            group=int(group[i]),
            label=(labels or {}).get(int(latent)),
            evidence={name: float(values[latent]) for name, values in by_channel.items()},
        )
        for i, latent in enumerate(chosen)
    )


def _label_matches(task: str, labels: Mapping[int, str] | None, d_sae: int) -> np.ndarray:
    """Return the share of the description's words that each latent's label holds."""
    matches = np.zeros(d_sae)
    words = {term[:6] for term in query_terms(task)}
    for latent, label in (labels or {}).items():
        if 0 <= latent < d_sae:
            matches[latent] = len(words & {t[:6] for t in query_terms(label)}) / max(len(words), 1)
    return matches


def _seed_list(channels: list[Channel], drops: IndexBlock | None) -> tuple[Seed, ...]:
    total = sum((channel.mass for channel in channels), start=0.0)
    seeds = [
        Seed(
            one,
            int(row) if channel.in_pool else None,
            channel.name,
            float(w * channel.mass / total),
        )
        for channel in channels
        for one, row, w in zip(channel.block.ids, channel.block.rows, channel.weights, strict=True)
        if not channel.in_pool or channel.name == "keep" or w * channel.mass / total >= LISTED_SHARE
    ]
    if drops is not None:
        each = -1 / len(drops)
        seeds += [
            Seed(one, int(row), "drop", each)
            for one, row in zip(drops.ids, drops.rows, strict=True)
        ]
    return tuple(seeds)
