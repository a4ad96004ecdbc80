#!/usr/bin/env python
"""Make the embedded default: data, tiny language model, SAE, latent labels and their card.

Everything comes from one seed. Stages run in this order, and a finished one is not redone:

    generate   conversations, questions, preference pairs, safety prompts, text (seconds)
    pretrain   tokenizer and language model (about an hour on one core; goes on where it stopped)
    sae        a SAE at mid-depth on isolated chats (about 15 minutes)
    label      what each latent fires on, checked on held-out rows (a minute)
    card       measured quality, and README.md beside the folder

Without --pool and --text, everything is made from the generator alone, and the card says so.

    python jobs/make_tiny.py --out my_tiny --pool pool.parquet --text text.parquet
"""

import argparse
import logging
from pathlib import Path

import torch

from sae_ray import tiny
from sae_ray.lm import HookPoint
from sae_ray.sae.labels import label_sae
from sae_ray.sae.train import TrainConfig, train_on_instances
from sae_ray.tiny import card, recipe
from sae_ray.tiny.pretrain import PretrainConfig

HOW = "concept tags of the generator most enriched among each latent's strongest contexts on the "\
    "rows seen in training; detection AUC on held-out rows; no judge model"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=tiny.DEFAULT, help="folder to make")
    parser.add_argument("--work", type=Path, default=Path("tiny_work"), help="unfinished state")
    parser.add_argument("--pool", type=Path, help="real chats: id, licence, messages (Parquet)")
    parser.add_argument("--text", type=Path, help="real text: source, licence, text (Parquet)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lm_steps", type=int, default=9000, help="batches of 2,048 tokens")
    parser.add_argument("--sae_steps", type=int, default=1200, help="batches of 2,048 tokens")
    parser.add_argument("--d_sae", type=int, default=2048, help="number of latents")
    parser.add_argument("--k", type=int, default=32, help="latents on per token")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores to use")
    return parser.parse_args()


def main() -> None:
    """Run the stages that are not finished."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    out, log = options.out, logging.getLogger("make_tiny")
    if not (out / "text.parquet").exists():
        recipe.write_data(out, options.seed, options.text)
    material = recipe.material(options.seed, options.pool, options.text)
    lm_config = PretrainConfig(num_steps=options.lm_steps, seed=options.seed)
    if not (out / "model" / "model.safetensors").exists():
        for step in recipe.pretrain_lm(material, lm_config, out / "model", options.work):
            if step.number % 50 == 0:
                log.info("language model: step %d loss %.3f", step.number, step.loss)
    pool = recipe.read_rows(out / "pool.parquet")
    if not (out / "sae" / "sae_weights.safetensors").exists():
        config = TrainConfig(options.d_sae, options.k, options.sae_steps, seed=options.seed)
        instances = material.chats() + material.pool_instances(pool, held_out=False)
        hook_point = HookPoint.parse(tiny.HOOK_POINT)
        for step in train_on_instances(
            out / "model", instances, hook_point, config, out / "sae", model_name="sae-ray-tiny"
        ):
            if step.number % 50 == 0:
                log.info("SAE: step %d FVU %.3f L0 %.1f", step.number, step.fvu, step.l0)
    if not (out / "labels.json").exists():
        seen, unseen = recipe.halves(pool)
        label_sae(out / "model", out / "sae", seen, unseen, out / "labels.json", how=HOW)
    card.write(out, material, lm_config, measured=recipe)
    log.info("made %s", out)


if __name__ == "__main__":
    main()
