"""Settings of a search: what is tried, how often, how many at a time, and by what it is judged."""

from typing import Any

from pydantic import Field, JsonValue, model_validator

from sae_ray.adapters.proposals import Sampler
from sae_ray.adapters.settings import FinetuneSettings, of_others
from sae_ray.adapters.space import Space
from sae_ray.errors import ConfigError

DEFAULT_SPACE: dict[str, Any] = {
    "adapter": ["lora", "steering", "affine", "residual"],
    "learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
    "layers": [[0], [1], [2], [3], [0, 1, 2, 3]],
    "targets": [["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]],
    "l1": [0.0, 0.01],
    "hidden": [8, 32],
}
"""Of the embedded model: which layers and which component of LoRA, or which edit of the latents."""

_INCIDENTAL = {"concurrent_trials", "gpus_per_trial", "max_failures", "max_rejected"}
_OF_A_GANG = ("num_workers", "zero_stage", "offload", "nvme_path")


class SearchSettings(FinetuneSettings):
    """What a search depends on: a space, and the settings that hold where it says nothing."""

    max_rows: int = Field(default=400, ge=2)
    """Rows read of the data, from its beginning: settings are compared on few."""
    space: str | dict[str, Any] | None = None
    """What to try: a YAML file, or the space itself: '{adapter: [lora, steering], learning_rate:
    {low: 0.001, high: 0.1, log: true}}'. Lists are choices; `sae` of several layers and sites, and
    `layers` and `targets` of lora, ask where to train; `data` and `max_rows` which selection, and
    how much of it, all judged by the same rows of --data, which none of them learns. Without it,
    one for the embedded model."""
    num_trials: int = Field(default=24, ge=1)
    """Trainings to try, beside the default LoRA, which every search has."""
    sampler: Sampler = "tpe"
    """How they are chosen: by what came before (tpe), blindly (random), or all in turn (grid)."""
    prune: bool = True
    """End a trial at a look at which it is behind the better half of those that have come as far in
    their own steps (ASHA); the first of all are ended on the word of few."""
    num_finalists: int = Field(default=3, ge=1)
    """The best of them, which are trained again with other seeds."""
    finalist_seeds: int = Field(default=3, ge=3)
    """Seeds of each finalist and of the default LoRA, none of which the search has used."""
    max_divergence: float = Field(default=0.1, gt=0)
    """Of dpo: nats a token of plain text from the base (KL) past which a look does not count: what
    is compared is what each reaches within that distance."""
    concurrent_trials: int | None = Field(default=None, ge=1)
    """Trials at a time: one a GPU or core, or as many as share the GPUs, unless given."""
    gpus_per_trial: float | None = Field(default=None, gt=0, le=1)
    """Part of a GPU that a trial takes, where there are any; a whole one unless given."""

    @model_validator(mode="after")
    def _search_fits(self) -> "SearchSettings":
        fields = FinetuneSettings.model_fields
        for name in _OF_A_GANG:
            if getattr(self, name) != fields[name].default:
                raise ValueError(
                    f"--{name} does nothing in a search, whose trials train in a process each: "
                    "leave it out, and give it to jobs/finetune.py with the best settings"
                )
        if self.objective == "dpo" and not self.general_rows:
            raise ValueError("--general_rows 0 with dpo leaves no text to measure --max_divergence")
        if self.start_from is not None:
            raise ValueError("--start_from does not go with a search, whose trials begin anew")
        if self.space is None and self.lm is not None:
            raise ValueError(
                "--lm needs --space: the default one is of the embedded model's layers"
            )
        return self

    def find_space(self) -> Space:
        """Return the space that is searched.

        Raises:
            ConfigError: it is none, or is given twice.
        """
        space = Space.parse(DEFAULT_SPACE if self.space is None else self.space, self.as_base())
        kinds = space.kinds()
        for name in sorted(self.model_fields_set):
            if all(name in of_others(kind) for kind in kinds):
                raise ConfigError(
                    f"--{name} does nothing for --adapter {', '.join(kinds)}: leave it out"
                )
        for name in space.knobs:
            if name in self.model_fields_set - {"data"}:
                raise ConfigError(
                    f"--{name}={getattr(self, name)!r} is given and searched too (space.{name}): "
                    "leave one of them out"
                )
        return space

    def as_base(self) -> FinetuneSettings:
        """Return what was given of a training's settings."""
        given = (self.model_fields_set | {"max_rows"}) & set(FinetuneSettings.model_fields)
        # Of several kinds: each point is validated, without what is another kind's.
        return FinetuneSettings.model_construct(
            _fields_set=set(given), **{name: getattr(self, name) for name in given}
        )

    def _of_no_use(self) -> dict[str, str]:
        return {}  # that depends on the kinds that are searched: see find_space

    def identity(self) -> dict[str, JsonValue]:
        """Return what decides the result beside what it is made of."""
        own = set(SearchSettings.model_fields) - set(FinetuneSettings.model_fields) - _INCIDENTAL
        found = self.model_dump(mode="json", include=own - {"space"})
        knobs = {
            name: knob if isinstance(knob, list) else knob.model_dump()
            for name, knob in self.find_space().knobs.items()
        }
        return {**super().identity(), **found, "space": knobs}  # pyright: ignore
