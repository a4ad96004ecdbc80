"""Latent labels without a judge: what a latent's strongest contexts have in common.

A label is the concept most enriched among a latent's strongest contexts: a tag of whole
conversations, a tag of single words, or failing that the tokens themselves. It is kept only if
the latent then tells, on rows that had no part in choosing it, what has the concept from what has
not (detection AUC). Nothing here knows where the tags come from: any tagged data will do.
"""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from sae_ray.artifacts import hash_file, read_file
from sae_ray.chat import ChatTokenizer
from sae_ray.errors import ModelError
from sae_ray.lm import LanguageModel
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.neuronpedia_labels import (
    Labels,
    Owner,
    explanation_files,
    made_for,
    read_explanations,
)
from sae_ray.sae.pretrained import resolve
from sae_ray.sae.tagged import Evidence, gather_evidence, read_tagged

logger = logging.getLogger(__name__)

Kind = Literal["conversation", "word", "token", "judged", "unlabelled"]
Concept = tuple[str, ...]
"""A tag alone, or one or a few tokens."""

MAX_TOKENS = 3
MIN_POSITIVES = 5
"""An AUC over fewer held-out cases than this says nothing."""


@dataclasses.dataclass(frozen=True, slots=True)
class Label:
    """What a latent fires on, and how well that is borne out."""

    latent: int
    label: str
    kind: Kind
    auc: float | None
    """Detection on held-out data: of conversations by their maximum, or of tokens."""
    density: float
    """Share of tokens that it is on for."""
    tokens: list[str]
    """The commonest tokens at the peaks of its strongest contexts."""


def label_latents(
    choose_on: Evidence,
    check_on: Evidence,
    *,
    num_contexts: int = 24,
    min_share: float = 0.6,
    min_auc: float = 0.75,
) -> list[Label]:
    """Label every latent from one half of the data and check the labels on the other.

    A concept is a candidate if at least `min_share` of a latent's strongest `num_contexts` have
    it; of the candidates, the one of the largest `share * log(share / base rate)` is taken.
    """
    density = choose_on.density()
    finder = _Finder(choose_on, num_contexts, min_share)
    detector = _Detector(check_on)
    labels: list[Label] = []
    for latent in range(choose_on.peaks.shape[1]):
        tokens, candidates = finder.candidates(latent)
        found: tuple[str, Kind, float | None] = ("unlabelled", "unlabelled", None)
        for kind, concept in candidates:
            auc = detector.auc(latent, kind, concept)
            if auc is not None and auc >= min_auc:
                found = (_text(kind, concept), kind, auc)
                break
        labels.append(Label(latent, found[0], found[1], found[2], float(density[latent]), tokens))
    return labels


def label_sae(
    lm_path: Path,
    sae_path: Path,
    choose_on: Sequence[Mapping[str, Any]],
    check_on: Sequence[Mapping[str, Any]],
    out: Path,
    *,
    how: str,
) -> list[Label]:
    """Label a SAE folder from tagged rows and write the labels to `out`."""
    encoder = LatentEncoder.load(sae_path)
    model = LanguageModel.load(lm_path, [encoder.hook_point])
    tokenizer = ChatTokenizer.load(lm_path)
    labels = label_latents(
        *(
            gather_evidence(read_tagged(model, encoder, tokenizer, rows))
            for rows in (choose_on, check_on)
        )
    )
    out.write_text(labels_text(labels, sae_sha256=fingerprint(sae_path), how=how), "utf-8")
    return labels


def labels_text(labels: Sequence[Label], *, sae_sha256: str, how: str) -> str:
    """Return labels as JSON, with the SAE's fingerprint and how they were made."""
    rows = [dataclasses.asdict(label) for label in labels]
    for row in rows:
        row["density"] = round(row["density"], 6)
        row["auc"] = None if row["auc"] is None else round(row["auc"], 4)
    head = json.dumps({"sae_sha256": sae_sha256, "how": how}, indent=1)
    body = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return head[:-2] + ',\n "latents": [\n' + body + "\n]\n}\n"


def fingerprint(sae: str | Path) -> str:
    """Return the SHA-256 of a SAE's weights, by which its labels know it."""
    return hash_file(str(resolve(str(sae)) / "sae_weights.safetensors")).sha256


def read_labels(path: str | Path, sae: str | Path) -> Labels:
    """Read the labels of a SAE's latents, less those that nobody could name.

    Args:
        path: a file that `label_sae` or the labelling job wrote, or explanations of Neuronpedia: a
            file or folder of its export. A local path or any fsspec URL.
        sae: whose latents they are to name.

    Raises:
        ModelError: nothing is there, it is damaged, or it was made for another SAE.
        ArtifactError: storage refuses.
    """
    given, name = str(path), str(sae)
    if (files := explanation_files(given)) is None:
        own, labels = _read_own(given)
        _require_made_for(own, given, name)
        return labels
    if (own := made_for(files)) is not None:
        _require_made_for(own, given, name)
    labels = read_explanations(files, Owner.load(name), is_proved=own is not None)
    for warning in labels.warnings:
        logger.warning("%s", warning)
    return labels


