"""How the embedded default's data and language model are made, stage by stage."""

import dataclasses
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int32
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sae_ray.tiny.corpus import Corpus, public_pages, real_corpus
from sae_ray.tiny.exam import accuracies
from sae_ray.tiny.generator import Splits, generate
from sae_ray.tiny.pretrain import (
    IGNORED,
    PretrainConfig,
    Step,
    batches,
    cut,
    held_out_loss,
    new_model,
    new_optimiser,
    pretrain,
)
from sae_ray.tiny.split import is_held_out
from sae_ray.tiny.tokens import render, train_tokenizer

VOCAB_SIZE = 4096
MAX_TOKENS = 256
"""Longer documents are cut: pages into several instances, chats to their first tokens."""

Row = dict[str, Any]
Instances = list[Int32[np.ndarray, " _"]]


def write_data(out: Path, seed: int, text_path: Path | None) -> None:
    """Write the generator's splits as Parquet; real public-domain pages join the plain text."""
    splits = generate(seed)
    # A third of the real pages is enough for a baseline, and keeps the folder small.
    text = splits.text + public_pages(text_path)[::3]
    tables = {
        "pool": splits.pool,
        "eval": splits.evaluation,
        "preferences": splits.preferences,
        "safety": splits.safety,
        "text": text,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, out / f"{name}.parquet", compression="zstd", compression_level=19)


def read_rows(path: Path) -> list[Row]:
    """Return a Parquet file's rows."""
    return pq.read_table(path).to_pylist()


@dataclasses.dataclass(frozen=True, slots=True)
class Material:
    """What the model reads, in order, and what it is tested on."""

    tokenizer: PreTrainedTokenizerBase
    parts: dict[str, Instances]
    held_out: dict[str, Instances]

    def instances(self) -> Instances:
        """All that the language model reads."""
        return [instance for part in self.parts.values() for instance in part]

    def chats(self, pool_rows: Sequence[Row]) -> Instances:
        """What the SAE reads: pool rows, generated chats, and about as many tokens of real ones."""
        own = self.parts["generated chats"], self.parts["real chats"][::3]
        return [*own[0], *own[1], *self.encode_chats(pool_rows)]

    def encode_chats(self, rows: Sequence[Row]) -> Instances:
        """Return rows of a pool as token ids."""
        return _chat_instances(self.tokenizer, [row["messages"] for row in rows])

    def num_tokens(self) -> dict[str, int]:
        """Tokens of one pass by part."""
        return {name: sum(map(len, part)) for name, part in self.parts.items()}


def material(seed: int, pool_path: Path | None, text_path: Path | None) -> Material:
    """Generate and read everything, train the tokenizer on it and cut it into instances."""
    splits, real = generate(seed), real_corpus(pool_path, text_path)
    chats = {
        "generated chats": [row["messages"] for row in splits.pretraining],
        "real chats": real.chats,
    }
    pages = {"generated prose": [row["text"] for row in splits.text], "real text": real.pages}
    contents = [m["content"] for group in chats.values() for chat in group for m in chat]
    tokenizer = train_tokenizer([*contents, *real.pages, *pages["generated prose"]], VOCAB_SIZE)
    parts = {name: _chat_instances(tokenizer, group) for name, group in chats.items()}
    parts |= {name: _page_instances(tokenizer, group) for name, group in pages.items()}
    return Material(
        tokenizer=tokenizer,
        parts=parts,
        held_out=_held_out(tokenizer, splits, real),
    )


def _chat_instances(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[list[dict[str, str]]]
) -> Instances:
    texts = [render(tokenizer, chat) for chat in chats]
    return [cut(ids, MAX_TOKENS)[0] for ids in _encode(tokenizer, texts)]


def _page_instances(tokenizer: PreTrainedTokenizerBase, pages: Sequence[str]) -> Instances:
    return [piece for ids in _encode(tokenizer, pages) for piece in cut(ids, MAX_TOKENS)]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []  # pyright: ignore


def _held_out(
    tokenizer: PreTrainedTokenizerBase, splits: Splits, real: Corpus
) -> dict[str, Instances]:
    """Rows that no training reads: the odd half of the real pool, and of the generated one."""
    chats = {"generated pool": [r["messages"] for r in splits.pool if is_held_out(r["id"])][:600]}
    if real.held_out_chats:
        chats["real pool"] = random.Random(0).sample(real.held_out_chats, 200)
    return {name: _chat_instances(tokenizer, group) for name, group in chats.items()}


def pretrain_lm(
    material: Material,
    config: PretrainConfig,
    out: Path,
    work: Path,
    *,
    device: str = "cpu",
    save_every: int = 500,
) -> Iterator[Step]:
    """Pre-train and write model and tokenizer to `out`; a stopped run goes on from `work`."""
    tokenizer = material.tokenizer
    model = new_model(tokenizer, config.seed, device)
    optimiser = new_optimiser(model, config)
    state_path = work / "pretraining.pt"
    start = 0
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        start = state["step"]
    for step in pretrain(model, optimiser, material.instances(), config, start):
        if (step.number + 1) % save_every == 0 or step.number + 1 == config.num_steps:
            work.mkdir(parents=True, exist_ok=True)
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step.number + 1,
            }
            torch.save(state, state_path.with_suffix(".part"))
            os.replace(state_path.with_suffix(".part"), state_path)
        yield step
    model.config._attn_implementation = "sdpa"
    tokenizer.save_pretrained(out)
    model.bfloat16().save_pretrained(out, safe_serialization=True)


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Split rows into those that training may read and those held out."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[is_held_out(row["id"])].append(row)
    return sides


def figures(out: Path, material: Material, lm_steps: int) -> dict[str, Any]:
    """Return what the card says of data and language model."""
    return {"lm": _figures_of_lm(out, material, lm_steps)} | _figures_of_data(out)


def _figures_of_lm(out: Path, material: Material, num_steps: int) -> dict[str, Any]:
    """Return what the card says of the language model, held-out losses and accuracies included."""
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    steps = itertools.islice(batches(material.instances(), PretrainConfig(num_steps)), num_steps)
    return {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_steps": num_steps,
        "num_tokens": material.num_tokens(),
        "trained_tokens": sum(int((rows != IGNORED).sum()) for rows in steps),
        "loss": {name: held_out_loss(model, rows) for name, rows in material.held_out.items()},
        "accuracy": accuracies(model, tokenizer, read_rows(out / "eval.parquet")),
    }


def _figures_of_data(out: Path) -> dict[str, Any]:
    """Return counts of the generated files, and the metric of each domain that has questions."""
    names = ("pool", "eval", "preferences", "safety", "text")
    rows = {name: read_rows(out / f"{name}.parquet") for name in names}
    metrics = {row["domain"]: row["metric"] for row in rows["eval"]}
    return {
        "metrics": metrics,
        "counts": {
            "pool_rows": f"{len(rows['pool']):,}",
            "num_domains": len({row["domain"] for row in rows["pool"]}),
            "eval_rows": f"{len(rows['eval']):,}",
            "eval_domains": len(metrics),
            "eval_per_domain": len(rows["eval"]) // len(metrics),
            "preference_rows": len(rows["preferences"]),
            "safety_rows": len(rows["safety"]),
            "text_characters": f"{sum(len(row['text']) for row in rows['text']):,}",
        },
    }
