"""Basis: an orthonormal basis of what chosen latents write.

    V = [ (|t_i| / max |t|)^p  w_i / |w_i| ]_i  =  U S Qᵀ        (thin SVD, not centred)

and of U the first r columns that hold a share tau of the energy. Weighted, because the plain SVD
of many latents follows their number and not their effect; not centred, because centring takes out
the direction that the chosen latents share, which is the one that is sought.
Source: after SAILS, arXiv 2512.23260 (p = 0, tau = 0.8: `PAPER`); weights and centring are ours.
"""

import dataclasses

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_ray.errors import TaskError

MIN_SINGULAR = 0.2
"""Of the unit decoder rows that `atoms` takes as they are."""


@dataclasses.dataclass(frozen=True)
class BasisRule:
    """How latents become a basis."""

    power: float = 2.0
    tau: float = 0.9
    r_max: int = 16
    atoms: bool = False
    """Take the strongest `r_max` decoder rows as they are: each column is one latent."""


DEFAULT = BasisRule()
PAPER = BasisRule(power=0.0, tau=0.8)


@dataclasses.dataclass(frozen=True)
class Basis:
    """Directions in the stream, and the latents that they are made of."""

    U: Float[Tensor, "d_in r"]
    S: Float[Tensor, " directions"]
    """All singular values, falling."""
    loadings: Float[Tensor, "chosen r"]
    """How much of each latent is in each column."""
    latents: Int64[Tensor, " chosen"]
    coherence: float
    """Largest |cosine| of two chosen decoder rows."""

    @property
    def r(self) -> int:
        """Number of directions."""
        return self.U.shape[1]


def build_basis(
    W_dec: Float[Tensor, "d_sae d_in"],
    latents: Int64[Tensor, " chosen"],
    scores: Float[Tensor, " chosen"],
    rule: BasisRule = DEFAULT,
) -> Basis:
    """Make a basis from latents, of falling |score|.

    Raises:
        TaskError: `atoms` are asked for and nearly the same direction is among them twice.
    """
    if rule.atoms:
        latents, scores = latents[: rule.r_max], scores[: rule.r_max]
    rows = torch.nn.functional.normalize(W_dec[latents].float(), dim=-1)
    cosines = (rows @ rows.T).fill_diagonal_(0).abs()
    weights = (scores.abs().float() / scores.abs().max()) ** (0 if rule.atoms else rule.power)
    U, S, Qh = torch.linalg.svd((rows * weights.unsqueeze(1)).T, full_matrices=False)
    if rule.atoms:
        if S[-1] < MIN_SINGULAR or len(rows) > W_dec.shape[1]:
            raise TaskError(
                f"{len(rows)} latents' directions are nearly dependent (smallest singular value "
                f"{S[-1]:.2f}, {MIN_SINGULAR} needed for atoms): ask for fewer, or leave atoms out"
            )
        U, loadings = rows.T.contiguous(), torch.eye(len(rows))
    else:
        energy = (S**2).cumsum(0) / (S**2).sum()
        # A hair's breadth for rounding, or a share of 1 is never reached.
        r = min(rule.r_max, int((energy < rule.tau - 1e-6).sum()) + 1)
        U, loadings = U[:, :r].contiguous(), (Qh[:r] * S[:r, None]).T.contiguous()
    return Basis(U, S, loadings, latents, float(cosines.max()))
