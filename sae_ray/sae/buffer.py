"""MixingBuffer: a room of tokens of which random ones go out, and what comes in takes their places.

The room is allocated once and never copied: a batch is gathered from random places, and the next
tokens are written there. Places are taken in the order of one random permutation after another, so
each token leaves after at most two rounds of the room, and a batch holds tokens of as many forward
passes as the room does.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from sae_ray.lm import HookPoint


@dataclasses.dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens with their activations at every hook point; row i is one token everywhere."""

    lanes: Int32[Tensor, "_ 4"]
    """Conversation, position, token id and kind: see `sae_ray.sae.sequences`."""
    activations: dict[HookPoint, Float[Tensor, "_ _"]]

    def __len__(self) -> int:
        return len(self.lanes)


class MixingBuffer:
    """A room of `num_batches` batches, from which batches of `batch_tokens` are drawn."""

    def __init__(self, batch_tokens: int, num_batches: int, seed: int) -> None:
        self.batch_tokens, self.num_batches, self.seed = batch_tokens, num_batches, seed
        self._room: TokenBatch | None = None
        self._waiting: TokenBatch | None = None
        self._round = 0
        self._next = 0
        # The room is filled in one order, and every round is drawn in another.
        self._free = self._permutation()
        self._begin_round()

    @property
    def is_full(self) -> bool:
        """True where a batch can be drawn."""
        return self._room is not None and len(self._free) == 0

    def put(self, tokens: TokenBatch) -> None:
        """Take tokens in: those for which there is no room wait until a batch is drawn."""
        assert self._waiting is None, "draw batches until the last tokens have found a place"
        self._room = self._room or self._new_room(tokens)
        self._waiting = tokens
        self._fill()

    def take(self) -> TokenBatch:
        """Draw a batch; its places go to the tokens that wait."""
        assert self._room is not None
        assert self.is_full
        places = self._places[self._next : self._next + self.batch_tokens]
        batch = _select(self._room, places)
        self._free = places
        self._next += self.batch_tokens
        if self._next == len(self._places):
            self._begin_round()
        self._fill()
        return batch

    def contents(self) -> TokenBatch:
        """Return all that is in a full room, in no order; the tensors are the room's own."""
        assert self._room is not None
        assert self.is_full
        return self._room

    def state_dict(self) -> dict[str, Any]:
        """Return everything that what is drawn depends on."""
        return {
            "room": self._room and _tensors(self._room),
            "waiting": self._waiting and _tensors(self._waiting),
            "free": self._free.clone(),
            "round": self._round,
            "next": self._next,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where a buffer of the same size and seed was, on this one's device."""
        device = self._room.lanes.device if self._room else torch.device("cpu")
        self._room = state["room"] and _batch(state["room"], device)
        self._waiting = state["waiting"] and _batch(state["waiting"], device)
        self._free, self._round, self._next = state["free"], state["round"], state["next"]
        self._places = self._permutation()

    def _begin_round(self) -> None:
        self._round, self._next = self._round + 1, 0
        self._places = self._permutation()

    def _permutation(self) -> Tensor:
        rng = np.random.default_rng((self.seed, self._round))
        return torch.from_numpy(rng.permutation(self.batch_tokens * self.num_batches))

    def _new_room(self, like: TokenBatch) -> TokenBatch:
        num = self.batch_tokens * self.num_batches
        return TokenBatch(
            like.lanes.new_empty(num, 4),
            {point: x.new_empty(num, x.shape[1]) for point, x in like.activations.items()},
        )

    def _fill(self) -> None:
        if self._waiting is None or self._room is None:
            return
        num = min(len(self._free), len(self._waiting))
        places, self._free = self._free[:num], self._free[num:]
        _write(self._room, places, _rows(self._waiting, slice(0, num)))
        rest = _rows(self._waiting, slice(num, None))
        self._waiting = rest if len(rest) else None


def _select(tokens: TokenBatch, places: Tensor) -> TokenBatch:
    places = places.to(tokens.lanes.device)
    return TokenBatch(
        tokens.lanes.index_select(0, places),
        {point: x.index_select(0, places) for point, x in tokens.activations.items()},
    )


def _rows(tokens: TokenBatch, rows: slice) -> TokenBatch:
    return TokenBatch(
        tokens.lanes[rows], {point: x[rows] for point, x in tokens.activations.items()}
    )


def _write(room: TokenBatch, places: Tensor, tokens: TokenBatch) -> None:
    places = places.to(room.lanes.device)
    room.lanes.index_copy_(0, places, tokens.lanes)
    for point, x in tokens.activations.items():
        room.activations[point].index_copy_(0, places, x)


def _tensors(tokens: TokenBatch) -> dict[str, Tensor]:
    named = {str(point): x.clone() for point, x in tokens.activations.items()}
    return {"lanes": tokens.lanes.clone(), **named}


def _batch(tensors: dict[str, Tensor], device: torch.device) -> TokenBatch:
    moved = {name: x.to(device) for name, x in tensors.items()}
    lanes = moved.pop("lanes")
    return TokenBatch(lanes, {HookPoint.parse(name): x for name, x in moved.items()})
