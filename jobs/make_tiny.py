#!/usr/bin/env python
"""Make the embedded default: data, tiny language model, SAE, latent labels and their card.

Everything comes from one seed. Stages run in this order, and a finished one is not redone:

    generate   conversations, questions, preference pairs, safety prompts, text (seconds)
    pretrain   tokenizer and language model (about an hour on a core; goes on where it stopped)
    sae        a SAE at mid-depth on isolated chats (about 10 minutes)
    label      what each latent fires on, checked on held-out rows (a minute)
    card       measured quality and the README (a minute)

Without --pool and --text, everything is made from the generator alone, and the card says so.
"""

import argparse
import dataclasses
import logging
from pathlib import Path

import torch

from sae_ray import tiny
from sae_ray.lm import HookPoint
from sae_ray.sae.labels import label_sae
from sae_ray.sae.quality import measure_sae
from sae_ray.sae.train import TrainConfig, train_on_instances
from sae_ray.tiny import card, recipe
from sae_ray.tiny.pretrain import PretrainConfig


def parse() -> argparse.Namespace:
    """Read the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, default=tiny.DEFAULT, help="folder to make")
    parser.add_argument("--work", type=Path, default=Path("tiny_work"), help="unfinished state")
    parser.add_argument("--pool", type=Path, help="real chats: id, licence, messages (Parquet)")
    parser.add_argument("--text", type=Path, help="real text: source, licence, text (Parquet)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lm_steps", type=int, default=4000, help="batches of 2,048 tokens")
    parser.add_argument("--sae_steps", type=int, default=800, help="batches of 2,048 tokens")
    parser.add_argument("--d_sae", type=int, default=1024, help="number of latents")
    parser.add_argument("--k", type=int, default=32, help="latents on a token")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores to use")
    return parser.parse_args()


def main() -> None:
    """Run the stages that are not finished."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    out: Path = options.out
    lm, sae, labels = (out / name for name in ("model", "sae", "labels.json"))
    if not (out / "text.parquet").exists():
        recipe.write_data(out, options.seed, options.text)
    material = recipe.material(options.seed, options.pool, options.text)
    if not (lm / "model.safetensors").exists():
        config = PretrainConfig(num_steps=options.lm_steps, seed=options.seed)
        for step in recipe.pretrain_lm(material, config, lm, options.work):
            if step.number % 50 == 0:
                logging.info("language model: step %d loss %.3f", step.number, step.loss)
    seen, unseen = recipe.halves(recipe.read_rows(out / "pool.parquet"))
    if not (sae / "sae_weights.safetensors").exists():
        config = TrainConfig(options.d_sae, options.k, options.sae_steps, seed=options.seed)
        chats = material.chats() + material.encode_chats(seen)
        point = HookPoint.parse(tiny.HOOK_POINT)
        for step in train_on_instances(lm, chats, point, config, sae, model_name=tiny.MODEL_NAME):
            if step.number % 50 == 0:
                logging.info("SAE: step %d FVU %.3f L0 %.1f", step.number, step.fvu, step.l0)
    if not labels.exists():
        label_sae(lm, sae, seen, unseen, labels, how=card.HOW_LABELLED)
    quality = measure_sae(lm, sae, material.encode_chats(unseen))
    figures = {"sae": dataclasses.asdict(quality), "sae_steps": options.sae_steps}
    card.write(out, figures | recipe.figures(out, material, options.lm_steps))
    logging.info("made %s", out)


if __name__ == "__main__":
    main()
