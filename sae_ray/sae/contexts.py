"""Contexts of every latent over its whole range, and places where it is off, from one pass.

For each latent are kept

    strongest   where it is on most
    spread      a uniform sample of all pieces of conversations where it is on, by its peak there:
                sorted and cut into equal parts, that is a sample of each quantile
                of its activations, with no edge to be known before the pass
    hard        where it is off although a latent of like direction is on
    easy        where it is off, of one sample of windows that all latents share

and nothing else: no activations are stored. What is kept at random has the smallest random keys,
which come from the seed and the place in the pool alone.

Memory: 8 bytes x context_tokens x (num_strongest + num_spread + num_hard) a latent (15 KB with
the defaults), d_sae bytes for each easy window, and the latents of one piece.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from sae_ray.chat import Kind
from sae_ray.lm import LanguageModel
from sae_ray.sae.activations import read_sequences
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.sequences import CONVERSATION, KIND, POSITION, TOKEN, Lanes, length_buckets

PIECE_TOKENS = 512
"""Longest piece of a conversation whose latents are held at once."""
NUM_NEIGHBOURS = 4
_CHUNK = 1024
_LEFT = 0.75
"""Share of a context before its peak: a causal model answers to what came before."""
_NO_TOKEN = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Room:
    """How much is kept."""

    num_strongest: int = 10
    num_spread: int = 40
    num_hard: int = 10
    num_easy: int = 256
    context_tokens: int = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens of one conversation, in order, with their latents."""

    lanes: Lanes
    latents: Float[Tensor, "tokens d_sae"]


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """A few tokens of a conversation, and a latent's activations there."""

    ids: Int32[np.ndarray, " tokens"]
    values: Float32[np.ndarray, " tokens"]
    conversation: int
    position: int
    """Of the first token, in the conversation."""

    @property
    def peak(self) -> int:
        """Place of the strongest token."""
        return int(self.values.argmax())

    @property
    def strength(self) -> float:
        """Activation at the peak; 0 where the latent is off."""
        return float(self.values.max())


@dataclasses.dataclass(frozen=True, slots=True)
class LatentContexts:
    """What was kept of one latent."""

    strongest: list[Context]
    """Strongest first."""
    spread: list[Context]
    """Weakest first."""
    hard: list[Context]
    easy: list[Context]

    def quantiles(self, num: int) -> list[list[Context]]:
        """Cut the spread into equal parts, weakest first; parts of a latent rarely on are empty."""
        parts = np.array_split(np.arange(len(self.spread)), num)
        return [[self.spread[i] for i in part] for part in parts]


def read_pieces(
    model: LanguageModel,
    encoder: LatentEncoder,
    instances: Sequence[Lanes],
    *,
    tokens_per_forward: int = 8192,
) -> Iterator[Piece]:
    """Read instances, each alone, and yield their latents a piece at a time."""
    lengths = [len(one) for one in instances]
    for group in length_buckets(lengths, tokens_per_forward, np.random.default_rng(0)):
        sequences = [instances[row] for row in group]
        x = read_sequences(model, sequences)[encoder.hook_point]
        ends = np.cumsum([len(one) for one in sequences])
        for lanes, end in zip(sequences, ends.tolist(), strict=True):
            own = x[end - len(lanes) : end]
            for start in range(0, len(lanes), PIECE_TOKENS):
                part = slice(start, start + PIECE_TOKENS)
                with torch.inference_mode():
                    yield Piece(lanes[part], encoder.encode(own[part].float()))


def decoder_neighbours(
    W_dec: Float[Tensor, "d_sae d_out"], num: int = NUM_NEIGHBOURS
) -> tuple[Int64[np.ndarray, "d_sae num"], Float32[np.ndarray, "d_sae num"]]:
    """Return the latents of the likest decoder directions, nearest first, and their cosines."""
    unit = torch.nn.functional.normalize(W_dec.float(), dim=-1)
    num = min(num, len(unit) - 1)
    indices, cosines = [], []
    for start in range(0, len(unit), _CHUNK):
        likeness = unit[start : start + _CHUNK] @ unit.T
        own = torch.arange(len(likeness), device=unit.device)
        likeness[own, own + start] = -torch.inf
        found = likeness.topk(num, dim=-1)
        indices.append(found.indices)
        cosines.append(found.values)
    return torch.cat(indices).cpu().numpy(), torch.cat(cosines).cpu().numpy()


