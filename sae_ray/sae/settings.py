"""Settings of a training: which SAEs, of which model, from which data, and how they are trained."""

import dataclasses
from typing import Literal

from pydantic import Field, JsonValue, model_validator
from transformers import PretrainedConfig

from sae_ray import tiny
from sae_ray.config import JobConfig
from sae_ray.errors import ConfigError
from sae_ray.lm import DTypeName, HookPoint, require_layer, width_at
from sae_ray.sae.recipe import Architecture, Recipe, SAESpec, fast_paper, grid
from sae_ray.sae.repeats import Order
from sae_ray.sae.sequences import Arrangement, Regime

_EXPANSION = 8
"""Width of a SAE in widths of the hook point, where none is given."""
_INCIDENTAL = {
    "checkpoint_every", "max_failures", "max_rejected", "min_workers", "trackers", "lm", "data",
    "steer_prompts",
}  # fmt: skip
"""What says how a run goes on or where it reports: it may be continued with others."""


class TrainSettings(JobConfig):
    """What a training depends on."""

    lm: str | None = None
    """Language model that is read: a folder or a Hugging Face name. Without it, the embedded
    one."""
    data: str | None = None
    """Conversations: Parquet, JSONL or a folder of them, on any fsspec URL, or the name of a
    Hugging Face dataset. For regime bt_p also plain text, in a column `text`. Without it, the
    embedded pool (bt_p: the embedded text)."""
    hook_points: list[str] = [tiny.HOOK_POINT]
    """Where the model is read: blocks.L.(hook_resid_pre, hook_resid_post, hook_mlp_out,
    hook_attn_out, attn.hook_z), or module paths of layers."""
    archs: list[Architecture] = ["batchtopk"]
    """Architectures. Each hook point, width and seed is trained with each of them."""
    widths: list[int] = []
    """Latents of the SAEs. Not set: eight times the width of the hook point."""
    seeds: list[int] = [0]
    """Of the first weights: one SAE for each."""
    k: float = Field(default=32.0, gt=0)
    """Latents on at a token, for topk, batchtopk, matryoshka, and as jumprelu's target."""
    sparsity: float | None = Field(default=None, ge=0)
    """Weight of the penalty of standard and gated SAEs (5 if not set) and jumprelu ones (1), which
    then have no target k."""
    regime: Regime = "fast"
    """fast: each conversation alone. bt_f: conversations end to end, cut into blocks. bt_f_masked:
    the same, each piece alone. bt_p: blocks of plain text."""
    num_tokens: int = Field(default=2_000_000, ge=1)
    """Tokens that every SAE is trained on, over all workers."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest conversation of regime fast; what lies behind is cut and counted. Not set: 8,192, or
    the positions that the model has, if fewer."""
    block_tokens: int | None = Field(default=None, ge=1)
    """Length of blocks. Not set: 2,048, or the positions that the model has, if fewer."""
    preset: Literal["default", "fast_paper"] = "default"
    """fast_paper: the paper's batch of 128, rates, penalties and no scaling; slow by design."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a SAE's batch, on each worker. Not set: 4,096 (fast_paper: 128)."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak rate. Not set: 4e-4 for 16,384 latents, else in inverse proportion to the root of that
    (fast_paper: 7e-5)."""
    dead_after_tokens: int | None = Field(default=None, ge=1)
    """Tokens after which a latent that was never on is taught by the auxiliary loss. Not set:
    1,000,000, or a twentieth of num_tokens, if fewer (fast_paper: 128,000)."""
    dtype: DTypeName = "float32"
    """Precision of the language model."""
    compute: DTypeName = "float32"
    """Precision of the SAEs' large products; weights and thresholds are float32 always."""
    tokens_per_forward: int = Field(default=8192, ge=1)
    """Tokens in a batch of the language model, padding included."""
    buffer_batches: int | None = Field(default=None, ge=1)
    """Batches that the mixing buffer holds, of which tokens are drawn at random. Not set: 16
    (fast_paper, whose batches are small: those of eight forwards, or nothing would mix)."""
    drop_repeats: Order | None = None
    """Drop conversations that share 20 words on end with one that was kept before: `rows` goes by
    the order of the pool, as the paper does, `content` by a hash, so that order does not matter."""
    held_out_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of rows, by a hash of their ids, that are kept from training and measured on. Of the
    embedded pool it is always the half that its model has not seen."""
    eval_conversations: int = Field(default=1000, ge=1)
    """Held-out conversations that the SAEs are measured on."""
    splice: bool = True
    """Measure also what the SAEs cost the model when spliced in: cross entropy and divergence."""
    rows_per_shard: int = Field(default=512, ge=1)
    """Rows of the data that are read at once: the unit of work of a worker."""
    num_workers: int = Field(default=0, ge=0)
    """Ray Train workers (one a GPU, or a core); 0 trains in this process, without Ray."""
    min_workers: int | None = Field(default=None, ge=1)
    """Go on with so few workers where nodes are lost, and with more again when they are back."""
    placement: Literal["data", "saes"] = "data"
    """What workers divide: `data`, each SAE on all of them; or `saes`, each on one, for grids that
    do not fit on one device. Then every worker runs the language model over all data."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints, from which a run that was killed goes on."""
    max_failures: int = Field(default=3, ge=0)
    """Times that lost workers are replaced."""
    max_rejected: float = Field(default=0.1, ge=0, le=1)
    """Share of unreadable rows past which the job stops; they are listed with reasons."""
    label_conversations: int = Field(default=0, ge=0)
    """Conversations in which every SAE's latents are looked at and labelled; 0 for no labels."""
    steer_prompts: int = Field(default=0, ge=0)
    """Held-out questions that the model answers while the latents of special tokens are pushed,
    beside a random and an unrelated direction and the opposite; 0 for none."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Where curves go beside the report: `tensorboard` in a folder beside the output's, of its name
    and -tensorboard, wandb and mlflow as their own environment variables say. If one fails,
    training goes on."""
    seed: int = Field(default=0, ge=0)
    """Of the order of the data."""

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainSettings":
        if self.lm is not None and self.data is None:
            raise ValueError("--lm is given without --data: give conversations to train on")
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError("--min_workers is more than --num_workers: lower it, or raise that")
        if self.placement == "saes" and (self.num_workers < 2 or self.min_workers is not None):
            raise ValueError(
                "--placement saes needs a fixed number of workers, at least 2: set --num_workers "
                "and leave --min_workers out"
            )
        for name, why in self._of_no_use().items():
            if getattr(self, name) != TrainSettings.model_fields[name].default:
                raise ValueError(f"--{name} does nothing {why}: leave it out")
        if self.label_conversations and self.regime == "bt_p" and self.data is not None:
            raise ValueError(
                "--label_conversations needs conversations and regime bt_p reads text: leave it "
                "out, and label the SAEs with jobs/label_latents.py"
            )
        if self.steer_prompts and self.regime == "bt_p":
            raise ValueError(
                "--steer_prompts needs conversations and regime bt_p reads text: leave it out"
            )
        return self

    def _of_no_use(self) -> dict[str, str]:
        """Return settings that this run would not look at, and why."""
        archs = set(self.archs)
        of_no_use = {"block_tokens": "with --regime fast, which cuts by --max_tokens"}
        if self.regime != "fast":
            of_no_use = {"max_tokens": f"with --regime {self.regime}, which cuts by --block_tokens"}
        if archs <= {"standard", "gated"}:
            of_no_use["k"] = f"for {', '.join(sorted(archs))}, which have --sparsity"
        if archs <= {"topk", "batchtopk", "matryoshka"}:
            of_no_use["sparsity"] = f"for {', '.join(sorted(archs))}, which have --k"
        return of_no_use

    def identity(self) -> dict[str, JsonValue]:
        """Return what decides the result beside model and data."""
        fields = set(TrainSettings.model_fields) - _INCIDENTAL
        return self.model_dump(mode="json", include=fields)

    @property
    def data_workers(self) -> int:
        """How many workers divide the data among them."""
        return max(1, self.num_workers) if self.placement == "data" else 1

    def points(self, config: PretrainedConfig, name: str) -> list[HookPoint]:
        """Return the hook points.

        Raises:
            ModelError: one is unknown, or above the model's last layer.
        """
        points = list(dict.fromkeys(HookPoint.parse(one) for one in self.hook_points))
        for point in points:
            require_layer(point, config, name)
        return points

    def specs(self, config: PretrainedConfig, name: str) -> list[SAESpec]:
        """Return the SAEs of the grid.

        Raises:
            ConfigError: a width or k cannot be.
        """
        specs: list[SAESpec] = []
        for point in self.points(config, name):
            widths = self.widths or [_EXPANSION * width_at(config, point)]
            k = self.k if set(self.archs) != {"jumprelu"} or self._has_target else None
            specs += grid(
                [point], self.archs, widths, k=k, sparsity=self.sparsity, seeds=self.seeds
            )
        if not self._has_target:
            specs = [
                dataclasses.replace(one, k=None) if one.architecture == "jumprelu" else one
                for one in specs
            ]
        if not specs:
            raise ConfigError("no SAE is asked for: give at least one of archs, seeds, hook_points")
        return specs

    @property
    def _has_target(self) -> bool:
        """Whether jumprelu aims at k: a penalty takes its place, the paper's unless k is given."""
        by_penalty = self.preset == "fast_paper" and "k" not in self.model_fields_set
        return self.sparsity is None and not by_penalty

    def arrangement(self, config: PretrainedConfig) -> Arrangement:
        """Return how instances become sequences.

        Raises:
            ConfigError: a length is more than the model has positions.
        """
        limit = getattr(config, "max_position_embeddings", None) or 2**31
        for name in ("max_tokens", "block_tokens"):
            given = getattr(self, name)
            if given is not None and given > limit:
                raise ConfigError(
                    f"{name}={given}, but the model has {limit} positions: give at most that"
                )
        return Arrangement(
            self.regime,
            max_tokens=self.max_tokens or min(8192, limit),
            block_tokens=self.block_tokens or min(2048, limit),
        )

    @property
    def room_batches(self) -> int:
        """Return how many batches the mixing buffer holds."""
        by_preset = {"default": 16, "fast_paper": 8 * self.tokens_per_forward // 128}
        return self.buffer_batches or by_preset[self.preset]

    def recipe(self) -> Recipe:
        """Return how the SAEs are trained."""
        given = {
            name: value
            for name in ("batch_tokens", "learning_rate", "dead_after_tokens")
            if (value := getattr(self, name)) is not None
        }
        if self.preset == "fast_paper":
            base = fast_paper(self.num_tokens)
        else:
            base = Recipe(1, dead_after_tokens=min(10**6, max(1, self.num_tokens // 20)))
        recipe = dataclasses.replace(base, compute=self.compute, **given)
        num_steps = max(1, round(self.num_tokens / (recipe.batch_tokens * self.data_workers)))
        return dataclasses.replace(recipe, num_steps=num_steps)
