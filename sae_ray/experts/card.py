"""ExpertCard: what an expert is, what it was made from, and how it compares with its base."""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
)

from sae_ray.artifacts import FileRecord, Source
from sae_ray.errors import ArtifactError

_RESERVED = ("base", "moie")
"""What a service calls the base and the mixture: an expert of that name could not be asked."""


def _require_unreserved(name: str) -> str:
    if name in _RESERVED:
        raise ValueError(
            f"a service calls its base and its mixture {' and '.join(_RESERVED)}: give another name"
        )
    return name


ExpertName = Annotated[str, Field(pattern=r"^\w[\w.-]*$"), AfterValidator(_require_unreserved)]
"""By which an expert is asked."""
ADAPTER = "adapter"
"""Folder of an expert's files, beside its card."""
SAFE_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".md")
"""Files that hold data and nothing that runs."""

Status = Literal["candidate", "active", "retired"]


class Measure(BaseModel):
    """One figure of base and expert on the same rows, neither of which was trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    base: float
    expert: float
    gain: float
    """Positive where the expert is better."""
    low: float
    """Lower end of the 95 % interval of the gain, by paired bootstrap over rows."""
    high: float
    num_rows: int

    @property
    def is_better(self) -> bool:
        """Say whether the gain is beyond its interval."""
        return self.low > 0


class ExpertCard(BaseModel):
    """All that is known of an expert when it is made; its id is the hash of this."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: ExpertName
    description: str
    """The task, in a sentence."""
    adapter: str
    """Kind: lora, subspace, steering, scale, affine, residual or full."""
    objective: Literal["sft", "dpo"]
    base: str
    """Path or published name of the language model."""
    base_sha256: str
    """Fingerprint of that model's weights: another model under its name is another base."""
    files: dict[str, FileRecord]
    """Of the adapter, by name below its folder."""
    parents: dict[str, str] = {}
    """Content hashes of data, selection, language model and SAE."""
    sources: dict[str, Source] = {}
    """Where these lay: told, and never compared."""
    profile: dict[str, JsonValue] | None = None
    """Of the selection: the task as weighted latents."""
    prototypes: dict[str, JsonValue] | None = None
    """What the router compares prompts with: latents and centroid of the rows."""
    num_parameters: int
    """Trained."""
    share: float
    """Of the base model's parameters."""
    measures: list[Measure]
    """The first one decides."""

    @field_validator("files")
    @classmethod
    def _safe(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            parts = name.split("/")
            if name.startswith("/") or "\\" in name or any(p in ("", ".", "..") for p in parts):
                raise ValueError(f"file {name!r} leads out of the expert's folder")
            if not name.endswith(SAFE_SUFFIXES):
                raise ValueError(
                    f"file {name!r} may hold code: files of an expert end in "
                    f"{', '.join(SAFE_SUFFIXES)}; save weights as safetensors"
                )
        if not any(name.endswith(".safetensors") for name in files):
            raise ValueError("there are no weights (.safetensors) among its files")
        return files

    @property
    def id(self) -> str:
        """Return the hash of its file: what a registry knows it by."""
        return hash_of(self.encode())

    @property
    def beats_base(self) -> bool:
        """Say whether the figure that decides is better beyond its interval."""
        return bool(self.measures) and self.measures[0].is_better

    def encode(self) -> bytes:
        """Return the card as canonical JSON."""
        content = self.model_dump(mode="json")
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, content: bytes, place: str) -> "ExpertCard":
        """Read a card; `place` is where it lies, for the error."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "JSON"
            raise ArtifactError(
                f"{place} is no card of an expert ({field}: {first['msg']}): make the expert again"
            ) from None


def hash_of(card: bytes) -> str:
    """Return the first 16 hex digits of the SHA-256 of a card's file."""
    return hashlib.sha256(card).hexdigest()[:16]