class ContextGatherer:
    """Takes pieces in and keeps contexts; counts for each latent where it is on."""

    def __init__(
        self, W_dec: Float[Tensor, "d_sae d_out"], room: Room | None = None, seed: int = 0
    ) -> None:
        self.room, self.seed = room or Room(), seed
        self.neighbours, self.cosines = decoder_neighbours(W_dec)
        d_sae, width = len(W_dec), self.room.context_tokens
        self.num_tokens = np.zeros(len(Kind), dtype=np.int64)
        self.num_on = np.zeros((len(Kind), d_sae), dtype=np.int64)
        """By token kind, then latent: tokens at which it is on."""
        self._strongest = _Shelf(d_sae, self.room.num_strongest, width)
        self._spread = _Shelf(d_sae, self.room.num_spread, width)
        self._hard = _Shelf(d_sae, self.room.num_hard, width)
        self._easy = _Shelf(1, self.room.num_easy, width)
        self._on_in_easy = np.zeros((self.room.num_easy, d_sae), dtype=bool)
        self._windows: list[tuple[float, int, Context]] | None = None

    def gather(self, pieces: Iterable[Piece]) -> "ContextGatherer":
        """Take in all pieces."""
        for piece in pieces:
            self.add(piece)
        return self

    @torch.inference_mode()
    def add(self, piece: Piece) -> None:
        """Take in one piece, and keep what is worth keeping of it."""
        self._count(piece)
        self._windows = None
        place = (int(piece.lanes[0, CONVERSATION]), int(piece.lanes[0, POSITION]))
        rng = np.random.default_rng((self.seed, *place))
        values, where = (one.cpu().numpy() for one in piece.latents.max(dim=0))
        starts = self._starts(where, len(piece.lanes))
        keys = rng.random((1 + self.neighbours.shape[1], len(values)), dtype=np.float32)
        on = np.flatnonzero(values > 0)
        self._put(self._strongest, piece, on, -values[on], starts[on], once=True)
        self._put(self._spread, piece, on, keys[0, on], starts[on])
        for near, cosine, key in zip(self.neighbours.T, self.cosines.T, keys[1:], strict=True):
            latents = np.flatnonzero((values[near] > 0) & (cosine > 0))
            self._put(self._hard, piece, latents, key[latents], starts[near[latents]], off=True)
        self._keep_easy(piece, rng)

    def contexts(self, latent: int) -> LatentContexts:
        """Return what was kept of a latent."""
        if self._windows is None:
            self._windows = sorted(self._easy.held(0), key=_first)
        off = ~self._on_in_easy[:, latent]
        return LatentContexts(
            strongest=[one for _, _, one in sorted(self._strongest.held(latent), key=_first)],
            spread=sorted(
                (one for _, _, one in sorted(self._spread.held(latent), key=_first)),
                key=lambda one: one.strength,
            ),
            hard=[one for _, _, one in sorted(self._hard.held(latent), key=_first)],
            easy=[one for _, slot, one in self._windows if off[slot]],
        )

    def _count(self, piece: Piece) -> None:
        kinds = piece.lanes[:, KIND]
        on = piece.latents > 0
        for kind in np.unique(kinds).tolist():
            at = torch.from_numpy(kinds == kind).to(on.device)
            self.num_tokens[kind] += int(at.sum())
            self.num_on[kind] += on[at].sum(0).cpu().numpy()

    def _starts(self, peaks: np.ndarray, num_tokens: int) -> np.ndarray:
        width = self.room.context_tokens
        return np.clip(peaks - int(_LEFT * width), 0, max(0, num_tokens - width))

    def _put(
        self,
        shelf: "_Shelf",
        piece: Piece,
        latents: np.ndarray,
        priority: np.ndarray,
        starts: np.ndarray,
        *,
        off: bool = False,
        once: bool = False,
    ) -> None:
        """Put windows on a shelf where it wants them.

        If `off`, only where the latent is off; if `once`, only one of those that agree up to the
        peak, which to a causal model are the same.
        """
        wanted = shelf.wants(latents, priority)
        latents, priority, starts = latents[wanted], priority[wanted], starts[wanted]
        if not len(latents):
            return
        at = starts[:, None] + np.arange(self.room.context_tokens)
        real = at < len(piece.lanes)
        at = np.minimum(at, len(piece.lanes) - 1)
        rows, columns = torch.from_numpy(at), torch.from_numpy(latents)[:, None]
        values = np.where(real, piece.latents[rows, columns].cpu().numpy(), 0)
        ids = np.where(real, piece.lanes[at, TOKEN], _NO_TOKEN)
        keep = np.ones(len(latents), dtype=bool)
        if off:
            keep &= ~(values > 0).any(axis=1)
        if once:
            keep &= ~shelf.holds(latents, ids, values)
        places = piece.lanes[at[:, 0]]
        shelf.put(latents[keep], priority[keep], ids[keep], values[keep], places[keep])

    def _keep_easy(self, piece: Piece, rng: np.random.Generator) -> None:
        key, width = np.array([rng.random(dtype=np.float32)]), self.room.context_tokens
        start = int(rng.integers(0, max(1, len(piece.lanes) - width + 1)))
        if not self._easy.wants(np.array([0]), key)[0]:
            return
        lanes = piece.lanes[start : start + width]
        ids = np.full((1, width), _NO_TOKEN, dtype=np.int32)
        ids[0, : len(lanes)] = lanes[:, TOKEN]
        none = np.zeros((1, width), dtype=np.float32)
        slots = self._easy.put(np.array([0]), key, ids, none, lanes[:1])
        on = (piece.latents[start : start + width] > 0).any(0)
        self._on_in_easy[slots[0]] = on.cpu().numpy()


