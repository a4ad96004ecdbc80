"""How good a SAE is: what it leaves unexplained and keeps on, by token kind and norm.

Squared errors are given twice. Micro: the mean over tokens and dimensions. Macro, FAST's eq. 7:
for each sequence the mean over its tokens of the squared error, then the mean over sequences, then
divided by d_in,

    MSE = 1 / (N d) sum_i 1/|S_i| sum_{t in S_i} |x_t - x̂_t|²

with S_i the tokens of sequence i that are in the part looked at: all of them, or the special ones
and role words (the paper's MSE_st). The paper's tables and abstract hold log2 of it.

Source: FAST, arXiv 2506.07691, eq. 7 and table 11.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from sae_ray.chat import Kind
from sae_ray.lm import LanguageModel
from sae_ray.sae.activations import read_sequences
from sae_ray.sae.buffer import TokenBatch
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.sequences import KIND, POSITION, Lanes, length_buckets
from sae_ray.sae.splice import Recovered, WholeModel, recovered

PARTS = (
    "all", "special and role", "special", "role", "template", "content", "position 0",
    "all but position 0",
)  # fmt: skip
"""Parts by token kind. The paper's special tokens are `special and role`."""

DECILES = tuple(f"norm decile {number}" for number in range(1, 11))
_CHUNK_TOKENS = 2048
_EDGE_TOKENS = 32_768
"""Tokens from which the edges of the norm deciles are taken."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What a SAE does at some of the tokens."""

    num_tokens: int
    l0: float
    fvu: float
    """Squared error over squared distance from the mean of all tokens."""
    mse: float
    """Micro: over tokens and dimensions."""
    mse_macro: float
    """FAST's eq. 7."""
    mean_norm: float

    @property
    def log2_mse(self) -> float:
        """Return log2 of the micro error."""
        return math.log2(self.mse) if self.mse > 0 else -math.inf

    @property
    def log2_mse_macro(self) -> float:
        """Return log2 of eq. 7: the number in the paper's tables."""
        return math.log2(self.mse_macro) if self.mse_macro > 0 else -math.inf


