"""What the latents of special tokens do: pushed while the model answers, beside their controls.

FAST's protocol with what it lacks: the strength is given in lengths of the stream, and every
direction stands beside its opposite, a random and an unrelated one, and the reconstruction.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

from sae_ray.chat import ChatTokenizer, Conversation, Message, Tokens
from sae_ray.errors import ModelError
from sae_ray.lm import LanguageModel
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.quality import Quality
from sae_ray.sae.sequences import Lanes
from sae_ray.sae.splice import WholeModel
from sae_ray.sae.steer import Answer, Arm, SpecialLatent, Steering, special_latents, steer

logger = logging.getLogger(__name__)

STRENGTHS = (0.25, 0.5, 1.0)
"""Of what is added, in mean lengths of the activations of content tokens."""
_NUM_LATENTS = 2
_NUM_INSTANCES = 200
"""Held-out instances in which special tokens' latents are looked for."""
_NEW_TOKENS = 48
_PROMPT_TOKENS = 512
"""Of a prompt that is asked: of each answer log probabilities of all its tokens are held."""
_SHOWN: tuple[Arm, ...] = ("none", "latent", "random")
_SAYS = {
    "none": "left alone",
    "latent": "the latent",
    "flipped": "its opposite",
    "random": "a random direction",
    "unrelated": "another latent",
    "reconstruction": "read through the SAE",
}


@dataclasses.dataclass(frozen=True)
class Effect:
    """One arm at one strength: means over the prompts."""

    arm: str
    strength: float | None
    """In lengths of the stream; None where nothing is added."""
    kl: float
    """Nats a token, along the unsteered answer."""
    agreement: float
    """Share of the answer before it differs from the unsteered one."""


@dataclasses.dataclass(frozen=True)
class SteeredLatent:
    """The latent of a special token, and what pushing it does."""

    token: str
    latent: int
    label: str | None
    effects: list[Effect]
    question: str
    answers: list[tuple[str, str]]
    """What was said to one question, by what was added."""


@dataclasses.dataclass(frozen=True)
class SpecialSteering:
    """Pushes the latents that answer most to special tokens, at all tokens of prompt and answer."""

    reader: LanguageModel
    """The model up to the hook points, which finds the latents."""
    whole: WholeModel | None
    """The model with its head, which answers; without one nothing is pushed."""
    tokenizer: ChatTokenizer
    instances: Sequence[Lanes]
    """Held-out ones, in which the latents are looked for."""
    prompts: Sequence[Sequence[Message]]
    """Questions to answer."""

    def __call__(
        self, encoder: LatentEncoder, quality: Quality | None, labels: Mapping[int, str]
    ) -> list[SteeredLatent]:
        """Return what pushing a SAE's latents does; its quality says how long the stream is."""
        prompts = self._fitting()
        if self.whole is None or quality is None or not prompts:
            return []
        length = (quality.parts.get("content") or quality.parts["all"]).mean_norm
        alphas = [strength * length for strength in STRENGTHS]
        found: list[SteeredLatent] = []
        instances = self.instances[:_NUM_INSTANCES]
        for special in _strongest(special_latents(self.reader, encoder, instances)):
            try:
                steering = Steering(self.whole, encoder, special.latent)
                said = list(
                    steer(steering, self.tokenizer, prompts, alphas, max_new_tokens=_NEW_TOKENS)
                )
            except ModelError as error:  # the rest of the page is worth having
                logger.warning("latent %d is not pushed: %s", special.latent, error)
                continue
            found.append(self._told(special, prompts[0], said, length, labels))
        return found

    def _fitting(self) -> list[Sequence[Message]]:
        """Return the prompts that leave room for an answer and that the template takes."""
        asked = [Conversation(str(i), list(one)) for i, one in enumerate(self.prompts)]
        rows = self.tokenizer.tokenize(asked, _PROMPT_TOKENS + 1, generation_prompt=True)
        config = self.whole.model.config if self.whole else None
        room = (getattr(config, "max_position_embeddings", None) or 2**31) - _NEW_TOKENS
        most = min(room, _PROMPT_TOKENS)
        fits = [isinstance(row, Tokens) and len(row) <= most for row in rows]
        if left_out := len(fits) - sum(fits):
            logger.warning("%d prompts are too long, or the template refuses them", left_out)
        return [prompt for prompt, fit in zip(self.prompts, fits, strict=True) if fit]

    def _told(
        self,
        special: SpecialLatent,
        prompt: Sequence[Message],
        said: Sequence[Answer],
        length: float,
        labels: Mapping[int, str],
    ) -> SteeredLatent:
        text = self.tokenizer.tokenizer.decode([special.token])
        assert isinstance(text, str)
        shown = [one for one in said if one.prompt == 0 and one.arm in _SHOWN]
        return SteeredLatent(
            token=text,
            latent=special.latent,
            label=labels.get(special.latent),
            effects=_effects(said, length),
            question=prompt[-1]["content"],
            answers=[(_named(one, length), one.text) for one in shown],
        )


def _strongest(special: Sequence[SpecialLatent]) -> list[SpecialLatent]:
    """Return those of the largest mean maximum, each latent once."""
    best: dict[int, SpecialLatent] = {}
    for one in sorted(special, key=lambda one: -one.mean_max):
        best.setdefault(one.latent, one)
    return [one for one in best.values() if one.mean_max > 0][:_NUM_LATENTS]


def _effects(answers: Sequence[Answer], length: float) -> list[Effect]:
    by: dict[tuple[Arm, float], list[Answer]] = {}
    for one in answers:
        by.setdefault((one.arm, one.alpha), []).append(one)
    return [
        Effect(
            _SAYS[arm],
            alpha / length if alpha else None,
            sum(one.kl for one in some) / len(some),
            sum(one.agreement for one in some) / len(some),
        )
        for (arm, alpha), some in by.items()
        if arm != "none"
    ]


def _named(one: Answer, length: float) -> str:
    added = f", {one.alpha / length:g} x the length" if one.alpha else ""
    return f"{_SAYS[one.arm]}{added}"
