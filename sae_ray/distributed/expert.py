"""From data to a registered expert: rows read, trained, compared with the base, written down.

An expert's folder holds

    adapter/            PEFT's folder, or with adapter=full the whole model
    card.json           what it is, made from what, and how it compares with its base
    curves.jsonl        the figures of every step
    held_out.parquet    every held-out row before and after
    rejected.parquet    rows that could not be learnt from, with reasons
    report.html         all of it for people
"""

import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from sae_ray.adapters.finetune import Look, Step
from sae_ray.adapters.material import Learnt, read_learnt, rows_path
from sae_ray.adapters.settings import FinetuneSettings
from sae_ray.artifacts import (
    FileRecord,
    Manifest,
    Source,
    State,
    begin,
    finish,
    inspect,
    locate,
    open_artifact,
    read_file,
    write_atomically,
)
from sae_ray.curate.sources import (
    EMBEDDED,
    describe_source,
    fingerprint,
    locate_model,
    locate_source,
)
from sae_ray.distributed.finetune import Trained, Training, copied, train_expert
from sae_ray.distributed.runtime import cluster
from sae_ray.distributed.spans import keep_subspace, subspaces_of
from sae_ray.errors import ConfigError, PoolError
from sae_ray.evaluate.expert import compare
from sae_ray.experts.card import ADAPTER, ExpertCard
from sae_ray.experts.files import record_files
from sae_ray.experts.prototypes import PROTOTYPES, Eyes, make_prototypes
from sae_ray.experts.registry import Expert, ExpertRegistry
from sae_ray.explain.finetuning import Page, render
from sae_ray.rows import Rejected, count_reasons

logger = logging.getLogger(__name__)

KIND = "expert"
Progress = tuple[str, int, int, str]
"""What is being done, how much of it, of how much, and what else there is to say."""


