"""Request: one description, a budget, and what a person added to them."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sae_ray.curate.score import ScorerName
from sae_ray.curate.select import SelectorName


def require_task(task: str) -> str:
    """Return a task, refusing one that says nothing or is no text."""
    if not task.strip():
        raise ValueError("the task is empty: say in a sentence what a model should get good at")
    if "\0" in task or task != task.encode("utf-8", "replace").decode():
        raise ValueError("the task holds a NUL or half a character: write it as plain UTF-8 text")
    return task


Task = Annotated[str, AfterValidator(require_task)]
"""What a model should get good at, in a sentence."""


class Request(BaseModel):
    """What is asked of an index; with the index it decides the selection."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: Task
    """What a model should get good at, in a sentence."""
    budget_examples: int = Field(default=500, ge=1)
    """Rows to select."""
    budget_tokens: int | None = Field(default=None, ge=1)
    """Content tokens that the selection may hold."""
    keep: tuple[str, ...] = ()
    """Ids of rows of the pool that are right. They are evidence, which outweighs what the words
    found, and no promise of a place: a kept row is selected where its own score says so."""
    drop: tuple[str, ...] = ()
    """Ids of rows of the pool that are wrong: never selected, and rows like them count for less."""
    examples: str | None = None
    """Conversations of the kind wanted: Parquet or JSONL, in any form that a pool may have."""
    pseudo_queries: str | None = None
    """File of conversations that a capable model wrote from the task: prompts, or JSON lines. Not
    together with pseudo_url."""
    pseudo_url: str | None = None
    """OpenAI-compatible endpoint asked to write them instead; its key is in OPENAI_API_KEY."""
    pseudo_model: str | None = None
    """Model that the endpoint serves."""
    evaluation: tuple[str, ...] = ()
    """Evaluation files that the selection is checked against: by 13-grams and whole questions."""
    scorer: ScorerName = "fused"
    """How rows are scored: fused, latents, hidden, sum_topk, jaccard (MONA), max or cosine."""
    selector: SelectorName = "greedy"
    """How scored rows are chosen: greedy (with coverage of concepts), topk or round_robin."""
    explain_rows: int | None = Field(default=None, ge=0)
    """Rows of the selection, from the first on, whose reasons name the tokens that they rest on:
    the model reads each of them again. All, if not given, where that is cheap (on a GPU, or with a
    small model), else as many as the page shows in full."""
    quota_column: str | None = None
    """Column, carried by keep_columns, of which no value may take more than quota."""
    quota: float | None = Field(default=None, gt=0, le=1)
    """Largest share of the selection that one value of quota_column may take."""
