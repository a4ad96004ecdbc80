"""LatentScorer: conversations to pooled latents, the rows of the feature index.

A plain callable: it knows nothing of Ray, of the pool's files or of the index on disk. What comes
out depends on the conversations of the call alone, so fixed calls give the same rows wherever they
are made.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
import torch
from jaxtyping import Float32, Int64
from joblib import cpu_count  # heeds affinity and control groups, as os.cpu_count does not
from torch import Tensor

from sae_ray.chat import ChatTokenizer, Conversation, Kind, Tokens, Unreadable
from sae_ray.curate.block import IndexBlock
from sae_ray.errors import ModelError
from sae_ray.lm import (
    DTypeName,
    LanguageModel,
    load_config,
    require_layer,
    weight_bytes,
    width_at,
)
from sae_ray.sae.encoder import LatentEncoder, Pooled
from sae_ray.sae.pretrained import load_encoder

ALL_LATENTS_UP_TO = 4096
"""d_sae up to which every active latent is kept; above it, the strongest of each row."""
MAX_FVU = 0.8
"""A SAE that leaves more of the variance unexplained was not trained on these activations."""
MIN_FIT_TOKENS = 64
"""Tokens below which variance is not judged."""
PROCESS_BYTES = 5 * 2**28
"""What a process takes beside the weights, at its peak: libraries, batches, and a shard's rows."""
MAX_READERS = 8
"""Threads that read at once when a selection is explained: each takes the room of a batch."""
MAX_POOLED_VALUES = 2**24
"""Latents pooled at once: with a wide SAE, short conversations need more room than their tokens."""


@dataclasses.dataclass(frozen=True)
class ScorerConfig:
    """All that a row of the index depends on, beside the conversation."""

    lm: str
    sae: str
    dtype: DTypeName = "bfloat16"
    max_tokens: int = 2048
    batch_tokens: int = 4096
    top_latents: int = 512
    check_fit: bool = True


