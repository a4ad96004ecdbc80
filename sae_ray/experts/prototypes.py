"""Prototypes: how the base model sees the prompts that an expert was made of; one of its files.

Of a sample of the expert's conversations the last request of each is read alone, by the base model
cut off above the SAE's hook point: the mean hidden state over its tokens, and the latents strongest
there. They are what a router compares prompts with. No text is kept.
"""

import dataclasses
import json
import threading
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sae_ray import tiny
from sae_ray.artifacts import locate
from sae_ray.chat import Conversation, Message
from sae_ray.curate.block import IndexBlock
from sae_ray.curate.scorer import LatentScorer, ScorerConfig, Trace
from sae_ray.curate.sources import EMBEDDED, fingerprint, locate_source
from sae_ray.errors import PoolError, RegistryError
from sae_ray.experts.card import ADAPTER
from sae_ray.experts.files import read_checked
from sae_ray.experts.registry import Expert
from sae_ray.pool import plan, read

PROTOTYPES = "prototypes.safetensors"
NUM_PROMPTS = 128
STRONGEST = 64
"""Latents kept of each prompt, by their mean."""
CHARACTERS_PER_TOKEN = 2
"""So few that the end of a prompt fits into what the model reads, in nearly any language."""
_DRAWN_FROM = 4096
_SLICE = 512


@dataclasses.dataclass(frozen=True)
class ReadToken:
    """A token of a request, as the router reads it."""

    text: str
    """Empty where an earlier token shows the character that both are parts of."""
    activations: dict[int, float]
    """Of the latents asked for, those that are on."""

    @property
    def told(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"text": self.text, "activations": {str(n): z for n, z in self.activations.items()}}


def tokens_of(trace: Trace, latents: Sequence[int]) -> list[ReadToken]:
    """Return the tokens of a trace, each with those of its latents that are on there."""
    return [
        ReadToken(text, {latents[i]: float(values[i]) for i in values.nonzero()[0]})
        for text, values in zip(trace.texts, trace.latents, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Eyes:
    """The base model and the SAE that prompts are read through, and what identifies them."""

    scorer: LatentScorer
    lm: str
    """Fingerprint of the language model."""
    sae: str
    _reading: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)
    """Held while they read: what hooks see is of one forward at a time."""

    @classmethod
    def open(cls, lm: str, sae: str) -> "Eyes":
        """Load both; `embedded` names the embedded ones.

        Raises:
            ModelError: one is missing, or they do not belong together.
        """
        # A request is short: on CPUs 16-bit arithmetic costs more than it saves there.
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        config = ScorerConfig(locate_source("lm", lm), locate_source("sae", sae), dtype)
        return cls(LatentScorer.load(config), fingerprint("lm", lm), fingerprint("sae", sae))

    def read(self, prompts: Sequence[str]) -> IndexBlock:
        """Read prompts, each alone as a user's turn; `rows` says which ones could be read.

        Of a long prompt the end is read, where it says what is to be done.
        """
        asked = [self.asked(one) for one in prompts]
        with self._reading:
            return _strongest(self.scorer(asked, range(len(asked))).block)

    def trace(self, prompt: str, latents: Sequence[int]) -> Trace:
        """Read a prompt as `read` does, and return these latents at each of its tokens."""
        with self._reading:
            return self.scorer.traces([self.asked(prompt)], np.asarray(latents, dtype=np.int64))[0]

    def asked(self, prompt: str) -> Conversation:
        """Return what is read of a prompt, as a user's turn."""
        end = prompt[-CHARACTERS_PER_TOKEN * self.scorer.max_tokens :]
        return Conversation("", [{"role": "user", "content": end}])


Turns = Sequence[Message | Mapping[str, str]]
"""Of a conversation, in order."""


def requests(messages: Turns) -> list[str]:
    """Return what the user asked before each reply, in order; system turns and replies left out."""
    found: list[list[str]] = [[]]
    for message in messages:
        if message["role"] == "user":
            found[-1].append(message["content"])
        elif message["role"] == "assistant":
            found.append([])
    return ["\n\n".join(parts) for parts in found if parts]


def draw_prompts(source: str, num: int, *, staging: str | None = None, seed: int = 0) -> list[str]:
    """Return last requests of conversations from all over a pool, or of pairs; each text once.

    Raises:
        PoolError: the pool cannot be read, or nobody asks for anything in it.
    """
    rng = np.random.default_rng(seed)
    slices = plan(source, rows_per_shard=_SLICE, staging=staging).slices
    order = rng.permutation(len(slices))
    conversations = (one for i in order for one in read(slices[i]).conversations)
    asked = (requests(one.messages)[-1:] for one in islice(conversations, _DRAWN_FROM))  # pyright: ignore
    texts = list(dict.fromkeys(text for last in asked for text in last if text.strip()))
    if not texts:
        raise PoolError(
            f"no user asks for anything in {source}: a router needs conversations with user turns; "
            "give another pool"
        )
    return [texts[i] for i in rng.permutation(len(texts))[:num]]


def make_prototypes(eyes: Eyes, source: str, *, staging: str | None = None) -> bytes:
    """Read a sample of an expert's data; return the content of its prototypes' file."""
    return encode(eyes, eyes.read(draw_prompts(source, NUM_PROMPTS, staging=staging)))


def encode(eyes: Eyes, block: IndexBlock) -> bytes:
    """Return prompts as safetensors: hidden [n, d_in], and latents as sparse rows."""
    tensors = {
        "hidden": block.hidden[:, 0],
        "n_tokens": block.n_tokens[:, 0],
        "l1": block.l1[:, 0],
        "indptr": block.indptr,
        "latents": block.latents,
        "means": block.means[:, 0],
    }
    about = {"lm": eyes.lm, "sae": eyes.sae, "d_sae": str(block.d_sae)}
    about["dtype"] = eyes.scorer.config.dtype  # that they were read in: told, and never compared
    return save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, about)


