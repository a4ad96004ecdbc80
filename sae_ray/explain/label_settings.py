"""Settings of a labelling: which latents are looked at in which data, who judges them, and tags."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, JsonValue, ValidationError, model_validator
from typing_extensions import TypedDict

from sae_ray.config import JobConfig
from sae_ray.curate.sources import EMBEDDED
from sae_ray.rows import BadRow

TAGS = ("concepts", "spans")
"""Columns of tags."""
_INCIDENTAL = {"judge_at_once", "judge_timeout_s", "max_rejected"}
"""What says what is refused and how fast it goes: a run may be continued with others."""


class LabelSettings(JobConfig):
    """What labelling a SAE's latents depends on."""

    lm: str | None = None
    """Language model that reads: a folder or a Hugging Face name. Without it, the embedded one."""
    sae: str | None = None
    """SAE of that model: a folder in sae-lens format, or release:sae_id of sae-lens' registry.
    Without it, the embedded one."""
    data: str | None = None
    """Conversations in which latents are looked at: Parquet, JSONL or a folder of them, on any
    fsspec URL, or the name of a Hugging Face dataset. Columns `concepts` (a list of text) and
    `spans` (message, start, end, concept) are tags, and labels are drawn from them. Without it, the
    embedded pool."""
    max_conversations: int = Field(default=20_000, ge=2)
    """Conversations that are read, in slices of 512 from all over the data."""
    max_tokens: int = Field(default=8192, ge=8)
    """Tokens read of each conversation; the rest is left out and counted as truncated."""
    context_tokens: int = Field(default=32, ge=4)
    """Tokens of a context that is kept."""
    judge_url: str | None = None
    """OpenAI-compatible endpoint of a judge, such as https://host/v1; its key is taken from
    OPENAI_API_KEY. Without it, labels are tags and tokens, and nothing leaves this machine; with
    it, contexts from the data are sent there."""
    judge_model: str | None = None
    """Model that judges."""
    judge_latents: int = Field(default=128, ge=1)
    """Latents that are judged, drawn at random among those that are ever on."""
    judge_at_once: int = Field(default=8, ge=1)
    """Requests to the judge under way at once."""
    judge_timeout_s: float = Field(default=120.0, gt=0)
    """Longest wait for one answer of the judge."""
    max_rejected: float = Field(default=0.1, ge=0, le=1)
    """Share of unreadable rows past which the job stops; they are listed with reasons."""
    seed: int = Field(default=0, ge=0)
    """Of the slices and contexts that are kept, and of the latents that are judged."""

    @model_validator(mode="after")
    def _pairs(self) -> "LabelSettings":
        for one, other in (("lm", "sae"), ("judge_url", "judge_model")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                given, missing = (one, other) if getattr(self, other) is None else (other, one)
                raise ValueError(f"--{given} is given without --{missing}: give both, or neither")
        return self

    def source(self, role: Literal["pool", "lm", "sae"]) -> str:
        """Return the name of the data, model or SAE: the one given, or the embedded one's."""
        return (self.data if role == "pool" else getattr(self, role)) or EMBEDDED

    def identity(self) -> dict[str, JsonValue]:
        """Return what decides the result beside what it is made of."""
        fields = set(LabelSettings.model_fields) - {"lm", "sae", "data"} - _INCIDENTAL
        return self.model_dump(mode="json", include=fields)


class Span(TypedDict):
    """A piece of a message with a tag."""

    message: int
    start: int
    end: int
    concept: str


class Tags(BaseModel):
    """What a row's columns may say of it."""

    concepts: list[str] | None = None
    spans: list[Span] | None = None


def tags_of(row: Mapping[str, object], num_messages: int) -> dict[str, Any]:
    """Return the tags of a row.

    Raises:
        BadRow: they are none, or are about a message that is not there.
    """
    try:
        tags = Tags.model_validate({name: row.get(name) for name in TAGS})
    except ValidationError as error:
        raise BadRow("concepts or spans are no tags", error.errors()[0]["msg"]) from None
    for span in tags.spans or []:
        if not 0 <= span["message"] < num_messages:
            raise BadRow("a span names a message that is not there", f"{span['message']}")
    return tags.model_dump()
