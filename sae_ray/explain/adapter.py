"""Explaining: from an expert to what its training changed, checked, with a page for people.

A folder of an explanation holds

    explanation.json    what was found: scores, checks, curves, drift, rows, answers
    latents.parquet     a row a latent: score, what it was checked by, drift
    report.html         all of it for people

Of an expert whose edits sit on latents, latents are ranked on one half of its held-out rows and
checked on the other. Any other adapter changes weights: of it, what the latents do before and after
is told, and no latent is said to be the cause.
"""

import dataclasses
import hashlib
import io
import json
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from peft import PeftModel
from pydantic import Field, JsonValue

from sae_ray.adapters.edits import LATENT_KINDS
from sae_ray.adapters.examples import Example, PairExample
from sae_ray.adapters.material import Learnt, read_learnt, rows_path
from sae_ray.adapters.settings import FinetuneSettings
from sae_ray.artifacts import (
    Manifest,
    State,
    begin,
    finish,
    inspect,
    open_artifact,
    read_file,
    write_atomically,
)
from sae_ray.chat import ChatTokenizer
from sae_ray.config import JobConfig
from sae_ray.curate.scorer import ScorerConfig, check_pair
from sae_ray.curate.sources import EMBEDDED, fingerprint, locate_model, locate_source
from sae_ray.errors import ConfigError, ModelError
from sae_ray.experts.card import ADAPTER, ExpertCard
from sae_ray.explain.adapter_page import AdapterPage, Answered, Pushed, Ranked, render
from sae_ray.explain.agreement import Contender, agreed, require_alike, unseen_by
from sae_ray.explain.attribution import Attribution, attribute, pushes
from sae_ray.explain.dial import Dial, Spread, units_of
from sae_ray.explain.drift import drift
from sae_ray.explain.gains import gained, greedy
from sae_ray.explain.tuned import Spreading, Tuned
from sae_ray.explain.verification import Verification, verify
from sae_ray.lm import HookPoint
from sae_ray.sae.labels import labels_of, read_labels
from sae_ray.sae.neuronpedia_labels import Labels
from sae_ray.sae.pretrained import load_encoder
from sae_ray.threads import one_thread, use_cores

KIND = "explanation"
_MIN_ROWS = 20
"""Held-out rows, of which half rank and half check."""
_NUM_PUSHED, _ROWS_EACH = 5, 3
_SMALL = 10_000_000
"""Parameters below which a second thread costs more than it gives, where cores are shared."""

Progress = tuple[str, int, int, str]
Names = Mapping[str, Mapping[int, str]]
"""What latents are called, by hook point and number."""


class ExplainSettings(JobConfig):
    """What an explanation depends on."""

    lm: str | None = None
    """Where the base lies, if the folder that the expert or the router names has moved."""
    sae: list[str] | None = None
    """Where the SAEs lie that the adapter sits on, in its order, or the one of the router, if they
    have moved. Of lora and subspace, which sit on none, the SAE to look through; without it the
    embedded one, if the base is the embedded model."""
    labels: str | None = None
    """Labels of one of these SAEs: a label file, or a file or folder of Neuronpedia's explanations;
    a path or URL. Default: labels.json in or beside each."""
    num_rows: int = Field(default=256, ge=_MIN_ROWS)
    """Held-out rows that are read, at most: half rank the latents, the others check them."""
    num_top: int = Field(default=20, ge=1)
    """Latents that are checked from the top."""
    num_drawn: int = Field(default=20, ge=0)
    """Latents that are checked of the others, drawn at random."""
    audit_rows: int = Field(default=200, ge=0)
    """Rows that were trained on, in which those are looked for that asked for the top latents."""
    num_answers: int = Field(default=3, ge=0)
    """Held-out prompts that are answered before and after."""
    seed: int = 0
    """Of what is drawn."""
    others: list[str] = []
    """Experts trained as this one with other seeds: on held-out rows that none of them was trained
    on, it is told how alike they rank latents."""
    num_workers: int = Field(default=0, ge=0)
    """Ray workers that turn latents off and on, each with its own model; 0: this process alone.
    Their number does not change the result; of lora and subspace they do nothing."""

    def identity(self) -> dict[str, JsonValue]:
        """Return what decides the result beside what it is made of."""
        fields = set(ExplainSettings.model_fields) - {"lm", "sae", "labels", "num_workers"}
        return self.model_dump(mode="json", include=fields)


