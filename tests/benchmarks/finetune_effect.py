"""What training on a domain's rows does, kind of adapter by kind, on equal rows and steps.

    python tests/benchmarks/finetune_effect.py --out effect.json                      embedded model
    python tests/benchmarks/finetune_effect.py --lm LM --sae SAE --pool POOL --domains math,science
    python tests/benchmarks/finetune_effect.py --lm LM --sae SAE --pairs PAIRS --objective dpo

Each cell is one domain, one seed (which draws the rows, their order and the first weights) and one
arm: nothing, LoRA, every weight, SAE latents by each kind, and LoRA within a subspace of as many
directions: those of the SAE, random ones, and the principal ones of the same rows' activations. On
the embedded model its questions are answered; elsewhere held-out rows are scored. Differences to
`none` are paired by domain and seed; intervals are t intervals over these pairs.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from measure import Figure, Part, log, show
from transformers import AutoTokenizer

from sae_ray import tiny
from sae_ray.adapters.attach import AdapterSpec
from sae_ray.adapters.basis import Basis
from sae_ray.adapters.examples import read_examples, read_pairs
from sae_ray.adapters.finetune import Finetuning, Look, Material, mean_nats
from sae_ray.adapters.recipe import Recipe
from sae_ray.adapters.settings import LEARNING_RATES
from sae_ray.adapters.spanning import span
from sae_ray.adapters.subspace import Subspace
from sae_ray.chat import ChatTokenizer
from sae_ray.curate.scorer import LatentScorer, ScorerConfig
from sae_ray.distributed.spans import SpanWork, pooled_rows
from sae_ray.pool import plan, read
from sae_ray.tiny.exam import accuracies

ARMS = {
    "none": None,
    "lora": "lora",
    "full": "full",
    "steering": "steering",
    "scale": "scale",
    "affine": "affine",
    "residual": "residual",
    "subspace sae init": "subspace",
    "subspace sae freeze": "subspace",
    "subspace random init": "subspace",
    "subspace random freeze": "subspace",
    "subspace pca init": "subspace",
    "subspace pca freeze": "subspace",
}
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}
"""97.5 % of Student's t, by the number of pairs."""
SMALL_MODEL = 10
"""What weights of such small models want their rates multiplied by: see FinetuneSettings."""
MAX_TOKENS, NUM_GENERAL = 512, 32


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lm", default=str(tiny.lm_path()))
    parser.add_argument("--sae", default=str(tiny.sae_path()))
    parser.add_argument("--pool", default=str(tiny.pool_path()), help="Parquet with `domain`")
    parser.add_argument("--pairs", default=str(tiny.preferences_path()), help="for dpo")
    parser.add_argument("--objective", choices=["sft", "dpo"], default="sft")
    parser.add_argument("--domains", default="order,kinds")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--held_out", type=int, default=100)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", default="finetune_effect.json")
    return parser.parse_args()


def write_material(options: argparse.Namespace, domain: str, seed: int, folder: str) -> str:
    """Write a domain's rows, or pairs, in an order that the seed draws."""
    table = pq.read_table(options.pairs if options.objective == "dpo" else options.pool)
    rows = np.arange(table.num_rows)
    if options.objective == "sft":
        rows = np.flatnonzero([one == domain for one in table["domain"].to_pylist()])
    chosen = np.random.default_rng(seed).permutation(rows)
    path = f"{folder}/{domain}-{seed}.parquet"
    pq.write_table(table.take(chosen[: 2 * (options.rows + options.held_out)]), path)
    return path


def material_of(options: argparse.Namespace, path: str, tokenizer: ChatTokenizer) -> Material:
    reader = read_pairs if options.objective == "dpo" else read_examples
    rows: list[Any] = reader(path, tokenizer, max_tokens=MAX_TOKENS).rows
    needed = options.rows + options.held_out
    assert len(rows) >= needed, f"{path} has {len(rows)} rows to learn from, {needed} are needed"
    text = Path(tiny.text_path())
    general = general_rows(str(text), tokenizer)
    return Material(
        rows[: options.rows], rows[options.rows : needed], general, max_tokens=MAX_TOKENS
    )


