"""Labels without a judge: planted latents get their concepts, noise gets none."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from sae_ray.sae.labels import auc, label_latents, labels_text
from sae_ray.sae.tagged import TaggedLatents, gather_evidence

WORDS = ["net", "sail", "plum", "pear", "walks", "sings", "the", "a", "red", "old"]
KINDS = {"net": "sailing", "sail": "sailing", "plum": "food", "pear": "food"}


def planted(seed: int, num: int = 120) -> list[TaggedLatents]:
    """Conversations of ten words with six latents, each made to fire on something known.

    0: words for food; 1: everywhere in conversations on travel; 2: the word "the"; 3: noise;
    4: never; 5: `walks` or `sings`.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num):
        tokens = [WORDS[i] for i in rng.integers(0, len(WORDS), size=10)]
        topic = "travel" if number % 3 == 0 else "trade"
        latents = np.zeros((10, 6), dtype=np.float32)
        latents[:, 0] = [KINDS.get(token) == "food" for token in tokens]
        latents[:, 1] = topic == "travel"
        latents[:, 2] = [token == "the" for token in tokens]
        latents[:, 3] = rng.random(10)
        latents[:, 5] = [token in ("walks", "sings") for token in tokens]
        latents[:, :3] *= 1 + rng.random((10, 3))
        latents[:, 5] *= 1 + rng.random(10)
        rows.append(
            TaggedLatents(tokens, latents, frozenset([topic]), [KINDS.get(t) for t in tokens])
        )
    return rows


def test_planted_latents_get_their_concepts() -> None:
    labels = label_latents(gather_evidence(planted(0)), gather_evidence(planted(1)))
    assert [(label.label, label.kind) for label in labels] == [
        ("food", "word"),
        ("travel", "conversation"),
        ('token "the"', "token"),
        ("unlabelled", "unlabelled"),
        ("unlabelled", "unlabelled"),
        (labels[5].label, "token"),
    ]
    assert labels[5].label in ('tokens "walks", "sings"', 'tokens "sings", "walks"')
    assert all(label.auc == 1.0 for label in (labels[0], labels[1], labels[2], labels[5]))
    assert labels[3].auc is None
    assert labels[4].density == 0
    assert set(labels[0].tokens) == {"plum", "pear"}


def test_a_label_that_fails_on_held_out_rows_is_dropped() -> None:
    def shuffled(rows: Sequence[TaggedLatents]) -> list[TaggedLatents]:
        rng = np.random.default_rng(5)
        return [
            TaggedLatents(
                row.tokens, row.latents[rng.permutation(10)], row.concepts, row.token_concepts
            )
            for row in rows
        ]

    labels = label_latents(gather_evidence(planted(0)), gather_evidence(shuffled(planted(1))))
    # Which tokens it fires on is now random, but what the whole conversation is about is not.
    assert labels[0].kind == labels[2].kind == "unlabelled"
    assert labels[1].label == "travel"


def test_auc_is_the_textbook_one_ties_included() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, size=200).astype(np.float32)
    positive = rng.random(200) < 0.3 + 0.1 * (scores > 2)
    above = scores[positive][:, None] - scores[~positive][None, :]
    by_pairs = ((above > 0) + 0.5 * (above == 0)).mean()
    assert auc(scores, positive) == pytest.approx(by_pairs)
    assert auc(scores, np.zeros(200, dtype=bool)) is None


def test_written_labels_say_how_they_were_made() -> None:
    labels = label_latents(gather_evidence(planted(0, 60)), gather_evidence(planted(1, 60)))
    read = json.loads(labels_text(labels, sae_sha256="ab" * 32, how="by hand"))
    assert read["sae_sha256"] == "ab" * 32
    assert read["how"] == "by hand"
    assert [row["latent"] for row in read["latents"]] == list(range(6))
    assert read["latents"][1]["label"] == "travel"
