"""Batch: the rows that one base model grows together, each as one expert's view of a request.

Rows join with their prompts, which are read right-padded, grow a token at a time, and leave: the
last row takes the place of one that left. What belongs to a row (its keys and values, the factors
of its LoRA, whose latent edits it gets) moves with it.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sae_ray.experts.residents import NOBODY, LatentRows, Resident
from sae_ray.experts.row_cache import RowCache
from sae_ray.experts.stacked import StackedLora


@dataclasses.dataclass(eq=False)
class Row:
    """A row of the batch."""

    ids: Sequence[int]
    """Tokens of its prompt."""
    resident: Resident | None
    length: int = 0
    """Tokens whose keys and values are kept."""
    next_id: int = 0
    """The token to read next."""


class Batch:
    """Rows of a model, at most so many."""

    def __init__(self, model: PreTrainedModel, max_rows: int, latents: LatentRows) -> None:
        """Take the model, whose matrices and head it hooks.

        Raises:
            ModelError: batches cannot be made of such a model.
        """
        self.rows: list[Row] = []
        self.lora = StackedLora(model, max_rows)
        self.cache = RowCache(model.config.get_text_config(), max_rows)
        self._model, self._latents = model, latents
        self._last: Int[Tensor, " rows"] = torch.zeros(0, dtype=torch.long)
        model.get_output_embeddings().register_forward_pre_hook(self._last_states)  # pyright: ignore

    def join(self, rows: Sequence[Row]) -> Float[Tensor, "rows vocab"]:
        """Read the prompts of new rows; return the logits behind their last tokens.

        Where the model raises, the rows have not joined.
        """
        first = len(self.rows)
        try:
            for row in rows:
                self.lora.put(len(self.rows), row.resident.factors if row.resident else {})
                self.rows.append(row)
            return self._read(first)
        except BaseException:
            del self.rows[first:]
            raise

    def grow(self) -> Float[Tensor, "rows vocab"]:
        """Read each row's next token; return the logits behind it."""
        device = self._model.device
        places = torch.tensor([row.length for row in self.rows], device=device)
        ids = torch.tensor([[row.next_id] for row in self.rows], device=device)
        self.cache.grow(places)
        logits = self._forward(0, ids, places.unsqueeze(1), torch.zeros_like(places))
        for row in self.rows:
            row.length += 1
        return logits

    def leave(self, leaving: Sequence[Row]) -> None:
        """Take rows out."""
        gone = set(map(id, leaving))
        for i in reversed(range(len(self.rows))):
            if id(self.rows[i]) in gone:
                last = len(self.rows) - 1
                if i < last:
                    self.cache.move(last, i, self.rows[last].length)
                    self.lora.move(last, i)
                    self.rows[i] = self.rows[last]
                self.rows.pop()
        if not self.rows:
            self.cache.clear()

    def _read(self, first: int) -> Float[Tensor, "rows vocab"]:
        rows, device = self.rows[first:], self._model.device
        longest = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
        positions = torch.arange(longest, device=device).unsqueeze(0)
        self.cache.begin(first, longest, max((row.length for row in self.rows[:first]), default=0))
        last = torch.tensor([len(row.ids) - 1 for row in rows], device=device)
        logits = self._forward(first, ids.to(device), positions, last)
        for row in rows:
            row.length = len(row.ids)
        return logits

    def _forward(
        self,
        first: int,
        ids: Int[Tensor, "rows seq"],
        positions: Int[Tensor, "_ seq"],
        last: Int[Tensor, " rows"],
    ) -> Float[Tensor, "rows vocab"]:
        """Run the model over the rows from `first` on; return the logits at each one's last."""
        rows = self.rows[first:]
        self.lora.look_at(slice(first, len(self.rows)))
        latent = any(row.resident is not None and row.resident.edits_latents for row in rows)
        names = [
            row.resident.id if row.resident and row.resident.edits_latents else NOBODY
            for row in rows
        ]
        self._latents.look_at(names if latent else ())
        self._last = last
        out = self._model(
            input_ids=ids,
            attention_mask=self.cache.mask(positions, self._model.dtype),
            position_ids=positions.expand(len(ids), -1),
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.logits[:, 0]

    def _last_states(self, _head: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Let the head see one token a row: its logits for all would be the largest tensor here."""
        hidden = args[0]
        return (hidden[torch.arange(len(hidden), device=hidden.device), self._last].unsqueeze(1),)
