"""Quality of curation: every arm on every sentence, against a column that no arm may read.

    python tests/benchmarks/quality.py --pool POOL --lm LM --sae SAE --work DIR --out quality.json

The pool is its unseen half, indexed once through the SAE and once through a frozen random one.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from measure import ROOT, Figure, Part, add_inputs, log, run_watched, sample_pool, show
from safetensors.torch import load_file, save_file

from sae_ray.chat import Conversation, Kind, Tokens
from sae_ray.curate.baselines import DenseText, FinalStates, HashedNgrams
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.scorer import LatentScorer, ScorerConfig
from sae_ray.evaluate.curation import (
    Cell,
    Description,
    ResidentIndex,
    Summary,
    abstentions,
    read_descriptions,
    run_quality,
    summarise,
)

CALIBRATION_ROWS = 300
BLOCK_ROWS = 2048


def freeze_random_sae(config: ScorerConfig, pool: str, path: Path) -> None:
    """Write a SAE of the same shape whose directions are random, and as sparse.

    Every latent is on at the same share of content tokens as the trained ones are on average.
    """
    scorer = LatentScorer.load(dataclasses.replace(config, dtype="float32"))
    rows = pq.read_table(pool, columns=["id", "messages"]).slice(0, CALIBRATION_ROWS).to_pylist()
    tokenised = scorer._tokenize([Conversation(row["id"], row["messages"]) for row in rows])
    x = torch.cat(
        [
            scorer._read([t])[0, torch.from_numpy(t.kinds == Kind.CONTENT)]
            for t in tokenised
            if isinstance(t, Tokens)
        ]
    )
    share = float((scorer.encoder.encode(x[:4096]) > 0).float().mean())
    weights = load_file(Path(config.sae) / "sae_weights.safetensors")
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(weights["W_enc"].shape, generator=generator)
    W /= W.norm(dim=0)
    weights |= {
        "W_enc": W,
        "W_dec": W.T.contiguous(),
        "b_enc": -(x.mean(0) @ W),
        "b_dec": x.mean(0),
        "threshold": torch.quantile((x[:4096] - x.mean(0)) @ W, 1 - share, dim=0).clamp_min(0),
    }
    settings = json.loads((Path(config.sae) / "cfg.json").read_text())
    settings |= {"architecture": "jumprelu", "apply_b_dec_to_input": False}
    path.mkdir(parents=True, exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(settings))
    save_file(weights, path / "sae_weights.safetensors")


def index(options: argparse.Namespace, pool: str, sae: str, path: Path) -> None:
    """Index the pool, unless that is done."""
    command = [sys.executable, str(ROOT / "jobs" / "index.py"), "--pool", pool, "--lm", options.lm]
    command += ["--sae", sae, "--out", str(path), "--no-check_fit"]
    seconds, _ = run_watched(command, every_s=5)
    log(f"indexed through {sae} in {seconds:.0f} s")


def final_states(
    lm: str, opened: FeatureIndex, sentences: list[Description]
) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
    """Embed the pool and the sentences for RDS+."""
    model = FinalStates(lm)
    pool = np.concatenate(
        [
            model(opened.conversations(range(start, min(start + BLOCK_ROWS, opened.num_rows))))
            for start in range(0, opened.num_rows, BLOCK_ROWS)
        ]
    )
    asked = {
        one.text: model([Conversation("", [{"role": "user", "content": one.text}])])
        for one in sentences
    }
    return pool, asked


def figures(summaries: list[Summary]) -> list[Figure]:
    """Hold the default, on sentences that it was not fixed on, against its targets."""
    arms = {one.arm: one for one in summaries if one.split == "report"}
    if not arms:  # asked for on other sentences alone: there is no target for those
        return []

    def percent(arm: str) -> float:
        return 100 * arms[arm].precision

    default = arms["default"]
    gap = 100 * default.difference
    other = percent("default") - max(map(percent, ("bm25_rm3", "lsa", "lsa_bm25_seeded")))
    return [
        Figure("precision at 500, default", percent("default"), "%"),
        Figure("default minus BM25", gap, "points", 15),
        Figure("wins over BM25 / losses", default.wins / max(default.losses, 1), "x", 3),
        Figure("default minus the best of BM25 with feedback and LSA", other, "points", 0),
        Figure("after one round of ticks", percent("refine_1"), "%", 80),
        Figure("after three rounds", percent("refine_3"), "%", 90),
        Figure("with 20 given rows", percent("examples_20"), "%", 96),
    ]


def main() -> None:
    """Index, run all arms, and print their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_inputs(parser)
    parser.add_argument("--rows", type=int, default=10**9, help="of the unseen half, all if fewer")
    parser.add_argument("--splits", default="tune,report,fresh")
    parser.add_argument("--truth", default="domain", help="the hidden column")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", default="quality.json")
    options = parser.parse_args()
    part, work = Part("quality"), options.work
    work.mkdir(parents=True, exist_ok=True)
    pool, random_sae = str(work / "unseen.parquet"), work / "random_sae"
    sample_pool(options.pool, options.rows, pool)
    config = ScorerConfig(options.lm, options.sae)
    if not (random_sae / "cfg.json").exists():
        freeze_random_sae(config, pool, random_sae)
    index(options, pool, options.sae, work / "index-unseen")
    index(options, pool, str(random_sae), work / "index-unseen-random")
    opened = ResidentIndex(str(work / "index-unseen"))
    table = pq.read_table(pool, columns=["id", options.truth])
    hidden = dict(zip(table["id"].to_pylist(), table[options.truth].to_pylist(), strict=True))
    text = Path(__file__).with_name("curation_descriptions.yaml").read_text()
    splits = options.splits.split(",")
    sentences = [one for one in read_descriptions(text) if one.split in splits]
    texts = DenseText(c.text() for c in opened.conversations(range(opened.num_rows)))
    ngrams = HashedNgrams(c.text() for c in opened.conversations(range(opened.num_rows)))
    log("fitted LSA and n-grams")
    states = final_states(options.lm, opened, sentences)
    log("embedded the pool for RDS+")
    cells: list[Cell] = []
    for cell in run_quality(
        opened,
        ResidentIndex(str(work / "index-unseen-random")),
        [hidden[one] for one in opened.ids],
        sentences,
        texts=texts,
        ngrams=ngrams,
        final_states=states,
    ):
        if cell.arm == "default":
            log(f"{cell.domain} {cell.split} {cell.number}: {cell.precision:.2f}")
        cells.append(cell)
    summaries = summarise(cells)
    part.figures += figures(summaries)
    part.details |= {
        "rows": opened.num_rows,
        "abstentions": abstentions(cells),
        "summaries": [dataclasses.asdict(one) for one in summaries],
        "cells": [dataclasses.asdict(one) for one in cells],
    }
    show(
        "precision at 500, in percent",
        ("split", "arm", "mean", "95 %", "minus BM25", "95 %", "wins/losses"),
        (
            (
                one.split,
                one.arm,
                f"{100 * one.precision:.1f}",
                f"{100 * one.low:.0f} to {100 * one.high:.0f}",
                f"{100 * one.difference:+.1f}",
                f"{100 * one.difference_low:+.0f} to {100 * one.difference_high:+.0f}",
                f"{one.wins}/{one.losses}",
            )
            for one in summaries
        ),
    )
    part.write(options.out)


if __name__ == "__main__":
    main()
