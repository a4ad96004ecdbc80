"""Experts made by hand: adapters of every kind with random weights, registered and active."""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sae_ray.adapters.attach import AdapterSpec, attach
from sae_ray.curate.sources import EMBEDDED, fingerprint, locate_source
from sae_ray.experts.card import ExpertCard, Measure
from sae_ray.experts.files import record_files
from sae_ray.experts.prototypes import PROTOTYPES
from sae_ray.experts.registry import Expert, ExpertRegistry


def add_expert(
    registry: ExpertRegistry,
    name: str,
    spec: AdapterSpec,
    *,
    lm: str = EMBEDDED,
    seed: int = 0,
    size: float = 0.1,
    prototypes: bytes | None = None,
) -> Expert:
    """Make an adapter with random weights of this size, and put it into use."""
    base = AutoModelForCausalLM.from_pretrained(locate_source("lm", lm), dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1 + seed)  # the same weights whatever was drawn before
        adapted = attach(base, spec)
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter += size * torch.randn(parameter.shape, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        (Path(folder) / "README.md").unlink(missing_ok=True)
        if prototypes is not None:
            (Path(folder) / PROTOTYPES).write_bytes(prototypes)
        card = ExpertCard(
            name=name,
            description=f"made by hand with seed {seed}",
            adapter=spec.kind,
            objective="sft",
            base=lm,
            base_sha256=fingerprint("lm", lm),
            files=record_files(folder),
            num_parameters=sum(p.numel() for p in trained),
            share=0.01,
            measures=[
                Measure(name="reply_loss", base=2, expert=1, gain=1, low=0.5, high=1.5, num_rows=9)
            ],
        )
        registry.register(card, folder)
    return registry.activate(card.id)


def alone(registry: ExpertRegistry, id: str | None, lm: str, folder: Path) -> torch.nn.Module:
    """Load a base with one expert on it as PEFT does, or without any."""
    base = AutoModelForCausalLM.from_pretrained(locate_source("lm", lm), dtype=torch.float32)
    if id is None:
        return base.eval()
    return PeftModel.from_pretrained(base, str(registry.fetch(id, folder / id))).eval()
