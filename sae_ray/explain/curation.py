"""Curator: an open index that answers descriptions, each with a selection and a page.

    curator = Curator(index)
    curator.curate(request, "runs/maths")

A ready curator answers in seconds: the index is streamed once, and the model, cut off at the hook
point, reads only the description and the rows that are shown.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from tempfile import TemporaryDirectory

import numpy as np
from pydantic import JsonValue

from sae_ray.artifacts import (
    Manifest,
    State,
    begin,
    finish,
    hash_file,
    inspect,
    locate,
    open_artifact,
    write_atomically,
)
from sae_ray.chat import Conversation
from sae_ray.curate.block import IndexBlock
from sae_ray.curate.duplicates import contaminated
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.output import SelectedRow, copy_rejected, explain_rows, write_selection
from sae_ray.curate.profile import Profile, build_profile
from sae_ray.curate.pseudo import (
    ask_for_pseudo_queries,
    read_pseudo_queries,
    write_pseudo_queries,
)
from sae_ray.curate.refine import rows_to_show
from sae_ray.curate.request import Request
from sae_ray.curate.score import Scores, contributions, score_pool
from sae_ray.curate.select import Quota, Selection, candidates_needed, select
from sae_ray.curate.sources import locate_source
from sae_ray.errors import ConfigError, PoolError
from sae_ray.explain.command import Flags, next_flags, next_folder
from sae_ray.explain.page import fill_page
from sae_ray.explain.report import ROWS_IN_FULL, Refine, render
from sae_ray.pool import plan, read
from sae_ray.sae.labels import labels_of
from sae_ray.threads import one_thread

logger = logging.getLogger(__name__)

KIND = "selection"

LIGHT_BYTES = 2**30
"""Weights up to which a CPU reads a whole selection again in seconds to minutes."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a request gave."""

    profile: Profile
    selection: Selection
    scores: Scores
    budget_examples: int
    contaminated: dict[str, list[str]]
    """Evaluation source -> ids of selected rows that repeat a piece of it."""
    pseudo_queries: list[Conversation]
    """What a model wrote, for the next run to start from."""

    def warnings(self) -> list[str]:
        """Say what to know before trusting the selection."""
        found = [*self.profile.why, *self.profile.warnings]
        if abs(self.scores.length_correlation) > 0.5:
            found.append(
                f"scores go with length (rank correlation {self.scores.length_correlation:.2f}): "
                "look whether the task does"
            )
        missing = self.budget_examples - len(self.selection.rows)
        if missing > 0:
            found.append(
                f"{missing} of {self.budget_examples} rows are missing: every other row of the "
                "pool was dropped, nearly copies a chosen one or passes the quota, or the next one "
                "does not fit budget_tokens"
            )
        for source, ids in self.contaminated.items():
            if ids:
                found.append(
                    f"{len(ids)} selected rows repeat what {source} holds ({_a_few(ids)}): drop "
                    "them before you measure with it"
                )
        return found


