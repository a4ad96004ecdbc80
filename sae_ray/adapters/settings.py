"""Settings of a fine-tuning: what is trained of which model, on what, and on how many workers."""

from typing import Any, Literal

from pydantic import Field, JsonValue, model_validator

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.adapters.edits import LATENT_KINDS
from sae_ray.adapters.positions import Where
from sae_ray.adapters.recipe import Recipe
from sae_ray.adapters.subspace import Mode
from sae_ray.config import JobConfig

AdapterName = Literal["lora", "subspace", "steering", "scale", "affine", "residual", "full"]

LEARNING_RATES: dict[AdapterName, float] = {
    "lora": 3e-4,
    "subspace": 1e-3,
    "steering": 3e-2,
    "scale": 3e-2,
    "affine": 3e-2,
    "residual": 2e-3,
    "full": 3e-5,
}
"""Unless one is given. AdamW moves a number by about the rate a step, and a latent's by as much as
latents are large: units, not hundredths."""
_WEIGHTS = ("lora", "subspace", "full")
_EMBEDDED_FACTOR = 10
"""Weights of the embedded model, a thousand times smaller than others, want larger steps."""

_INCIDENTAL = {"num_workers", "max_rejected", "max_failures"}
"""Settings that say what is refused and how fast it goes: a run may be continued with others."""
_SOURCES = {"lm", "sae", "data", "general", "retain", "positive", "reference", "control"}
_SOURCES |= {"start_from"}


_ON_LATENTS = {"positions", "l1", "hook_point"}
_OWN: dict[AdapterName, set[str]] = {
    "lora": {"r", "alpha", "targets", "layers"},
    "subspace": {"mode", "positive", "reference", "control"},
    "steering": _ON_LATENTS,
    "scale": _ON_LATENTS,
    "affine": _ON_LATENTS,
    "residual": _ON_LATENTS | {"hidden"},
    "full": set(),
}
"""Settings that not all kinds of adapter look at, by the kinds that do."""


def of_others(adapter: AdapterName) -> set[str]:
    """Return settings that are of other kinds of adapter alone."""
    return set().union(*_OWN.values()) - _OWN[adapter]


