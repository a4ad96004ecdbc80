#!/usr/bin/env python
"""Make the embedded default: data, tiny language model, SAE, latent labels and their card."""

import sys
from pathlib import Path

from sae_ray.config import JobConfig, run_job
from sae_ray.distributed.progress import follow
from sae_ray.lm import HookPoint
from sae_ray.sae.labels import label_sae
from sae_ray.sae.quality import measure_sae
from sae_ray.sae.recipe import Recipe, SAESpec
from sae_ray.sae.sequences import instance_of
from sae_ray.sae.train import train_on_instances
from sae_ray.tiny import DEFAULT, HOOK_POINT, MODEL_NAME, card, recipe


class Config(JobConfig):
    """Make the embedded default, or another like it, from one seed; no finished stage is redone.

    OMP_NUM_THREADS=1 python jobs/make_tiny.py --out my_tiny --pool chats.parquet
    """

    out: Path = DEFAULT
    """Folder to make."""
    work: Path = Path("out/tiny")
    """Folder for the state of an unfinished pre-training."""
    pool: Path | None = None
    """Parquet of real chats: id, licence, messages. Not set: the card says that none were read."""
    text: Path | None = None
    """Parquet of real pages: source, licence, text. Not set: prose of the generator alone."""
    seed: int = 0
    """Decides everything."""
    device: str = "cpu"
    """Where both are trained: cpu, or cuda."""
    lm_steps: int = 3219
    """Batches of 16,384 tokens for the language model: 12 passes; after 24 it knows less."""
    sae_steps: int = 4000
    """Batches of 4,096 tokens for the SAE."""


def make(config: Config, lm: Path, sae: Path, labels: Path) -> None:
    """Run the stages that are not finished; the card's figures come last."""
    if not (config.out / "text.parquet").exists():
        recipe.write_data(config.out, config.seed, config.text)
    material = recipe.material(config.seed, config.pool, config.text)
    if not (lm / "model.safetensors").exists():
        lm_how = recipe.PretrainConfig(config.lm_steps, seed=config.seed)
        steps = recipe.pretrain_lm(material, lm_how, lm, config.work, device=config.device)
        follow(("LM", one.number, config.lm_steps, f"loss {one.loss:.2f}") for one in steps)
    seen, unseen = recipe.halves(recipe.read_rows(config.out / "pool.parquet"))
    if not (sae / "sae_weights.safetensors").exists():
        spec = SAESpec(HookPoint.parse(HOOK_POINT), "batchtopk", 1024, k=32, seed=config.seed)
        how = Recipe(config.sae_steps, batch_tokens=4096, dead_after_tokens=400_000)
        chats = list(map(instance_of, material.chats(seen)))
        steps = train_on_instances(
            lm, chats, spec, how, sae, model_name=MODEL_NAME, device=config.device
        )
        follow(
            ("SAE", one.number, config.sae_steps, f"FVU {one.saes[spec.name].fvu:.3f}")
            for one in steps
        )
    if not labels.exists():
        label_sae(lm, sae, seen, unseen, labels, how=card.HOW_LABELLED)
    quality = measure_sae(lm, sae, list(map(instance_of, material.encode_chats(unseen))))
    figures = {"sae": quality.headline(), "sae_steps": config.sae_steps}
    card.write_figures(config.out, figures | recipe.figures(config.out, material, config.lm_steps))


def main(config: Config) -> None:
    """Make what is not there, and say where it and its card are."""
    if not card.has_figures(config.out):
        make(config, config.out / "model", config.out / "sae", config.out / "labels.json")
    print(f"{config.out}: finished, card {card.write(config.out)}")


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