def _read_own(path: str) -> tuple[str, Labels]:
    """Read a label file of this library: the fingerprint of its SAE, and the labels."""
    try:
        content = json.loads(read_file(path).decode("utf-8"))
        rows = content["latents"]
        labels = {row["latent"]: row["label"] for row in rows if row["label"] != "unlabelled"}
        return content["sae_sha256"], Labels(labels)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} cannot be read as labels ({error}): give a JSON file with sae_sha256 and "
            "latents: [{latent, label}], or a file or folder of Neuronpedia's explanations"
        ) from error


def _require_made_for(sae_sha256: str, path: str, sae: str) -> None:
    if sae_sha256 != fingerprint(sae):
        raise ModelError(
            f"the labels in {path} were made for another SAE than {sae}: by index they would name "
            "other latents; give that SAE's labels, or none"
        )


def labels_of(sae: str, given: str | None = None) -> Labels:
    """Read the labels given, or those that lie in or beside a SAE's folder, or none.

    Raises:
        ModelError: those given are not there, or are another SAE's.
    """
    if given is not None:
        return read_labels(given, sae)
    for path in (Path(sae) / "labels.json", Path(sae).parent / "labels.json"):
        if path.is_file():
            try:
                return read_labels(path, sae)
            except ModelError as error:
                logger.warning("%s", error)
    return Labels()


def auc(scores: Float[np.ndarray, " items"], positive: Bool[np.ndarray, " items"]) -> float | None:
    """Return the chance that a positive scores above a negative, or None where too few are there.

    Ties count half.
    """
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if min(num_positive, num_negative) < MIN_POSITIVES:
        return None
    ranks = rankdata(scores)
    above = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


def _text(kind: Kind, concept: Concept) -> str:
    if kind != "token":
        return concept[0]
    # Spaces are part of a token, but not of what a person wants to read.
    words = dict.fromkeys(token.strip() or "space" for token in concept)
    return ("token " if len(words) == 1 else "tokens ") + ", ".join(f'"{word}"' for word in words)


class _Finder:
    """Finds what a latent's strongest contexts share beyond what all contexts share."""

    def __init__(self, evidence: Evidence, num_contexts: int, min_share: float) -> None:
        self._evidence = evidence
        self._num_contexts = num_contexts
        self._min_share = min_share
        num_rows, num_tokens = len(evidence.concepts), len(evidence.tokens)
        self._base: dict[Kind, dict[str, float]] = {
            "conversation": _shares((c for row in evidence.concepts for c in row), num_rows),
            "word": _shares((c for c in evidence.token_concepts if c), num_tokens),
            "token": _shares(evidence.tokens, num_tokens),
        }

    def candidates(self, latent: int) -> tuple[list[str], list[tuple[Kind, Concept]]]:
        """Return the tokens at a latent's peaks, and concepts worth checking, best first."""
        evidence = self._evidence
        peaks = evidence.peaks[:, latent]
        top = np.argsort(-peaks, kind="stable")[: self._num_contexts]
        top = [int(row) for row in top if peaks[row] > 0]
        if len(top) < self._num_contexts // 2:
            return [], []
        tokens = Counter(map(str, evidence.names(evidence.peak_tokens[top, latent])))
        words = Counter(evidence.names(evidence.peak_concepts[top, latent]))
        whole = Counter(c for row in top for c in evidence.concepts[row])
        scored: list[tuple[float, Kind, Concept]] = []
        counted: list[tuple[Kind, Counter[str] | Counter[str | None]]] = [
            ("conversation", whole), ("word", words), ("token", tokens)
        ]  # fmt: skip
        for kind, counts in counted:
            for concept, count in counts.items():
                share = count / len(top)
                if concept is not None and share >= self._min_share:
                    base = self._base[kind].get(concept, 1 / len(evidence.tokens))
                    scored.append((share * np.log(share / base), kind, (concept,)))
        # Tags say more than tokens do: tokens are tried when no tag holds, a few together last.
        scored.sort(key=lambda item: (item[1] == "token", -item[0], item[2]))
        candidates = [item[1:] for item in scored]
        common = tokens.most_common(MAX_TOKENS)
        if sum(count for _, count in common) / len(top) >= self._min_share:
            candidates.append(("token", tuple(token for token, _ in common)))
        return [token for token, _ in tokens.most_common(5)], candidates


class _Detector:
    """Measures how well a latent tells what has a concept from what has not."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence

    def auc(self, latent: int, kind: Kind, concept: Concept) -> float | None:
        evidence = self._evidence
        if kind == "conversation":
            has = [concept[0] in row for row in evidence.concepts]
            return auc(evidence.peaks[:, latent], np.array(has))
        held = evidence.token_concepts if kind == "word" else evidence.tokens
        return auc(evidence.latents[:, latent], np.array([item in concept for item in held]))


def _shares(items: Iterable[str], total: int) -> dict[str, float]:
    return {item: count / total for item, count in Counter(items).items()}
