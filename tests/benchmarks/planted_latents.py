"""Planted truth: does attribution name the one latent in which training data differ from the base?

    python tests/benchmarks/planted_latents.py --runs 100 --out planted.json

A small random model says rows with one latent pushed; its base learns them by one number a latent,
with an L1 penalty; attribution ranks latents on held-out rows, and verification checks them on
others. The control learns rows of the base itself, in which there is nothing to find.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import ROOT, Figure, Part, log, spread

sys.path.insert(0, str(ROOT))
from transformers import AutoModelForCausalLM, PreTrainedModel

from sae_ray.explain.attribution import attribute
from sae_ray.explain.dial import Dial, units_of
from sae_ray.explain.verification import verify
from tests.conftest import save_tiny_lm, save_tiny_sae, train_tokenizer
from tests.sae_ray.explain.planted import learn, plant


def load(path: Path) -> PreTrainedModel:
    """Load the whole model."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def one_run(lm: Path, sae: str, seed: int, push: float, l1: float) -> dict[str, Any]:
    """Plant, learn, attribute and verify; a push of 0 is the control."""
    latent = int(np.random.default_rng(seed).integers(64))
    train, held = plant(load, lm, sae, latent, push, seed)
    dial = Dial(learn(load(lm), sae, train, l1=l1), 0)
    found = attribute(dial, units_of(held[:48]))
    *_, (_, _, result) = verify(dial, units_of(held[48:]), found, num_top=6, num_drawn=10)
    assert result is not None
    curve = result.curves[0]
    tenth = max(i for i, count in enumerate(curve.counts) if count <= 0.1 * dial.num_latents)
    return {
        "latent": latent,
        "rank": int(np.flatnonzero(found.order == latent)[0]),
        "gap": found.gap,
        "num_points": found.num_points,
        "effect": found.effect,
        "num_beyond_chance": int(found.beyond_chance.sum()),
        "verified": [one.number for one in result.verified],
        "verified_of_drawn": sum(one.is_verified for one in result.drawn),
        "removed_by_tenth": curve.removed[tenth],
        "removed_by_random_tenth": result.curves[2].removed[tenth],
    }


def main() -> None:
    """Run all seeds and their controls."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--controls", type=int, default=20)
    parser.add_argument("--push", type=float, default=4.0)
    parser.add_argument("--l1", type=float, default=0.01)
    parser.add_argument("--out", default="planted.json")
    options = parser.parse_args()
    part, started = Part("planted_latents"), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
        lm = Path(folder) / "lm"
        save_tiny_lm("llama", train_tokenizer(), lm)
        sae = str(save_tiny_sae(Path(folder) / "sae"))
        planted, control = list[dict[str, Any]](), list[dict[str, Any]]()
        for seed in range(options.runs):
            planted.append(one_run(lm, sae, seed, options.push, options.l1))
            log(f"seed {seed}: rank {planted[-1]['rank']}, gap {planted[-1]['gap']:.3f}")
        for seed in range(options.controls):
            control.append(one_run(lm, sae, 1000 + seed, 0.0, options.l1))
            log(f"control {seed}: {len(control[-1]['verified'])} verified")
    first = np.mean([one["rank"] == 0 for one in planted])
    by_verified = np.mean([one["latent"] in one["verified"] for one in planted])
    part.figures += [
        Figure("planted latent ranked first", 100 * float(first), "%", 95),
        Figure("planted latent verified", 100 * float(by_verified), "%"),
        Figure("largest gap", 100 * max(one["gap"] for one in planted), "%", at_most=5),
        Figure(
            "change gone without a tenth of the latents",
            100 * float(np.median([one["removed_by_tenth"] for one in planted])),
            "%",
            80,
            note="without a random tenth: "
            f"{100 * np.median([one['removed_by_random_tenth'] for one in planted]):.0f} %",
        ),
        Figure("others verified, of those drawn at random", 100 * float(
            np.sum([one["verified_of_drawn"] for one in planted]) / (10 * max(1, len(planted)))
        ), "%"),
        Figure("verified where nothing was planted, a run", float(
            np.mean([len(one["verified"]) for one in control])
        ) if control else 0.0, "latents"),
    ]  # fmt: skip
    part.details |= {
        "planted": planted,
        "control": control,
        "gap": spread([one["gap"] for one in planted]),
        "seconds": time.monotonic() - started,
    }
    part.write(options.out)


if __name__ == "__main__":
    main()