class ExpertMaker:
    """One run from data to an expert."""

    def __init__(
        self, settings: FinetuneSettings, path: str, *, name: str, description: str | None = None
    ) -> None:
        """Say what is to be made, and where.

        Args:
            settings: what is trained, and how.
            path: folder or URL of the expert.
            name: of the expert; another expert of the name is another version.
            description: the task in a sentence; that of the selection unless given.
        """
        self.settings, self.path = settings, path.rstrip("/")
        self.name, self._description = name, description

    def make(self) -> Iterator[Progress]:
        """Do what is not done, and say how far it is; a finished folder is left alone.

        Raises:
            SaeRayError: the data cannot be learnt from, or the model not be trained so.
        """
        settings = self.settings
        asked = {**settings.identity(), "name": self.name, "description": self._description}
        named = self._named()
        parents = {role: self._fingerprint(role, name) for role, name in named.items()}
        sources = {role: self._source(role, name) for role, name in named.items()}
        if inspect(self.path, KIND, asked, parents, sources) is State.FINISHED:
            return
        lm = locate_model(settings.lm or EMBEDDED)
        self._require_same_base(parents["lm"])
        with ExitStack() as stack:
            staging = stack.enter_context(tempfile.TemporaryDirectory(prefix="sae-ray-"))
            yield "reading", 0, 1, self._data
            learnt = read_learnt(settings, self._data, lm, staging)
            if settings.num_workers != 0:
                stack.enter_context(cluster())
            saes = tuple(locate_source("sae", one) for one in self._saes)
            spanned = self._spanned(lm, saes, learnt, staging)
            # Claimed only now: what is refused leaves its folder to the run put right.
            begin(self.path, KIND, asked, parents, sources)
            subspaces = tuple(keep_subspace(one, f"{self.path}/subspace") for one in spanned)
            training = Training(
                lm=lm,
                adapter=settings.spec(saes, subspaces),
                recipe=settings.recipe,
                out=self.path,
                start_from=settings.start_from,
                subspaces=subspaces,
                zero_stage=settings.zero_stage,
                offload=settings.offload,
                nvme_path=settings.nvme_path,
            )
            trained = yield from self._train(training, learnt)
        self._write(learnt, trained, parents, sources)

    def register(self, registry: ExpertRegistry) -> Expert:
        """Register what was made, and make it active if it beats its base."""
        card = self.card
        expert = registry.register(card, f"{self.path}/{ADAPTER}")
        if expert.status == "candidate" and card.beats_base:
            return registry.activate(expert.id)
        return expert

    @property
    def card(self) -> ExpertCard:
        """Return the card of the finished expert."""
        place = f"{self.path}/card.json"
        return ExpertCard.decode(read_file(place), place)

    @property
    def manifest(self) -> Manifest:
        """Return the manifest of the finished expert."""
        return open_artifact(self.path, KIND)

    @property
    def _data(self) -> str:
        """Where the rows lie: in a selection's table, or wherever a pool does."""
        return rows_path(self.settings.data, self.settings.objective)

    @property
    def _selection(self) -> Manifest | None:
        data = self.settings.data
        if data is None:
            return None
        fs, root = locate(data)
        if not fs.isfile(f"{root}/profile.json"):
            return None
        return open_artifact(data, "selection")

    @property
    def _saes(self) -> list[str]:
        return (self.settings.sae or [EMBEDDED]) if self.settings.needs_sae else []

    def _named(self) -> dict[str, str]:
        """Return the name of everything that the expert is made of, by its role."""
        settings = self.settings
        named = {"lm": settings.lm or EMBEDDED, "data": settings.data or EMBEDDED}
        named |= {f"sae {i}": sae for i, sae in enumerate(self._saes)}
        roles = ["general", "retain", "start_from"]
        roles += ["positive", "reference", "control"] if settings.adapter == "subspace" else []
        others = {role: getattr(settings, role) for role in roles}
        return named | {role: name for role, name in others.items() if name is not None}

    def _fingerprint(self, role: str, name: str) -> str:
        if role == "lm":
            return fingerprint("lm", name)
        if role.startswith("sae"):
            return fingerprint("sae", name)
        if role == "start_from":
            return _hash_of(record_files(name))
        if role == "data" and (selection := self._selection):
            return selection.content_hash
        return fingerprint("pool", self._data if role == "data" else name)

    def _source(self, role: str, name: str) -> Source:
        if role == "lm":
            return describe_source("lm", name)
        if role.startswith("sae"):
            return describe_source("sae", name)
        return Source(name=name)

    def _spanned(self, lm: str, saes: tuple[str, ...], learnt: Learnt, staging: str) -> list[Path]:
        """Make the subspaces from what Ray's workers read of the pools, or this process.

        An adapter that is gone on from keeps its own, which lie beside it.
        """
        settings = self.settings
        if settings.adapter != "subspace":
            return []
        if settings.start_from is not None:
            return _copied_subspaces(settings.start_from, Path(staging))
        return subspaces_of(
            settings,
            self._data,
            lm,
            saes,
            leave_out={row.id for row in learnt.material.held_out},
            folder=Path(staging) / "subspaces",
            staging=staging,
        )

    def _require_same_base(self, base: str) -> None:
        """Refuse to go on from an expert of another model, where its card is there to say so."""
        start = self.settings.start_from
        place = f"{start and start.rstrip('/').rpartition('/')[0]}/card.json"
        fs, path = locate(place)
        if start is None or not fs.isfile(path):
            return
        card = ExpertCard.decode(read_file(place), place)
        if card.base_sha256 != base:
            raise ConfigError(
                f"--start_from {start} was trained on {card.base} ({card.base_sha256[:12]}), and "
                f"--lm is another model ({base[:12]}): give the same, or start anew"
            )

    def _train(self, training: Training, learnt: Learnt) -> Generator[Progress, None, Trained]:
        settings = self.settings
        steps = train_expert(
            training,
            learnt.material,
            num_workers=settings.num_workers,
            max_failures=settings.max_failures,
        )
        while True:
            try:
                yield _told(next(steps))
            except StopIteration as done:
                return done.value

    def _write_prototypes(self) -> dict[str, JsonValue] | None:
        """Write what a router knows the expert by, where a SAE of its base is known."""
        settings = self.settings
        if not settings.sae and settings.lm is not None:
            return None
        sae = settings.sae[0] if settings.sae else EMBEDDED
        eyes = Eyes.open(settings.lm or EMBEDDED, sae)
        with tempfile.TemporaryDirectory(prefix="sae-ray-") as staging:
            try:
                content = make_prototypes(eyes, self._data, staging=staging)
            except PoolError as error:  # of what nobody asks for an expert can still be made
                logger.warning("no router will know this expert: %s", error)
                return None
        write_atomically(f"{self.path}/{ADAPTER}/{PROTOTYPES}", content)
        return {"file": PROTOTYPES, "sae": describe_source("sae", sae).name, "sae_sha256": eyes.sae}

    def _write(
        self,
        learnt: Learnt,
        trained: Trained,
        parents: dict[str, str],
        sources: dict[str, Source],
    ) -> None:
        settings, selection = self.settings, self._selection
        task = str(selection.config.get("task")) if selection else f"What {self._data} holds"
        profile = json.loads(read_file(f"{settings.data}/profile.json")) if selection else None
        # By the rows that have chosen nothing: neither weights, nor directions, nor the best step.
        looks = (trained.before, trained.after)
        before, after = (look.halves(settings.objective)[1] for look in looks)
        prototypes = self._write_prototypes()
        card = ExpertCard(
            name=self.name,
            description=self._description or task,
            adapter=settings.adapter,
            objective=settings.objective,
            base=sources["lm"].name,
            base_sha256=parents["lm"],
            files=record_files(f"{self.path}/{ADAPTER}"),
            parents=parents,
            sources=sources,
            profile=profile,
            prototypes=prototypes,
            num_parameters=trained.num_parameters,
            share=trained.num_parameters / trained.num_base_parameters,
            measures=compare(before, after, settings.objective),
        )
        page = Page(
            card=card,
            curves=trained.curves,
            examples=learnt.shown,
            num_train=len(learnt.material.train),
            num_held_out=len(learnt.material.held_out),
            num_tokens=learnt.num_tokens,
            rejected=count_reasons(learnt.rejected),
            best_step=trained.after.number,
            stopped_early=trained.stopped_early,
            settings=settings.identity(),
        )
        lines = "".join(json.dumps(row) + "\n" for row in trained.curves)
        write_atomically(f"{self.path}/curves.jsonl", lines.encode())
        ids = [row.id for row in learnt.material.held_out]
        write_atomically(f"{self.path}/held_out.parquet", _rows(ids, trained))
        write_atomically(f"{self.path}/rejected.parquet", _table(_REJECTED, learnt.rejected))
        write_atomically(f"{self.path}/card.json", card.encode())
        write_atomically(f"{self.path}/report.html", render(page).encode("utf-8", "replace"))
        counts: dict[str, JsonValue] = {
            "num_rows": page.num_train,
            "num_held_out": page.num_held_out,
            "num_rejected": len(learnt.rejected),
            "num_workers": trained.num_workers,
            "best_step": page.best_step,
            "beats_base": card.beats_base,
        }
        finish(self.path, counts, [page.forgets] if page.forgets else [])


