"""Filling the curation page: from an index and an outcome to what the report shows."""

import dataclasses
import datetime
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sae_ray.curate.block import IndexBlock
from sae_ray.curate.concepts import rows_on
from sae_ray.curate.duplicates import num_copies
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.output import SelectedRow, explain_rows
from sae_ray.curate.profile import ProfileLatent
from sae_ray.curate.refine import NUM_TOP, rows_to_show
from sae_ray.curate.request import Request
from sae_ray.curate.score import contributions
from sae_ray.explain.report import (
    LATENTS_IN_FULL,
    ROWS_IN_FULL,
    Candidate,
    CurationReport,
    LatentCard,
    NearCopies,
    Notice,
    Reason,
    Refine,
    ShownRow,
    histogram,
    shares,
)
from sae_ray.explain.shading import Context, context, distinct, plain, shade

if TYPE_CHECKING:
    from sae_ray.explain.curation import Outcome

NUM_RANDOM = 8
CONTEXTS = 4
NUM_SAMPLED = 500
"""Rows of the pool among which near-copies are counted."""
_SEED = 0


class _Page:
    """One page being filled."""

    def __init__(self, index: FeatureIndex, outcome: "Outcome", labels: Mapping[int, str]) -> None:
        self.index, self.outcome, self.labels = index, outcome, labels
        self.columns = {name: index.column(name) for name in index.kept_columns}
        self.thresholds = index.stats.on_threshold

    def rows(self, explained: Sequence[SelectedRow], *, ranked: bool) -> list[ShownRow]:
        """Show rows, those of the first `ROWS_IN_FULL` that are ranked, and all others, shaded."""
        shown = []
        for rank, one in enumerate(explained):
            if ranked and rank >= ROWS_IN_FULL:
                turns = plain(one.conversation)
            else:
                latents = [reason.latent for reason in one.reasons]
                scale = self.index.stats.p99_on[latents]
                turns = shade(one.conversation, one.trace, latents, scale)
            shown.append(
                ShownRow(
                    id=one.conversation.id,
                    score=one.score,
                    turns=turns,
                    n_tokens=one.n_tokens,
                    rank=rank + 1 if ranked else None,
                    source=" · ".join(v for c in self.columns.values() if (v := c[one.row])),
                    reasons=[Reason(r.latent, r.label, r.weight, r.tokens) for r in one.reasons],
                )
            )
        return shown

    def explain(self, rows: Sequence[int]) -> list[ShownRow]:
        """Show rows that are not ranked, with the latents that speak for them."""
        block = self.index.take(rows, means_only=True)
        reasons = contributions(block, self.outcome.profile, self.thresholds)
        scores = self.outcome.scores.total[np.asarray(rows, dtype=np.int64)].tolist()
        explained = explain_rows(self.index, rows, scores, reasons, self.labels)
        return self.rows(explained, ranked=False)

    def at_random(self, rows: Sequence[int], shown: Sequence[ShownRow]) -> list[ShownRow]:
        """Show rows, shaded by the latents that earned others their place."""
        latents = dict.fromkeys(reason.latent for row in shown for reason in row.reasons)
        same = [[(latent, 0.0) for latent in latents]] * len(rows)
        scores = self.outcome.scores.total[np.asarray(rows, dtype=np.int64)].tolist()
        explained = explain_rows(self.index, rows, scores, same, self.labels)
        return [dataclasses.replace(row, reasons=()) for row in self.rows(explained, ranked=False)]

    def cards(self) -> list[LatentCard]:
        """Describe the profile's concepts, heaviest first, with their strongest contexts."""
        groups: defaultdict[int, list[ProfileLatent]] = defaultdict(list)
        for one in self.outcome.profile.latents:
            groups[one.group].append(one)
        leaders = [members[0] for members in groups.values()]
        background, selected = self.index.background, self._selected()
        contexts = self._contexts([one.latent for one in leaders[:LATENTS_IN_FULL]])
        in_pool, in_selection = (
            np.asarray(rows_on(block, self.thresholds).mean(axis=0)).ravel()
            for block in (background, selected)
        )
        return [
            LatentCard(
                latent=one.latent,
                weight=one.weight,
                label=one.label,
                evidence=one.evidence,
                document_frequency=float(self.index.stats.document_frequency[one.latent]),
                contexts=contexts.get(one.latent, []),
                grouped=[other.latent for other in groups[one.group][1:]],
                strong_in=(float(in_pool[one.latent]), float(in_selection[one.latent])),
            )
            for one in leaders
        ]

    def _selected(self) -> IndexBlock:
        place = {int(row): i for i, row in enumerate(self.outcome.scores.candidates.rows)}
        rows = self.outcome.selection.rows.tolist()
        if all(row in place for row in rows):
            return self.outcome.scores.candidates.take([place[row] for row in rows])
        return self.index.take(rows)

    def near_copies(self) -> NearCopies:
        """Count near-copies in a sample of the pool, and those that the selection met."""
        num = min(NUM_SAMPLED, self.index.num_rows)
        sample = np.linspace(0, self.index.num_rows - 1, num).astype(np.int64)
        texts = [one.text() for one in self.index.conversations(sample)]
        met = self.outcome.selection.num_near_duplicates
        return NearCopies(num, num_copies(texts), len(self.outcome.selection.rows), met)

    def _contexts(self, latents: Sequence[int]) -> dict[int, list[Context]]:
        """Find where latents are strongest among the background rows."""
        maxes = self.index.background.pooled("max").tocsc()[:, list(latents)].tocsc()
        best: dict[int, list[int]] = {}
        for i, latent in enumerate(latents):
            column = slice(maxes.indptr[i], maxes.indptr[i + 1])
            order = np.argsort(-maxes.data[column], kind="stable")[: CONTEXTS + 2]
            best[latent] = maxes.indices[column][order].tolist()
        places = sorted({place for found in best.values() for place in found})
        rows = self.index.background.rows[places]
        conversations = self.index.conversations(rows)
        traces = self.index.scorer.traces(conversations, np.asarray(latents, dtype=np.int64))
        at = {place: i for i, place in enumerate(places)}
        return {
            latent: distinct(
                [
                    context(
                        conversations[at[place]],
                        traces[at[place]],
                        latents,
                        column,
                        float(self.index.stats.p99_on[latent]),
                    )
                    for place in best[latent]
                ],
                CONTEXTS,
            )
            for column, latent in enumerate(latents)
        }


