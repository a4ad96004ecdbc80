"""Router: which expert answers a conversation, or the base; from what the base model sees in it.

Read is the last request alone, at the cost of one pass of the truncated base model. The expert that
answered the request before stays where it is nearly as good: earlier requests of a conversation are
routed first, unless the caller says who answered. See `sae_ray.experts.fitting` for what decides.

    router.safetensors   the space, the background's and the experts' prompts as vectors, and what
                         was fitted to them; no text
    router.json          the experts, and the labels of latents
    manifest.json        written last; model and SAE by name and hash
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float32, Int32
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sae_ray.artifacts import State, begin, finish, open_artifact, read_file, write_atomically
from sae_ray.curate.block import IndexBlock
from sae_ray.curate.sources import describe_source
from sae_ray.curate.space import HiddenSpace
from sae_ray.errors import ArtifactError, ConfigError, RegistryError
from sae_ray.experts.fitting import Classifier, Fitted, Kind, Units, fit, unclaimed
from sae_ray.experts.prototypes import Eyes, Turns, requests

KIND = "router"
BASE = "base"
"""The base's key among a route's scores."""
HYSTERESIS = 0.25
"""What is added to the s of who answered before, on a scale where an expert's own prompts lie at 1.
"""
MAX_TURNS = 4
"""Requests of a conversation that are read, from its end."""
NUM_REASONS = 5


@dataclasses.dataclass(frozen=True)
class Reason:
    """A latent that spoke for a route; of an abstention, against the expert that came nearest.

    The contribution of latent l is (z_l - mean z_l) W_dec[l] . g, in units of the cosine (of the
    log odds, with a classifier) that g stands for: the direction in the model that speaks for the
    expert. It is what g . x would lose with the latent at its mean. Only latents that are on speak.
    """

    latent: int
    label: str
    contribution: float


@dataclasses.dataclass(frozen=True)
class Route:
    """A decision."""

    expert_ids: tuple[str, ...]
    """Best first; empty where the base answers."""
    weights: tuple[float, ...]
    """Of the experts; they sum to 1."""
    reasons: tuple[Reason, ...]
    scores: Mapping[str, float]
    """Calibrated probability of every expert by id, and of `base`."""
    abstained: bool

    @property
    def margin(self) -> float:
        """Return by how much probability the first choice is ahead of the second."""
        best = sorted(self.scores.values())[-2:]
        return best[1] - best[0]


@dataclasses.dataclass(frozen=True)
class Routed:
    """An expert that a router knows."""

    id: str
    name: str
    description: str
    units: Units
    """Its prompts."""


class Router:
    """Routers of every kind; immutable, and safe to be used from several threads."""

    def __init__(
        self,
        eyes: Eyes,
        space: HiddenSpace,
        latent_means: Float32[np.ndarray, " d_sae"],
        background: Units,
        experts: Sequence[Routed],
        fitted: Fitted,
        labels: Mapping[int, str],
    ) -> None:
        self.eyes, self.space, self.latent_means = eyes, space, latent_means
        self.background, self.experts, self.fitted = background, tuple(experts), fitted
        self.labels = labels

    @classmethod
    def fit(
        cls,
        eyes: Eyes,
        experts: Mapping[str, tuple[str, str, IndexBlock]],
        background: IndexBlock,
        *,
        kind: Kind = "knn",
        labels: Mapping[int, str] | None = None,
        mixed: bool = False,
    ) -> "Router":
        """Fit a router.

        Args:
            eyes: what reads prompts.
            experts: id -> name, description and prototypes.
            background: prompts that no expert should answer, in no particular order.
            kind: how it decides.
            labels: what latents stand for.
            mixed: the background is a pool in which the experts' tasks occur too: prompts that are
                like an expert's own are set aside. It is then no sample of what is nobody's, and
                nothing is promised of its share that stays with the base.

        Raises:
            RegistryError: there are too few prompts.
        """
        seen = background.take(np.arange(0, len(background), 2))
        space = _laid_out(HiddenSpace.fit(seen))
        units = space.project(background)
        units = np.concatenate([units[::2], units[1::2]])  # the space has seen the first half
        routed = [
            Routed(id, name, about, space.project(block))
            for id, (name, about, block) in experts.items()
        ]
        means = np.asarray(seen.pooled("mean").mean(axis=0), dtype=np.float32).ravel()
        if mixed:
            near = _fit("knn", routed, units)
            units = units[unclaimed(near, units)]
        fitted = _fit(kind, routed, units)
        return cls(eyes, space, means, units, routed, fitted, dict(labels or {}))

    def add(self, id: str, name: str, description: str, prototypes: IndexBlock) -> "Router":
        """Return a router that knows one expert more; nothing is trained.

        Raises:
            ConfigError: it is a logistic one, which must be fitted again.
        """
        new = Routed(id, name, description, self.space.project(prototypes))
        return self._with([*self.experts, new])

    def retire(self, id: str) -> "Router":
        """Return a router that knows one expert less; nothing is trained.

        Raises:
            ConfigError: it is a logistic one, which must be fitted again.
            RegistryError: it does not know the expert, or no other.
        """
        self._number(id)
        return self._with([one for one in self.experts if one.id != id])

    def route(
        self,
        messages: Turns,
        *,
        previous: str | None = None,
        top_k: int = 1,
    ) -> Route:
        """Decide who answers a conversation.

        Args:
            messages: its turns, the last request at their end.
            previous: id of the expert that answered before; one that is not the router's counts
                as not known.
            top_k: experts at most, of those that the base is not ahead of.

        Raises:
            ConfigError: `top_k` is more than there are experts.
        """
        return self.route_many([messages], previous=[previous], top_k=top_k)[0]

    def route_many(
        self,
        conversations: Sequence[Turns],
        *,
        previous: Sequence[str | None] | None = None,
        top_k: int = 1,
    ) -> list[Route]:
        """Decide who answers each of some conversations, in one pass over all of them."""
        if not 1 <= top_k <= len(self.experts):
            names = ", ".join(one.name for one in self.experts)
            raise ConfigError(
                f"top_k={top_k} but the router knows {len(self.experts)} experts ({names}): give 1 "
                f"to {len(self.experts)}, or register more and fit it again"
            )
        before = previous or [None] * len(conversations)
        asked = [requests(one)[-MAX_TURNS:] for one in conversations]
        ids = {one.id for one in self.experts}
        asked = [
            turns[-1:] if known in ids else turns
            for turns, known in zip(asked, before, strict=True)
        ]
        block = self.eyes.read([text for turns in asked for text in turns])
        scores = self.fitted.scores(self.space.project(block)) if len(block) else None
        place = {int(row): i for i, row in enumerate(block.rows)}
        routes, start = [], 0
        for turns, known in zip(asked, before, strict=True):
            found = [place.get(row) for row in range(start, start + len(turns))]
            start += len(turns)
            routes.append(self._decide(block, scores, found, known, top_k))
        return routes

    def scores(self, block: IndexBlock) -> Float32[np.ndarray, "n experts"]:
        """Return s - t of prompts that were read, for every expert in order."""
        return self.fitted.scores(self.space.project(block))

    def contributions(
        self, block: IndexBlock, row: int, expert: int
    ) -> tuple[Int32[np.ndarray, " on"], Float32[np.ndarray, " on"]]:
        """Return the latents that are on in a prompt, and what each contributes to an expert."""
        raw = (block.hidden_mean()[row] - self.space.mean) @ self.space.basis
        length = max(float(np.linalg.norm(raw)), 1e-9)
        pull = self.fitted.pull((raw / length).astype(np.float32), expert)
        direction = torch.from_numpy((self.space.basis @ pull / length).astype(np.float32))
        on = slice(block.indptr[row], block.indptr[row + 1])
        latents = block.latents[on]
        decoder = self.eyes.scorer.encoder.W_dec
        written = decoder[torch.from_numpy(latents.astype(np.int64)).to(decoder.device)]
        speaks = (written.float().cpu() @ direction).numpy()
        return latents, (block.means[on, 0] - self.latent_means[latents]) * speaks

    def save(self, path: str, lm: str, sae: str) -> None:
        """Write the router as an artifact; `lm` and `sae` say where these lie."""
        sources = {"lm": describe_source("lm", lm), "sae": describe_source("sae", sae)}
        config = {"kind": self.fitted.kind, "experts": [one.id for one in self.experts]}
        parents = {"lm": self.eyes.lm, "sae": self.eyes.sae}
        if begin(path, KIND, config, parents, sources) is State.FINISHED:
            return
        about = {
            "experts": [[one.id, one.name, one.description] for one in self.experts],
            "labels": {str(latent): label for latent, label in self.labels.items()},
            "temperature": self.fitted.temperature,
        }
        write_atomically(f"{path}/router.safetensors", save(self._tensors()))
        write_atomically(f"{path}/router.json", json.dumps(about, ensure_ascii=False).encode())
        finish(path, {"num_experts": len(self.experts), "num_background": len(self.background)})

    @classmethod
    def load(cls, path: str, lm: str | None = None, sae: str | None = None) -> "Router":
        """Load a router, and the model and SAE that it reads prompts through.

        Args:
            path: folder or URL that `save` wrote.
            lm: where the base model lies, if not where it did.
            sae: the same of the SAE.

        Raises:
            ArtifactError: it is no router, is damaged, or model or SAE are others.
        """
        manifest = open_artifact(path, KIND)
        lm, sae = lm or manifest.sources["lm"].name, sae or manifest.sources["sae"].name
        try:
            about = json.loads(read_file(f"{path}/router.json"))
            tensors = load(read_file(f"{path}/router.safetensors"))
        except (SafetensorError, ValueError, FileNotFoundError) as error:
            raise ArtifactError(f"the router {path} is damaged ({error}): fit it again") from None
        eyes = Eyes.open(lm, sae)
        for role, name, found in (("lm", lm, eyes.lm), ("sae", sae, eyes.sae)):
            if found != manifest.parents[role]:
                raise ArtifactError(
                    f"the router {path} was fitted with another {role} than {name} holds: give "
                    f"--{role} with a copy of what it was fitted with, or fit it again"
                )
        return cls._of(eyes, tensors, about, manifest.config["kind"])  # pyright: ignore

    @classmethod
    def _of(cls, eyes: Eyes, tensors: dict[str, np.ndarray], about: dict, kind: Kind) -> "Router":
        fields = [field.name for field in dataclasses.fields(HiddenSpace)]
        count = range(len(about["experts"]))
        classifier = None
        if "coefficients" in tensors:
            classifier = Classifier(tensors["coefficients"], tensors["intercepts"])
        fitted = Fitted(
            kind,
            tuple(tensors[f"members.{i}"] for i in count),
            tensors["nobodys"],
            tensors["low"],
            tensors["mid"],
            classifier,
            tensors["thresholds"],
            about["temperature"],
        )
        return cls(
            eyes,
            HiddenSpace(**{name: tensors[f"space.{name}"] for name in fields}),
            tensors["latent_means"],
            tensors["background"],
            [Routed(*about["experts"][i], tensors[f"prompts.{i}"]) for i in count],  # pyright: ignore
            fitted,
            {int(latent): label for latent, label in about["labels"].items()},
        )

    def _tensors(self) -> dict[str, np.ndarray]:
        fitted, space = self.fitted, dataclasses.asdict(self.space)
        tensors = {f"space.{name}": values for name, values in space.items()}
        tensors |= {"latent_means": self.latent_means, "background": self.background}
        tensors |= {"nobodys": fitted.nobodys, "low": fitted.low, "mid": fitted.mid}
        tensors |= {"thresholds": fitted.thresholds}
        tensors |= {f"prompts.{i}": one.units for i, one in enumerate(self.experts)}
        tensors |= {f"members.{i}": one for i, one in enumerate(fitted.members)}
        if fitted.classifier is not None:
            tensors |= dataclasses.asdict(fitted.classifier)
        return {name: np.ascontiguousarray(values) for name, values in tensors.items()}

    def _with(self, experts: Sequence[Routed]) -> "Router":
        if self.fitted.kind == "logistic":
            raise ConfigError(
                "a logistic router is trained on all of its experts: fit it again with "
                "jobs/fit_router.py, or use kind zero_shot or knn, which take experts as they come"
            )
        fitted = _fit(self.fitted.kind, experts, self.background)
        return Router(
            self.eyes,
            self.space,
            self.latent_means,
            self.background,
            experts,
            fitted,
            self.labels,
        )

    def _number(self, id: str) -> int:
        for number, one in enumerate(self.experts):
            if one.id == id:
                return number
        names = ", ".join(f"{one.name} ({one.id})" for one in self.experts)
        raise RegistryError(f"expert {id!r} is none of the router's: it knows {names}; give an id")

    def _decide(
        self,
        block: IndexBlock,
        scores: Float32[np.ndarray, "n experts"] | None,
        turns: Sequence[int | None],
        previous: str | None,
        top_k: int,
    ) -> Route:
        """Route the requests of one conversation in order; that of the last one counts."""
        known = [one.id for one in self.experts]
        before = known.index(previous) if previous in known else None
        if scores is None or not turns or turns[-1] is None:  # nothing that could be read
            nobody = {**dict.fromkeys(known, 0.0), BASE: 1.0}
            return Route((), (), (), MappingProxyType(nobody), abstained=True)
        logs = np.zeros(0)
        for row in (one for one in turns if one is not None):
            s = scores[row].astype(np.float64)
            if before is not None:
                s[before] += HYSTERESIS
            logs = self.fitted.log_probabilities(s[None])[0]
            before = None if logs.argmax() == len(known) else int(logs.argmax())
        order = np.argsort(-logs[:-1], kind="stable")
        chosen = [int(e) for e in order[:top_k] if before is not None and logs[e] >= logs[-1]]
        shares = np.exp(logs[chosen] - logs[chosen].max()) if chosen else np.zeros(0)
        odds = dict(zip([*known, BASE], np.exp(logs).tolist(), strict=True))
        return Route(
            tuple(known[e] for e in chosen),
            tuple((shares / shares.sum()).tolist()) if chosen else (),
            self._reasons(block, turns[-1], int(order[0]), against=not chosen),
            MappingProxyType(odds),
            abstained=not chosen,
        )

    def _reasons(
        self, block: IndexBlock, row: int, expert: int, *, against: bool
    ) -> tuple[Reason, ...]:
        if self.eyes.scorer.encoder.is_transcoder:
            return ()  # it writes elsewhere than it reads: its latents do not add up to x
        latents, each = self.contributions(block, row, expert)
        sign = -1.0 if against else 1.0
        order = np.argsort(-sign * each, kind="stable")[:NUM_REASONS]
        return tuple(
            Reason(latent, self.labels.get(latent, "unlabelled"), contribution)
            for latent, contribution in zip(
                latents[order].tolist(), each[order].tolist(), strict=True
            )
            if sign * contribution > 0
        )


def _fit(kind: Kind, experts: Sequence[Routed], background: Units) -> Fitted:
    names, units = [one.name for one in experts], [one.units for one in experts]
    return fit(kind, names, units, background)


def _laid_out(space: HiddenSpace) -> HiddenSpace:
    """Lay arrays out as they come back from a file: products depend on it in their last digit."""
    fields = dataclasses.asdict(space)
    return HiddenSpace(**{name: np.ascontiguousarray(values) for name, values in fields.items()})
