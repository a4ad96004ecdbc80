"""Evidence: what each channel says of a task, as weighted rows, and how far the channels agree.

Once some rows are given or kept they outweigh what the words found, and the rows that the words
found count by how much they are like them; dropped rows count against.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float32, Float64, Int64

from sae_ray.curate.block import IndexBlock
from sae_ray.curate.concepts import num_clusters
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.seeds import spellings, strongest, task_terms
from sae_ray.curate.space import HiddenSpace, unit

NUM_JUDGED = 100
"""Rows found first by the words that the model is asked about; of a small pool, a twentieth."""
MIN_LEFT = 0.05
"""Share of the found rows' weight that must be left when rows like dropped ones are taken off."""
NEAR = 0.95
"""Quantile of the pool above which a row is near a direction."""


@dataclasses.dataclass(frozen=True)
class ProfileSettings:
    """How a description becomes a profile; the defaults were fixed on tuning wordings."""

    num_seeds: int = 100
    """Rows that the description's words may find; a sample stands for those after them."""
    seed_sharpness: float = 3.0
    """Exponent of a seed's lexical score in its weight."""
    description_weight: float = 0.1
    """Weight of the description's own state beside the seeds' centroid; 0 never loads the model."""
    label_weight: float = 0.5
    """Weight of a full match of description and label, in units of the top latent's weight."""
    pseudo_weight: float = 0.5
    """What a pseudo-query counts for beside a kept row."""
    drop_weight: float = 0.5
    """How hard the direction turns away from dropped rows."""
    max_latents: int = 128
    """Latents in a profile."""
    min_weight: float = 0.25
    """Weight, of the heaviest latent's, below which a latent is noise."""
    max_template_share: float = 0.5
    """A latent that fires on template tokens more than this is about the format, not the task."""
    min_agreement: float = 0.35
    """Agreement of the channels below which the profile abstains."""


@dataclasses.dataclass(frozen=True)
class Channel:
    """Rows of one channel with their mass: how many rows' worth of evidence they are."""

    name: str
    block: IndexBlock
    in_pool: bool
    weights: Float64[np.ndarray, " n"]
    """Sum to 1."""
    mass: float


@functools.lru_cache(maxsize=1)  # the seeds ask, and the score of the same sentence asks again
def lexical_evidence(index: FeatureIndex, text: str) -> Float32[np.ndarray, " num_rows"]:
    """Return BM25 of a text's words where requests are said, times the root of the share held.

    s(d) = sum_t BM25(t, d) * sqrt(|{t in d}| / |{t}|), where a word is the best of its spellings.
    Rows that hold *many* of the words come first: one rare word alone finds a row about anything.
    """
    terms = task_terms(text)
    total = np.zeros(index.num_rows, dtype=np.float32)
    held = np.zeros(index.num_rows, dtype=np.float32)
    for term in terms:
        found = np.max([index.request_scores({one: 1.0}) for one in spellings(term)], axis=0)
        total += found
        held += found > 0
    total *= np.sqrt(held / max(len(terms), 1))
    total.flags.writeable = False
    return total