def fill_page(
    index: FeatureIndex,
    request: Request,
    outcome: "Outcome",
    rows: Sequence[SelectedRow],
    labels: Mapping[int, str],
    refine: Refine,
    today: datetime.date,
) -> CurationReport:
    """Gather what the page says of one request; `refine` says how the next command begins."""
    page = _Page(index, outcome, labels)
    selection, scores = outcome.selection, outcome.scores
    chosen = np.zeros(index.num_rows, dtype=bool)
    chosen[selection.rows] = True
    sample = random.Random(_SEED).sample(range(index.num_rows), min(NUM_RANDOM, index.num_rows))
    judged = rows_to_show(index, outcome.profile, scores).tolist()
    selected = page.rows(rows, ranked=True)
    return CurationReport(
        task=outcome.profile.task,
        budget=_budget(request),
        created=f"{today.day} {today:%B %Y}",
        index=index.path,
        num_pool=index.num_rows,
        pool_tokens=int(index.n_tokens.sum()),
        selected_tokens=int(selection.n_tokens.sum()),
        selected=selected,
        random=page.at_random(sample, selected[:ROWS_IN_FULL]),
        latents=page.cards(),
        scores=histogram(
            scores.total, chosen, cut=float(selection.scores.min()) if len(rows) else None
        ),
        prompt_tokens=histogram(index.n_tokens[:, 0], chosen, log=True),
        response_tokens=histogram(index.n_tokens[:, 1], chosen, log=True),
        refine=dataclasses.replace(
            refine,
            candidates=[
                Candidate(row, "top" if i < NUM_TOP else "undecided")
                for i, row in enumerate(page.explain(judged))
            ],
            kept=request.keep,
            dropped=request.drop,
        ),
        carried=_carried(outcome),
        columns={name: shares(column, chosen) for name, column in page.columns.items()},
        near_copies=page.near_copies(),
        notices=_notices(index, request, outcome, rows),
        provenance={
            "index": index.manifest.content_hash,
            "pool": index.source("pool"),
            "model": index.source("lm"),
            "SAE": index.source("sae"),
            **index.manifest.versions,
        },
        config={
            **index.manifest.config,
            **request.model_dump(mode="json", exclude={"keep", "drop"}),
        },
    )


def _carried(outcome: "Outcome") -> dict[str, float]:
    names = {"latents": "latents", "hidden": "the mean hidden state", "lexical": "the words"}
    carried = outcome.scores.carried(outcome.selection.rows)
    return {names[name]: share for name, share in carried.items() if name in names}


def _budget(request: Request) -> str:
    text = f"{request.budget_examples:,} examples"
    return text + (f", {request.budget_tokens:,} tokens" if request.budget_tokens else "")


def _notices(
    index: FeatureIndex, request: Request, outcome: "Outcome", rows: Sequence[SelectedRow]
) -> list[Notice]:
    notices = [Notice("stop", "Unsure", text) for text in outcome.profile.why]
    notices += [
        Notice("caution", "Look twice", text)
        for text in outcome.warnings()
        if text not in outcome.profile.why
    ]
    if rejected := index.manifest.extra.get("num_rejected"):
        notices.append(
            Notice(
                "note",
                "Rejected rows",
                f"{rejected} rows of the pool could not be read: see rejected.parquet",
            )
        )
    if truncated := index.manifest.extra.get("num_truncated"):
        notices.append(
            Notice(
                "note", "Truncated rows", f"{truncated} rows are longer than what was read of them"
            )
        )
    if unread := sum(not row.trace.texts for row in rows):
        text = f"{unread} of the rows chosen were not read again, so their reasons name no tokens"
        notices.append(Notice("note", "Unread rows", f"{text}: --explain_rows {len(rows)} does"))
    if gave_way := outcome.selection.num_over_quota:
        text = f"{gave_way} rows gave way, so that no {request.quota_column} has over "
        notices.append(Notice("note", "Quota", f"{text}{request.quota:.0%} of the selection"))
    return notices
