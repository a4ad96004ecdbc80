"""An exam: the embedded default's questions, put to its base and to experts side by side."""

from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_ray import tiny
from sae_ray.lm import quiet_loading
from sae_ray.tiny.exam import accuracies

Marks = dict[str, dict[str, float]]
"""Who was asked -> domain -> share of right answers."""


def examine(adapters: Mapping[str, str | Path], *, num_questions: int = 20) -> Marks:
    """Ask the embedded model alone and with each adapter, so many questions a domain."""
    asked: dict[str, int] = {}
    rows = []
    for row in pq.read_table(tiny.eval_path()).to_pylist():
        asked[row["domain"]] = asked.get(row["domain"], 0) + 1
        if asked[row["domain"]] <= num_questions:
            rows.append(row)
    tokenizer = AutoTokenizer.from_pretrained(tiny.lm_path())
    marks: Marks = {}
    for name, adapter in {"base": None, **adapters}.items():
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(tiny.lm_path(), dtype=torch.float32)
            if adapter is not None:
                # The adapter's layers are in the base model from here on.
                model = PeftModel.from_pretrained(model, str(adapter)).get_base_model()
        marks[name] = accuracies(model, tokenizer, rows)  # pyright: ignore[reportArgumentType]
    return marks


def tabulate(marks: Marks) -> str:
    """Return a row a domain, a column for each who was asked, as text."""
    table = Table("domain", *marks, title="right answers")
    for domain in next(iter(marks.values())):
        table.add_row(domain, *(f"{one[domain]:.0%}" for one in marks.values()))
    console = Console()
    with console.capture() as said:
        console.print(table)
    return said.get().rstrip("\n")
