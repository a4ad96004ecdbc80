"""Labelling: a SAE's latents read in one pass, judged if there is a judge, and written down.

A folder of labels holds

    labels.json         what each latent stands for: what curation and reports read
    latents.parquet     a row a latent: statistics, label, and what the judge found
    neuronpedia/        all of it with the contexts, in Neuronpedia's export layout
    report.html         some of the latents for people
    verdicts.jsonl      every answer of the judge
    rejected.parquet    rows that could not be read, with reasons
"""

import contextlib
import dataclasses
import io
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import JsonValue

from sae_ray.artifacts import State, begin, finish, inspect, write_atomically
from sae_ray.chat import ChatTokenizer
from sae_ray.chat_endpoint import ChatEndpoint
from sae_ray.curate.scorer import ScorerConfig, check_pair
from sae_ray.curate.sources import (
    ROLES,
    describe_source,
    fingerprint,
    locate_source,
)
from sae_ray.errors import EndpointError, PoolError
from sae_ray.explain.label_settings import TAGS, LabelSettings, tags_of
from sae_ray.explain.latents import Page, render
from sae_ray.lm import LanguageModel
from sae_ray.pool import Plan, plan
from sae_ray.rows import BadRow, Rejected, count_reasons, to_conversation
from sae_ray.sae.contexts import Room
from sae_ray.sae.interpret import LatentFacts, Reading, TokenTexts
from sae_ray.sae.judge import Examiner, Judgement, Question, accuracy, judge_latents, wilson
from sae_ray.sae.labels import Label, labels_text
from sae_ray.sae.labels import fingerprint as sae_sha256
from sae_ray.sae.lens import LogitLens
from sae_ray.sae.neuronpedia import Explained, ExportedLatent, Place, export
from sae_ray.sae.verdicts import Cost, Verdicts, estimate
from sae_ray.tables import Slice, read_rows
from sae_ray.tiny.split import is_held_out

logger = logging.getLogger(__name__)

KIND = "latent_labels"
HOW = "tags or tokens most enriched among strongest contexts; detection AUC on the other half"
_MAX_UNANSWERED = 0.05
_ROWS = 512
_LABEL_CHARS = 100
"""Of a label that is not there yet, when its cost is estimated."""
_LATENTS = pa.schema(
    [
        ("latent", pa.int32()),
        ("label", pa.string()),
        ("label_kind", pa.string()),
        ("auc", pa.float64()),
        ("density", pa.float64()),
        ("template_share", pa.float64()),
        ("max_activation", pa.float64()),
        ("token_entropy_bits", pa.float64()),
        ("peak_tokens", pa.list_(pa.string())),
        ("neighbours", pa.list_(pa.int32())),
        ("neighbour_cosines", pa.list_(pa.float64())),
        ("promoted", pa.list_(pa.string())),
        ("suppressed", pa.list_(pa.string())),
        ("judge_label", pa.string()),
        ("rubric", pa.int8()),
        *(
            (f"{exam}{part}", pa.int32() if part == "_num" else pa.float64())
            for exam in ("detection", "fuzzing")
            for part in ("", "_low", "_high", "_num")
        ),
    ]
)
_BAD = pa.schema(
    [("row", pa.int64()), ("id", pa.string()), ("reason", pa.string()), ("excerpt", pa.string())]
)


class Progress(NamedTuple):
    """How far a labelling is."""

    stage: Literal["reading", "judging", "writing"]
    done: int
    total: int
    detail: str = ""