class Curator:
    """An index, its labels and its SAE's decoder, ready for descriptions."""

    def __init__(self, index: FeatureIndex, labels: str | None = None) -> None:
        self.index, self._labels_given = index, labels
        found = labels_of(locate_source("sae", index.source("sae")), labels)
        self.labels: Mapping[int, str] = found
        self._label_warnings = found.warnings
        self._written: dict[tuple[str, str, str], list[Conversation]] = {}

    @cached_property
    def _decoder(self) -> np.ndarray:
        return self.index.scorer.encoder.W_dec.float().cpu().numpy()

    @one_thread()
    def answer(self, request: Request) -> Outcome:
        """Turn a request into a selection; nothing is written."""
        if request.budget_examples > self.index.num_rows:
            raise ConfigError(
                f"budget_examples={request.budget_examples} but the pool holds "
                f"{self.index.num_rows} readable rows: ask for at most as many"
            )
        quota = self._quota(request)
        evaluation = {source: _conversations(source) for source in request.evaluation}
        examples = self._score(_conversations(request.examples))
        pseudo_queries = self._pseudo_queries(request)
        profile = build_profile(
            request.task,
            self.index,
            examples=examples,
            keep=request.keep,
            drop=request.drop,
            pseudo_queries=self._score(pseudo_queries),
            labels=self.labels,
            decoder=self._decoder,
        )
        scores = score_pool(
            self.index,
            profile,
            request.scorer,
            num_candidates=candidates_needed(request.budget_examples),
        )
        selection = select(
            self.index,
            profile,
            scores,
            request.budget_examples,
            budget_tokens=request.budget_tokens,
            selector=request.selector,
            quota=quota,
        )
        if not len(selection.rows):
            raise ConfigError(
                f"budget_tokens={request.budget_tokens} holds no row: the best has "
                f"{int(self.index.n_tokens[scores.order(1)].sum())} tokens; raise it"
            )
        leaks = contaminated(self.index.conversations(selection.rows), evaluation)
        budget = request.budget_examples
        return Outcome(profile, selection, scores, budget, leaks, pseudo_queries)

    @one_thread()
    def curate(self, request: Request, path: str, flags: Flags | None = None) -> Manifest:
        """Answer a request into a folder, unless that is done.

        Args:
            request: what is asked.
            path: the folder.
            flags: of the command that asks, beside the request's own: the page's next has them too.

        Raises:
            TaskError, ConfigError: the request cannot be answered.
            ArtifactError: the folder holds something else, or the disk is full.
        """
        asked, parents = request.model_dump(mode="json"), self._parents(request)
        if inspect(path, KIND, asked, parents) is State.FINISHED:
            return open_artifact(path, KIND)
        outcome = self.answer(request)
        # Claimed only now: a request that is refused leaves its folder to the one put right.
        begin(path, KIND, asked, parents)
        rows = self._explained(request, outcome)
        write_selection(path, rows)
        write_atomically(f"{path}/profile.json", outcome.profile.to_json().encode())
        copy_rejected(self.index, path)
        if outcome.pseudo_queries:
            write_pseudo_queries(f"{path}/pseudo_queries.jsonl", outcome.pseudo_queries)
        again = next_flags(request, self.index.path, path)
        own = {"labels": self._labels_given} if self._labels_given else {}
        again |= {**self.index.moved, **own, **(flags or {})}
        refine = Refine(again, next_folder(path))
        today = datetime.now(UTC).date()
        report = fill_page(self.index, request, outcome, rows, self.labels, refine, today)
        write_atomically(f"{path}/report.html", render(report).encode("utf-8", "replace"))
        counts: dict[str, JsonValue] = {
            "num_rows": len(rows),
            "num_rows_with_tokens": self._num_traced(request, len(rows)),
            "num_tokens": int(outcome.selection.n_tokens.sum()),
            "num_rejected": self.index.manifest.extra["num_rejected"],
            "abstained": outcome.profile.abstained,
            "num_near_duplicates": outcome.selection.num_near_duplicates,
            "num_over_quota": outcome.selection.num_over_quota,
            "contaminated": {name: len(ids) for name, ids in outcome.contaminated.items()},
        }
        return finish(path, counts, [*outcome.warnings(), *self._label_warnings])

    @one_thread()
    def to_judge(self, outcome: Outcome, seen: Collection[int] = ()) -> list[SelectedRow]:
        """Return about 20 rows for a person to keep or drop, none of those seen before."""
        rows = rows_to_show(self.index, outcome.profile, outcome.scores, seen=seen)
        block = self.index.take(rows, means_only=True)
        reasons = contributions(block, outcome.profile, self.index.stats.on_threshold)
        scores = outcome.scores.total[rows].tolist()
        return explain_rows(self.index, rows.tolist(), scores, reasons, self.labels)

    def _parents(self, request: Request) -> dict[str, str]:
        """Return hashes of all that the answer is made from."""
        named = {"examples": request.examples, "pseudo_queries": request.pseudo_queries}
        named |= {f"evaluation {one}": one for one in request.evaluation}
        files = {n: _hash_of(p) for n, p in named.items() if p}
        labels = json.dumps(sorted(self.labels.items())).encode()
        return {
            "index": self.index.manifest.content_hash,
            "labels": hashlib.sha256(labels).hexdigest(),
            **files,
        }

    def _explained(self, request: Request, outcome: Outcome) -> list[SelectedRow]:
        chosen = outcome.selection
        return explain_rows(
            self.index,
            chosen.rows.tolist(),
            chosen.scores.tolist(),
            chosen.reasons,
            self.labels,
            self._num_traced(request, len(chosen.rows)),
        )

    def _num_traced(self, request: Request, num_rows: int) -> int:
        lm = self.index.scorer.lm
        most = request.explain_rows
        if most is None:
            num_bytes = sum(weight.nbytes for weight in lm.model.parameters())
            most = num_rows if lm.device.type != "cpu" or num_bytes <= LIGHT_BYTES else ROWS_IN_FULL
        return min(most, num_rows)

    def _score(self, conversations: list[Conversation]) -> IndexBlock | None:
        """Read conversations from outside the pool; every one counts."""
        if not conversations:
            return None
        scored = self.index.scorer(conversations, range(len(conversations)))
        for i, reason in scored.unreadable.items():
            raise PoolError(
                f"{conversations[i].id}, an example or pseudo-query, cannot be read ({reason}): "
                "mend or remove it"
            )
        return scored.block

    def _pseudo_queries(self, request: Request) -> list[Conversation]:
        """Read what a model wrote, or ask it; the same is asked once, whatever the round."""
        if request.pseudo_queries is not None:
            if request.pseudo_url is not None or request.pseudo_model is not None:
                raise ConfigError(
                    f"pseudo_queries={request.pseudo_queries!r} is given with pseudo_url or "
                    "pseudo_model: the conversations come from a file or from an endpoint; leave "
                    "one of them out"
                )
            return read_pseudo_queries(request.pseudo_queries)
        if (request.pseudo_url is None) != (request.pseudo_model is None):
            raise ConfigError("pseudo_url and pseudo_model go together: give both, or neither")
        if request.pseudo_url is None or request.pseudo_model is None:
            return []
        asked = (request.task, request.pseudo_url, request.pseudo_model)
        if asked not in self._written:
            self._written[asked] = ask_for_pseudo_queries(
                request.task,
                base_url=request.pseudo_url,
                model=request.pseudo_model,
                api_key=os.environ.get("OPENAI_API_KEY"),
            )
        return self._written[asked]

    def _quota(self, request: Request) -> Quota | None:
        if (request.quota is None) != (request.quota_column is None):
            raise ConfigError(
                "quota and quota_column go together: --quota_column source --quota 0.4"
            )
        if request.quota is None or request.quota_column is None:
            return None
        if request.quota_column not in self.index.kept_columns:
            raise ConfigError(
                f"quota_column={request.quota_column!r} is not in the index, which carries "
                f"{', '.join(self.index.kept_columns) or 'no columns'}: index the pool with "
                f"--keep_columns {request.quota_column}"
            )
        return Quota(self.index.column(request.quota_column), request.quota)


def _conversations(source: str | None) -> list[Conversation]:
    """Read Parquet or JSONL in any form that a pool may have; every row must be readable."""
    if source is None:
        return []
    pieces = [read(piece) for piece in plan(source).slices]
    if rejected := [one for piece in pieces for one in piece.rejected]:
        raise PoolError(
            f"{source}: {len(rejected)} rows cannot be read, the first being row {rejected[0].row} "
            f"({rejected[0].reason}): every row of such a file counts; mend or remove them"
        )
    return [one for piece in pieces for one in piece.conversations]


def _hash_of(source: str) -> str:
    """Hash a file, or all that a folder, glob or dataset holds."""
    fs, root = locate(source)
    if fs.isfile(root):
        return hash_file(source).sha256
    with TemporaryDirectory(prefix="sae-ray-") as staging:
        return plan(source, staging=staging).fingerprint


def _a_few(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + ", ..." * (len(ids) > 3)
