"""Routes explained: who would answer each of some prompts, why, and where in it that was read.

A folder of such an explanation holds

    route.json     decision, scores, reasons and tokens of every prompt
    report.html    all of it for people

Each prompt is a conversation of one turn, with no expert that answered before. All that is told is
what the router decided by, and no cause beyond it.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from sae_ray.artifacts import (
    Source,
    State,
    begin,
    finish,
    inspect,
    open_artifact,
    verify,
    write_atomically,
)
from sae_ray.errors import ConfigError
from sae_ray.experts.fitting import Kind
from sae_ray.experts.prototypes import ReadToken, tokens_of
from sae_ray.experts.router import BASE, Route, Router
from sae_ray.experts.router import KIND as ROUTER
from sae_ray.explain.filled import fill
from sae_ray.explain.shading import shade, to_html
from sae_ray.threads import use_cores

KIND = "route-explanation"
_NUM_STRONGEST = 3

Progress = tuple[str, int, int, str]


@dataclasses.dataclass(frozen=True)
class Standing:
    """An expert before a prompt."""

    id: str
    name: str
    probability: float
    threshold: float
    """t: the base answers where every expert's score is under its own."""
    lead: float | None
    """s - t; None where nothing of the prompt could be read."""

    @property
    def score(self) -> float | None:
        """Return s."""
        return None if self.lead is None else self.threshold + self.lead


@dataclasses.dataclass(frozen=True)
class ExplainedRoute:
    """A decision, with what it was made by."""

    prompt: str
    num_unread: int
    """Characters at its start that were not read."""
    route: Route
    standings: Sequence[Standing]
    """Of every expert, the likeliest first."""
    tokens: Sequence[ReadToken]
    """As they were read, with the latents of the reasons."""
    shaded: Markup
    """What was read of the prompt."""

    @property
    def weights(self) -> dict[str, float]:
        """Return the weights of those who answer by id, best first; none where the base does."""
        return dict(zip(self.route.expert_ids, self.route.weights, strict=True))

    @property
    def chosen(self) -> list[tuple[Standing, float]]:
        """Return who answers, with their weights."""
        by_id = {one.id: one for one in self.standings}
        return [(by_id[id], weight) for id, weight in self.weights.items()]

    @property
    def decision(self) -> str:
        """Say who answers."""
        if len(self.chosen) < 2:
            return f"Sent to {self.chosen[0][0].name}" if self.chosen else "The base answers"
        return "Sent to " + " and ".join(f"{one.name} ({part:.0%})" for one, part in self.chosen)

    @property
    def why(self) -> str:
        """Say by which scores."""
        first = self.standings[0]
        if first.lead is None:
            return "nothing in the prompt could be read."
        of_first = f"a score of {first.score:.2f} against a threshold of {first.threshold:.2f}"
        if not self.chosen:
            return f"no expert reaches its threshold; {first.name} comes nearest, with {of_first}."
        told = f"{first.name} has {of_first}"
        for one in self.standings[1:2]:
            assert one.lead is not None, "who is read for one is read for all"
            side = "over" if one.lead >= 0 else "under"
            told += f"; {one.name} comes next, {abs(one.lead):.2f} {side} its own"
        return f"{told}."

    @property
    def case(self) -> str:
        """Say for whom or against whom its reasons speak."""
        if not self.route.reasons:
            return "There is no latent to name."
        name = self.standings[0].name
        if self.chosen:
            return f"What was read that speaks for {name}:"
        return f"What was read against {name}, which came nearest:"

    def strongest(self, latent: int) -> list[tuple[str, float]]:
        """Return the tokens where a latent is most on, with its activations."""
        shown = [one for one in self.tokens if one.text.strip() and latent in one.activations]
        shown.sort(key=lambda one: -one.activations[latent])
        return [(one.text, one.activations[latent]) for one in shown[:_NUM_STRONGEST]]

    def to_json(self) -> dict[str, Any]:
        """Return it in plain values."""
        return {
            "prompt": self.prompt,
            "num_unread": self.num_unread,
            "decision": self.decision,
            "why": self.why,
            "experts": [
                {"id": one.id, "name": one.name, "weight": weight} for one, weight in self.chosen
            ],
            "abstained": self.route.abstained,
            "base_probability": self.route.scores[BASE],
            "scores": [
                {
                    "id": one.id,
                    "name": one.name,
                    "score": one.score,
                    "threshold": one.threshold,
                    "probability": one.probability,
                }
                for one in self.standings
            ],
            "case": self.case,
            "reasons": [dataclasses.asdict(one) for one in self.route.reasons],
            "tokens": [one.told for one in self.tokens],
        }


