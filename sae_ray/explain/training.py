"""The page of a training: curves, what the SAEs leave unexplained and where, and some latents."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from pydantic import JsonValue

from sae_ray.chat import ChatTokenizer
from sae_ray.explain.filled import fill
from sae_ray.explain.shading import ShadedText, to_html
from sae_ray.explain.steered import SteeredLatent
from sae_ray.lm import LanguageModel
from sae_ray.sae.activations import read_sequences
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.interpret import TokenTexts
from sae_ray.sae.quality import DECILES, PARTS, Quality
from sae_ray.sae.recipe import SAESpec
from sae_ray.sae.sequences import TOKEN, Lanes

_WIDTH, _HEIGHT = 600, 110
_NUM_LATENTS, _NUM_CONTEXTS = 12, 3
_TOKENS_LOOKED_AT = 20_000
_AROUND = 10
_FIGURES = (
    ("loss", "loss"),
    ("fvu", "variance unexplained"),
    ("l0", "latents on"),
    ("num_dead", "dead latents"),
    ("num_dense", "dense latents"),
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A latent, and some places where it is strongest."""

    latent: int
    label: str | None
    contexts: list[Markup]


@dataclasses.dataclass(frozen=True)
class TrainedSAE:
    """One SAE of the run."""

    spec: SAESpec
    quality: Quality | None
    examples: list[Example]
    steered: Sequence[SteeredLatent] = ()
    """Latents of special tokens, pushed."""

    @property
    def parts(self) -> list[str]:
        """Return the parts of the tokens that hold any."""
        return [one for one in (*PARTS, *DECILES) if self.quality and one in self.quality.parts]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One figure of one SAE over the training, as a line."""

    name: str
    points: str
    """Of an SVG polyline."""
    low: float
    high: float
    last: float


@dataclasses.dataclass(frozen=True)
class TrainingPage:
    """All that the page says."""

    model: str
    regime: str
    trained: Sequence[TrainedSAE]
    curves: Sequence[Mapping[str, Any]]
    """Steps in order: number, num_tokens, saes."""
    counts: Mapping[str, JsonValue]

    def lines(self, sae: str) -> list[Curve]:
        """Return the curves of a SAE."""
        x = np.array([point["num_tokens"] for point in self.curves], dtype=float)
        return [
            _curve(text, x, np.array([point["saes"][sae][name] for point in self.curves]))
            for name, text in _FIGURES
        ]

    def render(self) -> str:
        """Return the page as one file that needs no network."""
        values = {"page": self, "counts": self.counts, "width": _WIDTH, "height": _HEIGHT}
        return fill("training.html.jinja", values, style="report.css", script=None)


def _curve(name: str, x: np.ndarray, y: np.ndarray) -> Curve:
    y = np.nan_to_num(y.astype(float))
    low, high = float(y.min()), float(y.max())
    across = (x - x[0]) / max(x[-1] - x[0], 1) * _WIDTH
    up = _HEIGHT - (y - low) / max(high - low, 1e-12) * _HEIGHT
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up, strict=True))
    return Curve(name, points, low, high, float(y[-1]))


def examples(
    model: LanguageModel,
    encoder: LatentEncoder,
    instances: Sequence[Lanes],
    tokenizer: ChatTokenizer,
    labels: Mapping[int, str],
) -> list[Example]:
    """Return random latents that are on, with the places in some instances where most."""
    lanes: list[Lanes] = []
    room = _TOKENS_LOOKED_AT
    for one in instances:
        if len(one) > room:
            break
        lanes, room = [*lanes, one], room - len(one)
    if not lanes:
        return []
    states = [read_sequences(model, [one])[encoder.hook_point].float() for one in lanes]
    on = torch.stack([(encoder.encode(x) > 0).any(dim=0) for x in states]).any(dim=0)
    alive = on.nonzero().squeeze(1).cpu().numpy()
    chosen = np.sort(np.random.default_rng(0).permutation(alive)[:_NUM_LATENTS])
    latents = torch.cat([encoder.encode(x, chosen).cpu() for x in states])
    ids: list[int] = np.concatenate([one[:, TOKEN] for one in lanes]).tolist()
    ends = np.cumsum([len(one) for one in lanes])
    texts = TokenTexts(tokenizer)
    found: list[Example] = []
    for column, latent in enumerate(chosen.tolist()):
        values = latents[:, column].numpy()
        shown = [
            _context(latent, int(at), ids, values, ends, texts)
            for at in np.argsort(-values, kind="stable")[:_NUM_CONTEXTS]
            if values[at] > 0
        ]
        found.append(Example(latent, labels.get(latent), shown))
    return found


def _context(
    latent: int,
    at: int,
    ids: Sequence[int],
    values: np.ndarray,
    ends: np.ndarray,
    texts: TokenTexts,
) -> Markup:
    instance = int(np.searchsorted(ends, at, side="right"))
    begin = max(at - _AROUND, int(ends[instance - 1]) if instance else 0)
    end = min(at + _AROUND, int(ends[instance]))
    peak = max(float(values[at]), 1e-9)
    pieces = [
        ShadedText(_text(texts, ids[i]), latent, float(values[i]), float(values[i]) / peak, i == at)
        if values[i] > 0
        else ShadedText(_text(texts, ids[i]))
        for i in range(begin, end)
    ]
    label: Callable[[int], str] = lambda number: f"latent {number}"  # noqa: E731
    return to_html(pieces, label, lambda _: "l0")


def _text(texts: TokenTexts, id: int) -> str:
    return texts[id].replace("\n", "⏎")
