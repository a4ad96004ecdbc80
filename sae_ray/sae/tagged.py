"""Tagged latents: what is known of conversations and words, laid over latents, and samples of it.

Nothing here knows where the tags come from: any tagged data will do, and data without tags too.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32

from sae_ray.chat import ChatTokenizer, Conversation, Kind, Message
from sae_ray.lm import LanguageModel
from sae_ray.sae.contexts import Piece, read_pieces
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.sequences import CONVERSATION, KIND, POSITION, chat_instances


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
class Evidence:
    """Latents of one half of the data: conversations by their peaks, and a sample of tokens."""

    peaks: Float[np.ndarray, "conversations d_sae"]
    peak_tokens: Int32[np.ndarray, "conversations d_sae"]
    """The token of the peak: a place in `vocabulary`."""
    peak_concepts: Int32[np.ndarray, "conversations d_sae"]
    """What its word stands for: a place in `vocabulary`, -1 where nobody has said."""
    concepts: list[frozenset[str]]
    latents: Float[np.ndarray, "sample d_sae"]
    tokens: list[str]
    token_concepts: list[str | None]
    vocabulary: list[str]

    def density(self) -> Float[np.ndarray, " d_sae"]:
        """Return the share of tokens that each latent is on for."""
        return (self.latents > 0).mean(axis=0)

    def names(self, codes: Int32[np.ndarray, " _"]) -> list[str | None]:
        """Return what codes stand for."""
        return [None if code < 0 else self.vocabulary[code] for code in codes.tolist()]


class EvidenceGatherer:
    """Takes conversations in and keeps a uniform sample of them, and one of their tokens.

    Memory: 12 bytes a latent for each conversation kept, and 4 for each token.
    """

    def __init__(
        self, *, max_conversations: int = 10_000, sample_tokens: int = 16_000, seed: int = 0
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self._conversations = _Sample(max_conversations)
        self._tokens = _Sample(sample_tokens)
        self._codes: dict[str | None, int] = {None: -1}

    def add(self, row: TaggedLatents) -> None:
        """Take in one conversation."""
        if not len(row.tokens):
            return
        where = row.latents.argmax(axis=0)
        codes = [self._coded(names) for names in (row.tokens, row.token_concepts)]
        tokens, concepts = (one[where] for one in codes)
        peak = (row.latents.max(axis=0), tokens, concepts, row.concepts)
        self._conversations.offer(self._rng.random(), peak)
        keys = self._rng.random(len(row.tokens))
        for i in np.flatnonzero(keys < self._tokens.limit).tolist():
            # A copy, so that the rest of the conversation's latents can go.
            item = (row.latents[i].copy(), row.tokens[i], row.token_concepts[i])
            self._tokens.offer(keys[i], item)

    def evidence(self) -> Evidence:
        """Return what was kept."""
        rows, tokens = self._conversations.items(), self._tokens.items()
        vocabulary = [name for name in self._codes if name is not None]
        return Evidence(
            peaks=np.stack([row[0] for row in rows]),
            peak_tokens=np.stack([row[1] for row in rows]),
            peak_concepts=np.stack([row[2] for row in rows]),
            concepts=[row[3] for row in rows],
            latents=np.stack([item[0] for item in tokens]),
            tokens=[item[1] for item in tokens],
            token_concepts=[item[2] for item in tokens],
            vocabulary=vocabulary,
        )

    def __len__(self) -> int:
        return len(self._conversations.items())

    def _coded(self, names: Sequence[str | None]) -> Int32[np.ndarray, " tokens"]:
        codes = [self._codes.setdefault(name, len(self._codes) - 1) for name in names]
        return np.array(codes, dtype=np.int32)


def gather_evidence(rows: Iterable[TaggedLatents]) -> Evidence:
    """Take in all conversations of one half."""
    gatherer = EvidenceGatherer()
    for row in rows:
        gatherer.add(row)
    return gatherer.evidence()


def read_tagged(
    model: LanguageModel,
    encoder: LatentEncoder,
    tokenizer: ChatTokenizer,
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[TaggedLatents]:
    """Read rows of id, messages, concepts, spans: latents of what people said, not the template."""
    conversations = [Conversation(row["id"], row["messages"]) for row in rows]
    instances, _ = chat_instances(tokenizer, conversations)
    for piece in read_pieces(model, encoder, instances):
        row = rows[int(piece.lanes[0, CONVERSATION])]
        yield tag(tokenizer, piece, row, [Kind.CONTENT])


def tag(
    tokenizer: ChatTokenizer,
    piece: Piece,
    row: Mapping[str, Any],
    kinds: Collection[Kind] = tuple(Kind),
) -> TaggedLatents:
    """Lay a row's tags over the tokens of some kinds in a piece of its conversation.

    Spans, if it has any, name the concept of a piece of a message: message, start, end, concept.
    Concepts of spans are words' and not the conversation's.
    """
    spans = row.get("spans") or []
    places = np.flatnonzero(np.isin(piece.lanes[:, KIND], list(kinds)))
    offsets, concepts = _concepts_of_tokens(tokenizer, row["messages"], spans)
    text = tokenizer.render(row["messages"])
    at = piece.lanes[places, POSITION].tolist()
    return TaggedLatents(
        tokens=[text[slice(*offsets[i])] for i in at],
        latents=piece.latents[torch.from_numpy(places)].cpu().numpy(),
        concepts=frozenset(row.get("concepts") or []) - {span["concept"] for span in spans},
        token_concepts=[concepts[i] for i in at],
    )


def _concepts_of_tokens(
    tokenizer: ChatTokenizer, messages: Sequence[Message], spans: Sequence[Mapping[str, Any]]
) -> tuple[list[tuple[int, int]], list[str | None]]:
    """Return where each token of the rendered chat stands, and the concept of its span."""
    text = tokenizer.render(messages)
    offsets = tokenizer.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    if not spans:
        return offsets, [None] * len(offsets)
    starts: list[int] = []
    for message in messages:
        starts.append(text.find(message["content"], max([0, *starts])))
    concept_at: dict[int, str] = {}
    for span in spans:
        if (at := starts[span["message"]]) < 0:
            continue  # the template rewrote that message
        for character in range(at + span["start"], at + span["end"]):
            concept_at[character] = span["concept"]
    # The last character decides: a token's first may be the space before its word.
    return offsets, [concept_at.get(end - 1) for _, end in offsets]


class _Sample:
    """The items of the smallest keys, in the order in which they came."""

    def __init__(self, size: int) -> None:
        self.limit, self._size = 1.0, size
        self._held: list[tuple[float, Any]] = []

    def offer(self, key: float, item: Any) -> None:
        if key < self.limit:
            self._held.append((key, item))
        if len(self._held) > 2 * self._size:
            self._prune()

    def items(self) -> list[Any]:
        self._prune()
        return [item for _, item in self._held]

    def _prune(self) -> None:
        if len(self._held) > self._size:
            self.limit = sorted(key for key, _ in self._held)[self._size]
            self._held = [one for one in self._held if one[0] < self.limit]
