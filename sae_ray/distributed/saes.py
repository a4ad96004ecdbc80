"""From a model and conversations to a folder of SAEs with their quality, labels and a page.

A folder of SAEs holds

    NAME/cfg.json, sae_weights.safetensors    one SAE, as sae_lens.SAE.load_from_disk reads it
    NAME/quality.json                         what it leaves unexplained, by token kind and norm
    NAME/labels/                              what its latents stand for, where that was asked for
    curves.json                               loss, L0, dead and dense latents over the training
    rejected.parquet                          rows that could not be read, with reasons
    report.html                               all of it for people
"""

import dataclasses
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import JsonValue

from sae_ray import tiny
from sae_ray.artifacts import State, begin, finish, inspect, locate, read_file, write_atomically
from sae_ray.curate.sources import EMBEDDED, describe_source, fingerprint, locate_source
from sae_ray.distributed.repeats import find_repeats
from sae_ray.distributed.train import train_parts
from sae_ray.explain.label_settings import LabelSettings
from sae_ray.explain.labelling import Labelling
from sae_ray.explain.steered import SpecialSteering
from sae_ray.explain.trackers import Trackers, flat
from sae_ray.explain.training import TrainedSAE, TrainingPage, examples
from sae_ray.lm import LanguageModel, load_config
from sae_ray.pool import Plan, plan
from sae_ray.rows import FORMS, PLAIN_FORMS, Rejected, count_reasons
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.labels import read_labels
from sae_ray.sae.part import FOUND, Task
from sae_ray.sae.quality import Quality, batches_of, measure_saes
from sae_ray.sae.sequences import Lanes
from sae_ray.sae.settings import TrainSettings
from sae_ray.sae.splice import WholeModel, recovered
from sae_ray.sae.train import Step

KIND = "saes"
_DONE = "done.json"
_TRACKED = ("loss", "fvu", "l0", "num_dead", "num_dense", "gradient_norm", "learning_rate")
_BAD = pa.schema(
    [("row", pa.int64()), ("id", pa.string()), ("reason", pa.string()), ("excerpt", pa.string())]
)

Shown = tuple[str, int, int, str]
"""What is being done, how much of it, of how much, and what else there is to say."""


