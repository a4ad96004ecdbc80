"""Headroom of the embedded default: what an expert gains from 500 rows of its domain.

Fine-tunes the tiny language model on 500 rows of one domain's half of the pool, all weights, and
asks it that domain's questions before and after. Three seeds draw the rows and their order.

    python tests/benchmarks/tiny_headroom.py --seeds 0,1,2 --out headroom.json
"""

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sae_ray import tiny
from sae_ray.tiny.exam import accuracies
from sae_ray.tiny.pretrain import IGNORED, logits_at, pad
from sae_ray.tiny.skills import SKILLS
from sae_ray.tiny.tokens import render


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> tuple[list[int], list[int]]:
    """Return ids, and targets that count on the last reply alone."""
    prompt = render(tokenizer, messages[:-1], generation_prompt=True)
    whole = render(tokenizer, messages)
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert ids[: len(head)] == head
    return ids, [IGNORED] * len(head) + ids[len(head) :]


def finetune(
    model: PreTrainedModel,
    examples: Sequence[tuple[list[int], list[int]]],
    *,
    num_epochs: int,
    learning_rate: float,
    batch_rows: int,
    seed: int,
) -> None:
    """Train all weights on the replies, with a rate that falls linearly to zero."""
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    num_steps = num_epochs * -(-len(examples) // batch_rows)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, num_steps)
    model.train()
    for _ in range(num_epochs):
        order = rng.permutation(len(examples))
        for start in range(0, len(order), batch_rows):
            chosen = [examples[i] for i in order[start : start + batch_rows]]
            rows = pad([np.asarray(ids, dtype=np.int32) for ids, _ in chosen]).to(model.device)
            targets = pad([np.asarray(wanted, dtype=np.int32) for _, wanted in chosen])[:, 1:]
            targets = targets.to(model.device)
            kept = targets != IGNORED
            with torch.autocast(model.device.type, dtype=torch.bfloat16):
                logits = logits_at(model, rows, kept)
            loss = functional.cross_entropy(logits.float(), targets[kept])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()


def load(path: Path, device: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to(torch.device(device))  # pyright: ignore


def main() -> None:
    """Measure every domain and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lm", type=Path, default=tiny.lm_path())
    parser.add_argument("--data", type=Path, default=tiny.DEFAULT)
    parser.add_argument("--domains", default="", help="comma-separated; all by default")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--num_rows", type=int, default=500)
    parser.add_argument("--num_epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--batch_rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.lm)
    pool = pq.read_table(options.data / "pool.parquet").to_pylist()
    exam = pq.read_table(options.data / "eval.parquet").to_pylist()
    domains = options.domains.split(",") if options.domains else list(SKILLS)
    base = accuracies(
        load(options.lm, options.device), tokenizer, [r for r in exam if r["domain"] in domains]
    )
    table = {}
    for domain in domains:
        rows = [row for row in pool if row["domain"] == domain]
        questions = [row for row in exam if row["domain"] == domain]
        after = []
        for seed in map(int, options.seeds.split(",")):
            chosen = random.Random(seed).sample(rows, options.num_rows)
            model = load(options.lm, options.device)
            finetune(
                model,
                [encode(tokenizer, row["messages"]) for row in chosen],
                num_epochs=options.num_epochs,
                learning_rate=options.learning_rate,
                batch_rows=options.batch_rows,
                seed=seed,
            )
            after.append(accuracies(model, tokenizer, questions)[domain])
        gain = statistics.mean(after) - base[domain]
        table[domain] = {"base": base[domain], "expert": after, "gain": gain}
        runs = " ".join(f"{accuracy:.1%}" for accuracy in after)
        print(f"{domain:10} base {base[domain]:6.1%} expert {runs} gain {gain:+.1%}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
