"""Settings of an index: which pool is read through which model and SAE, and how."""

from collections.abc import Collection

from pydantic import Field, JsonValue, model_validator

from sae_ray.artifacts import open_artifact
from sae_ray.config import JobConfig
from sae_ray.curate.index import KIND
from sae_ray.curate.scorer import ScorerConfig
from sae_ray.curate.sources import (
    EMBEDDED,
    ROLES,
    Role,
    locate_model,
    locate_source,
    require_source,
)
from sae_ray.errors import ArtifactError
from sae_ray.lm import DTypeName, fast_dtype

_INCIDENTAL = {"max_rejected", "check_fit", "num_workers"}
"""Settings that say what is refused and how fast it goes: a run may be continued with others."""


class IndexSettings(JobConfig):
    """What the jobs that index a pool have in common."""

    pool: str | None = None
    """Conversations: Parquet, JSONL or a folder of them, local or on any fsspec URL (s3://...), or
    the name of a Hugging Face dataset; as `messages`, `instruction/input/output` or
    `prompt/completion`. Without it, the embedded pool."""
    lm: str | None = None
    """Language model that reads: a folder or a Hugging Face name, whose revision of now is taken
    (`name@revision` for another). Without it, the embedded one."""
    sae: str | None = None
    """SAE of that model: a folder in sae-lens format, or release:sae_id of sae-lens' registry.
    Without it, the embedded one."""
    dtype: DTypeName = Field(default_factory=fast_dtype)
    """Precision of the forward and of the encoder's product; sums stay float32. Without it,
    bfloat16 where the machine that starts the job is fast at it, else float32."""
    max_tokens: int = Field(default=2048, ge=8)
    """Tokens read of each conversation; the rest is left out and counted as truncated."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens in a batch, padding included."""
    top_latents: int = Field(default=512, ge=1)
    """Latents kept of each row by maximum and as many by mean, where d_sae is above 4,096."""
    rows_per_shard: int = Field(default=2048, ge=1)
    """Rows of the pool in a shard: the unit that is scored at once, and lost when a worker dies."""
    keep_columns: list[str] = Field(default=["source"])
    """Columns of the pool to show in reports, where it has them; never read by a selector."""
    max_rejected: float = Field(default=0.1, ge=0, le=1)
    """Share of unreadable rows past which the job stops; rejected rows are listed with reasons.
    Rows whose id an earlier one has are listed, too, and not counted."""
    check_fit: bool = True
    """Refuse a SAE that leaves over 80 % of the variance unexplained: another model's."""
    num_workers: int | None = Field(default=None, ge=0)
    """Ray workers: one a GPU, or a core, if not given; 0 scores in this process without Ray."""

    @model_validator(mode="after")
    def _model_and_sae_together(self) -> "IndexSettings":
        if (self.lm is None) != (self.sae is None):
            given, missing = ("lm", "sae") if self.sae is None else ("sae", "lm")
            raise ValueError(
                f"--{given} is given without --{missing}: a SAE reads one model; give both, or "
                "neither for the embedded pair"
            )
        return self

    def identity(self) -> dict[str, JsonValue]:
        """Return what decides an index beside what it is made of: what it records."""
        fields = set(IndexSettings.model_fields) - set(ROLES) - _INCIDENTAL
        return self.model_dump(mode="json", include=fields)

    def source(self, role: Role) -> str:
        """Return the name of the pool, model or SAE: the one given, or the embedded one's."""
        return getattr(self, role) or EMBEDDED

    def require_same(self, path: str, said: Collection[str]) -> None:
        """Refuse a finished index that differs in a setting or source that was said.

        Raises:
            ArtifactError: it was made with other settings, or of another pool, model or SAE.
        """
        manifest = open_artifact(path, KIND)
        differences = [
            f"{name}: {manifest.config.get(name)!r} there, {value!r} here"
            for name, value in self.identity().items()
            if name in said and value != manifest.config.get(name)
        ]
        if differences:
            raise ArtifactError(
                f"{path} holds an index made otherwise ({'; '.join(differences)}): give another "
                "folder for the index, or leave these settings out"
            )
        for role in ROLES:
            if role in said:
                require_source(role, self.source(role), manifest, path)

    @property
    def pool_source(self) -> str:
        """Where the pool lies."""
        return locate_source("pool", self.source("pool"))

    def scorer_config(self) -> ScorerConfig:
        """Return what a row of the index depends on."""
        return ScorerConfig(
            lm=locate_model(self.source("lm")),
            sae=locate_source("sae", self.source("sae")),
            dtype=self.dtype,
            max_tokens=self.max_tokens,
            batch_tokens=self.batch_tokens,
            top_latents=self.top_latents,
            check_fit=self.check_fit,
        )