@dataclasses.dataclass(frozen=True)
class RoutePage:
    """All that the page says."""

    kind: Kind
    router: str
    """Content hash."""
    experts: Sequence[tuple[str, str, str]]
    """Id, name and description."""
    routes: Sequence[ExplainedRoute]

    @property
    def summary(self) -> str:
        """Say who answers how many."""
        num = len(self.routes)
        stay = sum(one.route.abstained for one in self.routes)
        if num == 1:
            return f"{self.routes[0].decision}: {self.routes[0].why}"
        return f"{num} prompts: {num - stay} sent to experts, {stay} answered by the base."

    def to_json(self) -> dict[str, Any]:
        """Return the facts of the page in plain values."""
        fields = ("id", "name", "description")
        experts = [dict(zip(fields, one, strict=True)) for one in self.experts]
        return {
            "summary": self.summary,
            "router": {"kind": self.kind, "content_hash": self.router, "experts": experts},
            "routes": [one.to_json() for one in self.routes],
        }


def explain_routes(
    router: str,
    prompts: Sequence[str],
    path: str,
    *,
    lm: str | None = None,
    sae: str | None = None,
    top_k: int = 1,
) -> Iterator[Progress]:
    """Write who would answer each prompt and why; a finished folder is left alone.

    Args:
        router: folder or URL, as jobs/fit_router.py makes it.
        prompts: each a conversation of its own.
        path: folder or URL of the explanation.
        lm: where the base lies, if it has moved.
        sae: the same of the SAE.
        top_k: experts at most that answer a prompt together.

    Raises:
        ArtifactError: there is no such router, or it or its model or SAE have changed.
        ConfigError: a prompt says nothing, or more experts are to answer than there are.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise ConfigError(
                f"prompt {number} of {len(prompts)} is blank: there is nothing to route; leave it "
                "out, or write what would be asked"
            )
    if not prompts:
        raise ConfigError("there is no prompt to route: give one with --prompt, or a list of them")
    router, path = router.rstrip("/"), path.rstrip("/")
    manifest = open_artifact(router, ROUTER)
    config = {"prompts": [*prompts], "top_k": top_k}
    parents = {"router": manifest.content_hash, **manifest.parents}
    sources = {"router": Source(name=router), **manifest.sources}
    if inspect(path, KIND, config, parents, sources) is State.FINISHED:
        return
    use_cores(None)
    verify(router)
    yield "loading", 0, 1, ""
    loaded, routes = Router.load(router, lm, sae), list[ExplainedRoute]()
    for prompt in prompts:
        yield "routing", len(routes), len(prompts), ""
        routes.append(explained(loaded, prompt, top_k=top_k))
    about = [(one.id, one.name, one.description) for one in loaded.experts]
    page = RoutePage(loaded.fitted.kind, manifest.content_hash, about, routes)
    begin(path, KIND, config, parents, sources)
    content = json.dumps(page.to_json(), indent=1, ensure_ascii=False)
    write_atomically(f"{path}/route.json", content.encode("utf-8", "replace"))
    write_atomically(f"{path}/report.html", render(page).encode("utf-8", "replace"))
    num_abstained = sum(one.route.abstained for one in routes)
    finish(path, {"summary": page.summary, "num_abstained": num_abstained})


def explained(router: Router, prompt: str, *, top_k: int = 1) -> ExplainedRoute:
    """Route a prompt, and tell what that was decided by."""
    route = router.route([{"role": "user", "content": prompt}], top_k=top_k)
    block = router.eyes.read([prompt])
    leads = router.scores(block)[0].tolist() if len(block) else [None] * len(router.experts)
    standings = [
        Standing(one.id, one.name, route.scores[one.id], float(threshold), lead)
        for one, threshold, lead in zip(
            router.experts, router.fitted.thresholds, leads, strict=True
        )
    ]
    standings.sort(key=lambda one: -(one.lead or 0.0))
    latents = [reason.latent for reason in route.reasons]
    trace, read = router.eyes.trace(prompt, latents), router.eyes.asked(prompt)
    (turn,) = shade(read, trace, latents, trace.latents.max(axis=0, initial=0.0))
    names = {one.latent: f"{one.label} ({one.latent})" for one in route.reasons}
    hues = {latent: f"l{i}" for i, latent in enumerate(latents)}
    return ExplainedRoute(
        prompt=prompt,
        num_unread=len(prompt) - len(read.messages[0]["content"]),
        route=route,
        standings=standings,
        tokens=tokens_of(trace, latents),
        shaded=to_html(turn.pieces, names.__getitem__, hues.__getitem__),
    )


def render(page: RoutePage) -> str:
    """Return the page as one file that needs no network."""
    heaviest = [
        max((abs(reason.contribution) for reason in one.route.reasons), default=1.0)
        for one in page.routes
    ]
    values = {"page": page, "routes": list(zip(page.routes, heaviest, strict=True)), "base": BASE}
    return fill("route.html.jinja", values, style="report.css", script=None)
