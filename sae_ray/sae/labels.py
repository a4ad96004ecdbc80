"""Latent labels without a judge: what a latent's strongest contexts have in common.

A label is the concept most enriched among a latent's strongest contexts: a tag of whole
conversations, a tag of single words, or failing that the tokens themselves. It is kept only if
the latent then tells, on rows that had no part in choosing it, what has the concept from what has
not (detection AUC). Nothing here knows where the tags come from: any tagged data will do.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from sae_ray.artifacts import hash_file
from sae_ray.chat import ChatTokenizer, Conversation, Unreadable
from sae_ray.chat import Kind as TokenKind
from sae_ray.errors import ModelError
from sae_ray.lm import LanguageModel
from sae_ray.sae.activations import read_sequences
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.pretrained import resolve
from sae_ray.sae.sequences import instance_of

Kind = Literal["conversation", "word", "token", "unlabelled"]
Concept = tuple[str, ...]
"""A tag alone, or one or a few tokens."""

MAX_TOKENS = 3
MIN_POSITIVES = 5
"""An AUC over fewer held-out cases than this says nothing."""


@dataclasses.dataclass(frozen=True, slots=True)
class TaggedLatents:
    """A conversation's latents, with what is known about it and about its tokens."""

    tokens: Sequence[str]
    latents: Float[np.ndarray, "tokens d_sae"]
    concepts: frozenset[str]
    """What the whole conversation is about."""
    token_concepts: Sequence[str | None]
    """What each token's word stands for."""


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


@dataclasses.dataclass(frozen=True, slots=True)
class _Evidence:
    """Latents of one half of the data: conversations by their peaks, and a sample of tokens."""

    peaks: Float[np.ndarray, "conversations d_sae"]
    peak_tokens: list[list[str]]
    """By conversation, then latent: the token of the peak."""
    peak_concepts: list[list[str | None]]
    concepts: list[frozenset[str]]
    latents: Float[np.ndarray, "sample d_sae"]
    tokens: list[str]
    token_concepts: list[str | None]

    def density(self) -> Float[np.ndarray, " d_sae"]:
        return (self.latents > 0).mean(axis=0)


def label_latents(
    choose_on: Iterable[TaggedLatents],
    check_on: Iterable[TaggedLatents],
    *,
    num_contexts: int = 24,
    min_share: float = 0.6,
    min_auc: float = 0.75,
    sample_tokens: int = 16_000,
    seed: int = 0,
) -> list[Label]:
    """Label every latent from one half of the data and check the labels on the other.

    A concept is a candidate if at least `min_share` of a latent's strongest `num_contexts` have
    it; of the candidates, the one of the largest `share * log(share / base rate)` is taken.
    """
    rng = np.random.default_rng(seed)
    chosen_from = _gather(choose_on, sample_tokens, rng)
    checked_on = _gather(check_on, sample_tokens, rng)
    density = chosen_from.density()
    finder = _Finder(chosen_from, num_contexts, min_share)
    detector = _Detector(checked_on)
    labels: list[Label] = []
    for latent in range(chosen_from.peaks.shape[1]):
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
        read_tagged(model, encoder, tokenizer, choose_on),
        read_tagged(model, encoder, tokenizer, check_on),
    )
    weights = (sae_path / "sae_weights.safetensors").read_bytes()
    write_labels(out, labels, sae_sha256=hashlib.sha256(weights).hexdigest(), how=how)
    return labels


def write_labels(path: Path, labels: Sequence[Label], *, sae_sha256: str, how: str) -> None:
    """Write labels as JSON, with the SAE's fingerprint and how they were made."""
    rows = [dataclasses.asdict(label) for label in labels]
    for row in rows:
        row["density"] = round(row["density"], 6)
        row["auc"] = None if row["auc"] is None else round(row["auc"], 4)
    head = json.dumps({"sae_sha256": sae_sha256, "how": how}, indent=1)
    body = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(head[:-2] + ',\n "latents": [\n' + body + "\n]\n}\n", encoding="utf-8")


