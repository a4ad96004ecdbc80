"""What a judge is asked of a latent, and how its answers are scored.

    explain    contexts from all quantiles, marked: what is it? That answer is the label.
    rubric     the five strongest contexts, token by token: a score of 1 to 5, as FAST puts it
    detect     the label and unmarked contexts, half of them on: in which does it hold?
    fuzz       the label and contexts, half of them marked at the wrong tokens: which are right?

The judge is blind: it sees texts and marks, and neither the latent's number nor which SAE, model
or method it comes from; what is on and what is off come in one random order. Contexts that it has
explained are not among those that it is examined on. An answer that is not in the form asked for
counts as unparsed, and never as right or wrong.

Source: rubric: FAST, arXiv 2506.07691, 5 and appendix E; detection and fuzzing: Paulo et al.,
arXiv 2410.13928.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import JsonValue

from sae_ray.chat import ChatTokenizer, Message
from sae_ray.sae.contexts import Context, LatentContexts

Kind = Literal["explain", "rubric", "detect", "fuzz"]
KINDS: tuple[Kind, ...] = ("explain", "rubric", "detect", "fuzz")

NUM_QUANTILES = 10
NUM_EXPLAINED = 10
NUM_RUBRIC = 5
MAX_LABEL_CHARS = 200
REPLY_TOKENS = 200
_ON_ENOUGH = 0.3
"""Tokens are marked from this share of a context's peak on."""
_OPEN, _CLOSE = "<<", ">>"

_EXPLAIN = (
    "Below are excerpts of text. In each, a hidden detector responded to the tokens between << and "
    ">>; they stand from the strongest response to the weakest. Say in at most 15 words what the "
    "detector responds to, as exactly as the excerpts allow.\n"
    'Reply with JSON and nothing else: {"label": "..."}'
)
_RUBRIC = (
    "Below are excerpts of text as pairs of token and activation, 0 to 10, of one hidden detector. "
    "Rate how clear a single meaning it has:\n"
    "5: a clear pattern, and no example that deviates\n"
    "4: a clear pattern, with one or two deviating examples\n"
    "3: a clear overall pattern, but quite a few examples do not fit it\n"
    "2: a broad theme without structure\n"
    "1: no pattern\n"
    'Reply with JSON and nothing else: {"score": 1 to 5, "name": "..."}'
)
_DETECT = (
    "A hidden detector is said to respond to: {label}\n"
    "For each of the numbered excerpts say whether the detector responds anywhere in it.\n"
    "Reply with a JSON list of {num} numbers, 1 for yes and 0 for no, and nothing else."
)
_FUZZ = (
    "A hidden detector is said to respond to: {label}\n"
    "In each of the numbered excerpts tokens are marked with << and >>. Say for each whether the "
    "marked tokens are those to which such a detector responds.\n"
    "Reply with a JSON list of {num} numbers, 1 for yes and 0 for no, and nothing else."
)
_BRACES = re.compile(r"\{.*\}", re.DOTALL)
_LIST = re.compile(r"\[[^\[\]]*\]")


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """One request to the judge, and what it does not see."""

    latent: int
    kind: Kind
    messages: list[Message]
    truth: tuple[bool, ...] = ()
    """For detect and fuzz: the right answers in order."""

    @property
    def key(self) -> str:
        """Name what is asked: the same texts have the same name in every run."""
        asked = json.dumps([self.kind, self.latent, self.messages], ensure_ascii=False)
        return hashlib.sha256(asked.encode("utf-8", "replace")).hexdigest()[:32]


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A share with its 95 % Wilson interval."""

    share: float | None
    low: float
    high: float
    num: int


@dataclasses.dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge found of one latent."""

    latent: int
    label: str | None = None
    """None where it gave none, or none that could be read."""
    rubric: int | None = None
    """1 to 5."""
    detection: Interval | None = None
    fuzzing: Interval | None = None


def wilson(num_right: int, num: int, z: float = 1.959964) -> Interval:
    """Return a share and its interval; with nothing counted, nothing is known."""
    if not num:
        return Interval(None, 0.0, 1.0, 0)
    share, square = num_right / num, z * z / num
    centre = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / num + square / (4 * num)) / (1 + square)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), num)


