"""TopK, BatchTopK and Matryoshka training at the cost of what is on: sae-lens' classes and losses.

Only the way to the latents differs from sae-lens': one product without gradients finds
candidates, in bf16 where asked for; their values are then computed in the weights' own precision,
and the largest kept. Losses, auxiliary loss, threshold and saving are sae-lens' code.

This module imports sae-lens, which takes 8 s: import it where it is used.
"""

import functools
import math
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int64
from sae_lens import BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE, TopKTrainingSAE
from torch import Tensor

from sae_ray.sae.kept import KeptAffine, KeptLatents, Pattern

_CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**28}
"""Pre-activations at a time: what fits a core's cache, or a little of a GPU's memory."""

_MARGIN = 1.15
"""Candidates for one that is kept, where they are found in less than full precision."""

_SPARE = 1.3
"""Candidates for one that is kept, where a floor under them is estimated from a few rows."""


class SparseTopK(TopKTrainingSAE):
    """sae-lens' TopK, its latents kept as a list."""

    finding_dtype: torch.dtype | None = None
    """Precision of the product that finds candidates; the weights' own where None."""

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[KeptLatents, Tensor]:  # pyright: ignore
        """Return what is on, and the centred input in the place of sae-lens' pre-activations."""
        with torch.no_grad():
            centred = x.to(self.dtype) - self.b_dec * self.cfg.apply_b_dec_to_input
            pattern, pre = self._choose(centred)
        b_dec = self.b_dec if self.cfg.apply_b_dec_to_input else None
        pre = KeptAffine.apply(centred, self.W_enc, self.b_enc, b_dec, pre, pattern)
        if self.cfg.rescale_acts_by_decoder_norm:
            pre = pre * self.W_dec.norm(dim=-1)[pattern.columns]
        return KeptLatents(pre.relu(), pattern), centred

    def decode(self, feature_acts: KeptLatents) -> Tensor:  # pyright: ignore
        """Return the reconstruction."""
        return self._unscaled(feature_acts).decode(self.W_dec) + self.b_dec

    def calculate_topk_aux_loss(
        self,
        sae_in: Tensor,
        sae_out: Tensor,
        hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
    ) -> Tensor:
        """Return sae-lens' auxiliary loss, computed over the dead latents alone."""
        if dead_neuron_mask is None or not dead_neuron_mask.any():
            return sae_out.new_zeros(())
        dead = dead_neuron_mask.nonzero().squeeze(1)
        W_dec = self.W_dec[dead]
        pre = self.process_sae_in(sae_in) @ self.W_enc[:, dead] + self.b_enc[dead]
        if self.cfg.rescale_acts_by_decoder_norm:
            pre = pre * W_dec.norm(dim=-1)
        # Their code, given a SAE that consists of the dead latents.
        part = SimpleNamespace(
            cfg=self.cfg, W_dec=W_dec, reshape_fn_out=self.reshape_fn_out, d_head=self.d_head
        )
        return TopKTrainingSAE.calculate_topk_aux_loss(
            part,  # pyright: ignore[reportArgumentType]
            sae_in=sae_in,
            sae_out=sae_out,
            hidden_pre=pre,
            dead_neuron_mask=dead_neuron_mask[dead],
        )

    def _unscaled(self, latents: KeptLatents) -> KeptLatents:
        if not self.cfg.rescale_acts_by_decoder_norm:
            return latents
        norm = self.W_dec.norm(dim=-1)[latents.pattern.columns]
        return KeptLatents(latents.values / norm, latents.pattern)

    def _choose(self, centred: Float[Tensor, "rows d_in"]) -> tuple[Pattern, Tensor]:
        """Return the k largest of each row, and their pre-activations."""
        rows, k = len(centred), self.cfg.k
        num = min(self.cfg.d_sae, k if self._finds_exactly else math.ceil(k * _MARGIN))
        found = [largest_columns(pre, num) for pre in self._pre_activations(centred)]
        columns = torch.cat(found).to(torch.int32)
        pattern = Pattern.of_rows(columns, self.cfg.d_sae)
        pre, rank = self._exactly(centred, pattern)
        if num > k:
            best = rank.view(rows, num).topk(k, sorted=False).indices
            pattern = Pattern.of_rows(columns.gather(1, best), self.cfg.d_sae)
            pre = pre.view(rows, num).gather(1, best).flatten()
        return pattern, pre

    @property
    def _finds_exactly(self) -> bool:
        return self.finding_dtype in (None, self.dtype)

    def _pre_activations(self, centred: Tensor) -> Iterator[Float[Tensor, "chunk d_sae"]]:
        """Yield what latents are ranked by, a few rows at a time."""
        dtype = self.finding_dtype or self.dtype
        W, b = self.W_enc, self.b_enc
        if self.cfg.rescale_acts_by_decoder_norm:
            norm = self.W_dec.norm(dim=-1)
            W, b = W * norm, b * norm
        W, b = W.to(dtype), b.to(dtype)
        room = _CHUNK_BYTES.get(centred.device.type, 2**28)
        rows = max(64, room // (self.cfg.d_sae * dtype.itemsize))
        for chunk in centred.to(dtype).split(rows):
            yield torch.addmm(b, chunk, W)

    def _exactly(self, centred: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Return candidates' pre-activations in full precision, and what they are ranked by."""
        pre = pattern.gather_dot(centred, self.W_enc.t()) + self.b_enc[pattern.columns]
        if self.cfg.rescale_acts_by_decoder_norm:
            return pre, pre * self.W_dec.norm(dim=-1)[pattern.columns]
        return pre, pre


class SparseBatchTopK(SparseTopK, BatchTopKTrainingSAE):  # pyright: ignore
    """sae-lens' BatchTopK, its latents kept as a list."""

    def update_topk_threshold(self, acts_topk: KeptLatents) -> None:  # pyright: ignore
        """Let the threshold follow the least latent that is on."""
        super().update_topk_threshold(acts_topk.values.detach())

    def _choose(self, centred: Float[Tensor, "rows d_in"]) -> tuple[Pattern, Tensor]:
        """Return the k x rows largest of the batch that are above zero."""
        rows, d_sae = len(centred), self.cfg.d_sae
        wanted = int(self.cfg.k * rows)
        least, floor = self._floors(centred)
        places = self._above(centred, floor)
        if len(places) < wanted and floor > least:
            places = self._above(centred, least)
        pattern = Pattern.of_places(places, rows, d_sae)
        pre, rank = self._exactly(centred, pattern)
        if len(places) > wanted:
            best = rank.topk(wanted, sorted=False).indices.sort().values
            pattern, pre = Pattern.of_places(places[best], rows, d_sae), pre[best]
        return pattern, pre

    def _floors(self, centred: Tensor) -> tuple[float, float]:
        """Return what surely nothing lies below that is on, and a floor with few candidates.

        The second is an estimate from the first rows: above it there should be enough.
        """
        ranks = next(self._pre_activations(centred))
        # Rounding may put what is just above zero just below.
        least = 0.0 if self._finds_exactly else -0.02 * float(ranks.float().std())
        num = math.ceil(_SPARE * self.cfg.k * len(ranks))
        if num >= ranks.numel():
            return least, least
        return least, max(least, float(ranks.flatten().topk(num, sorted=False).values.min()))

    def _above(self, centred: Tensor, floor: float) -> Int64[Tensor, " places"]:
        """Return the places [row * d_sae + column] of all that is above a floor, in order."""
        found: list[Tensor] = []
        begin = 0
        for ranks in self._pre_activations(centred):
            found.append((ranks > floor).flatten().nonzero().squeeze(1) + begin)
            begin += ranks.numel()
        return torch.cat(found)


class SparseMatryoshka(  # pyright: ignore
    SparseBatchTopK, MatryoshkaBatchTopKTrainingSAE
):
    """sae-lens' Matryoshka BatchTopK, its latents kept as a list."""

    def _iterable_decode(  # pyright: ignore
        self, feature_acts: KeptLatents, include_outer_loss: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        latents = self._unscaled(feature_acts)
        widths = self.cfg.matryoshka_widths[: None if include_outer_loss else -1]
        for width in widths:
            inside = latents.values * (latents.pattern.columns < width)
            yield width, KeptLatents(inside, latents.pattern).decode(self.W_dec) + self.b_dec


def largest_columns(ranks: Float[Tensor, "rows columns"], num: int) -> Int64[Tensor, "rows {num}"]:
    """Return where the `num` largest of each row are, in no order.

    Columns are put into groups first: what is among the `num` largest lies in one of the `num`
    groups whose largest are largest.
    """
    rows, columns = ranks.shape
    groups = _num_groups(columns, num)
    if groups == columns:
        return ranks.topk(num, sorted=False).indices
    size = columns // groups
    best = ranks.view(rows, size, groups).amax(1).topk(num, sorted=False).indices
    inside = torch.arange(0, columns, groups, device=ranks.device).unsqueeze(1)
    candidates = (best.unsqueeze(1) + inside).flatten(1)
    chosen = ranks.gather(1, candidates).topk(num, sorted=False).indices
    return candidates.gather(1, chosen)


@functools.cache
def _num_groups(columns: int, num: int) -> int:
    """Choose the divisor of the columns with which both rounds together look at the fewest."""
    divisors = [g for g in range(num + 1, columns) if columns % g == 0]
    best = min(divisors, key=lambda groups: groups + num * columns // groups, default=columns)
    return best if best + num * columns // best < columns else columns