class Labelling:
    """One run: what is read, asked and found on the way to a folder of labels."""

    def __init__(self, settings: LabelSettings, path: str) -> None:
        """Check model and SAE against each other, and the judge's address; nothing is read yet.

        Raises:
            ModelError: something is missing, or they do not belong to each other.
            EndpointError: the address of the judge cannot be one.
        """
        self.settings, self.path = settings, path
        self.lm, self.sae, self.data = (
            locate_source(role, settings.source(role)) for role in ("lm", "sae", "pool")
        )
        self.encoder = check_pair(ScorerConfig(lm=self.lm, sae=self.sae))
        self.judge: ChatEndpoint | None = None
        if settings.judge_url and settings.judge_model:
            self.judge = ChatEndpoint(
                settings.judge_url,
                settings.judge_model,
                os.environ.get("OPENAI_API_KEY"),
                timeout_s=settings.judge_timeout_s,
            )
        self.rejected: list[Rejected] = []
        self.ids: list[str] = []
        self.judgements: dict[int, Judgement] = {}
        self.counts: dict[str, JsonValue] = {}
        self.warnings: list[str] = []

    def run(self) -> Iterator[Progress]:
        """Do what is not done, and say how far it is; a finished folder is left alone.

        Raises:
            PoolError: the data cannot be read.
            EndpointError: the judge refuses, or leaves too much unanswered; its verdicts are kept.
            ArtifactError: the folder holds something else.
        """
        settings, asked = self.settings, self.settings.identity()
        parents = {role: fingerprint(role, settings.source(role)) for role in ROLES}
        if inspect(self.path, KIND, asked, parents) is State.FINISHED:
            return
        sources = {role: describe_source(role, settings.source(role)) for role in ROLES}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = LanguageModel.load(self.lm, [self.encoder.hook_point], device=device)
        self.encoder = self.encoder.to(dtype=torch.float32, device=device)
        tokenizer = ChatTokenizer.load(self.lm)
        reading = Reading(
            model,
            self.encoder,
            tokenizer,
            room=Room(context_tokens=settings.context_tokens),
            max_tokens=settings.max_tokens,
            seed=settings.seed,
        )
        with tempfile.TemporaryDirectory(prefix="sae-ray-") as staging:
            yield from self._read(reading, plan(self.data, rows_per_shard=_ROWS, staging=staging))
        begin(self.path, KIND, asked, parents, sources)
        del model
        lens = LogitLens.load(self.lm, self.encoder.hook_point, device=device)
        facts, labels = list(reading.facts(lens)), reading.labels()
        if self.judge is not None:
            with contextlib.closing(self.judge) as judge:
                yield from self._ask(judge, reading, Examiner(tokenizer, seed=settings.seed))
            labels = [self._best(label) for label in labels]
        yield Progress("writing", 0, 1)
        self._write(reading, facts, labels, TokenTexts(tokenizer))

    def _read(self, reading: Reading, found: Plan) -> Iterator[Progress]:
        """Read slices from all over the data until there are enough conversations."""
        total = min(self.settings.max_conversations, found.num_rows)
        tags = [name for name in TAGS if name in found.columns]
        order = np.random.default_rng(self.settings.seed).permutation(len(found.slices))
        for number in order.tolist():
            if (room := total - len(self.ids)) <= 0:
                break
            part = found.slices[number]
            rows = self._rows(part, tags)[:room]
            self.ids += [row["id"] for row in rows]
            numbers = {row["id"]: row["row"] for row in rows}
            for id, reason in reading.add(rows, is_held_out):
                self.rejected.append(Rejected(numbers[id], id, reason, ""))
            yield Progress("reading", len(self.ids), total, f"{reading.num_tokens:,} tokens")
        num_read = len(self.ids)
        if not reading.num_tokens or len(self.rejected) > self.settings.max_rejected * num_read:
            reasons = "; ".join(f"{why}: {n}" for why, n in count_reasons(self.rejected).items())
            raise PoolError(
                f"{len(self.rejected)} rows of {self.data} cannot be read ({reasons}), and "
                f"{num_read} can: at most {self.settings.max_rejected:.0%} may be rejected; mend "
                "the data, or raise max_rejected"
            )

    def _rows(self, part: Slice, tags: Sequence[str]) -> list[dict[str, Any]]:
        """Read a slice: conversations with their tags; the others are rejected with a reason."""
        rows: list[dict[str, Any]] = []
        for number, raw in enumerate(read_rows(part, tags), part.first_row):
            try:
                if isinstance(raw, BadRow):
                    raise raw
                one = to_conversation(raw)
                rows.append({"row": number, "id": one.id, "messages": one.messages})
                if tags:
                    rows[-1] |= tags_of(raw, len(one.messages))
            except BadRow as bad:
                self.rejected.append(Rejected(number, None, bad.reason, bad.excerpt))
        return rows

    def _ask(self, judge: ChatEndpoint, reading: Reading, examiner: Examiner) -> Iterator[Progress]:
        """Put all questions to the judge: first what it is, then how well that label does."""
        alive = np.flatnonzero(reading.contexts.num_on.sum(axis=0))
        rng = np.random.default_rng(self.settings.seed)
        chosen = sorted(rng.permutation(alive)[: self.settings.judge_latents].tolist())
        contexts = {latent: reading.contexts.contexts(latent) for latent in chosen}
        questions = [q for one in chosen for q in examiner.first(one, contexts[one])]
        asked = sorted({question.latent for question in questions})
        sample = "x" * _LABEL_CHARS
        exam = [q for one in asked for q in examiner.second(one, contexts[one], sample)]
        verdicts, cost = Verdicts(self.path), estimate(questions) + estimate(exam)
        logger.info(
            "%s will be asked about %d latents: %d requests, about %d prompt tokens and at most "
            "%d tokens of reply; %d verdicts are there already",
            *(judge.model, len(asked), cost.num_requests, cost.prompt_tokens),
            *(cost.reply_tokens, len(verdicts.answers)),
        )
        num_at_once = self.settings.judge_at_once
        for _ in verdicts.ask(judge, questions, num_at_once=num_at_once):
            yield Progress("judging", len(verdicts.answers), cost.num_requests)
        named = judge_latents(questions, verdicts.answers)
        labels = {one: label for one in asked if (label := named[one].label)}
        exam = [q for one in labels for q in examiner.second(one, contexts[one], labels[one])]
        for _ in verdicts.ask(judge, exam, num_at_once=num_at_once):
            yield Progress("judging", len(verdicts.answers), cost.num_requests)
        self._judged(questions + exam, verdicts, cost)

    def _judged(self, questions: Sequence[Question], verdicts: Verdicts, cost: Cost) -> None:
        """Take in what the judge said, and refuse to call it finished if too much is missing."""
        tally, answers = verdicts.tally(questions), verdicts.answers
        if tally.num_unanswered > _MAX_UNANSWERED * tally.num_asked:
            raise EndpointError(
                f"{tally.num_unanswered} of {tally.num_asked} requests to {self.settings.judge_url}"
                f" had no answer (allowed: {_MAX_UNANSWERED:.0%}); the others are kept in "
                f"{self.path}: the same command asks for what is missing"
            )
        verdicts.write()
        self.judgements = judge_latents(questions, answers)
        scores = [one.rubric for one in self.judgements.values() if one.rubric is not None]
        self.counts["judge"] = {
            "estimate": dataclasses.asdict(cost),
            **tally.to_json(),
            "num_latents": len(self.judgements),
            "detection": dataclasses.asdict(accuracy(questions, answers, "detect")),
            "fuzzing": dataclasses.asdict(accuracy(questions, answers, "fuzz")),
            "rubric_4_or_5": dataclasses.asdict(wilson(sum(s >= 4 for s in scores), len(scores))),
        }
        for num, what in (
            (tally.num_unparsed, "were not in the form asked for and count as no answer"),
            (tally.num_unanswered, "never came"),
        ):
            if num:
                self.warnings.append(f"{num} of {tally.num_asked} answers of the judge {what}")

    def _best(self, label: Label) -> Label:
        """Prefer the judge's label, if with it contexts are told apart better than by chance."""
        found = self.judgements.get(label.latent)
        if found is None or not found.label or not found.detection or found.detection.low <= 0.5:
            return label
        return dataclasses.replace(label, label=found.label, kind="judged", auc=None)

    def _write(
        self,
        reading: Reading,
        facts: Sequence[LatentFacts],
        labels: Sequence[Label],
        texts: TokenTexts,
    ) -> None:
        how = HOW + (f"; judged by {self.settings.judge_model}" if self.judgements else "")
        made_for = sae_sha256(self.sae)
        labels_json = labels_text(labels, sae_sha256=made_for, how=how)
        write_atomically(f"{self.path}/labels.json", labels_json.encode())
        rows = [self._row(*both) for both in zip(facts, labels, strict=True)]
        for name, table in (
            ("latents", pa.Table.from_pylist(rows, _LATENTS)),
            ("rejected", pa.Table.from_pylist(list(map(dataclasses.asdict, self.rejected)), _BAD)),
        ):
            sink = io.BytesIO()
            pq.write_table(table, sink, compression="zstd")
            write_atomically(f"{self.path}/{name}.parquet", sink.getvalue())
        place = Place(
            model=self.encoder.model_name or Path(self.lm).name,
            set_name=Path(self.sae.replace(":", "/")).name,
            hook_point=self.encoder.hook_point,
            dataset=self.settings.source("pool"),
            conversations=self.ids,
            context_tokens=self.settings.context_tokens,
            sae_sha256=made_for,
        )
        exported = (
            ExportedLatent(one, reading.contexts.contexts(one.latent), self._explained(label))
            for one, label in zip(facts, labels, strict=True)
        )
        export(f"{self.path}/neuronpedia", place, exported, texts)
        kinds = Counter(label.kind for label in labels)
        counts: dict[str, JsonValue] = {
            "num_latents": len(labels),
            "num_never_on": sum(one.density == 0 for one in facts),
            "num_labelled": len(labels) - kinds["unlabelled"],
            "labels": dict(kinds),
            "num_conversations": len(self.ids),
            "num_tokens": reading.num_tokens,
            "num_truncated": reading.num_truncated,
            "num_rejected": len(self.rejected),
            **self.counts,
        }
        page = Page(facts, labels, self.judgements, reading.contexts.contexts, texts, counts)
        title = f"{place.model}, {self.encoder.hook_point}"
        write_atomically(f"{self.path}/report.html", render(page, title).encode("utf-8", "replace"))
        finish(self.path, counts, self.warnings)

    def _row(self, facts: LatentFacts, label: Label) -> dict[str, Any]:
        found = self.judgements.get(facts.latent) or Judgement(facts.latent)
        row = dataclasses.asdict(facts) | {
            "promoted": [token for token, _ in facts.promoted],
            "suppressed": [token for token, _ in facts.suppressed],
            "label": label.label,
            "label_kind": label.kind,
            "auc": label.auc,
            "judge_label": found.label,
            "rubric": found.rubric,
        }
        for name, share in (("detection", found.detection), ("fuzzing", found.fuzzing)):
            values = dataclasses.asdict(share or wilson(0, 0))
            row |= {f"{name}_{key}" if key != "share" else name: values[key] for key in values}
        return row

    def _explained(self, label: Label) -> Explained | None:
        if label.kind == "unlabelled":
            return None
        judged = label.kind == "judged"
        model = self.settings.judge_model if judged else None
        return Explained(label.label, "sae-ray_judge" if judged else "sae-ray_tokens", model)