class Explaining:
    """One run from an expert to its explanation."""

    def __init__(
        self,
        settings: ExplainSettings,
        expert: str,
        path: str,
        spreading: Spreading | None = None,
    ) -> None:
        """Read what the expert is.

        Args:
            settings: what the explanation depends on.
            expert: folder or URL of it, as jobs/finetune.py writes one.
            path: folder or URL of the explanation.
            spreading: how workers are let in, if settings want any.

        Raises:
            ArtifactError: there is none, or it is not finished.
            ConfigError: it has no adapter, or nothing says through which SAE to look.
        """
        self.settings, self.path = settings, path.rstrip("/")
        self._spreading = spreading
        self._root = root = expert.rstrip("/")
        self.expert: Manifest = open_artifact(root, "expert")
        place = f"{root}/card.json"
        self.card = ExpertCard.decode(read_file(place), place)
        if self.card.adapter == "full":
            raise ConfigError(
                f"{root} is a whole model, not an adapter: there is nothing to take off and put "
                "on again; explain one of kind lora, subspace, steering, scale, affine or residual"
            )
        self.finetuned = _settings_of(self.expert)
        self.lm = locate_model(settings.lm or self.card.base)
        self._on_latents = self.card.adapter in LATENT_KINDS
        self._saes = self._sites()
        """Where the SAE lies that is looked through, by hook point."""
        alone = settings.model_copy(update={"others": []})
        self.others = [Explaining(alone, one, path) for one in settings.others]
        for one in self.others:
            both = (root, one._root)
            require_alike(both, (self.card, one.card), (self._saes, one._saes))

    def run(self) -> Iterator[Progress]:
        """Do what is not done, and say how far it is; a finished folder is left alone.

        Raises:
            SaeRayError: base, SAE or data of the expert are gone, or others.
        """
        labels = self._labels()
        told = json.dumps({point: sorted(one.items()) for point, one in labels.items()})
        parents = {"expert": self.expert.content_hash, "lm": fingerprint("lm", self.lm)}
        parents |= {f"sae {point}": fingerprint("sae", sae) for point, sae in self._saes.items()}
        parents["labels"] = hashlib.sha256(told.encode()).hexdigest()
        parents |= {f"other {n}": one.expert.content_hash for n, one in enumerate(self.others)}
        asked = self.settings.identity()
        if inspect(self.path, KIND, asked, parents) is State.FINISHED:
            return
        if parents["lm"] != self.card.base_sha256:
            raise ConfigError(
                f"{self.lm} is not the base that the expert was trained on "
                f"({self.card.base_sha256[:12]}): name a copy of that with --lm"
            )
        use_cores(None)
        with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
            yield "reading", 0, 1, ""
            learnt = self._learnt(folder)
            every = [self._contender(folder, learnt)]
            every += [one._contender(folder) for one in self.others]
            common = unseen_by(every, learnt.material.held_out) if self.others else []
            tuned = every[0].tuned
            model = tuned.load()
            begin(self.path, KIND, asked, parents)
            is_small = sum(one.numel() for one in model.parameters()) < _SMALL
            with one_thread() if is_small else nullcontext():
                with self._workers(tuned) as spread:
                    page = yield from self._explained(model, tuned.pad, spread, learnt, labels)
                if self.others:  # by workers of their own, when those are gone
                    rows, num_top = common[: self.settings.num_rows], self.settings.num_top
                    agreements = yield from agreed(every, rows, num_top, self._workers)
                    page = dataclasses.replace(page, agreements=agreements)
        self._write(page, [warning for one in labels.values() for warning in one.warnings])

    def _sites(self) -> dict[str, str]:
        """Return where the SAE of each hook point lies: the adapter's own, or the one given."""
        given = self.settings.sae
        if self._on_latents:
            config = f"{self._root}/{ADAPTER}/adapter_config.json"
            sites = json.loads(read_file(config))["sites"]
            if given is not None and len(given) != len(sites):
                raise ConfigError(
                    f"--sae names {len(given)} SAEs and the adapter sits on {len(sites)}: name one "
                    "for each, in the adapter's order, or leave it out"
                )
            saes = given or [site["sae"] for site in sites]
            for sae in given or ():
                check_pair(ScorerConfig(self.lm, sae))  # says what is wrong with it in one line
            points = (site["hook_point"] for site in sites)
            return dict(zip(points, (locate_source("sae", sae) for sae in saes), strict=True))
        if (given is None and self.card.base != EMBEDDED) or (given and len(given) != 1):
            raise ConfigError(
                f"{self._root}, of kind {self.card.adapter}, sits on no SAE: say with --sae "
                "through which SAE of its base to look, one"
            )
        sae = locate_source("sae", given[0] if given else EMBEDDED)
        return {str(check_pair(ScorerConfig(self.lm, sae)).hook_point): sae}

    def _labels(self) -> dict[str, Labels]:
        """Read the labels of each SAE; those given are one's of them."""
        found: dict[str, Labels] = {}
        refused: list[ModelError] = []
        if (given := self.settings.labels) is not None:
            for point, sae in self._saes.items():
                try:
                    found[point] = read_labels(given, sae)
                except ModelError as error:
                    refused.append(error)
            if not found:
                raise refused[0]
            if len({fingerprint("sae", self._saes[point]) for point in found}) > 1:
                raise ConfigError(
                    f"{given} may be the labels of {' or '.join(found)}, and are one SAE's: put "
                    "neuronpedia_id into the metadata of their cfg.json, or leave --labels out"
                )
        return {
            point: found[point] if point in found else labels_of(sae)
            for point, sae in self._saes.items()
        }

    def _learnt(self, staging: str) -> Learnt:
        """Read the expert's rows again, divided as they were."""
        data = rows_path(self.finetuned.data, self.finetuned.objective)
        learnt = read_learnt(self.finetuned, data, self.lm, staging)
        self._require_same_rows(learnt, data)
        if len(learnt.material.held_out) < _MIN_ROWS:
            raise ConfigError(
                f"the expert holds out {len(learnt.material.held_out)} rows, and {_MIN_ROWS} are "
                "needed to rank and to check: train it with a larger --held_out_rows"
            )
        return learnt

    def _require_same_rows(self, learnt: Learnt, data: str) -> None:
        """Refuse rows that have changed: what was trained on might be taken for held out."""
        written = read_file(f"{self._root}/held_out.parquet")
        table = pq.read_table(pa.BufferReader(written), columns=["id"])
        same = table["id"].to_pylist() == [row.id for row in learnt.material.held_out]
        if not same or len(learnt.material.train) != self.expert.extra["num_rows"]:
            raise ConfigError(
                f"{data} does not hold the rows any more that the expert was trained on and held "
                "out: put them back, or train it again"
            )

    def _contender(self, staging: str, learnt: Learnt | None = None) -> Contender:
        """Return this expert as one whose latents are ranked."""
        tuned = Tuned.of(self._root, self.card, self.lm, self._saes)
        rows = (learnt or self._learnt(staging)).material.train
        return Contender(self._root, self.card, tuned, rows)

    def _workers(self, tuned: Tuned) -> AbstractContextManager[Spread | None]:
        if self._spreading is None or not self.settings.num_workers or not self._on_latents:
            return nullcontext()
        return self._spreading(tuned, self.settings.num_workers)

    def _explained(
        self, model: PeftModel, pad: int, spread: Spread | None, learnt: Learnt, labels: Names
    ) -> Generator[Progress, None, AdapterPage]:
        settings = self.settings
        tokenizer = ChatTokenizer.load(self.lm)
        rng = np.random.default_rng(settings.seed)
        # The first of each two rows have chosen the step that was kept: they rank.
        held = learnt.material.held_out
        ranking, checking = (
            [half[i] for i in rng.permutation(len(half))[: settings.num_rows // 2]]
            for half in (held[::2], held[1::2])
        )
        points = {point: HookPoint.parse(point) for point in self._saes}
        encoders = {point: load_encoder(sae) for point, sae in self._saes.items()}
        yield "looking at drift", 0, 1, ""
        drifts = {
            point: drift(model, encoders[point], _texts(checking), pad=pad, point=points[point])
            for point in points
        }
        found: Attribution | None = None
        checked: Verification | None = None
        places: list[tuple[str, int]] = []
        pushed: list[Pushed] = []
        ranked: list[Ranked] = []
        if self._on_latents:
            dial = Dial(model, pad, spread=spread)
            places = [(str(site.point), int(i)) for site in dial.sites for i in site.latents]
            yield "ranking latents", 0, 1, f"on {len(ranking)} held-out rows"
            found = attribute(dial, units_of(ranking))  # pyright: ignore[reportArgumentType]
            for done, total, result in verify(
                dial, units_of(checking), found,  # pyright: ignore[reportArgumentType]
                num_top=settings.num_top, num_drawn=settings.num_drawn,
                density=np.array([drifts[point].density[i] for point, i in places]),
                seed=settings.seed,
            ):  # fmt: skip
                yield "checking latents", done, total, ""
                checked = result
            assert checked is not None
            yield "looking for rows that asked for them", 0, 1, ""
            ranked = [
                Ranked.of(one, places[one.number], found, checked, labels, drifts)
                for one in checked.top
            ]
            pushed = self._pushed(dial, learnt, ranked, tokenizer, rng)
        yield "answering", 0, 1, ""
        some = _texts(checking)[: settings.num_answers]
        answered = [_answered(model, row, tokenizer) for row in some]
        return AdapterPage(
            card=self.card, attribution=found, places=places, verification=checked, ranked=ranked,
            pushed=pushed, drifts=drifts, labels=labels, answered=answered,
            num_ranking=len(ranking), num_checking=len(checking),
        )  # fmt: skip

    def _pushed(
        self,
        dial: Dial,
        learnt: Learnt,
        ranked: Sequence[Ranked],
        tokenizer: ChatTokenizer,
        rng: np.random.Generator,
    ) -> list[Pushed]:
        """Return the rows that were trained on and asked for the first latents most."""
        train = list(learnt.material.train)
        some = [train[i] for i in rng.permutation(len(train))[: self.settings.audit_rows]]
        first = ([one for one in ranked if one.is_verified] or ranked)[:_NUM_PUSHED]
        if not some or not first:
            return []
        by_row = pushes(dial, units_of(some))  # pyright: ignore[reportArgumentType]
        found = []
        for one in first:
            asked = by_row[:, one.checked.number]  # up is the way the edit went, whatever its sign
            order = np.argsort(-asked, kind="stable")[:_ROWS_EACH]
            rows = [
                (some[i].id, float(asked[i]), _said(some[i], tokenizer))
                for i in order.tolist()
                if asked[i] > 0
            ]
            share = float((asked > 0).mean())
            found.append(Pushed(one.point, one.latent, one.label, share, rows))
        return found

    def _write(self, page: AdapterPage, warnings: Sequence[str]) -> None:
        content = json.dumps(page.to_json(), indent=1, ensure_ascii=False)
        write_atomically(f"{self.path}/explanation.json", content.encode("utf-8", "replace"))
        write_atomically(f"{self.path}/report.html", render(page).encode("utf-8", "replace"))
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(page.rows()), sink, compression="zstd")
        write_atomically(f"{self.path}/latents.parquet", sink.getvalue())
        counts: dict[str, JsonValue] = {
            "num_verified": len(page.verified),
            "gap": page.attribution.gap if page.attribution else None,
            "summary": page.summary,
        }
        finish(self.path, counts, [*page.warnings, *warnings])


def _settings_of(expert: Manifest) -> FinetuneSettings:
    """Return the settings that an expert was made with."""
    known = {k: v for k, v in expert.config.items() if k in FinetuneSettings.model_fields}
    named = {role: source.name for role, source in expert.sources.items()}
    given = {role: named[role] for role in ("lm", "data") if named[role] != EMBEDDED}
    # Rows are read alone, in which as many may be bad as were then.
    unread = {"general_rows": 0, "max_rejected": 1.0}
    return FinetuneSettings.model_construct(
        **{**FinetuneSettings().model_dump(), **known, **given, **unread}
    )


def _texts(rows: Sequence[Example | PairExample]) -> list[Example]:
    return [one.chosen if isinstance(one, PairExample) else one for one in rows]


def _said(row: Example | PairExample, tokenizer: ChatTokenizer) -> str:
    (one,) = _texts([row])
    return str(tokenizer.tokenizer.decode(one.ids))


def _answered(model: PeftModel, row: Example, tokenizer: ChatTokenizer) -> Answered:
    prompt = row.ids[: int(row.learnt.argmax())]
    return Answered(
        prompt=str(tokenizer.tokenizer.decode(prompt, skip_special_tokens=True)),
        gains=gained(model, row, tokenizer),
        before=greedy(model, row, tokenizer, tuned=False),
        after=greedy(model, row, tokenizer, tuned=True),
    )