class SAERun:
    """One run: what is read and found on the way to a folder of SAEs."""

    def __init__(self, settings: TrainSettings, path: str) -> None:
        """Check what is asked for against the model; nothing else is read yet.

        Raises:
            ModelError, ConfigError: the model is not there, or has no such hook point.
        """
        self.settings, self.path = settings, path
        self.is_plain = settings.regime == "bt_p"
        lm = locate_source("lm", settings.lm or EMBEDDED)
        # Workers have working directories of their own.
        self.lm = str(Path(lm).absolute()) if Path(lm).exists() else lm
        embedded = tiny.text_path() if self.is_plain else tiny.pool_path()
        self.data = settings.data or str(embedded)
        config = load_config(self.lm)
        self.model_name = settings.lm or tiny.MODEL_NAME
        self.specs = tuple(settings.specs(config, self.model_name))
        self.arrangement, self.recipe = settings.arrangement(config), settings.recipe()
        self.parts: list[dict[str, Any]] = []
        self.warnings: list[str] = []

    def run(self) -> Iterator[Shown]:
        """Do what is not done, and say how far it is; a finished folder is left alone.

        Raises:
            PoolError: the data cannot be read.
            TrainingError: a loss was no number or blew up.
            WorkError: workers were lost too often.
            ArtifactError: the folder holds something else.
        """
        identity = self.settings.identity()
        parents = {"lm": fingerprint("lm", self.settings.lm or EMBEDDED)}
        sources = {"lm": describe_source("lm", self.settings.lm or EMBEDDED)}
        if inspect(self.path, KIND, identity, parents, sources, so_far=True) is State.FINISHED:
            return
        found = plan(
            self.data,
            rows_per_shard=self.settings.rows_per_shard,
            staging=f"{self.path}/.staging",
            forms=PLAIN_FORMS if self.is_plain else FORMS,
        )
        begin(self.path, KIND, identity, {**parents, "pool": found.fingerprint}, sources)
        yield "looking for repeats", 0, 1, ""
        task = self._task(found)
        yield from self._train(task)
        self.parts = self._found()
        yield "measuring", 0, len(self.specs), ""
        with TemporaryDirectory(prefix="sae-ray-") as scratch:
            yield from self._finish(task, Path(scratch))

    def _task(self, found: Plan) -> Task:
        settings, repeats = self.settings, frozenset[int]()
        if settings.drop_repeats:
            on_ray = settings.num_workers > 0
            repeats = find_repeats(
                found.slices, settings.drop_repeats, plain_text=self.is_plain, on_ray=on_ray
            )
        return Task(
            settings,
            self.lm,
            self.specs,
            self.recipe,
            self.arrangement,
            found.slices,
            repeats,
            half_is_held_out=settings.data is None and not self.is_plain,
        )

    def _train(self, task: Task) -> Iterator[Shown]:
        """Train, unless that was done before a run was stopped."""
        done = f"{self.path}/{FOUND}/{_DONE}"
        fs, place = locate(done)
        if fs.exists(place):
            return
        trackers = Trackers(self.settings.trackers, self.path)
        started, first = time.monotonic(), 0
        for step in train_parts(task, self.path, self.model_name):
            first = first or step.num_tokens
            speed = (step.num_tokens - first) / max(1e-9, time.monotonic() - started)
            trackers.log(dict(flat(step.saes, _TRACKED)), step.number)
            yield "training", step.number + 1, self.recipe.num_steps, _said(step, speed)
        write_atomically(done, b"{}")

    def _found(self) -> list[dict[str, Any]]:
        fs, folder = locate(f"{self.path}/{FOUND}")
        names = sorted(str(name) for name in fs.ls(folder, detail=False))
        numbers = [Path(name).stem for name in names if Path(name).stem.isdigit()]
        return [json.loads(read_file(f"{self.path}/{FOUND}/{one}.json")) for one in numbers]

    def _finish(self, task: Task, scratch: Path) -> Iterator[Shown]:
        """Measure, label and write down what was trained."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        encoders = {name: self._load(name, scratch, device) for name in self._names}
        reader = task.reader()
        instances = [
            one
            for whole in reader.held_out(task.slices, self.settings.eval_conversations)
            for one in self.arrangement.arrange([whole])
        ]
        points = sorted({spec.hook_point for spec in self.specs})
        model = LanguageModel.load(self.lm, points, dtype=self.settings.dtype, device=device)
        whole = None
        if instances and (self.settings.splice or self.settings.steer_prompts):
            whole = WholeModel.load(self.lm, dtype=self.settings.dtype, device=device)
        quality = dict.fromkeys(self._names)
        if instances:
            quality = self._measured(model, whole, encoders, instances)
        else:
            self.warnings.append("no row is held out: nothing was measured; raise held_out_share")
        for name, one in quality.items():
            text = json.dumps(one.to_json() if one else None, indent=1)
            write_atomically(f"{self.path}/{name}/quality.json", text.encode())
        trained: list[TrainedSAE] = []
        if not self.settings.steer_prompts:
            whole = None  # labelling loads a model of its own
        prompts = reader.held_out_prompts(task.slices, self.settings.steer_prompts)
        steered = SpecialSteering(model, whole, reader.tokenizer, instances, prompts)
        for number, spec in enumerate(self.specs):
            yield "looking at latents", number, len(self.specs), spec.name
            labels = self._label(spec.name, scratch)
            shown = examples(model, encoders[spec.name], instances, reader.tokenizer, labels)
            pushed = steered(encoders[spec.name], quality[spec.name], labels)
            trained.append(TrainedSAE(spec, quality[spec.name], shown, pushed))
        yield "writing", 0, 1, ""
        self._write(task, trained)

    def _measured(
        self,
        model: LanguageModel,
        whole: WholeModel | None,
        encoders: dict[str, LatentEncoder],
        instances: list[Lanes],
    ) -> dict[str, Quality | None]:
        quality: dict[str, Quality | None] = dict(measure_saes(model, encoders, instances))
        if self.settings.splice and whole:
            for name, cost in recovered(whole, encoders, batches_of(instances, 2048)).items():
                one = quality[name]
                assert one is not None
                quality[name] = dataclasses.replace(one, recovered=cost)
        return quality

    def _label(self, name: str, scratch: Path) -> dict[int, str]:
        """Label a SAE's latents, and return the labels; what it writes lies beside the SAE."""
        if not self.settings.label_conversations:
            return {}
        settings = LabelSettings(
            lm=self.lm,
            sae=str(scratch / name),
            data=str(tiny.pool_path()) if self.settings.data is None else self.data,
            max_conversations=self.settings.label_conversations,
            seed=self.settings.seed,
        )
        folder = scratch / "labels" / name
        for _ in Labelling(settings, str(folder)).run():
            pass
        for file in sorted(one for one in folder.rglob("*") if one.is_file()):
            if file.name != "manifest.json":
                target = f"{self.path}/{name}/labels/{file.relative_to(folder)}"
                write_atomically(target, file.read_bytes())
        return read_labels(folder / "labels.json", scratch / name)

    def _load(self, name: str, scratch: Path, device: str) -> LatentEncoder:
        for file in ("cfg.json", "sae_weights.safetensors"):
            (scratch / name).mkdir(exist_ok=True)
            (scratch / name / file).write_bytes(read_file(f"{self.path}/{name}/{file}"))
        return LatentEncoder.load(scratch / name).to(dtype=torch.float32, device=device)

    def _write(self, task: Task, trained: list[TrainedSAE]) -> None:
        rejected = {row[0]: Rejected(*row) for part in self.parts for row in part["rejected"]}
        rows_in = {index: n for part in self.parts for index, n in part["rows_in"].items()}
        divided = self.parts if self.settings.placement == "data" else self.parts[:1]
        sums = {
            name: sum(part["counts"][name] for part in divided)
            for name in ("instances", "tokens", "padding", "cut_instances", "cut_tokens")
        }
        curves = _merged([part["curves"] for part in self.parts])
        counts: dict[str, JsonValue] = {
            "num_saes": len(trained),
            "num_steps": self.recipe.num_steps,
            "num_tokens": curves[-1]["num_tokens"],
            "num_rows": sum(rows_in.values()),
            "num_rejected": len(rejected),
            "rejected": dict(count_reasons(rejected.values())),
            "num_repeats": len(task.repeats),
            "num_passes": max(part["num_passes"] for part in self.parts),
            "padding_share": sums["padding"] / max(1, sums["padding"] + sums["tokens"]),
            "cut_instances": sums["cut_instances"],
            "cut_tokens": sums["cut_tokens"],
        }
        write_atomically(f"{self.path}/curves.json", json.dumps(curves).encode())
        table = pa.Table.from_pylist(
            [dataclasses.asdict(rejected[n]) for n in sorted(rejected)], _BAD
        )
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        write_atomically(f"{self.path}/rejected.parquet", sink.getvalue())
        page = TrainingPage(self.model_name, self.settings.regime, trained, curves, counts)
        write_atomically(f"{self.path}/report.html", page.render().encode("utf-8", "replace"))
        finish(self.path, counts, self.warnings)

    @property
    def _names(self) -> list[str]:
        return [spec.name for spec in self.specs]


def _said(step: Step, speed: float) -> str:
    l0 = sum(one.l0 for one in step.saes.values()) / len(step.saes)
    fvu = sum(one.fvu for one in step.saes.values()) / len(step.saes)
    return f"{speed:,.0f} tokens/s, FVU {fvu:.3f}, L0 {l0:.0f}"


def _merged(curves: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Put the curves of SAEs on different workers together; workers with all SAEs have the same."""
    merged: dict[int, dict[str, Any]] = {}
    for point in (point for part in curves for point in part):
        there = merged.setdefault(point["number"], {**point, "saes": {}})
        there["saes"] |= point["saes"]
    return [merged[number] for number in sorted(merged)]