class Examiner:
    """Puts questions about latents from their contexts; the same ones for the same seed."""

    def __init__(
        self, tokenizer: ChatTokenizer, *, num_on: int = 10, per_request: int = 10, seed: int = 0
    ) -> None:
        """Say how much is asked.

        Args:
            tokenizer: the model's, to turn contexts into text.
            num_on: contexts in which the latent is on, in detection; as many are off.
            per_request: contexts in one request.
            seed: of which contexts, and in which order.
        """
        self._tokenizer = tokenizer.tokenizer
        self._num_on, self._per_request, self._seed = num_on, per_request, seed

    def first(self, latent: int, contexts: LatentContexts) -> list[Question]:
        """Ask for a label and a score; nothing of a latent that is hardly ever on."""
        if len(contexts.strongest) < NUM_RUBRIC:
            return []
        marked = [self._marked(one, _on(one)) for one in self._explained(contexts)]
        pairs = [self._pairs(one) for one in contexts.strongest[:NUM_RUBRIC]]
        return [
            Question(latent, "explain", _messages(_EXPLAIN, marked)),
            Question(latent, "rubric", _messages(_RUBRIC, pairs)),
        ]

    def second(self, latent: int, contexts: LatentContexts, label: str) -> list[Question]:
        """Examine a label on contexts that it was not made from."""
        rng = np.random.default_rng((self._seed, latent))
        seen = {one.conversation for one in self._explained(contexts)}
        unseen = [one for one in contexts.spread if one.conversation not in seen]
        off = _mixed(contexts, min(self._num_on, len(unseen)), rng)
        on = _spaced(unseen, len(off))  # as many as are off: guessing is right half of the time
        fuzzed = self._fuzzed(_spaced(unseen, self._num_on), rng)
        cases = [(self._text(one), True) for one in on] + [(self._text(one), False) for one in off]
        detect = self._questions(latent, "detect", _DETECT, label, cases, rng)
        return detect + self._questions(latent, "fuzz", _FUZZ, label, fuzzed, rng)

    def _fuzzed(self, on: Sequence[Context], rng: np.random.Generator) -> list[tuple[str, bool]]:
        """Mark the right tokens in half of the contexts, and as many wrong ones in the others.

        Where too few tokens are off for that, a context can only be marked rightly: such ones are
        left out, or a latent that is on nearly everywhere would be judged by right cases alone.
        """
        cases: list[tuple[str, bool]] = []
        for one in rng.permutation(len(on)).tolist():
            context, places = on[one], _on(on[one])
            wrong = _elsewhere(context, len(places), rng)
            if len(wrong) == len(places):
                right = len(cases) % 2 == 0
                cases.append((self._marked(context, places if right else wrong), right))
        return cases[: len(cases) // 2 * 2]

    def _explained(self, contexts: LatentContexts) -> list[Context]:
        """Return contexts from the strongest on down through the quantiles, each text once."""
        half = contexts.strongest[: NUM_EXPLAINED // 2]
        taken = {one.conversation for one in half}
        rest = [one for one in contexts.spread if one.conversation not in taken]
        # At most half of what is left: the exam needs contexts too.
        more = _spaced(rest, min(NUM_EXPLAINED - len(half), len(rest) // 2))
        return half + more[::-1]

    def _questions(
        self,
        latent: int,
        kind: Kind,
        ask: str,
        label: str,
        cases: Sequence[tuple[str, bool]],
        rng: np.random.Generator,
    ) -> list[Question]:
        mixed = [cases[i] for i in rng.permutation(len(cases)).tolist()]
        questions = []
        for start in range(0, len(mixed), self._per_request):
            part = mixed[start : start + self._per_request]
            head = ask.format(label=label, num=len(part))
            texts, truth = zip(*part, strict=True)
            questions.append(Question(latent, kind, _messages(head, texts), truth))
        return questions

    def _text(self, context: Context) -> str:
        return self._decode(context.ids)

    def _marked(self, context: Context, places: Sequence[int]) -> str:
        """Return the text with some tokens between marks; neighbours share one pair."""
        at = np.isin(np.arange(len(context.ids)), list(places))
        runs = np.split(np.arange(len(at)), np.flatnonzero(np.diff(at)) + 1)
        pieces = [(self._decode(context.ids[run]), bool(at[run[0]])) for run in runs]
        return "".join(f"{_OPEN}{text}{_CLOSE}" if mark else text for text, mark in pieces)

    def _pairs(self, context: Context) -> str:
        scaled = np.ceil(10 * context.values / context.strength).astype(int).tolist()
        tokens = (self._decode(context.ids[i : i + 1]) for i in range(len(context.ids)))
        return "\n".join(f"{t!r}\t{v}" for t, v in zip(tokens, scaled, strict=True))

    def _decode(self, ids: np.ndarray) -> str:
        text = self._tokenizer.decode(ids.tolist())
        assert isinstance(text, str)
        # What stands there already must not pass for a mark.
        return text.replace(_OPEN, "< <").replace(_CLOSE, "> >")


def parse(question: Question, reply: str) -> JsonValue:
    """Read an answer in the form that was asked for; None where it is in no such form."""
    found = (_LIST if question.truth else _BRACES).findall(reply)
    if not found:
        return None
    try:
        answer = json.loads(found[-1])
    except ValueError:
        return None
    if question.truth:
        right_form = len(answer) == len(question.truth) and all(one in (0, 1) for one in answer)
        return [int(one) for one in answer] if right_form else None
    value = answer.get("label" if question.kind == "explain" else "score")
    if question.kind == "explain":
        label = " ".join(value.split()).rstrip(".") if isinstance(value, str) else ""
        return label[:MAX_LABEL_CHARS] or None
    return int(value) if str(value) in ("1", "2", "3", "4", "5") else None


def judge_latents(
    questions: Iterable[Question], answers: Mapping[str, JsonValue]
) -> dict[int, Judgement]:
    """Put together what was answered of each latent.

    Args:
        questions: all that were asked.
        answers: what `parse` read, by the question's key; None or absent where it read nothing.
    """
    by_latent: dict[int, list[Question]] = {}
    for question in questions:
        by_latent.setdefault(question.latent, []).append(question)
    judgements = {}
    for latent, asked in sorted(by_latent.items()):
        label, rubric = (
            next((answers.get(q.key) for q in asked if q.kind == kind), None)
            for kind in ("explain", "rubric")
        )
        judgements[latent] = Judgement(
            latent,
            label if isinstance(label, str) else None,
            rubric if isinstance(rubric, int) else None,
            accuracy(asked, answers, "detect"),
            accuracy(asked, answers, "fuzz"),
        )
    return judgements


def accuracy(
    questions: Iterable[Question], answers: Mapping[str, JsonValue], kind: Kind
) -> Interval:
    """Return the share of contexts that were judged rightly, of those that were judged."""
    right = num = 0
    for question in questions:
        answer: Any = answers.get(question.key)
        if question.kind == kind and answer is not None:
            right += sum(bool(a) == t for a, t in zip(answer, question.truth, strict=True))
            num += len(answer)
    return wilson(right, num)


def _messages(ask: str, texts: Sequence[str]) -> list[Message]:
    numbered = "\n\n".join(f"{i}:\n{text}" for i, text in enumerate(texts, 1))
    return [{"role": "user", "content": f"{ask}\n\n{numbered}"}]


def _on(context: Context) -> list[int]:
    """Return the places that are marked: where a latent is strong for this context."""
    return np.flatnonzero(context.values >= _ON_ENOUGH * context.strength).tolist()


def _elsewhere(context: Context, num: int, rng: np.random.Generator) -> list[int]:
    """Return as many places where the latent is off, or as many as there are."""
    off = np.flatnonzero(context.values <= 0)
    return sorted(rng.permutation(off)[:num].tolist())


def _spaced(contexts: Sequence[Context], num: int) -> list[Context]:
    """Return contexts from all quantiles: one of the middle of each of `num` equal parts."""
    if len(contexts) <= num:
        return list(contexts)
    return [contexts[int((i + 0.5) * len(contexts) / num)] for i in range(num)]


def _mixed(contexts: LatentContexts, num: int, rng: np.random.Generator) -> list[Context]:
    """Return contexts where the latent is off: half of them hard, as far as there are any."""
    easy = [contexts.easy[i] for i in rng.permutation(len(contexts.easy)).tolist()]
    hard = contexts.hard[: max(num // 2, num - len(easy))]
    return (hard + easy)[:num]
