"""RowCache: keys and values of a batch whose rows join, grow and leave each at its own time.

Row i of every tensor belongs to the i-th row of the batch, its token at position t to place t. New
rows are right-padded: what lies behind a row's end is masked, and overwritten as the row grows.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PretrainedConfig

_FIRST_PLACES = 64
Mask = Float[Tensor, "rows 1 queries keys"]


class RowCache(Cache):
    """What models of transformers ask for as `past_key_values`."""

    def __init__(self, config: PretrainedConfig, max_rows: int) -> None:
        super().__init__(layers=[])
        self.config = config
        self.max_rows = max_rows
        self._bytes_per_place = 0
        self._kept: list[tuple[Tensor, Tensor] | None] = [None] * config.num_hidden_layers
        self._first = 0
        self._places: Tensor | None = None
        self._index = torch.arange(max_rows)
        self._longest = self._deepest = 0

    def begin(self, first: int, longest: int, deepest: int) -> None:
        """Let the next forward read new rows, right-padded to `longest`, from row `first` on.

        `deepest` is how far those before them reach.
        """
        self._first, self._places, self._longest = first, None, longest
        self._deepest = max(longest, deepest)

    def grow(self, places: Int[Tensor, " rows"]) -> None:
        """Let the next forward add a token to each row, at these places."""
        self._first, self._places, self._longest = 0, places, int(places.max()) + 1
        self._deepest = self._longest

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values; return those of all that its tokens may see."""
        rows = len(key_states)
        keys, values = self._room(layer_idx, key_states, value_states, self._first + rows)
        if self._places is None:
            mine = slice(self._first, self._first + rows)
            keys[mine, :, : self._longest] = key_states
            values[mine, :, : self._longest] = value_states
            return key_states, value_states
        index = self._index[:rows]
        keys[index, :, self._places] = key_states.squeeze(2)
        values[index, :, self._places] = value_states.squeeze(2)
        return keys[:rows, :, : self._longest], values[:rows, :, : self._longest]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens came before those of the forward: 0 for new rows alone."""
        return 0 if self._places is None else self._longest - 1

    def move(self, source: int, target: int, length: int) -> None:
        """Put a row into the place of another, which has left."""
        for kept in self._kept:
            for tensor in kept or ():
                tensor[target, :, :length] = tensor[source, :, :length]

    def clear(self) -> None:
        """Give the memory back."""
        self._kept = [None] * len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Return what keys and values take, in bytes."""
        return sum(one.nbytes for kept in self._kept for one in kept or ())

    def bytes_for(self, rows: int, longest: int) -> int:
        """Return what so many rows of so many tokens would take, once a forward has shown how."""
        return self._rows_for(rows) * _places_for(longest) * self._bytes_per_place

    def _rows_for(self, rows: int) -> int:
        return min(self.max_rows, 1 << (rows - 1).bit_length())

    def _room(self, layer: int, keys: Tensor, values: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Return a layer's tensors, made anew where they are too small."""
        kept = self._kept[layer]
        if kept is None or kept[0].shape[0] < rows or kept[0].shape[2] < self._deepest:
            shape = self._rows_for(rows), _places_for(self._deepest)
            made = tuple(
                one.new_zeros(shape[0], one.shape[1], shape[1], one.shape[3])
                for one in (keys, values)
            )
            for old, new in zip(kept or (), made, strict=False):
                held = (
                    slice(min(shape[0], len(old))),
                    slice(None),
                    slice(min(shape[1], old.shape[2])),
                )
                new[held] = old[held]
            kept = self._kept[layer] = (made[0], made[1])
            self._index = self._index.to(keys.device)
            self._bytes_per_place = self.num_bytes // (shape[0] * shape[1])
        return kept

    def mask(self, queries: Int[Tensor, "rows queries"], dtype: torch.dtype) -> Mask | dict:
        """Return what a forward's tokens, at these positions, may see of its keys.

        Models with layers of several kinds take a mask for each kind.
        """
        keys = torch.arange(self._longest, device=queries.device)
        back = queries.unsqueeze(-1) - keys
        window = getattr(self.config, "sliding_window", None)

        def additive(seen: Tensor) -> Mask:
            hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            return hidden.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)

        def sliding() -> Mask:
            return additive((back >= 0) & (back < window))  # pyright: ignore

        if kinds := getattr(self.config, "layer_types", None):
            made = {"full_attention": lambda: additive(back >= 0), "sliding_attention": sliding}
            return {kind: made[kind]() for kind in set(kinds)}
        return sliding() if window else additive(back >= 0)


def _places_for(longest: int) -> int:
    return max(_FIRST_PLACES, 1 << (longest - 1).bit_length())