def found_rows(
    index: FeatureIndex, task: str, settings: ProfileSettings
) -> tuple[IndexBlock, Float64[np.ndarray, " n"], int]:
    """Return the seeds that the words find with their weights, and how many first are judged."""
    evidence, sample = lexical_evidence(index, task), index.background.rows
    seeds = strongest(evidence, settings.num_seeds, settings.seed_sharpness, sample)
    judged = min(NUM_JUDGED, settings.num_seeds, max(1, index.num_rows // 20), len(seeds.rows))
    return _take(index, seeds.rows), seeds.weights, judged


def given_channels(
    index: FeatureIndex,
    kept: list[int],
    examples: IndexBlock | None,
    pseudo_queries: IndexBlock | None,
    settings: ProfileSettings,
) -> list[Channel]:
    """Return what a person or a model gave, a channel each."""

    def channel(name: str, block: IndexBlock | None, in_pool: bool, each: float) -> list[Channel]:
        if block is None or not len(block):
            return []
        return [
            Channel(name, block, in_pool, np.full(len(block), 1 / len(block)), each * len(block))
        ]

    return [
        *channel("keep", index.take(kept, means_only=True) if kept else None, True, 1.0),
        *channel("example", examples, False, 1.0),
        *channel("pseudo", pseudo_queries, False, settings.pseudo_weight),
    ]


def lexical_channel(
    block: IndexBlock,
    weights: Float64[np.ndarray, " n"],
    space: HiddenSpace,
    drops: IndexBlock | None,
    given: list[Channel],
    trusted: float,
) -> Channel | None:
    """Weigh the rows that the words found by what a person said of rows like them.

    Returns None where all of them are like dropped rows: the words found nothing.
    """
    here = space.project(block)
    if drops is not None:
        weights = weights * (1 - np.clip(here @ space.project(drops).T, 0, 1).max(1)) ** 2
        if weights.sum() < MIN_LEFT:
            return None
    if given:
        known = np.concatenate([space.project(channel.block) for channel in given])
        liked = weights * np.clip(here @ known.T, 0, 1).max(1)
        weights = liked if liked.sum() > 0 else weights
    weights = weights / weights.sum()
    mass = float(1 / np.square(weights).sum()) / (1 + trusted) ** 1.5
    return Channel("lexical", block, True, weights, mass)


def _take(index: FeatureIndex, rows: Int64[np.ndarray, " n"]) -> IndexBlock:
    """Return rows, those of the background from where they are at hand."""
    background = index.background
    place = {int(row): i for i, row in enumerate(background.rows)}
    far = [row for row in rows.tolist() if row not in place]
    near = background.take([place[row] for row in rows.tolist() if row in place])
    joined = IndexBlock.concatenate([index.take(far, means_only=True), near]) if far else near
    where = {int(row): i for i, row in enumerate(joined.rows)}
    return joined.take([where[row] for row in rows.tolist()])


def direction_of(
    space: HiddenSpace,
    channels: list[Channel],
    own: IndexBlock | None,
    drops: IndexBlock | None,
    trusted: float,
    settings: ProfileSettings,
) -> Float32[np.ndarray, " r"]:
    """Return the direction in which a task lies from the pool's middle.

    d = M (unit(s - c) / (1 + trusted) ** 1.5 + unit(g - c) + own state - drop_weight unit(r - c)),
    with the centroids s of the rows that words found, g given and r dropped, the background's mean
    c, and the inverse M of its ridged covariance.
    """
    fade = (1 + trusted) ** -1.5

    def away(centroid: np.ndarray) -> np.ndarray:
        return unit(centroid - space.centre)

    total = np.zeros(space.basis.shape[1], dtype=np.float32)
    given = np.zeros_like(total)
    for channel in channels:
        centroid = channel.weights.astype(np.float32) @ space.project(channel.block)
        if channel.name == "lexical":
            total += fade * away(centroid)
        else:
            given += np.float32(channel.mass / trusted) * centroid
    if trusted:
        total += away(given)
    if own is not None:
        alone = 1.0 if not channels else settings.description_weight * fade
        total += np.float32(alone) * away(space.project(own)[0])
    if drops is not None:
        total -= np.float32(settings.drop_weight) * away(space.project(drops).mean(0))
    return unit(space.metric @ total)


def agreement_of(
    space: HiddenSpace,
    background: IndexBlock,
    channels: list[Channel],
    found: IndexBlock,
) -> float:
    """Return the share of rows that lie, says the model, where the others do: 0 to 1.

    Asked about are the rows that the words find first and those that were given. A row agrees when
    its cosine with the centroid of the *other* seeds is above that of 95 % of the pool: one row
    alone agrees with nothing, and random rows agree in 5 % of cases.
    """
    if not channels:
        return 0.0
    block = IndexBlock.concatenate([*(channel.block for channel in channels), found])
    weights = [*(channel.weights * channel.mass for channel in channels), np.zeros(len(found))]
    # A row that several channels bring is one row; one from elsewhere may have another one's id.
    keys = [f"{one} {n.tolist()}" for one, n in zip(block.ids, block.n_tokens, strict=True)]
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    w = np.bincount(which, np.concatenate(weights)).astype(np.float32)
    x = space.project(block)[first]
    by_words = np.repeat([c.name == "lexical" for c in channels], [len(c.block) for c in channels])
    asked = np.bincount(which, [*~by_words, *np.ones(len(found))]) > 0
    others = unit(w @ x - w[asked, None] * x[asked])
    levels = np.quantile(space.project(background) @ others.T, NEAR, axis=0)
    return float((np.einsum("nr,nr->n", x[asked], others) > levels).mean())


def doubts_of(
    task: str,
    space: HiddenSpace,
    channels: list[Channel],
    agreement: float,
    trusted: float,
    settings: ProfileSettings,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return reasons to abstain, and warnings."""
    ask = "keep a few right rows (--keep) or give some (--examples)"
    if not channels:
        none = f"no row of the pool holds a word of the task {task!r} that was not dropped; {ask}"
        return (none,), ()
    if agreement >= settings.min_agreement:
        return (), ()
    x = np.concatenate([space.project(channel.block) for channel in channels])
    mixed = (
        f"the words and the model disagree: of the rows that were found, {agreement:.0%} are alike "
        f"to the model ({settings.min_agreement:.0%} are asked for; kinds of seeds: "
        f"{num_clusters(x @ x.T)}); {ask}"
    )
    return ((), (mixed,)) if trusted >= 5 else ((mixed,), ())
