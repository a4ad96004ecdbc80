"""What can be said of a latent without a judge: where it is on, at which tokens, what it writes.

One pass over conversations feeds the contexts and the labels; statistics come from what it kept.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sae_ray.chat import ChatTokenizer, Conversation, Kind
from sae_ray.lm import LanguageModel
from sae_ray.sae.contexts import ContextGatherer, LatentContexts, Room, read_pieces
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.labels import Label, label_latents
from sae_ray.sae.lens import LogitLens
from sae_ray.sae.sequences import CONVERSATION, Lanes, chat_instances
from sae_ray.sae.tagged import EvidenceGatherer, tag

EVIDENCE_GB = 2.0
"""What the conversations kept for labels may take, over all four samples of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class LatentFacts:
    """Statistics of one latent."""

    latent: int
    density: float
    """Share of all tokens at which it is on."""
    template_share: float
    """Of the tokens at which it is on, the share that nobody said: special, role and template."""
    max_activation: float
    token_entropy_bits: float
    """Of the tokens at the peaks of its strongest contexts: 0 where it is always the same."""
    peak_tokens: list[str]
    """At the peaks of its strongest contexts, commonest first."""
    neighbours: list[int]
    """Of the likest decoder directions, nearest first."""
    neighbour_cosines: list[float]
    promoted: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    """Tokens that its direction speaks for, with logits up to a common factor."""
    suppressed: list[tuple[str, float]] = dataclasses.field(default_factory=list)


class Reading:
    """One pass of a model and a SAE over conversations: contexts, and evidence for labels."""

    def __init__(
        self,
        model: LanguageModel,
        encoder: LatentEncoder,
        tokenizer: ChatTokenizer,
        *,
        room: Room | None = None,
        max_tokens: int = 8192,
        seed: int = 0,
    ) -> None:
        self._model, self._encoder, self._tokenizer = model, encoder, tokenizer
        self._max_tokens = max_tokens
        self.num_conversations = self.num_tokens = 0
        self.num_truncated = 0
        self.contexts = ContextGatherer(encoder.W_dec, room, seed)
        # Two halves of the data, each with what people said alone and with all tokens.
        kept = int(EVIDENCE_GB * 2**30 / 4 / (12 * encoder.d_sae))
        sizes = {"max_conversations": min(10_000, kept), "sample_tokens": min(16_000, 3 * kept)}
        self._evidence = {
            (half, said): EvidenceGatherer(**sizes, seed=seed)
            for half in ("choose", "check")
            for said in (True, False)
        }

    def add(
        self,
        rows: Sequence[Mapping[str, Any]],
        is_held_out: Callable[[str], bool],
    ) -> list[tuple[str, str]]:
        """Read rows of id, messages and perhaps concepts and spans; return those it could not.

        Args:
            rows: some conversations; the whole pool in a few calls.
            is_held_out: by a row's id, whether labels are checked on it rather than chosen.

        Returns:
            Id and reason of each row that the chat template refuses.
        """
        conversations = [Conversation(row["id"], row["messages"]) for row in rows]
        first = self.num_conversations
        instances, unreadable = chat_instances(self._tokenizer, conversations, first=first)
        self.num_truncated += sum(len(one) > self._max_tokens for one in instances)
        instances = [one[: self._max_tokens] for one in instances]
        self.num_conversations += len(rows)
        self.num_tokens += sum(map(len, instances))
        self._read(instances, rows, first, is_held_out)
        return [(id, why.reason) for id, why in unreadable]

    def _read(
        self,
        instances: Sequence[Lanes],
        rows: Sequence[Mapping[str, Any]],
        first: int,
        is_held_out: Callable[[str], bool],
    ) -> None:
        for piece in read_pieces(self._model, self._encoder, instances):
            self.contexts.add(piece)
            row = rows[int(piece.lanes[0, CONVERSATION]) - first]
            half = "check" if is_held_out(row["id"]) else "choose"
            said = tag(self._tokenizer, piece, row, [Kind.CONTENT])
            self._evidence[half, True].add(said)
            self._evidence[half, False].add(tag(self._tokenizer, piece, row))

    def labels(self) -> list[Label]:
        """Label latents by what people said; the others by the template's tokens, if those hold."""
        of_content = self._labels(said=True)
        of_all = self._labels(said=False)
        return [
            whole if label.kind == "unlabelled" and whole.kind == "token" else label
            for label, whole in zip(of_content, of_all, strict=True)
        ]

    def _labels(self, *, said: bool) -> list[Label]:
        choose, check = (self._evidence[half, said] for half in ("choose", "check"))
        if not len(choose) or not len(check):
            d_sae = self._encoder.d_sae
            return [Label(i, "unlabelled", "unlabelled", None, 0.0, []) for i in range(d_sae)]
        return label_latents(choose.evidence(), check.evidence())

    def facts(self, lens: LogitLens | None = None) -> Iterable[LatentFacts]:
        """Yield the statistics of every latent."""
        texts = TokenTexts(self._tokenizer)
        gathered = self.contexts
        on, total = gathered.num_on.sum(axis=0), max(1, int(gathered.num_tokens.sum()))
        written = lens.promoted(self._encoder.W_dec) if lens else None
        for latent, cosines in enumerate(gathered.cosines.tolist()):
            contexts = gathered.contexts(latent)
            tokens = [texts[int(one.ids[one.peak])] for one in contexts.strongest]
            promoted = next(written) if written else None
            template = on[latent] - gathered.num_on[Kind.CONTENT, latent]
            yield LatentFacts(
                latent=latent,
                density=float(on[latent] / total),
                template_share=float(template / max(1, on[latent])),
                max_activation=_strongest(contexts),
                token_entropy_bits=entropy_bits(tokens),
                peak_tokens=[token for token, _ in Counter(tokens).most_common(5)],
                neighbours=gathered.neighbours[latent].tolist(),
                neighbour_cosines=[round(cosine, 4) for cosine in cosines],
                promoted=[(texts[i], v) for i, v in promoted.up] if promoted else [],
                suppressed=[(texts[i], v) for i, v in promoted.down] if promoted else [],
            )


class TokenTexts:
    """What each token of a vocabulary looks like alone, looked up once."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer.tokenizer
        self._texts: dict[int, str] = {}

    def __getitem__(self, id: int) -> str:
        if id not in self._texts:
            text = self._tokenizer.decode([id])
            assert isinstance(text, str)
            self._texts[id] = text
        return self._texts[id]


def entropy_bits(tokens: Sequence[str]) -> float:
    """Return the entropy of how often each token stands there."""
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    return float(sum(share * math.log2(1 / share) for share in shares))


def _strongest(contexts: LatentContexts) -> float:
    return contexts.strongest[0].strength if contexts.strongest else 0.0