def read_labels(path: str | Path, sae: str | Path) -> dict[int, str]:
    """Read the labels of a SAE's latents, less those that nobody could name.

    Raises:
        ModelError: the file is not there, is no label file, or was made for another SAE.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        made_for, rows = content["sae_sha256"], content["latents"]
        labels = {row["latent"]: row["label"] for row in rows if row["label"] != "unlabelled"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} cannot be read as labels ({error}): give a JSON file with sae_sha256 and "
            "latents: [{latent, label}]"
        ) from error
    weights = resolve(str(sae)) / "sae_weights.safetensors"
    if made_for != hash_file(str(weights)).sha256:
        raise ModelError(
            f"the labels in {path} were made for another SAE than {sae}: by index they would name "
            "other latents; give that SAE's labels, or none"
        )
    return labels


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


def _gather(
    rows: Iterable[TaggedLatents], sample_tokens: int, rng: np.random.Generator
) -> _Evidence:
    """Keep the peaks of every conversation, and a uniform sample of tokens over all of them."""
    peaks, peak_tokens, peak_concepts, concepts = [], [], [], []
    sample: list[tuple[float, np.ndarray, str, str | None]] = []
    limit = 1.0
    for row in rows:
        where = row.latents.argmax(axis=0)
        peaks.append(row.latents.max(axis=0))
        peak_tokens.append([row.tokens[i] for i in where])
        peak_concepts.append([row.token_concepts[i] for i in where])
        concepts.append(row.concepts)
        keys = rng.random(len(row.tokens))
        for i in np.flatnonzero(keys < limit).tolist():
            # A copy, so that the rest of the conversation's latents can go.
            item = (keys[i], row.latents[i].copy(), row.tokens[i], row.token_concepts[i])
            sample.append(item)
        if len(sample) > 2 * sample_tokens:
            sample = sorted(sample, key=lambda item: item[0])[:sample_tokens]
            limit = sample[-1][0]
    sample = sorted(sample, key=lambda item: item[0])[:sample_tokens]
    return _Evidence(
        peaks=np.stack(peaks),
        peak_tokens=peak_tokens,
        peak_concepts=peak_concepts,
        concepts=concepts,
        latents=np.stack([item[1] for item in sample]),
        tokens=[item[2] for item in sample],
        token_concepts=[item[3] for item in sample],
    )


def read_tagged(
    model: LanguageModel,
    encoder: LatentEncoder,
    tokenizer: ChatTokenizer,
    rows: Iterable[Mapping[str, Any]],
    *,
    max_tokens: int = 512,
) -> Iterator[TaggedLatents]:
    """Read rows of id, messages, concepts, spans: latents of what people said, not the template.

    Spans name the concept of a piece of a message: message, start, end, concept. Concepts of
    spans are words' and not the conversation's.
    """
    for row in rows:
        (tokens,) = tokenizer.tokenize([Conversation(row["id"], row["messages"])], max_tokens)
        if isinstance(tokens, Unreadable) or not (tokens.kinds == TokenKind.CONTENT).any():
            continue
        content = np.flatnonzero(tokens.kinds == TokenKind.CONTENT)
        x = read_sequences(model, [instance_of(tokens.ids)])[encoder.hook_point].float()
        with torch.inference_mode():
            latents = encoder.encode(x[torch.from_numpy(content)]).numpy()
        offsets, concepts = _concepts_of_tokens(tokenizer, row)
        text = tokenizer.render(row["messages"])
        yield TaggedLatents(
            tokens=[text[slice(*offsets[i])] for i in content],
            latents=latents,
            concepts=frozenset(row["concepts"]) - {span["concept"] for span in row["spans"]},
            token_concepts=[concepts[i] for i in content],
        )


def _concepts_of_tokens(
    tokenizer: ChatTokenizer, row: Mapping[str, Any]
) -> tuple[list[tuple[int, int]], list[str | None]]:
    """Return where each token of the rendered chat stands, and the concept of its span."""
    text = tokenizer.render(row["messages"])
    starts: list[int] = []
    for message in row["messages"]:
        starts.append(text.index(message["content"], starts[-1] if starts else 0))
    offsets = tokenizer.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    concept_at: dict[int, str] = {}
    for span in row["spans"]:
        at = starts[span["message"]]
        for character in range(at + span["start"], at + span["end"]):
            concept_at[character] = span["concept"]
    # The last character decides: a token's first may be the space before its word.
    return offsets, [concept_at.get(end - 1) for _, end in offsets]


class _Finder:
    """Finds what a latent's strongest contexts share beyond what all contexts share."""

    def __init__(self, evidence: _Evidence, num_contexts: int, min_share: float) -> None:
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
        tokens = Counter(evidence.peak_tokens[row][latent] for row in top)
        words = Counter(evidence.peak_concepts[row][latent] for row in top)
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

    def __init__(self, evidence: _Evidence) -> None:
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