@dataclasses.dataclass(frozen=True)
class Scored:
    """What one call gives."""

    block: IndexBlock
    template_counts: Int64[np.ndarray, " d_sae"]
    """How often each latent was on at template tokens."""
    template_tokens: int
    unreadable: dict[int, str]
    """Position in the call -> why there is no row."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """Every content token of one conversation with its latents, or those chosen."""

    texts: list[str]
    latents: Float32[np.ndarray, "tokens chosen"]


class LatentScorer:
    """Reads conversations through one language model and one SAE."""

    def __init__(
        self,
        lm: LanguageModel,
        encoder: LatentEncoder,
        tokenizer: ChatTokenizer,
        config: ScorerConfig,
    ) -> None:
        self.lm, self.encoder, self.tokenizer, self.config = lm, encoder, tokenizer, config
        self.hook_point = encoder.hook_point
        positions = getattr(lm.model.config, "max_position_embeddings", None)
        self.max_tokens = min(config.max_tokens, positions or config.max_tokens)

    @classmethod
    def load(cls, config: ScorerConfig, *, device: str | None = None) -> "LatentScorer":
        """Load model, SAE and tokenizer; on a GPU where there is one.

        Raises:
            ModelError: something is missing, or the SAE does not belong to the model.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        encoder = check_pair(config)
        lm = LanguageModel.load(config.lm, [encoder.hook_point], dtype=config.dtype, device=device)
        encoder = encoder.to(dtype=getattr(torch, config.dtype), device=device)
        return cls(lm, encoder, ChatTokenizer.load(config.lm), config)

    def check_fit(self, conversations: Sequence[Conversation]) -> float | None:
        """Return the fraction of variance that the SAE leaves unexplained here.

        Raises:
            ModelError: it is so large that the SAE must be another model's.
        """
        tokens = [t for t in self._tokenize(conversations[:64]) if isinstance(t, Tokens) and len(t)]
        if not tokens or self.encoder.is_transcoder:
            return None  # a transcoder writes elsewhere than it reads: nothing to compare
        fvu = self._unexplained(tokens)
        if self.config.check_fit and fvu is not None and not fvu <= MAX_FVU:
            raise ModelError(
                f"SAE {self.config.sae} leaves {fvu:.0%} of the variance at {self.hook_point} of "
                f"{self.config.lm} unexplained on the first {len(tokens)} conversations (allowed: "
                f"{MAX_FVU:.0%}): it was trained on another model or layer (it names "
                f"{self.encoder.model_name or 'no model'}); give the SAE of this model, or switch "
                "check_fit off if you know better"
            )
        return fvu

    def __call__(self, conversations: Sequence[Conversation], rows: Sequence[int]) -> Scored:
        """Score conversations with these row numbers; rows come back in the order given."""
        tokenised = self._tokenize(conversations)
        unreadable = {
            i: t.reason if isinstance(t, Unreadable) else "no content tokens"
            for i, t in enumerate(tokenised)
            if isinstance(t, Unreadable) or not (t.kinds == Kind.CONTENT).any()
        }
        kept = [i for i in range(len(tokenised)) if i not in unreadable]
        blocks: list[IndexBlock] = []
        template_counts = np.zeros(self.encoder.d_sae, dtype=np.int64)
        template_tokens = 0
        order: list[int] = []
        for batch in self._batches(kept, tokenised):
            tokens = [t for i in batch if isinstance(t := tokenised[i], Tokens)]
            block, counts = self._score_batch(
                tokens, [conversations[i].id for i in batch], [rows[i] for i in batch]
            )
            finite = np.isfinite(block.l1).all(1) & np.isfinite(block.hidden).all((1, 2))
            unreadable |= {
                batch[i]: "activations are not finite" for i in np.flatnonzero(~finite).tolist()
            }
            blocks.append(block.take(np.flatnonzero(finite)))
            order += [batch[i] for i in np.flatnonzero(finite).tolist()]
            template_counts += counts
            template_tokens += sum(int((t.kinds != Kind.CONTENT).sum()) for t in tokens)
        block = IndexBlock.concatenate(blocks) if blocks else self._empty()
        return Scored(block.take(np.argsort(order)), template_counts, template_tokens, unreadable)

    def trace(self, conversation: Conversation) -> Trace:
        """Return the latents of every content token of one conversation."""
        (traced,) = self.traces([conversation], np.arange(self.encoder.d_sae))
        return traced

    def traces(
        self, conversations: Sequence[Conversation], latents: Int64[np.ndarray, " chosen"]
    ) -> list[Trace]:
        """Return chosen latents of every content token of each conversation.

        On CPUs batches are read by several threads: each on its own, so that the answer is the same
        on any number of them.
        """
        tokenised = self._tokenize(conversations)
        empty = Trace([], np.zeros((0, len(latents)), dtype=np.float32))
        traced = [empty] * len(conversations)
        readable = [i for i, t in enumerate(tokenised) if isinstance(t, Tokens) and len(t)]
        batches = list(self._batches(readable, tokenised))
        readers: SimpleQueue[LanguageModel] = SimpleQueue()
        for lm in (self.lm, *(self.lm.twin() for _ in range(self._num_twins(len(batches))))):
            readers.put(lm)

        def read(batch: list[int]) -> list[np.ndarray]:
            lm = readers.get()
            try:
                tokens = [t for i in batch if isinstance(t := tokenised[i], Tokens)]
                return self._at_content(lm, tokens, latents)
            finally:
                readers.put(lm)

        with ThreadPoolExecutor(readers.qsize()) as threads:
            for batch, found in zip(batches, threads.map(read, batches), strict=True):
                for i, values in zip(batch, found, strict=True):
                    one = tokenised[i]
                    assert isinstance(one, Tokens)
                    texts = self.tokenizer.texts(conversations[i], one)
                    content = np.flatnonzero(one.kinds == Kind.CONTENT)
                    traced[i] = Trace([texts[at] for at in content], values)
        return traced

    def _num_twins(self, num_batches: int) -> int:
        """Return how many readers may help this one: on a GPU none, which one keeps busy."""
        threads = 1 if self.lm.device.type != "cpu" else min(cpu_count(), MAX_READERS)
        return max(0, min(threads, num_batches) - 1)

    @torch.inference_mode()
    def _at_content(
        self, lm: LanguageModel, tokens: list[Tokens], latents: Int64[np.ndarray, " chosen"]
    ) -> list[np.ndarray]:
        found = []
        for one, x in zip(tokens, self._read(tokens, lm), strict=True):
            content = torch.from_numpy(np.flatnonzero(one.kinds == Kind.CONTENT)).to(x.device)
            found.append(self.encoder.encode(x[content], latents).cpu().numpy())
        return found

    def _tokenize(self, conversations: Sequence[Conversation]) -> list[Tokens | Unreadable]:
        return self.tokenizer.tokenize(conversations, self.max_tokens)

    def _batches(
        self, kept: list[int], tokenised: Sequence[Tokens | Unreadable]
    ) -> Iterator[list[int]]:
        max_rows = max(1, MAX_POOLED_VALUES // (2 * self.encoder.d_sae))
        return _batches(kept, tokenised, self.config.batch_tokens, max_rows)

    def _read(self, tokens: Sequence[Tokens], lm: LanguageModel | None = None) -> Tensor:
        """Run a right-padded batch: activations [batch, seq, d_in]."""
        lm = lm or self.lm
        ids = np.zeros((len(tokens), max(map(len, tokens))), dtype=np.int64)
        for row, one in zip(ids, tokens, strict=True):
            row[: len(one)] = one.ids
        return lm.read(torch.from_numpy(ids).to(lm.device))[self.hook_point]

    @torch.inference_mode()
    def _unexplained(self, tokens: Sequence[Tokens]) -> float | None:
        runs = [
            self._read([one])[0, torch.from_numpy(np.flatnonzero(one.kinds == Kind.CONTENT))]
            for one in tokens
        ]
        x = torch.cat(runs).float()
        x = x[x.isfinite().all(1)]
        if len(x) < MIN_FIT_TOKENS:
            return None
        x_hat = self.encoder.reconstruct(x)
        return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())

    @torch.inference_mode()
    def _score_batch(
        self, tokens: list[Tokens], ids: list[str], rows: list[int]
    ) -> tuple[IndexBlock, np.ndarray]:
        x = self._read(tokens)
        where, lengths = _segments(tokens, x.shape[1])
        flat = x.flatten(0, 1)[torch.from_numpy(where).to(x.device)]
        pooled = self.encoder.pool(flat, lengths)
        n_tokens = lengths[:-1].reshape(-1, 2)
        hidden = _segment_means(flat, lengths[:-1]).reshape(len(tokens), 2, -1)
        counts = pooled.counts[-1].cpu().numpy()
        return self._sparse(pooled, n_tokens, hidden, tokens, ids, rows), counts

    def _sparse(
        self,
        pooled: Pooled,
        n_tokens: np.ndarray,
        hidden: np.ndarray,
        tokens: list[Tokens],
        ids: list[str],
        rows: list[int],
    ) -> IndexBlock:
        """Keep the active latents of each row: all, or the union of its strongest."""
        shape = (len(ids), 2, self.encoder.d_sae)
        sums = pooled.sums[:-1].reshape(shape)
        maxes = pooled.maxes[:-1].reshape(shape)
        counts = pooled.counts[:-1].reshape(shape)
        keep = counts.sum(1) > 0
        if self.encoder.d_sae > ALL_LATENTS_UP_TO:
            strongest = torch.zeros_like(keep)
            for strength in (maxes.amax(1), sums.sum(1)):
                top = strength.topk(min(self.config.top_latents, shape[2]), dim=1).indices
                strongest.scatter_(1, top, True)
            keep &= strongest
        row, latent = keep.nonzero(as_tuple=True)
        per_token = torch.from_numpy(np.maximum(n_tokens, 1)).to(sums.device)
        return IndexBlock(
            rows=np.asarray(rows, dtype=np.int64),
            ids=ids,
            n_tokens=n_tokens.astype(np.int32),
            truncated=np.array([one.truncated for one in tokens]),
            hidden=hidden,
            l1=(sums.sum(2) / per_token).cpu().numpy(),
            indptr=np.concatenate([[0], np.cumsum(keep.sum(1).cpu().numpy())]).astype(np.int64),
            latents=latent.cpu().numpy().astype(np.int32),
            means=(sums[row, :, latent] / per_token[row]).float().cpu().numpy(),
            maxes=maxes[row, :, latent].cpu().numpy(),
            counts=counts[row, :, latent].cpu().numpy(),
            d_sae=self.encoder.d_sae,
        )

    def _empty(self) -> IndexBlock:
        def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray:
            return np.zeros(shape, dtype=dtype)

        return IndexBlock(
            rows=zeros(0, dtype=np.int64),
            ids=[],
            n_tokens=zeros(0, 2, dtype=np.int32),
            truncated=zeros(0, dtype=np.bool_),
            hidden=zeros(0, 2, self.encoder.d_in),
            l1=zeros(0, 2),
            indptr=zeros(1, dtype=np.int64),
            latents=zeros(0, dtype=np.int32),
            means=zeros(0, 2),
            maxes=zeros(0, 2),
            counts=zeros(0, 2, dtype=np.int32),
            d_sae=self.encoder.d_sae,
        )