def general_rows(source: str, tokenizer: ChatTokenizer) -> list[Any]:
    """Return plain text as rows on which forgetting shows."""
    from sae_ray.adapters.examples import Example  # noqa: PLC0415

    texts = pq.read_table(source, columns=["text"])["text"].to_pylist()
    order = np.random.default_rng(0).permutation(len(texts))[:NUM_GENERAL]
    found = []
    for i in order.tolist():
        ids = np.array(tokenizer.tokenizer(texts[i][:2000])["input_ids"][:256], dtype=np.int32)
        found.append(Example(f"text-{i}", ids, np.arange(len(ids)) > 0))
    return [one for one in found if len(one.ids) > 1]


def subspace_of(
    options: argparse.Namespace, arm: str, path: str, seed: int, folder: str, held_out: set[str]
) -> str:
    """Write the subspace of an arm: the SAE's, or one of as many other directions."""
    (found,) = span(
        [options.sae],
        {"positive": path, "reference": options.pool},
        Path(folder, "sae"),
        lambda sae, slices: pooled_rows(slices, SpanWork(options.lm, sae), 0),
        leave_out=held_out,
        num_rows=400,
        staging=folder,
        seed=seed,
    )
    if " sae " in arm:
        return str(found)
    own = Subspace.load(found)
    d_in, r = own.basis.U.shape
    if " random " in arm:
        U = torch.linalg.qr(torch.randn(d_in, r, generator=torch.Generator().manual_seed(seed)))[0]
    else:
        scorer = LatentScorer.load(ScorerConfig(options.lm, options.sae, dtype="float32"))
        rows = [
            one
            for piece in plan(path).slices
            for one in read(piece).conversations
            if one.id not in held_out
        ]
        hidden = scorer(rows[:400], range(min(400, len(rows)))).block.hidden[:, 1]
        x = torch.from_numpy(hidden - hidden.mean(0)).float()
        U = torch.linalg.svd(x, full_matrices=False)[2][:r].T.contiguous()
    basis = Basis(U, own.basis.S, own.basis.loadings, own.basis.latents, own.basis.coherence)
    other = Path(folder, "other")
    Subspace(basis, own.hook_point, own.facts | {"directions": arm}).save(other)
    return str(other)


def spec_of(
    arm: str, options: argparse.Namespace, path: str, seed: int, folder: str, held_out: set[str]
) -> Any:
    kind = ARMS[arm]
    if kind == "full":
        return None
    if kind == "lora":
        return AdapterSpec(kind="lora")
    if kind == "subspace":
        subspace = subspace_of(options, arm, path, seed, folder, held_out)
        mode: Any = arm.rpartition(" ")[2]
        return AdapterSpec(kind="subspace", subspaces=(subspace,), mode=mode)
    return AdapterSpec(kind=kind, sae=(options.sae,))  # pyright: ignore[reportArgumentType]


