"""Recipe: how a model is trained on examples, whatever is trained of it and on how many workers."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae_ray.errors import ConfigError
from sae_ray.lm import DTypeName

Objective = Literal["sft", "dpo"]


class Recipe(BaseModel):
    """What decides the weights that come out, beside model, adapter and rows."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    objective: Objective = "sft"
    """Learn replies, or learn to prefer one reply to another."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Of AdamW at its height; it rises over warmup_share and then falls to zero in a line. Without
    it, one that suits the kind of adapter."""
    warmup_share: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps over which the rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW."""
    max_gradient_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to it."""
    num_epochs: float = Field(default=3.0, gt=0)
    """Passes over the rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Steps, in place of num_epochs."""
    batch_rows: int = Field(default=16, ge=1)
    """Rows of a step, over all workers: results do not depend on how many there are."""
    micro_rows: int = Field(default=8, ge=1)
    """Rows that a worker holds at once, at most; the rest of its share is accumulated."""
    beta: float = Field(default=0.1, gt=0)
    """Of DPO: how much staying near the reference counts."""
    packing: bool = False
    """Lay several conversations into one row, each blind to the others (sft)."""
    gradient_checkpointing: bool = False
    """Recompute activations on the way back instead of keeping them."""
    dtype: DTypeName = "float32"
    """Of the frozen weights and the arithmetic; what is trained stays float32."""
    retain_weight: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the base model on rows of the retain set."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between looks at the held-out rows, with a checkpoint each; a quarter of all unless
    given."""
    patience: int | None = Field(default=None, ge=1)
    """Looks without a new best after which training stops; the best is kept in any case."""
    seed: int = Field(default=0, ge=0)
    """Of the adapter's first weights and the order of rows."""

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        if self.packing and self.objective == "dpo":
            raise ConfigError("packing goes with sft alone: leave it out for dpo")
        return self

    def micro_rows_for(self, num_workers: int) -> tuple[int, int]:
        """Return a worker's rows at once, and how often it accumulates them in a step.

        Raises:
            ConfigError: the rows of a step cannot be shared out evenly.
        """
        if self.batch_rows % num_workers:
            raise ConfigError(
                f"batch_rows={self.batch_rows} cannot be shared by {num_workers} workers: give a "
                "multiple of their number"
            )
        share = self.batch_rows // num_workers
        micro = max(n for n in range(1, min(share, self.micro_rows) + 1) if share % n == 0)
        return micro, share // micro