def prototypes_of(expert: Expert, registry: str, eyes: Eyes) -> IndexBlock:
    """Return an expert's prototypes: those of its files, or else of its data, read now.

    Raises:
        RegistryError: it is another base model's, or has neither prototypes of this SAE nor data.
    """
    card = expert.card
    if card.base_sha256 != eyes.lm:
        raise RegistryError(
            f"expert {card.name}@{expert.version} was made from another base ({card.base}) than "
            "the one that is to route: experts of one router share their base; retire it, or give "
            "its --lm"
        )
    if PROTOTYPES in card.files:
        place = f"{registry.rstrip('/')}/experts/{card.id}/{ADAPTER}/{PROTOTYPES}"
        block = _decode(read_checked(place, card.files[PROTOTYPES]), place, eyes)
        if block is not None:
            return block
    try:
        return eyes.read(draw_prompts(_data_of(expert), NUM_PROMPTS))
    except PoolError as error:
        raise RegistryError(
            f"expert {card.name}@{expert.version} has no prototypes that this SAE read, and its "
            f"data cannot be read again ({error}): put the data back, or make the expert again"
        ) from error


def _data_of(expert: Expert) -> str:
    """Return where the rows lie that an expert was made of."""
    source = expert.card.sources.get("data")
    if source is None:
        raise PoolError("its card names no data")
    if source.name == EMBEDDED:
        pairs = expert.card.objective == "dpo"
        return str(tiny.preferences_path() if pairs else tiny.pool_path())
    fs, root = locate(source.name)
    table = f"{root}/selection.parquet"
    return f"{source.name}/selection.parquet" if fs.isfile(table) else source.name


def _decode(content: bytes, place: str, eyes: Eyes) -> IndexBlock | None:
    """Read prompts back; None where another model or SAE read them."""
    try:
        tensors, about = load(content), _header(content)
    except SafetensorError as error:
        raise RegistryError(f"{place} is damaged ({error}): make the expert again") from None
    if (about.get("lm"), about.get("sae")) != (eyes.lm, eyes.sae):
        return None
    n = len(tensors["hidden"])

    def beside_nothing(name: str) -> np.ndarray:
        # A prompt has no response: the second segment is empty.
        return np.stack([tensors[name], np.zeros_like(tensors[name])], axis=1)

    return IndexBlock(
        rows=np.arange(n, dtype=np.int64),
        ids=[""] * n,
        n_tokens=beside_nothing("n_tokens"),
        truncated=np.zeros(n, dtype=bool),
        hidden=beside_nothing("hidden"),
        l1=beside_nothing("l1"),
        indptr=tensors["indptr"],
        latents=tensors["latents"],
        means=beside_nothing("means"),
        maxes=None,
        counts=None,
        d_sae=int(about["d_sae"]),
    )


def _header(content: bytes) -> dict[str, str]:
    # safetensors reads a file's metadata from a path alone; its layout is a length and then JSON.
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]).get("__metadata__", {})


def _strongest(block: IndexBlock) -> IndexBlock:
    """Keep the strongest latents of each row, in the order of their numbers."""
    rows = np.repeat(np.arange(len(block)), np.diff(block.indptr))
    order = np.lexsort((-block.means[:, 0], rows))
    place = np.arange(len(order)) - block.indptr[rows[order]]
    kept = np.sort(order[place < STRONGEST])
    sizes = np.bincount(rows[kept], minlength=len(block))
    return dataclasses.replace(
        block,
        indptr=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        latents=block.latents[kept],
        means=block.means[kept],
        maxes=None,
        counts=None,
    )