def _copied_subspaces(start_from: str, staging: Path) -> list[Path]:
    beside = f"{start_from.rstrip('/').rpartition('/')[0]}/subspace"
    fs, root = locate(beside)
    if not fs.isdir(root):
        raise ConfigError(
            f"--adapter subspace goes on from --start_from {start_from}, and no subspace lies at "
            f"{beside}: give the adapter in the folder of the expert that it was made with"
        )
    names = sorted(Path(str(one)).name for one in fs.ls(root, detail=False))
    return [Path(copied(f"{beside}/{name}", staging / f"start-{name}")) for name in names]


_REJECTED = pa.schema(
    [("row", pa.int64()), ("id", pa.string()), ("reason", pa.string()), ("excerpt", pa.string())]
)


def _table(schema: pa.Schema, rejected: list[Rejected]) -> bytes:
    rows = [{name: getattr(row, name) for name in schema.names} for row in rejected]
    return _parquet(pa.Table.from_pylist(rows, schema))


def _rows(ids: list[str], trained: Trained) -> bytes:
    """Return each held-out row before and after: its nats and tokens; of a pair, both replies'."""
    width = len(trained.before.held_out) // len(ids)
    columns: dict[str, Any] = {"id": ids}
    for i, reply in enumerate(("chosen", "rejected") if width == 2 else ("reply",)):
        looks: dict[str, Look] = {"base": trained.before, "expert": trained.after}
        for who, look in looks.items():
            columns[f"{reply}_nats_{who}"] = [row.nats for row in look.held_out[i::width]]
        columns[f"{reply}_tokens"] = [row.num_tokens for row in trained.before.held_out[i::width]]
    return _parquet(pa.table(columns))


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _told(step: Step) -> Progress:
    figures = {k: v for k, v in step.figures.items() if k.endswith("loss")}
    detail = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items())
    return "training", step.number, step.total, detail


def _hash_of(files: dict[str, FileRecord]) -> str:
    told = json.dumps({name: file.sha256 for name, file in files.items()}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()
