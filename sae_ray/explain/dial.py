"""Dial: a tuned model as a function of how far the edit of each latent is turned up.

    x' = x + sum_i c_i delta_i W_dec_i,    delta = g(z) - z

c = 1 is the tuned model and c = 0 its base, to the bit. What an edit writes is linear in b, s, W_2
and c_2, so that c scales rows of these and nothing else: every kind, any number of sites and the KV
cache work as they do without a dial, and one backward pass has the slope of every latent, without
ever holding tokens x latents beyond a batch.

What is looked at is the log probability of replies on rows that were not trained on or, of pairs,
the margin by which the chosen reply is the likelier.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from peft import PeftModel
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from sae_ray.adapters.edits import LatentEdit
from sae_ray.adapters.examples import Example, PairExample
from sae_ray.adapters.latent import LatentConfig, LatentModel
from sae_ray.adapters.positions import acts_on_answers
from sae_ray.adapters.replies import flat, labels_of, padded
from sae_ray.errors import ModelError
from sae_ray.lm import HookPoint

_WRITTEN_BY = ("steering", "scale", "up", "up_bias")
"""Parameters with a row for each latent, in which what is written is linear."""

Dials = Float[np.ndarray, " latents"]
"""How far each latent's edit is turned up, over the latents of all sites."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One hook point of an adapter."""

    point: HookPoint
    sae: str
    path: str
    """Of the edit's module in the model."""
    latents: Int64[np.ndarray, " latents"]
    """Numbers in the SAE of those that may change."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is looked at as one: a row, or a pair."""

    rows: tuple[Example, ...]
    signs: tuple[float, ...]
    """Of each row's log probability in what is looked at."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A batch of units and what is asked of it, which any process with the same model answers."""

    units: tuple[Unit, ...]
    dials: Dials | None = None
    """Where what is looked at is asked for, or None where slopes are."""
    points: tuple[float, ...] = ()
    """Of the path, over which slopes are summed."""


Spread = Callable[[Sequence[Piece]], Iterable[np.ndarray]]
"""Has pieces answered by others, and returns what they come to, in order."""


def units_of(rows: Sequence[Example] | Sequence[PairExample]) -> list[Unit]:
    """Return held-out rows as units: log probabilities of replies, or margins of pairs."""
    return [
        Unit(tuple(flat([row])), (1.0, -1.0))
        if isinstance(row, PairExample)
        else Unit((row,), (1.0,))
        for row in rows
    ]