def check_pair(config: ScorerConfig) -> LatentEncoder:
    """Load the SAE and hold it against the model's configuration, before any weight is loaded.

    Raises:
        ModelError: the model lacks the SAE's hook point, or has another width there.
    """
    encoder = load_encoder(config.sae)
    model = load_config(config.lm)
    require_layer(encoder.hook_point, model, config.lm)
    width = width_at(model, encoder.hook_point)
    if width != encoder.d_in:
        raise ModelError(
            f"SAE {config.sae} reads {encoder.d_in} values a token, but {encoder.hook_point} of "
            f"{config.lm} holds {width}: give the SAE of this model (it names "
            f"{encoder.model_name or 'no model'}), or the model of this SAE"
        )
    return encoder


def memory_needed(config: ScorerConfig, encoder: LatentEncoder) -> int:
    """Return the bytes of memory that a process takes to score, with the pair of `check_pair`."""
    sae = sum(weight.nbytes for weight in (encoder.W, encoder.W_dec))
    return PROCESS_BYTES + weight_bytes(config.lm, encoder.hook_point, config.dtype) + sae


def _batches(
    kept: list[int], tokenised: Sequence[Tokens | Unreadable], batch_tokens: int, max_rows: int
) -> Iterator[list[int]]:
    """Cut positions, longest first, into batches of at most `batch_tokens` with padding."""

    def length(i: int) -> int:
        one = tokenised[i]
        assert isinstance(one, Tokens)
        return len(one)

    batch: list[int] = []
    for i in sorted(kept, key=lambda i: (-length(i), i)):
        full = batch and length(batch[0]) * (len(batch) + 1) > batch_tokens
        if full or len(batch) == max_rows:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _segments(tokens: Sequence[Tokens], seq: int) -> tuple[np.ndarray, np.ndarray]:
    """Order a padded batch's real tokens by segment.

    Returns their places in the flattened batch, and the lengths of the runs: prompt and response
    of each conversation, then the template tokens of all.
    """
    places: list[np.ndarray] = []
    template: list[np.ndarray] = []
    lengths: list[int] = []
    for i, one in enumerate(tokens):
        content = one.kinds == Kind.CONTENT
        for mask in (content & ~one.response, content & one.response):
            places.append(np.flatnonzero(mask) + i * seq)
            lengths.append(len(places[-1]))
        template.append(np.flatnonzero(~content) + i * seq)
    places += template
    lengths.append(sum(map(len, template)))
    return np.concatenate(places), np.asarray(lengths, dtype=np.int64)


def _segment_means(x: Tensor, lengths: np.ndarray) -> Float32[np.ndarray, "segments d_in"]:
    # Run by run: adding by index is slower, and on a GPU not the same from one time to the next.
    runs = x[: lengths.sum()].split(lengths.tolist())
    sums = torch.stack([run.sum(0, dtype=torch.float32) for run in runs])
    return sums.cpu().numpy() / np.maximum(lengths, 1)[:, None].astype(np.float32)
