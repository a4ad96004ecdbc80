"""Tags laid over latents: the right tokens get them, and what is kept of them is bounded."""

from pathlib import Path

import numpy as np
import torch

from sae_ray.chat import ChatTokenizer
from sae_ray.lm import HookPoint, LanguageModel
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.tagged import EvidenceGatherer, TaggedLatents, read_tagged


def test_tagged_rows_are_read_without_the_template(tiny_lm: Path) -> None:
    point = HookPoint.parse("blocks.1.hook_resid_post")
    rng = np.random.default_rng(0)

    encoder = LatentEncoder(
        W=torch.from_numpy(rng.normal(size=(32, 8)).astype(np.float32)),
        b=torch.zeros(8),
        theta=torch.zeros(8),
        k=None,
        input_norm="none",
        W_dec=torch.zeros(8, 32),
        b_dec=torch.zeros(32),
        hook_point=point,
        model_name=None,
    )
    row = {
        "id": "1",
        "concepts": ["query", "travel"],
        "spans": [{"message": 1, "start": 8, "end": 13, "concept": "query"}],
        "messages": [
            {"role": "user", "content": "Write the orders."},
            {"role": "assistant", "content": "Write a query."},
        ],
    }
    model = LanguageModel.load(tiny_lm, [point])
    (read,) = read_tagged(model, encoder, ChatTokenizer.load(tiny_lm), [row])
    assert "".join(read.tokens) == "Write the orders.Write a query."
    assert read.latents.shape == (len(read.tokens), 8)
    assert read.concepts == {"travel"}
    tagged = [t for t, c in zip(read.tokens, read.token_concepts, strict=True) if c == "query"]
    assert "".join(tagged).strip() == "query"


def test_evidence_is_a_sample_of_bounded_size() -> None:
    gatherer = EvidenceGatherer(max_conversations=30, sample_tokens=200)
    for number in range(300):
        latents = np.full((10, 2), float(number), dtype=np.float32)
        half = frozenset(["early" if number < 150 else "late"])
        gatherer.add(TaggedLatents(["word"] * 10, latents, half, [None] * 10))
    evidence = gatherer.evidence()
    assert len(gatherer) == len(evidence.concepts) == len(evidence.peaks) == 30
    assert len(evidence.tokens) == len(evidence.latents) == 200
    assert 5 <= sum(row == {"early"} for row in evidence.concepts) <= 25
    assert 50 <= (evidence.latents[:, 0] < 150).sum() <= 150
    for place, row in enumerate(evidence.concepts):
        assert (evidence.peaks[place, 0] < 150) == (row == {"early"})
