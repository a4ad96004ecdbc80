"""KeptLatents: the few latents that are on, and products with them that touch nothing else.

With k of d_sae latents on at a token, a dense decoder multiplies almost only zeros, and so do its
backward pass and the encoder's. Here the pattern of what is on is kept in compressed rows, and

    spread     out[row]    = sum over kept of value * W[column]          (decode)
    gather_dot value[kept] = a[row] . W[column]                          (gradient of values)
    collect    out[column] = sum over kept of value * a[row]             (gradient of weights)

cost k / d_sae of the dense products, and are equal to them.
"""

import dataclasses
import functools
import warnings

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which latents are on at which row, row by row."""

    columns: Int32[Tensor, " kept"]
    offsets: Int32[Tensor, " rows_and_1"]
    """Where each row begins in `columns`; the last entry is their number."""
    d_sae: int

    @classmethod
    def of_rows(cls, columns: Int32[Tensor, "rows k"], d_sae: int) -> "Pattern":
        """Return the pattern of rows in each of which as many latents are on."""
        rows, k = columns.shape
        offsets = torch.arange(0, rows * k + 1, k, dtype=torch.int32, device=columns.device)
        return cls(columns.flatten(), offsets, d_sae)

    @classmethod
    def of_places(cls, places: Int64[Tensor, " kept"], num_rows: int, d_sae: int) -> "Pattern":
        """Return the pattern of places [row * d_sae + column], given in order."""
        counts = torch.bincount(places // d_sae, minlength=num_rows)
        offsets = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        return cls((places % d_sae).to(torch.int32), offsets, d_sae)

    @functools.cached_property
    def rows(self) -> Int32[Tensor, " kept"]:
        """The row of each kept latent."""
        numbers = torch.arange(len(self.offsets) - 1, dtype=torch.int32, device=self.columns.device)
        return numbers.repeat_interleave(self.offsets.diff(), output_size=len(self.columns))

    @functools.cached_property
    def by_column(self) -> tuple[Tensor, Int32[Tensor, " kept"], Int32[Tensor, " d_sae"]]:
        """The same pattern column by column: order, rows in that order, where columns begin."""
        narrow = self.columns.to(torch.int16) if self.d_sae < 2**15 else self.columns
        order = narrow.argsort(stable=True)
        counts = torch.bincount(self.columns, minlength=self.d_sae)
        begins = counts.cumsum(0, dtype=torch.int32) - counts.to(torch.int32)
        return order, self.rows[order], begins

    def counts(self) -> Tensor:
        """Return how many rows each latent is on in."""
        return torch.bincount(self.columns, minlength=self.d_sae)

    def spread(
        self, values: Float[Tensor, " kept"], W: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "rows d_in"]:
        """Sum rows of `W`, weighted by the values of each row's kept latents."""
        return embedding_bag(
            self.columns, W, self.offsets[:-1], per_sample_weights=values, mode="sum"
        )

    def collect(
        self, values: Float[Tensor, " kept"], a: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, "d_sae d_in"]:
        """Sum rows of `a`, weighted by the values, into the latents that are on there."""
        order, rows, begins = self.by_column
        return embedding_bag(rows, a, begins, per_sample_weights=values[order], mode="sum")

    def collect_sum(self, values: Float[Tensor, " kept"]) -> Float[Tensor, " d_sae"]:
        """Sum the values of each latent."""
        order, _, begins = self.by_column
        ends = torch.cat([begins[1:], begins.new_tensor([len(values)])])
        return torch.segment_reduce(
            values[order], "sum", lengths=(ends - begins).long(), unsafe=True
        )

    def gather_dot(
        self, a: Float[Tensor, "rows d_in"], W: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, " kept"]:
        """Return the product of each kept latent's row of `a` with its row of `W`."""
        if a.device.type == "cpu" and not torch.backends.mkl.is_available():
            return torch.cat(
                [
                    (a[row] * W[column]).sum(-1)
                    for row, column in zip(
                        self.rows.split(2**14), self.columns.split(2**14), strict=True
                    )
                ]
            )
        with warnings.catch_warnings():
            # torch says once a process that its compressed rows are new.
            warnings.simplefilter("ignore", UserWarning)
            pattern = torch.sparse_csr_tensor(
                self.offsets,
                self.columns,
                a.new_zeros(len(self.columns)),
                (len(a), self.d_sae),
                check_invariants=False,
            )
            return torch.sparse.sampled_addmm(pattern, a, W.t(), beta=0).values()


@dataclasses.dataclass(frozen=True)
class KeptLatents:
    """The latents that are on, with their values."""

    values: Float[Tensor, " kept"]
    pattern: Pattern

    def decode(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "rows d_in"]:
        """Return the values times `W_dec`."""
        return _Decode.apply(self.values, W_dec, self.pattern)  # pyright: ignore

    def to_dense(self) -> Float[Tensor, "rows d_sae"]:
        """Return every latent, with zeros."""
        rows = len(self.pattern.offsets) - 1
        dense = self.values.new_zeros(rows, self.pattern.d_sae)
        return dense.index_put((self.pattern.rows, self.pattern.columns), self.values)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, W_dec: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.pattern = pattern
        return pattern.spread(values, W_dec)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        values, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        return ctx.pattern.gather_dot(grad, W_dec), ctx.pattern.collect(values, grad), None


class KeptAffine(torch.autograd.Function):
    """(x - b_dec) @ W_enc + b_enc at the kept places alone; `pre` is that, already computed.

    x is data: of its gradient only the sum over rows is needed, which is W_enc times the gradient
    of b_enc, so that b_dec costs no product of the size of the batch.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx,
        centred: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
        pre: Tensor,
        pattern: Pattern,
    ) -> Tensor:
        ctx.save_for_backward(centred, W_enc)
        ctx.pattern = pattern
        return pre.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore  # noqa: D102
        centred, W_enc = ctx.saved_tensors
        b_enc = ctx.pattern.collect_sum(grad)
        W_enc_grad = ctx.pattern.collect(grad, centred).t()
        b_dec = -(W_enc @ b_enc) if ctx.needs_input_grad[3] else None
        return None, W_enc_grad, b_enc, b_dec, None, None
