"""A study: a space searched, its best settings trained again with other seeds, and what came of it.

A folder of a study holds

    trials/             a record a trial, written when it ends, by which a killed run goes on
    trials.parquet      a row a trial: what was tried, how it ended, what it gained
    best.yaml           the best settings, as jobs/finetune.py takes them
    report.html         all of it for people
"""

import dataclasses
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from sae_ray.adapters.proposals import Outcome, Proposals
from sae_ray.adapters.search_settings import SearchSettings
from sae_ray.adapters.space import Point
from sae_ray.adapters.trial import Glance, Role, Status, TrialRecord
from sae_ray.artifacts import (
    Manifest,
    State,
    begin,
    finish,
    inspect,
    locate,
    open_artifact,
    read_file,
    write_atomically,
)
from sae_ray.distributed.runtime import cluster, require_shared
from sae_ray.distributed.search import Ended, InOrder, Places, Under, run_trials
from sae_ray.distributed.trainings import Trainings
from sae_ray.distributed.trial import Plan, Workshop
from sae_ray.errors import ArtifactError, TrainingError
from sae_ray.evaluate.study import finalists, measured, ranked, table_of
from sae_ray.explain.search_page import SearchPage, render

KIND = "study"
Progress = tuple[str, int, int, str]
_RECORD = re.compile(r"\d+\.json")


class StudyMaker:
    """One run from a space to its best settings."""

    def __init__(self, settings: SearchSettings, path: str) -> None:
        """Read the space.

        Raises:
            ConfigError: it is none.
        """
        self.settings, self.path = settings, path.rstrip("/")
        self.trainings = Trainings(settings)
        self.records: dict[int, TrialRecord] = {}
        """Trials that have ended, by their numbers."""

    def make(self) -> Iterator[Progress]:
        """Do what is not done, and say how far it is; a finished folder is left alone.

        Raises:
            SaeRayError: a combination cannot be, or the data cannot be learnt from.
        """
        trainings = self.trainings
        num = trainings.space.require_possible(trainings.check)
        asked, parents = self.settings.identity(), trainings.parents()
        if inspect(self.path, KIND, asked, parents) is State.FINISHED:
            return
        yield "looking at combinations", num, num, ""
        with tempfile.TemporaryDirectory(prefix="sae-ray-") as staging, cluster():
            require_shared(trainings.folders())
            places = Places.plan(self.settings.concurrent_trials, self.settings.gpus_per_trial)
            materials = trainings.materials(staging)
            begin(self.path, KIND, asked, parents)
            trainings.span(materials, f"{self.path}/subspaces", staging)
            workshop = Workshop(
                trainings.lm,
                materials,
                max_divergence=self.settings.max_divergence,
                max_failures=self.settings.max_failures,
            )
            self.records = {one.number: one for one in self._read_records()}
            yield from self._search(workshop, places)
            yield from self._finals(workshop, places)
        self._write()

    @property
    def manifest(self) -> Manifest:
        """Return the manifest of the finished study."""
        return open_artifact(self.path, KIND)

    def _search(self, workshop: Workshop, places: Places) -> Iterator[Progress]:
        """Train what the sampler asks for, as far as it is not done."""
        asks = _Asking(self)
        known = sum(one.role == "searched" for one in self.records.values())
        num = self.settings.num_trials
        told = run_trials(asks, num - known, workshop, places, prune=self.settings.prune)
        yield from self._keep(told, "searching", known, num, asks.record)

    def _finals(self, workshop: Workshop, places: Places) -> Iterator[Progress]:
        """Train the default LoRA and the best with all seeds, none of them ended early."""
        wanted = {one.number: one for group in self._groups() for one in group}
        left = [one for one in wanted.values() if one.number not in self.records]
        plans = [self.trainings.plan(one.number, one.point, one.seed) for one in left]

        def record(ended: Ended) -> TrialRecord:
            one = wanted[ended.plan.number]
            role = "finalist" if one.point else "reference"
            return self.record(ended, role, one.point, one.seed)

        told = run_trials(InOrder(plans), len(plans), workshop, places, prune=False)
        yield from self._keep(told, "finalists", len(wanted) - len(left), len(wanted), record)

    def _groups(self) -> "list[list[_Run]]":
        """Return the runs of the default LoRA, then of each of the best: one a seed."""
        searched = [one for one in self.records.values() if one.role == "searched"]
        best = ranked(searched, self.settings.num_finalists)
        if not best:
            reasons = sorted({one.reason or "no look counts" for one in searched})
            raise TrainingError(
                f"none of {len(searched)} trials may be chosen ({'; '.join(reasons[:3])}): see "
                f"{self.path}/trials, and give another space"
            )
        first, each = self.settings.num_trials, self.settings.finalist_seeds
        # Seeds of their own: that of the search has chosen, and flatters what it chose.
        seeds = [self.settings.seed + i for i in range(1, each + 1)]
        groups = [[_Run(first + i, {}, seed) for i, seed in enumerate(seeds)]]
        for one in best:
            begin = first + each * (1 + one.number)
            groups.append([_Run(begin + i, one.point, seed) for i, seed in enumerate(seeds)])
        return groups

    def _keep(
        self,
        told: Generator[Ended | Under, None, None],
        what: str,
        done: int,
        total: int,
        record: Callable[[Ended], TrialRecord],
    ) -> Iterator[Progress]:
        """Write every trial down when it ends; say how far they are."""
        for one in told:
            if not isinstance(one, Ended):
                step = f"trial {one.plan.number}: step {one.glance.step} of {one.glance.total}"
                yield what, done, total, f"{step}, loss {one.glance.loss:.3f}"
                continue
            kept: TrialRecord = record(one)
            self.records[kept.number] = kept
            write_atomically(
                f"{self.path}/trials/{kept.number:05d}.json", kept.model_dump_json().encode()
            )
            done += 1
            how = kept.reason or ("" if kept.loss is None else f"loss {kept.loss:.3f}")
            yield what, done, total, f"trial {kept.number} {kept.status}: {how}"

    def record(self, ended: Ended, role: Role, point: Point, seed: int) -> TrialRecord:
        """Return what is kept of a trial that has ended."""
        settings = self.trainings.settings_of(point)
        layer, component = self.trainings.place(settings)
        status = _status(ended)
        return TrialRecord(
            number=ended.plan.number,
            role=role,
            point=point,
            seed=seed,
            layer=layer,
            component=component,
            status=status,
            reason=ended.reason,
            num_parameters=ended.num_parameters,
            glances=ended.glances,
            base=ended.base,
            best=None if status == "failed" else ended.best,
        )

    def _read_records(self) -> Iterator[TrialRecord]:
        fs, root = locate(f"{self.path}/trials")
        if not fs.isdir(root):
            return
        names = [str(one).rpartition("/")[2] for one in fs.ls(root, detail=False)]
        for name in sorted(names):
            if not _RECORD.fullmatch(name):
                continue  # what a killed run was writing: it is no record until it has its name
            place = f"{self.path}/trials/{name}"
            try:
                yield TrialRecord.model_validate_json(read_file(place))
            except ValidationError as error:
                raise ArtifactError(
                    f"{place} is no record of a trial ({error.errors()[0]['msg']}): delete it, and "
                    "that trial is trained again"
                ) from None

    def _write(self) -> None:
        objective = self.settings.objective
        default, *groups = [
            [self.records[one.number] for one in group if one.number in self.records]
            for group in self._groups()
        ]
        found = finalists(groups, default, objective)
        records = [self.records[number] for number in sorted(self.records)]
        gains = {one.number: measured(one, objective) for one in records}
        page = SearchPage(
            knobs=self.trainings.space.knobs,
            records=records,
            gains=gains,
            finalists=found,
            best=self._settings_of(found[0].trial),
            settings=self.settings.identity(),
            objective=objective,
        )
        write_atomically(f"{self.path}/trials.parquet", table_of(records, gains))
        write_atomically(f"{self.path}/best.yaml", _yaml(page.best, page.summary))
        write_atomically(f"{self.path}/report.html", render(page).encode("utf-8", "replace"))
        ended = Counter(one.status for one in records)
        extra: dict[str, Any] = {
            "summary": page.summary,
            "num_trials": len(records),
            "num_pruned": ended["pruned"],
            "num_failed": ended["failed"],
        }
        finish(self.path, extra, self._warnings(records))

    def _warnings(self, records: list[TrialRecord]) -> list[str]:
        found = []
        if num := sum(one.status == "failed" for one in records):
            found.append(f"{num} trials failed: report.html says why")
        searched, asked = sum(one.role == "searched" for one in records), self.settings.num_trials
        if searched < asked:
            found.append(
                f"{searched} trials of the {asked} asked for: the space holds no more that are new"
            )
        return found

    def _settings_of(self, trial: TrialRecord) -> dict[str, Any]:
        settings = self.trainings.settings_of(trial.point)
        left_out = {"num_workers"}
        if "max_rows" not in {*self.settings.model_fields_set, *trial.point}:
            left_out.add("max_rows")  # the search looked at few rows: training takes all
        values = settings.model_dump(mode="json", exclude_unset=True, exclude=left_out)
        return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class _Run:
    """A training among the finalists'."""

    number: int
    point: Point
    seed: int