def run_cell(options: argparse.Namespace, domain: str, seed: int, arm: str) -> dict[str, Any]:
    """Train one arm on one domain with one seed, and measure it; `none` is only measured."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
        path = write_material(options, domain, seed, folder)
        tokenizer = ChatTokenizer.load(options.lm)
        material = material_of(options, path, tokenizer)
        kind = ARMS[arm] or "steering"
        factor = SMALL_MODEL if kind in ("lora", "subspace", "full") else 1
        steps = math.ceil(options.epochs * (options.rows // Recipe().batch_rows))
        recipe = Recipe(
            objective=options.objective,
            max_steps=steps,
            evaluate_every=steps,
            micro_rows=Recipe().batch_rows,
            learning_rate=factor * LEARNING_RATES[kind],  # pyright: ignore[reportArgumentType]
            seed=seed,
        )
        held_out = {row.id for row in material.held_out}
        spec = spec_of(arm if ARMS[arm] else "steering", options, path, seed, folder, held_out)
        finetuning = Finetuning(options.lm, spec, recipe, material, Path(folder, "trainer"))
        looks = list(finetuning.looks)
        for step in finetuning.steps():
            looks = list(finetuning.looks)
            if ARMS[arm] is None and step.look is not None:
                break
        return {
            "domain": domain,
            "seed": seed,
            "arm": arm,
            "num_parameters": finetuning.num_parameters if ARMS[arm] else 0,
            "share": finetuning.num_parameters / finetuning.num_base_parameters,
            **measured(options, looks[-1]),
            **examined(options, domain, finetuning),
            "seconds": time.perf_counter() - started,
        }


def measured(options: argparse.Namespace, look: Look) -> dict[str, float]:
    found = {"general_loss": mean_nats(look.general)}
    if options.objective == "dpo":
        margins = look.margins()
        return found | {"ranked_right": sum(m > 0 for m in margins) / len(margins)}
    return found | {"held_out_loss": mean_nats(look.held_out)}


def examined(options: argparse.Namespace, domain: str, finetuning: Finetuning) -> dict[str, float]:
    """Ask the embedded model its questions."""
    if options.lm != str(tiny.lm_path()) or options.objective == "dpo":
        return {}
    rows = [row for row in pq.read_table(tiny.eval_path()).to_pylist() if row["domain"] == domain]
    model: Any = finetuning.model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokenizer = AutoTokenizer.from_pretrained(options.lm)
    return {"accuracy": accuracies(model, tokenizer, rows)[domain]}


def t_interval(values: list[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % interval."""
    middle = statistics.mean(values)
    if len(values) < 2:
        return middle, math.inf
    half = T_QUANTILE.get(len(values), 2.2) * statistics.stdev(values) / len(values) ** 0.5
    return middle, half


def summarise(cells: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row an arm: what it trains, its figures, and their differences to `none`."""
    by_arm: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for cell in cells:
        by_arm.setdefault(cell["arm"], {})[cell["domain"], cell["seed"]] = cell
    none, rows = by_arm.get("none", {}), []
    names = ("accuracy", "ranked_right", "held_out_loss", "general_loss")
    metrics = [one for one in names if any(one in cell for cell in cells)]
    for arm in (one for one in ARMS if one in by_arm):
        mine = by_arm[arm]
        row = [arm, f"{next(iter(mine.values()))['num_parameters']:,}", str(len(mine))]
        for metric in metrics:
            middle = statistics.mean(cell[metric] for cell in mine.values())
            pairs = [cell[metric] - none[key][metric] for key, cell in mine.items() if key in none]
            gain, half = t_interval(pairs) if pairs else (math.nan, math.nan)
            row.append(f"{middle:.3f} ({gain:+.3f} ± {half:.3f})")
        rows.append(tuple(row))
    return [("arm", "trained", "cells", *(f"{m} (less none's)" for m in metrics)), *rows]


def main() -> None:
    """Run every cell, each in a process of its own kind, and write what is there after each."""
    options = read_arguments()
    part = Part("finetune_effect")
    domains = options.domains.split(",") if options.objective == "sft" else ["pairs"]
    # Seed by seed, so that a run that is cut short has whole seeds.
    todo = [
        (domain, seed, arm)
        for seed in range(options.seeds)
        for domain in domains
        for arm in options.arms.split(",")
    ]
    cells: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        running = [pool.submit(run_cell, options, *cell) for cell in todo]
        for done in as_completed(running):
            cells.append(done.result())
            told = {k: round(v, 3) if isinstance(v, float) else v for k, v in cells[-1].items()}
            log(f"{len(cells)} of {len(todo)}: {told}")
            Path(options.out).with_suffix(".cells.json").write_text(json.dumps(cells, indent=1))
    head, *rows = summarise(cells)
    show("finetune_effect", head, rows)
    part.details |= {"command": vars(options), "table": [head, *rows], "cells": cells}
    if all("accuracy" in cell for cell in cells) and {"lora", "full", "none"} <= {
        cell["arm"] for cell in cells
    }:
        mean = {
            arm: statistics.mean(cell["accuracy"] for cell in cells if cell["arm"] == arm)
            for arm in ("none", "lora", "full")
        }
        share = (mean["lora"] - mean["none"]) / max(1e-9, mean["full"] - mean["none"])
        part.figures.append(
            Figure("gain of LoRA over that of every weight", 100 * share, "%", at_least=80)
        )
    part.write(options.out)


if __name__ == "__main__":
    main()
