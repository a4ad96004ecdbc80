"""Steering: a latent's direction added while a model answers, beside what must be ruled out.

The edit is x' = x + alpha d at the chosen kinds of tokens, d the decoder's row of unit length, so
that alpha is a length in the stream. FAST steers so with the latents that answer most to a special
token; its reading was by eye, of one direction. Here each answer comes with controls:

    latent          x + alpha d
    flipped         x - alpha d
    random          x + alpha r, r a random direction of the same length
    unrelated       x + alpha u, u the direction of another latent that is nearly orthogonal to d
    reconstruction  the SAE's x̂ in the place of x, whatever alpha: what reading through it costs
    none            x: alpha = 0, which is the model as it is, to the bit

Source: FAST, arXiv 2506.07691, 6 and appendix F; the controls are ours.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_ray.chat import ChatTokenizer, Conversation, Kind, Message, Unreadable
from sae_ray.errors import ModelError, TaskError
from sae_ray.lm import LanguageModel, require_layer, visiting
from sae_ray.sae.contexts import read_pieces
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.sequences import CONVERSATION, KIND, TOKEN, Lanes
from sae_ray.sae.splice import Edit, WholeModel

Arm = Literal["none", "latent", "flipped", "random", "unrelated", "reconstruction"]
ARMS: tuple[Arm, ...] = get_args(Arm)
PAPER_ALPHAS = (15.0, 25.0, 50.0, 75.0, 100.0, 150.0, 200.0)
"""FAST's, in the streams of 7B and 8B models; beside the length of a stream they say little."""

UNRELATED_COSINE = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a model said under one edit, and how far that is from what it says without."""

    prompt: int
    arm: Arm
    alpha: float
    text: str
    num_tokens: int
    agreement: float
    """Tokens before the first that differs from the unsteered answer, over the longer's length."""
    kl: float
    """Of the next-token distributions along the unsteered answer, unsteered from steered, nats."""


@dataclasses.dataclass(frozen=True, slots=True)
class SpecialLatent:
    """The latent that answers most to one special token."""

    token: int
    latent: int
    mean_max: float
    """Mean over conversations of its strongest activation at that token."""
    num_conversations: int


def special_latents(
    model: LanguageModel,
    encoder: LatentEncoder,
    instances: Sequence[Lanes],
    kinds: Collection[Kind] = (Kind.SPECIAL, Kind.ROLE),
) -> list[SpecialLatent]:
    """Return for each special token and role word the latent of the largest mean maximum.

    The mean is over the conversations that hold the token, of each latent's maximum there.
    """
    sums: dict[int, Tensor] = {}
    held: dict[tuple[int, int], Tensor] = {}
    counts: dict[int, int] = {}
    current = -1

    def close() -> None:
        for (_, token), strongest in held.items():
            sums[token] = sums.get(token, torch.zeros_like(strongest)) + strongest
            counts[token] = counts.get(token, 0) + 1
        held.clear()

    for piece in read_pieces(model, encoder, instances):
        conversation = int(piece.lanes[0, CONVERSATION])
        if conversation != current:
            close()
            current = conversation
        special = np.isin(piece.lanes[:, KIND], list(kinds))
        for token in np.unique(piece.lanes[special, TOKEN]).tolist():
            at = torch.from_numpy(special & (piece.lanes[:, TOKEN] == token))
            strongest = piece.latents[at.to(piece.latents.device)].amax(0).double()
            key = (conversation, token)
            held[key] = torch.maximum(held[key], strongest) if key in held else strongest
    close()
    found = []
    for token in sorted(sums):
        mean = sums[token] / counts[token]
        latent = int(mean.argmax())
        found.append(SpecialLatent(token, latent, float(mean[latent]), counts[token]))
    return found