@dataclasses.dataclass(frozen=True, slots=True)
class Quality:
    """Measured over tokens that had no part in training."""

    fvu: float
    """Squared error over variance about the mean."""
    l0: float
    dead: float
    """Share of latents that were never on."""
    dense: float
    """Share of latents on for more than a tenth of the tokens."""
    num_tokens: int
    num_sequences: int
    parts: dict[str, Part]
    """By token kind and by norm decile; parts without tokens are left out."""
    recovered: Recovered | None = None
    """With the SAE spliced into the whole model, where that was measured."""

    def headline(self) -> dict[str, float]:
        """Return the figures over all tokens."""
        names = ("fvu", "l0", "dead", "dense", "num_tokens")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Return plain values, what follows from others included."""
        values = dataclasses.asdict(self)
        for name, part in self.parts.items():
            more = {"log2_mse": part.log2_mse, "log2_mse_macro": part.log2_mse_macro}
            values["parts"][name] |= more
        if one := self.recovered:
            more = {"ce_recovered": one.ce_recovered, "kl_recovered": one.kl_recovered}
            values["recovered"] |= more
        return values


def measure_sae(
    lm_path: Path, sae_path: Path, instances: Sequence[Lanes], *, splice: bool = False
) -> Quality:
    """Measure a SAE folder on instances of its model, each read alone."""
    encoder = LatentEncoder.load(sae_path)
    model = LanguageModel.load(lm_path, [encoder.hook_point])
    quality = measure_saes(model, {"": encoder}, instances)[""]
    if not splice:
        return quality
    batches = batches_of(instances, 2048)
    return dataclasses.replace(
        quality, recovered=recovered(WholeModel.load(lm_path), {"": encoder}, batches)[""]
    )


def measure_saes(
    model: LanguageModel,
    encoders: Mapping[str, LatentEncoder],
    instances: Sequence[Lanes],
    *,
    tokens_per_forward: int = 8192,
) -> dict[str, Quality]:
    """Measure any number of SAEs of a model on the same instances, from one forward."""
    meters = {name: Meter(encoder) for name, encoder in encoders.items()}
    for sequences in batches_of(instances, tokens_per_forward):
        read = read_sequences(model, sequences)
        lanes = torch.from_numpy(np.concatenate(sequences)).to(model.device)
        for name, encoder in encoders.items():
            meters[name].add(TokenBatch(lanes, {encoder.hook_point: read[encoder.hook_point]}))
    return {name: meter.quality() for name, meter in meters.items()}


def measure(encoder: LatentEncoder, batches: Iterable[TokenBatch]) -> Quality:
    """Measure a SAE on activations: batches of whole sequences, one behind the other."""
    meter = Meter(encoder)
    for batch in batches:
        meter.add(batch)
    return meter.quality()


def batches_of(instances: Sequence[Lanes], tokens_per_forward: int) -> Iterable[list[Lanes]]:
    """Yield instances in batches of like length, always the same ones."""
    lengths = [len(one) for one in instances]
    for group in length_buckets(lengths, tokens_per_forward, np.random.default_rng(0)):
        yield [instances[row] for row in group]


class Meter:
    """Sums up what a SAE does, batch by batch; keeps no activations but the first few."""

    def __init__(self, encoder: LatentEncoder) -> None:
        self._encoder = encoder
        num_parts = len(PARTS) + len(DECILES)
        self._on = torch.zeros(encoder.d_sae, dtype=torch.float64)
        self._sums = torch.zeros(num_parts, 5, dtype=torch.float64)
        """Tokens, latents on, squared errors, squared norms, norms."""
        self._x = torch.zeros(num_parts, encoder.d_in, dtype=torch.float64)
        self._macro = torch.zeros(num_parts, 2, dtype=torch.float64)
        """Sums of sequences' mean errors, and how many sequences."""
        self._edges: Tensor | None = None
        self._held: list[TokenBatch] = []

    @torch.inference_mode()
    def add(self, batch: TokenBatch) -> None:
        """Take in whole sequences, one behind the other."""
        if self._edges is not None:
            self._count(batch)
            return
        self._held.append(batch)
        if sum(map(len, self._held)) >= _EDGE_TOKENS:
            self._set_edges()

    @torch.inference_mode()
    def quality(self) -> Quality:
        """Return the figures over all that was taken in."""
        if self._edges is None:
            self._set_edges()
        num_tokens = float(self._sums[0, 0])
        share = self._on / num_tokens
        parts = {
            name: self._part(number)
            for number, name in enumerate((*PARTS, *DECILES))
            if self._sums[number, 0] > 0
        }
        return Quality(
            fvu=parts["all"].fvu,
            l0=parts["all"].l0,
            dead=float((share == 0).double().mean()),
            dense=float((share > 0.1).double().mean()),
            num_tokens=int(num_tokens),
            num_sequences=int(self._macro[0, 1]),
            parts=parts,
        )

    def _part(self, number: int) -> Part:
        tokens, on, error, square, norm = self._sums[number].tolist()
        mean = self._x[0] / self._sums[0, 0]
        spread = square - 2 * float(self._x[number] @ mean) + tokens * float(mean @ mean)
        d_in = len(mean)
        macro, num_sequences = self._macro[number].tolist()
        return Part(
            num_tokens=int(tokens),
            l0=on / tokens,
            fvu=error / spread if spread else math.nan,
            mse=error / tokens / d_in,
            mse_macro=macro / num_sequences / d_in,
            mean_norm=norm / tokens,
        )

    def _set_edges(self) -> None:
        point = self._encoder.hook_point
        norms = torch.cat([one.activations[point].float().norm(dim=-1) for one in self._held])
        shares = torch.linspace(0.1, 0.9, 9, device=norms.device)
        self._edges = norms.quantile(shares)
        for batch in self._held:
            self._count(batch)
        self._held = []

    def _count(self, batch: TokenBatch) -> None:
        x = batch.activations[self._encoder.hook_point].float()
        error, on = torch.empty(2, len(x), dtype=torch.float64, device=x.device)
        for begin in range(0, len(x), _CHUNK_TOKENS):
            rows = slice(begin, begin + _CHUNK_TOKENS)
            z = self._encoder.encode(x[rows])
            error[rows] = (x[rows] - self._encoder.decode(z, x[rows])).square().sum(-1).double()
            on[rows] = (z > 0).sum(-1).double()
            self._on += (z > 0).sum(0).cpu()
        norms = x.norm(dim=-1)
        parts = self._parts(batch.lanes, norms).double()
        norms = norms.double()
        columns = [torch.ones_like(error), on, error, norms.square(), norms]
        self._sums += (parts @ torch.stack(columns, 1)).cpu()
        self._x += (parts @ x.double()).cpu()
        begins = batch.lanes[:, POSITION] == 0
        begins[0] = True
        sequence = begins.cumsum(0) - 1
        per_sequence = parts.new_zeros(2, len(parts), int(sequence[-1]) + 1)
        per_sequence[0].index_add_(1, sequence, parts * error)
        per_sequence[1].index_add_(1, sequence, parts)
        errors, counts = per_sequence
        means = torch.where(counts > 0, errors / counts, 0).sum(1)
        self._macro += torch.stack([means, (counts > 0).sum(1).double()], 1).cpu()

    def _parts(
        self, lanes: Int32[Tensor, "tokens 4"], norms: Float[Tensor, " tokens"]
    ) -> Bool[Tensor, "parts tokens"]:
        """Return which tokens are in which part."""
        assert self._edges is not None
        kinds, first = lanes[:, KIND], lanes[:, POSITION] == 0
        special, role = kinds == Kind.SPECIAL, kinds == Kind.ROLE
        decile = torch.bucketize(norms, self._edges)
        return torch.stack(
            [
                torch.ones_like(first),
                special | role,
                special,
                role,
                kinds == Kind.TEMPLATE,
                kinds == Kind.CONTENT,
                first,
                ~first,
                *(decile == number for number in range(len(DECILES))),
            ]
        )
