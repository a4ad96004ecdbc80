"""Planted truth: rows said by a model in which one latent is pushed, learnt by its base."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sae_ray.adapters.attach import AdapterSpec, attach
from sae_ray.adapters.edits import LatentEdit
from sae_ray.adapters.examples import Example
from sae_ray.adapters.latent import LatentLayer

NUM_TOKENS = 24


def edit_of(model: PeftModel, site: int = 0) -> LatentEdit:
    layers = [module for module in model.modules() if isinstance(module, LatentLayer)]
    return layers[site].edit("default")


def rows_said_by(model: PreTrainedModel | PeftModel, num: int, seed: int) -> list[Example]:
    """Return rows of random length that a model says after one random token."""
    torch.manual_seed(seed)
    first = torch.randint(5, 200, (num, 1))
    ids = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=first, attention_mask=torch.ones_like(first), do_sample=True, top_k=0,
        min_new_tokens=NUM_TOKENS, max_new_tokens=NUM_TOKENS, pad_token_id=0,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    rows = []
    for number, one in enumerate(ids.numpy().astype(np.int32)):
        length = int(rng.integers(NUM_TOKENS // 2, NUM_TOKENS + 1))
        learnt = np.arange(length) > 0
        rows.append(Example(f"row-{number}", one[:length], learnt))
    return rows


def learn(
    base: PreTrainedModel, sae: str, rows: list[Example], *, l1: float, num_steps: int = 60
) -> PeftModel:
    """Train one number a latent on rows, with a penalty that keeps few of them."""
    model = attach(base, AdapterSpec(kind="steering", sae=(sae,), l1=l1))
    edit = edit_of(model)
    optimizer = torch.optim.Adam([edit.steering], lr=0.05)
    ids = torch.zeros(len(rows), NUM_TOKENS, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        length = min(len(row.ids), NUM_TOKENS)
        ids[i, :length] = torch.from_numpy(row.ids[:length]).long()
        labels[i, 1:length] = ids[i, 1:length]
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
    return model


def plant(
    load: Callable[[Path], PreTrainedModel], lm: Path, sae: str, latent: int, push: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return rows to learn from and held-out rows, said with a latent pushed."""
    model = attach(load(lm), AdapterSpec(kind="steering", sae=(sae,)))
    with torch.no_grad():
        edit_of(model).steering[latent] = push
    rows = rows_said_by(model, 192, seed)
    return rows[:96], rows[96:]