class Steering:
    """A whole model with one latent's direction, and the directions that control for it."""

    def __init__(
        self, model: WholeModel, encoder: LatentEncoder, latent: int, *, seed: int = 0
    ) -> None:
        """Choose the controls.

        Args:
            model: with its head.
            encoder: of the SAE.
            latent: whose direction is added.
            seed: of the random direction and the unrelated latent.

        Raises:
            ModelError: there is no such latent, or the SAE writes elsewhere than it reads.
        """
        require_layer(encoder.hook_point, model.model.config, model.model.name_or_path or "it")
        if encoder.is_transcoder:
            raise ModelError("a transcoder writes elsewhere than it reads: give a SAE to steer by")
        if not 0 <= latent < encoder.d_sae:
            raise ModelError(
                f"latent={latent}, but the SAE has latents 0 to {encoder.d_sae - 1}: give one"
            )
        self.model, self.encoder, self.latent = model, encoder, latent
        unit = torch.nn.functional.normalize(encoder.W_dec.float(), dim=-1)
        rng = np.random.default_rng((seed, latent))
        noise = torch.from_numpy(rng.standard_normal(encoder.d_in)).to(unit)
        apart = np.flatnonzero((unit @ unit[latent]).abs().cpu().numpy() <= UNRELATED_COSINE)
        if not len(apart):
            raise ModelError(
                f"latent {latent} of this SAE has none that is unrelated (|cosine| <= "
                f"{UNRELATED_COSINE}): a wider SAE is needed for that control"
            )
        self.unrelated = int(rng.choice(apart))
        self._directions = {
            "latent": unit[latent],
            "flipped": -unit[latent],
            "random": noise / noise.norm(),
            "unrelated": unit[self.unrelated],
        }

    def edit(self, arm: Arm, alpha: float, steered: Bool[Tensor, "batch seq"]) -> Edit:
        """Return the edit of one forward; tokens that are not steered pass through as they are."""

        def apply(x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch seq d_in"]:
            if arm == "none":
                return x
            if arm == "reconstruction":
                changed = self.encoder.reconstruct(x.float()).to(x.dtype)
            else:
                changed = x + (alpha * self._directions[arm]).to(x)
            return torch.where(steered.to(x.device).unsqueeze(-1), changed, x)

        return apply

    @contextlib.contextmanager
    def steered(
        self, arm: Arm, alpha: float, prompt: Bool[Tensor, " seq"], answer: bool
    ) -> Iterator[None]:
        """Steer the forwards inside: first one of the whole prompt, then a token at a time.

        Args:
            arm: what is added.
            alpha: how much of it.
            prompt: which of the first tokens are steered.
            answer: whether all later ones are.
        """
        seen = 0

        def visit(x: Tensor) -> Tensor:
            nonlocal seen
            at = torch.arange(seen, seen + x.shape[1])
            mask = torch.where(at < len(prompt), prompt[at.clamp(max=len(prompt) - 1)], answer)
            seen += x.shape[1]
            return self.edit(arm, alpha, mask.unsqueeze(0))(x)

        base = self.model.model.base_model
        with visiting(base, self.model.family, self.encoder.hook_point, visit):
            yield

    @torch.inference_mode()
    def answer(
        self,
        ids: Sequence[int],
        arm: Arm,
        alpha: float,
        prompt: Bool[Tensor, " seq"],
        *,
        steer_answer: bool,
        max_new_tokens: int,
        ends: Collection[int],
    ) -> list[int]:
        """Return a greedy answer to a prompt, without the token that ends it."""
        given = torch.tensor([list(ids)], device=self.model.model.device)
        said: list[int] = []
        cache = None
        with self.steered(arm, alpha, prompt, steer_answer):
            while len(said) < max_new_tokens:
                out = self.model.model(input_ids=given, past_key_values=cache, use_cache=True)
                cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
                if token in ends:
                    break
                said.append(token)
                given = torch.tensor([[token]], device=given.device)
        return said

    @torch.inference_mode()
    def log_probs(
        self,
        ids: Sequence[int],
        arm: Arm,
        alpha: float,
        prompt: Bool[Tensor, " seq"],
        *,
        steer_answer: bool,
    ) -> Float[Tensor, "tokens vocab"]:
        """Return next-token log probabilities at every place of prompt and answer."""
        given = torch.tensor([list(ids)], device=self.model.model.device)
        with self.steered(arm, alpha, prompt, steer_answer):
            logits = self.model.model(input_ids=given, use_cache=False).logits[0]
        return logits.float().log_softmax(-1)


def steer(
    steering: Steering,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[Message]],
    alphas: Sequence[float] = PAPER_ALPHAS,
    *,
    kinds: Collection[Kind] = tuple(Kind),
    steer_answer: bool = True,
    max_new_tokens: int = 128,
) -> Iterator[Answer]:
    """Answer each prompt under every arm and strength, the unsteered answer first.

    Args:
        steering: model, SAE, latent and controls.
        tokenizer: the model's.
        prompts: conversations that the model is to go on with.
        alphas: lengths of what is added.
        kinds: of the prompt's tokens, those that are steered.
        steer_answer: whether the tokens of the answer are.
        max_new_tokens: longest answer.

    Raises:
        TaskError: the chat template refuses a prompt.
    """
    ends = set(steering.model.end_tokens)
    for number, messages in enumerate(prompts):
        (row,) = tokenizer.tokenize(
            [Conversation(f"prompt {number}", list(messages))], 2**31 - 1, generation_prompt=True
        )
        if isinstance(row, Unreadable):
            raise TaskError(f"prompt {number} cannot be asked ({row.reason}): correct it")
        ids = row.ids.tolist()
        mask = torch.from_numpy(np.isin(row.kinds, list(kinds)))
        clean: list[int] = []
        before: Tensor | None = None
        for arm, alpha in _plan(alphas):
            said = steering.answer(
                ids, arm, alpha, mask,
                steer_answer=steer_answer, max_new_tokens=max_new_tokens, ends=ends,
            )  # fmt: skip
            clean = said if arm == "none" else clean
            after = steering.log_probs(ids + clean, arm, alpha, mask, steer_answer=steer_answer)
            after = after[len(ids) - 1 :]
            before = after if before is None else before
            text = tokenizer.tokenizer.decode(said)
            assert isinstance(text, str)
            yield Answer(
                prompt=number,
                arm=arm,
                alpha=alpha,
                text=text,
                num_tokens=len(said),
                agreement=agreement(clean, said),
                kl=float((before.exp() * (before - after)).sum(-1).mean()),
            )


def agreement(one: Sequence[int], other: Sequence[int]) -> float:
    """Return how far two answers go together: 1 where they are the same."""
    longer = max(len(one), len(other))
    differs = (i for i in range(longer) if list(one[i : i + 1]) != list(other[i : i + 1]))
    return next(differs, longer) / longer if longer else 1.0


def _plan(alphas: Sequence[float]) -> Iterator[tuple[Arm, float]]:
    """Yield what is tried: nothing and the reconstruction once, directions at each strength."""
    yield "none", 0.0
    yield "reconstruction", 0.0
    for alpha in alphas:
        for arm in ("latent", "flipped", "random", "unrelated"):
            yield arm, alpha