class _Shelf:
    """So many contexts for each latent: those of the smallest priority, earlier ones first."""

    def __init__(self, d_sae: int, slots: int, width: int) -> None:
        self._priority = np.full((d_sae, slots), np.inf, dtype=np.float32)
        self._ids = np.full((d_sae, slots, width), _NO_TOKEN, dtype=np.int32)
        self._values = np.zeros((d_sae, slots, width), dtype=np.float32)
        self._places = np.zeros((d_sae, slots, 2), dtype=np.int32)
        self._worst = np.zeros(d_sae, dtype=np.int64)

    def wants(self, latents: np.ndarray, priority: np.ndarray) -> np.ndarray:
        """Say which offers are better than the worst that is held."""
        return priority < self._priority[latents, self._worst[latents]]

    def holds(self, latents: np.ndarray, ids: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Say which contexts are, up to their peaks, the same as one that is held."""
        peaks = values.argmax(axis=1)[:, None]
        until = np.arange(ids.shape[1]) <= peaks
        same = (self._ids[latents] == ids[:, None]) | ~until[:, None]
        return same.all(axis=2).any(axis=1)

    def put(
        self,
        latents: np.ndarray,
        priority: np.ndarray,
        ids: np.ndarray,
        values: np.ndarray,
        first_tokens: np.ndarray,
    ) -> np.ndarray:
        """Put one context for each latent in the place of its worst; return the slots taken."""
        slots = self._worst[latents]
        self._priority[latents, slots] = priority
        self._ids[latents, slots] = ids
        self._values[latents, slots] = values
        self._places[latents, slots] = first_tokens[:, [CONVERSATION, POSITION]]
        self._worst[latents] = self._priority[latents].argmax(axis=1)
        return slots

    def held(self, latent: int) -> list[tuple[float, int, Context]]:
        """Return what is held of a latent, with priority and slot."""
        held = []
        for slot in np.flatnonzero(np.isfinite(self._priority[latent])).tolist():
            real = self._ids[latent, slot] != _NO_TOKEN
            conversation, position = self._places[latent, slot].tolist()
            ids, values = self._ids[latent, slot][real], self._values[latent, slot][real]
            one = Context(ids, values, conversation, position)
            held.append((float(self._priority[latent, slot]), slot, one))
        return held


def _first(item: tuple[float, int, Context]) -> float:
    return item[0]