class Dial:
    """A tuned model that can be turned down, latent by latent."""

    def __init__(
        self,
        model: PeftModel,
        pad: int,
        *,
        adapter: str = "default",
        batch_tokens: int = 2048,
        spread: Spread | None = None,
    ) -> None:
        """Find the edits.

        Args:
            model: with the adapter on it.
            pad: token that fills up batches.
            adapter: its name.
            batch_tokens: tokens of a forward, padding included.
            spread: has pieces answered by other processes; by this one unless given.

        Raises:
            ModelError: the adapter does not edit latents.
        """
        config = model.peft_config[adapter]
        if not isinstance(config, LatentConfig):
            raise ModelError(
                f"adapter {adapter} is {getattr(config, 'peft_type', 'no adapter')}: it changes "
                "weights, not latents, so that none of them can be turned down; give one of kind "
                "steering, scale, affine or residual, or look at how latents drift under it"
            )
        self.model, self._pad, self._batch_tokens = model.eval(), pad, batch_tokens
        self._spread = spread
        self._with_labels = acts_on_answers(model)
        self.sites = list(_sites(model, config, adapter))
        self._edits = [model.get_submodule(site.path) for site in self.sites]
        for edit in self._edits:
            assert isinstance(edit, LatentEdit)
            edit.is_penalised = False  # slopes are of what is looked at, not of a penalty

    @property
    def num_latents(self) -> int:
        """Return how many latents may change, over all sites."""
        return sum(len(site.latents) for site in self.sites)

    @property
    def device(self) -> torch.device:
        """Return where the model computes."""
        return next(self.model.parameters()).device

    def place(self, number: int) -> tuple[Site, int]:
        """Return the site of a latent of the dials, and its number in the SAE there."""
        for site in self.sites:
            if number < len(site.latents):
                return site, int(site.latents[number])
            number -= len(site.latents)
        raise IndexError(number)

    def sizes(self) -> Dials:
        """Return the length of each latent's parameters, times that of what it writes."""
        sizes = []
        for edit in self._edits:
            assert isinstance(edit, LatentEdit)
            squares = [
                value.detach().float().reshape(len(value), -1).square().sum(1)
                for name, value in edit.named_parameters()
                if name in _WRITTEN_BY
            ]
            sizes.append(torch.stack(squares).sum(0).sqrt() * edit.sae.norms)
        return torch.cat(sizes).cpu().numpy()

    def batches(self, units: Sequence[Unit], at_least: int = 1) -> Iterator[list[int]]:
        """Yield numbers of units of like length to be read together, in at least so many batches
        where there are as many units."""
        sizes = [len(unit.rows) * max(len(row.ids) for row in unit.rows) for unit in units]
        yield from by_length(sizes, self._batch_tokens, most=max(1, len(units) // at_least))

    def look(self, units: Sequence[Unit], dials: Tensor) -> Float[Tensor, " units"]:
        """Return what is looked at of each unit, in nats; differentiable in the dials."""
        rows = [row for unit in units for row in unit.rows]
        signs = torch.tensor([sign for unit in units for sign in unit.signs], device=self.device)
        ids, real, learnt = (one.to(self.device) for one in padded(rows, self._pad))
        inputs = {"input_ids": ids, "attention_mask": real.long(), "use_cache": False}
        if self._with_labels:
            inputs["labels"] = labels_of(ids, learnt)
        output = functional_call(self.model, self._turned(dials), kwargs=inputs)
        counted = learnt[:, 1:]
        logits = output.logits[:, :-1][counted].float()
        nats = cross_entropy(logits, ids[:, 1:][counted], reduction="none")
        row = torch.arange(len(rows), device=self.device)[:, None].expand(counted.shape)[counted]
        sums = torch.zeros(len(rows), device=self.device).index_add(0, row, -nats)
        return (sums * signs).reshape(len(units), -1).sum(1)

    def looks(self, units: Sequence[Unit], dials: Dials) -> Float[np.ndarray, " units"]:
        """Return what is looked at of each of many units, in nats."""
        found, batches = np.zeros(len(units)), list(self.batches(units))
        pieces = [Piece(tuple(units[i] for i in batch), dials) for batch in batches]
        for batch, nats in zip(batches, self.ask(pieces), strict=True):
            found[batch] = nats
        return found

    def ask(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Have pieces answered, here or by other processes; in order."""
        return list(self._spread(pieces) if self._spread else map(self.answer, pieces))

    def answer(self, piece: Piece) -> Float[np.ndarray, " units"] | Float[np.ndarray, " latents"]:
        """Return what is looked at of each unit of a piece, or the slope in each dial, summed over
        its units and points."""
        units = list(piece.units)
        if piece.dials is not None:
            turned = torch.as_tensor(piece.dials, dtype=torch.float32, device=self.device)
            with torch.no_grad():
                return self.look(units, turned).double().cpu().numpy()
        total = torch.zeros(self.num_latents, dtype=torch.float64)
        for point in piece.points:
            dials = torch.full((self.num_latents,), point, device=self.device, requires_grad=True)
            (slope,) = torch.autograd.grad(self.look(units, dials).sum(), dials)
            total += slope.double().cpu()
        return total.numpy()

    def _turned(self, dials: Tensor) -> dict[str, Tensor]:
        turned: dict[str, Tensor] = {}
        own = dials.split([len(site.latents) for site in self.sites])
        for site, edit, mine in zip(self.sites, self._edits, own, strict=True):
            for name, value in edit.named_parameters():
                if name in _WRITTEN_BY:
                    factor = mine.reshape(-1, *[1] * (value.ndim - 1))
                    turned[f"{site.path}.{name}"] = value.detach() * factor
        return turned


def by_length(
    sizes: Sequence[int], batch_tokens: int, *, most: int | None = None
) -> Iterator[list[int]]:
    """Yield batches of numbers of like size: at most `most`, and so many tokens with padding."""
    batch: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        if batch and (len(batch) == most or (len(batch) + 1) * sizes[i] > batch_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _sites(model: PeftModel, config: LatentConfig, adapter: str) -> Iterator[Site]:
    tuner = model.base_model
    assert isinstance(tuner, LatentModel)
    paths = {id(module): path for path, module in model.named_modules()}
    by_point = {str(layer.point): layer for _, _, layer in tuner.layers()}
    for site in config.sites:
        point = HookPoint.parse(site["hook_point"])
        edit = by_point[str(point)].edit(adapter)
        given = site["latents"]
        latents = np.arange(len(edit.sae.W_dec)) if given is None else np.array(given)
        yield Site(point, site["sae"], paths[id(edit)], latents.astype(np.int64))
