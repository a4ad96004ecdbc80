"""SpanReader: the mean latents of what an assistant said, conversation by conversation.

The conversation is the unit of every statistic, not the token: tokens of one reply are far from
independent. This is the expensive part of making a subspace and a plain callable: the same in one
process, in a test and in a Ray Data stage.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32, Int32

from sae_ray.chat import ChatTokenizer, Conversation, Unreadable
from sae_ray.lm import DTypeName, LanguageModel
from sae_ray.sae.activations import read_sequences
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.pretrained import load_encoder
from sae_ray.sae.sequences import instance_of, length_buckets

_PIECE = 1024
"""Tokens whose latents are held at once."""


@dataclasses.dataclass(frozen=True)
class PooledRow:
    """What one reply leaves of its latents: those that are on at all."""

    id: str
    num_tokens: int
    """Tokens of the reply."""
    latents: Int32[np.ndarray, " on"]
    means: Float32[np.ndarray, " on"]
    """Over the tokens of the reply."""
    counts: Int32[np.ndarray, " on"]
    """Tokens of the reply at which it is on."""
    first: Float32[np.ndarray, " on"]
    """At the first token of the conversation, where attention sinks lie."""
    unexplained: float
    """Sum over tokens and coordinates of (x - x̂)²."""
    spread: float
    """Sum over tokens and coordinates of (x - mean over the reply)²."""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A conversation that has no reply to read."""

    id: str
    reason: str


class SpanReader:
    """Conversations in, pooled rows out, for one SAE."""

    def __init__(
        self,
        model: LanguageModel,
        encoder: LatentEncoder,
        tokenizer: ChatTokenizer,
        *,
        max_tokens: int = 2048,
        tokens_per_forward: int = 8192,
    ) -> None:
        self.model, self.encoder, self.tokenizer = model, encoder, tokenizer
        self.max_tokens, self.tokens_per_forward = max_tokens, tokens_per_forward

    @classmethod
    def load(
        cls, lm: str, sae: str, *, dtype: DTypeName = "float32", device: str = "cpu"
    ) -> "SpanReader":
        """Load model, SAE and tokenizer.

        Raises:
            ModelError: one of them cannot be loaded, or they do not fit each other.
        """
        encoder = load_encoder(sae).to(dtype=torch.float32, device=device)
        model = LanguageModel.load(lm, [encoder.hook_point], dtype=dtype, device=device)
        return cls(model, encoder, ChatTokenizer.load(lm))

    @torch.inference_mode()
    def __call__(self, conversations: Sequence[Conversation]) -> list[PooledRow | Skipped]:
        """Read conversations, each alone, and return what each reply leaves, in their order."""
        found: dict[int, PooledRow | Skipped] = {}
        instances, replies = {}, {}
        rows = self.tokenizer.tokenize(conversations, self.max_tokens)
        for number, (one, row) in enumerate(zip(conversations, rows, strict=True)):
            if isinstance(row, Unreadable):
                found[number] = Skipped(one.id, row.reason)
            elif not row.response.any():
                found[number] = Skipped(one.id, "no reply of an assistant within max_tokens")
            else:
                instances[number], replies[number] = instance_of(row.ids), row.response
        numbers = list(instances)
        lengths = [len(instances[number]) for number in numbers]
        rng = np.random.default_rng(0)
        for group in length_buckets(lengths, self.tokens_per_forward, rng) if numbers else ():
            chosen = [numbers[row] for row in group]
            states = read_sequences(self.model, [instances[number] for number in chosen])
            ends = np.cumsum([len(instances[number]) for number in chosen]).tolist()
            for number, end in zip(chosen, ends, strict=True):
                x = states[self.encoder.hook_point][end - len(instances[number]) : end].float()
                found[number] = self._pool(conversations[number].id, x, replies[number])
        return [found[number] for number in range(len(conversations))]

    def _pool(self, id: str, x: torch.Tensor, reply: np.ndarray) -> PooledRow:
        said = x[torch.from_numpy(reply).to(x.device)]
        sums = torch.zeros(self.encoder.d_sae, device=x.device)
        counts = torch.zeros_like(sums)
        unexplained = 0.0
        for piece in said.split(_PIECE):
            z = self.encoder.encode(piece)
            sums += z.sum(0)
            counts += (z > 0).sum(0)
            unexplained += float((piece - self.encoder.decode(z, piece)).square().sum())
        first = self.encoder.encode(x[:1])[0]
        on = torch.nonzero((counts > 0) | (first > 0)).squeeze(1)
        return PooledRow(
            id=id,
            num_tokens=len(said),
            latents=on.int().cpu().numpy(),
            means=(sums[on] / len(said)).cpu().numpy(),
            counts=counts[on].int().cpu().numpy(),
            first=first[on].cpu().numpy(),
            unexplained=unexplained,
            spread=float((said - said.mean(0)).square().sum()),
        )