class FinetuneSettings(JobConfig, Recipe):
    """What training an expert depends on."""

    lm: str | None = None
    """Language model: a folder or a Hugging Face name. Without it, the embedded one."""
    sae: list[str] | None = None
    """SAEs of that model, for the adapters that train on or along their latents: folders in
    sae-lens format, or release:sae_id. Without it, the embedded one, if the model is too."""
    hook_point: list[str] | None = None
    """Where each SAE reads, if not where it was trained."""
    data: str | None = None
    """What to learn: the folder of a selection, or any pool of conversations; of preference pairs
    (prompt, chosen, rejected) for dpo. Without it, the embedded pool or pairs."""
    max_rows: int = Field(default=100_000, ge=2)
    """Rows read of the data, from its beginning."""
    adapter: AdapterName = "lora"
    """What is trained: low-rank matrices (lora), the same within the span of SAE directions
    (subspace), numbers on SAE latents (steering, scale, affine, residual), every weight (full)."""
    start_from: str | None = None
    """PEFT folder of an adapter to go on from, in place of a new one: dpo after sft."""
    r: int = Field(default=16, ge=1)
    """Rank of lora."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale of lora times its rank; the rank itself unless given."""
    targets: list[str] | None = None
    """Names of the matrices that lora changes, such as q_proj,down_proj; all linear ones but the
    head unless given."""
    layers: list[int] | None = None
    """Numbers of the layers that lora changes, from 0; all unless given."""
    hidden: int = Field(default=16, ge=1)
    """Units of residual."""
    positions: Where = "all"
    """Tokens at which latents change."""
    l1: float = Field(default=0.0, ge=0)
    """Weight of the sum of what is trained on latents, each times the length of its direction."""
    mode: Mode = "freeze"
    """What a subspace keeps: its directions (freeze), its start (init), its inside (core, soft)."""
    positive: str | None = None
    """Conversations whose latents span the subspace. Without it, the data."""
    reference: str | None = None
    """Conversations from which these must differ. Without it, the embedded pool."""
    control: str | None = None
    """Conversations that share with the positive ones what is not meant (style, topic): what these
    must differ from, in the reference's place."""
    span_rows: int = Field(default=512, ge=20)
    """Conversations of each that are read for the subspace."""
    general: str | None = None
    """Conversations, or plain text in a column `text` of a Parquet file, on which forgetting is
    measured. Without it, the embedded plain text."""
    retain: str | None = None
    """Conversations on which the model is to stay near its base, for retain_weight; a subspace
    leaves out latents that are often on there."""
    held_out_rows: int = Field(default=128, ge=2)
    """Rows of the data that are never trained on, at most a fifth of them: base and expert are
    compared on these."""
    general_rows: int = Field(default=64, ge=0)
    """Rows of plain text that forgetting is measured on."""
    max_tokens: int = Field(default=512, ge=8)
    """Longest row that is learnt from; a row whose reply ends behind it is rejected."""
    max_rejected: float = Field(default=0.1, ge=0, le=1)
    """Share of rows that cannot be learnt from past which the job stops; listed with reasons."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards over the workers: nothing, optimiser, gradients too, weights too."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where DeepSpeed keeps the optimiser's state (and at stage 3 the weights) between uses."""
    nvme_path: str | None = None
    """Folder on a fast disk of every node, for offload=nvme."""
    num_workers: int | None = Field(default=None, ge=0)
    """Ray workers: one a GPU, or a core, if not given; 0 trains in this process without Ray."""
    max_failures: int = Field(default=3, ge=0)
    """Times that training is taken up again from its last checkpoint after a worker died."""

    @model_validator(mode="after")
    def _settings_fit(self) -> "FinetuneSettings":
        if self.retain_weight > 0 and self.retain is None:
            raise ValueError("--retain_weight needs --retain: conversations to stay near on")
        if self.offload != "none" and self.zero_stage < 2:
            raise ValueError("--offload needs --zero_stage 2 or 3: at 0 and 1 nothing is offloaded")
        if self.offload == "nvme" and (self.zero_stage != 3 or self.nvme_path is None):
            raise ValueError("--offload nvme needs --zero_stage 3 and --nvme_path")
        if self.zero_stage == 3 and self.packing:
            raise ValueError("--packing does not work at --zero_stage 3: leave one of them out")
        if self.adapter == "full" and self.start_from is not None:
            raise ValueError("--start_from goes on from an adapter: it does not go with full")
        if self.needs_sae and self.lm is not None and not self.sae:
            raise ValueError(f"--adapter {self.adapter} needs --sae: one of the model --lm")
        if self.adapter == "subspace":
            self._require_subspace_fits()
        if self.adapter in LATENT_KINDS and self.retain_weight and self.gradient_checkpointing:
            raise ValueError(
                f"--gradient_checkpointing runs layers of --adapter {self.adapter} again when the "
                "rows of --retain have been read since: leave one of them out"
            )
        for name, why in self._of_no_use().items():
            if getattr(self, name) != FinetuneSettings.model_fields[name].default:
                raise ValueError(f"--{name} does nothing {why}: leave it out")
        return self

    def _require_subspace_fits(self) -> None:
        if self.mode == "core" and self.objective == "dpo":
            raise ValueError(
                "--mode core does not go with dpo, which keeps a copy of the adapter beside it: "
                "give --mode freeze"
            )
        if self.mode in ("core", "soft") and self.zero_stage == 3 and self.num_workers != 0:
            raise ValueError(
                f"--mode {self.mode} needs whole weights, and --zero_stage 3 shards them: give "
                "--mode freeze, or a lower stage"
            )
        if self.lm is not None and self.reference is None and self.control is None:
            raise ValueError(
                "--adapter subspace needs --reference: ordinary conversations of your own, from "
                "which those to learn differ (the embedded ones are a toy's)"
            )

    def _of_no_use(self) -> dict[str, str]:
        """Return settings that this run would not look at, and why."""
        if self.start_from is not None:
            every = set().union(*_OWN.values())
            return dict.fromkeys(sorted(every), "with --start_from, which keeps what it has")
        found = dict.fromkeys(sorted(of_others(self.adapter)), f"for --adapter {self.adapter}")
        if self.num_workers == 0:
            found["offload"] = "with --num_workers 0, where DeepSpeed is not used"
        return found

    @property
    def needs_sae(self) -> bool:
        """Say whether the adapter is one of or along SAE latents."""
        return self.adapter in (*LATENT_KINDS, "subspace")

    @property
    def recipe(self) -> Recipe:
        """Return how it is trained, with the rate of its kind where none is given."""
        values = self.model_dump(include=set(Recipe.model_fields))
        values["learning_rate"] = self.rate
        return Recipe(**values)

    @property
    def rate(self) -> float:
        """Return the learning rate."""
        factor = _EMBEDDED_FACTOR if self.lm is None and self.adapter in _WEIGHTS else 1
        return self.learning_rate or factor * LEARNING_RATES[self.adapter]

    def spec(self, sae: tuple[str, ...], subspaces: tuple[str, ...] = ()) -> AdapterSpec | None:
        """Return the adapter; None for full fine-tuning."""
        points = tuple(self.hook_point or ())
        match self.adapter:
            case "full":
                return None
            case "lora":
                where: dict[str, Any] = {
                    name: tuple(given)
                    for name in ("targets", "layers")
                    if (given := getattr(self, name)) is not None
                }
                return AdapterSpec(kind="lora", r=self.r, alpha=self.alpha, **where)
            case "subspace":
                return AdapterSpec(kind="subspace", subspaces=subspaces, mode=self.mode)
            case kind:
                more: dict[str, Any] = {"hidden": self.hidden} if kind == "residual" else {}
                return AdapterSpec(
                    kind=kind,
                    sae=sae,
                    hook_points=points,
                    positions=self.positions,
                    l1=self.l1,
                    **more,
                )

    def identity(self) -> dict[str, JsonValue]:
        """Return what decides the result beside what it is made of."""
        fields = set(FinetuneSettings.model_fields) - _SOURCES - _INCIDENTAL
        return {**self.model_dump(mode="json", include=fields), "learning_rate": self.rate}


def quick(lm: str | None, data: str, adapter: AdapterName = "lora") -> FinetuneSettings:
    """Return settings that learn a few hundred rows in seconds, in this process.

    What is learnt on latents is kept to few of them, so that it can be told which they are.

    Args:
        lm: language model; None is the embedded one.
        data: folder of a selection, or a pool.
        adapter: what is trained.
    """
    return FinetuneSettings(
        lm=lm,
        data=data,
        adapter=adapter,
        l1=0.01 if adapter in LATENT_KINDS else 0.0,
        num_epochs=4,
        micro_rows=16,
        general_rows=8,
        num_workers=0,
    )