class _Asking:
    """What the sampler proposes, after what is known already."""

    def __init__(self, maker: StudyMaker) -> None:
        self._maker, settings = maker, maker.settings
        searched = [one for one in maker.records.values() if one.role == "searched"]
        known = [_outcome(one.point, one.glances, one.status) for one in searched]
        space = maker.trainings.space
        self._proposals = Proposals(space, settings.sampler, settings.seed, known)
        self._points: dict[int, Point] = {}
        numbers = range(settings.num_trials)
        self._free = iter([one for one in numbers if one not in maker.records])

    def ask(self) -> Plan | None:
        """Return the next training."""
        number = next(self._free, None)
        point = None if number is None else self._proposals.ask()
        if number is None or point is None:
            return None
        self._points[number] = point
        return self._maker.trainings.plan(number, point, self._maker.settings.seed)

    def told(self, ended: Ended) -> None:
        """Tell the sampler what came of a point."""
        point = self._points[ended.plan.number]
        self._proposals.told(_outcome(point, ended.glances, _status(ended)))

    def record(self, ended: Ended) -> TrialRecord:
        """Return what is kept of a trial."""
        point = self._points[ended.plan.number]
        return self._maker.record(ended, "searched", point, self._maker.settings.seed)


def _status(ended: Ended) -> Status:
    if ended.reason is not None:
        return "failed"
    return "pruned" if ended.pruned else "finished"


def _outcome(point: Point, glances: list[Glance], status: Status) -> Outcome:
    losses = [one.loss for one in glances if one.counts] if status != "failed" else []
    least = [min(losses[: i + 1]) for i in range(len(losses))]
    return Outcome(point, least, pruned=status == "pruned")


def _yaml(settings: Mapping[str, Any], summary: str) -> bytes:
    lines = [f"# {summary}", "# python jobs/finetune.py --config best.yaml --out runs/expert"]
    body = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    return ("\n".join(lines) + "\n" + body).encode()
