"""Verdicts: what a judge answered, each written down at once, so that nothing is asked twice.

A verdict is a file of its own below `.verdicts` in an artifact's folder until all are there, on
any file system; then `verdicts.jsonl` holds all of them. What had no answer is not written, and is
asked again by the next run.
"""

import dataclasses
import json
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, cast

from pydantic import JsonValue

from sae_ray.artifacts import explain_storage, locate, write_atomically
from sae_ray.chat_endpoint import ChatEndpoint, NoAnswerError, Reply
from sae_ray.errors import EndpointError
from sae_ray.sae.judge import REPLY_TOKENS, Question, parse

FILE = "verdicts.jsonl"
_SCRATCH = ".verdicts"
_CHARS_PER_TOKEN = 4
_SILENT_IN_A_ROW = 8
"""Requests without an answer, one after the other, after which asking on is no use."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What some questions will take, about."""

    num_requests: int
    prompt_tokens: int
    """At four characters a token."""
    reply_tokens: int
    """At most."""

    def __add__(self, other: "Cost") -> "Cost":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Cost(*(a + b for a, b in zip(mine, theirs, strict=True)))


def estimate(questions: Sequence[Question]) -> Cost:
    """Say what questions will take, before any is asked."""
    chars = sum(len(message["content"]) for q in questions for message in q.messages)
    num = len(questions)
    return Cost(num, round(chars / _CHARS_PER_TOKEN), num * REPLY_TOKENS)


@dataclasses.dataclass(frozen=True, slots=True)
class Tally:
    """What became of some questions."""

    num_asked: int
    num_unparsed: int
    """Answered, but not in the form asked for."""
    num_unanswered: int
    prompt_tokens: int
    """As far as the endpoint counts them."""
    reply_tokens: int

    def to_json(self) -> dict[str, JsonValue]:
        """Return plain values."""
        return dataclasses.asdict(self)


class Verdicts:
    """The verdicts of one artifact's folder, those of an interrupted run included."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._records: dict[str, dict[str, Any]] = {}
        fs, root = locate(f"{path}/{_SCRATCH}")
        with explain_storage(path):
            names = [str(one) for one in fs.ls(root, detail=False)] if fs.exists(root) else []
            names = [name for name in names if name.endswith(".json")]
            found = cast(dict[str, bytes], fs.cat(names)) if names else {}
        for content in found.values():
            record = json.loads(content)
            self._records[record["key"]] = record

    @property
    def answers(self) -> Mapping[str, JsonValue]:
        """What was read from each answer, by the question's key; None for what is unparsed."""
        return {key: record["answer"] for key, record in self._records.items()}

    def ask(
        self, endpoint: ChatEndpoint, questions: Sequence[Question], *, num_at_once: int = 8
    ) -> Generator[Question]:
        """Ask what has no verdict yet, in an order that tells nothing, and yield what is done.

        Raises:
            EndpointError: the endpoint refuses, or has not answered many requests in a row.
        """
        todo = sorted((q for q in questions if q.key not in self._records), key=lambda q: q.key)
        silent = 0
        with ThreadPoolExecutor(num_at_once) as threads:
            asked: dict[Future[Reply], Question] = {
                threads.submit(endpoint.ask, q.messages, max_tokens=REPLY_TOKENS): q for q in todo
            }
            try:
                for future in as_completed(asked):
                    try:
                        self._keep(asked[future], future.result(), endpoint.model)
                        silent = 0
                    except NoAnswerError as error:
                        silent += 1
                        if silent >= _SILENT_IN_A_ROW:
                            raise EndpointError(f"{error}; {self._kept()}") from error
                    except EndpointError as error:
                        raise EndpointError(f"{error}; {self._kept()}") from error
                    yield asked[future]
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def tally(self, questions: Sequence[Question]) -> Tally:
        """Count what became of questions."""
        records = [self._records[q.key] for q in questions if q.key in self._records]
        return Tally(
            num_asked=len(questions),
            num_unparsed=sum(record["answer"] is None for record in records),
            num_unanswered=len(questions) - len(records),
            prompt_tokens=sum(record["prompt_tokens"] or 0 for record in records),
            reply_tokens=sum(record["reply_tokens"] or 0 for record in records),
        )

    def write(self) -> None:
        """Write all of them into one file, in the order of their keys."""
        lines = [json.dumps(self._records[key]) + "\n" for key in sorted(self._records)]
        write_atomically(f"{self._path}/{FILE}", "".join(lines).encode())

    def _keep(self, question: Question, reply: Reply, model: str) -> None:
        record = {
            "key": question.key,
            "latent": question.latent,
            "kind": question.kind,
            "judge": model,
            "answer": parse(question, reply.text),
            "truth": [int(one) for one in question.truth] or None,
            "reply": reply.text,
            "prompt_tokens": reply.prompt_tokens,
            "reply_tokens": reply.reply_tokens,
        }
        write_atomically(
            f"{self._path}/{_SCRATCH}/{question.key}.json", json.dumps(record).encode()
        )
        self._records[question.key] = record

    def _kept(self) -> str:
        return (
            f"{len(self._records)} verdicts are kept in {self._path}: the same command goes on "
            "from there"
        )
