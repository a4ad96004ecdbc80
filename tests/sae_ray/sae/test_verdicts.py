"""Verdicts: written down one by one, never asked for twice, and nothing lost or passed over."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_ray.chat_endpoint import ChatEndpoint
from sae_ray.errors import EndpointError
from sae_ray.sae.judge import Question, accuracy
from sae_ray.sae.verdicts import Verdicts, estimate
from tests.endpoint import Endpoint, serve


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with serve() as server:
        server.rule = lambda text: str([int("on" in line) for line in text.split("\n")])
        yield server


def question(number: int) -> Question:
    content = f"{number} on\n{number} off"
    return Question(number, "detect", [{"role": "user", "content": content}], (True, False))


QUESTIONS = [question(number) for number in range(12)]


def endpoint(server: Endpoint, timeout_s: float = 10.0) -> ChatEndpoint:
    return ChatEndpoint(server.url, "m", timeout_s=timeout_s, num_tries=2, wait_s=0.01)


def ask(path: Path, server: Endpoint, questions: list[Question] = QUESTIONS) -> Verdicts:
    verdicts = Verdicts(str(path))
    for _ in verdicts.ask(endpoint(server), questions, num_at_once=3):
        pass
    return verdicts


def test_nothing_is_asked_twice(server: Endpoint, tmp_path: Path) -> None:
    ask(tmp_path, server, QUESTIONS[:5])
    verdicts = ask(tmp_path, server)
    assert len(server.asked) == 12
    assert len({str(body) for *_, body in server.asked}) == 12
    assert accuracy(QUESTIONS, verdicts.answers, "detect").share == 1.0
    assert accuracy(QUESTIONS, verdicts.answers, "detect").num == 24


def test_what_is_answered_is_kept_when_the_run_is_cut_short(
    server: Endpoint, tmp_path: Path
) -> None:
    verdicts = Verdicts(str(tmp_path))
    asking = verdicts.ask(endpoint(server), QUESTIONS, num_at_once=1)
    for _ in range(4):
        next(asking)
    asking.close()
    kept = len(Verdicts(str(tmp_path)).answers)
    assert kept >= 4
    before = len(server.asked)
    ask(tmp_path, server)
    assert len(server.asked) - before == 12 - kept


def test_prose_counts_as_unparsed_and_is_not_asked_again(server: Endpoint, tmp_path: Path) -> None:
    server.rule = lambda text: "Hard to say." if text[0] in "1" else "[1, 0]"
    tally = ask(tmp_path, server).tally(QUESTIONS)
    assert (tally.num_asked, tally.num_unparsed, tally.num_unanswered) == (12, 3, 0)
    verdicts = ask(tmp_path, server)
    assert len(server.asked) == 12
    # Neither right nor wrong.
    assert accuracy(QUESTIONS, verdicts.answers, "detect").num == 18
    verdicts.write()
    lines = (tmp_path / "verdicts.jsonl").read_text().splitlines()
    assert len(lines) == 12
    assert sum("Hard to say." in line for line in lines) == 3


def test_a_busy_judge_is_asked_again_and_one_without_an_answer_next_time(
    server: Endpoint, tmp_path: Path
) -> None:
    for _ in range(2):
        server.replies("", 429, retry_after="0")
        server.replies("", 500)
    tally = ask(tmp_path, server).tally(QUESTIONS)
    assert tally.num_unanswered <= 2  # two tries each
    assert ask(tmp_path, server).tally(QUESTIONS).num_unanswered == 0


def test_timeouts_are_counted_and_asked_again(server: Endpoint, tmp_path: Path) -> None:
    server.slow_s = 0.5
    verdicts = Verdicts(str(tmp_path))
    slow = endpoint(server, timeout_s=0.05)
    assert len(list(verdicts.ask(slow, QUESTIONS[:3], num_at_once=3))) == 3
    assert verdicts.tally(QUESTIONS[:3]).num_unanswered == 3
    server.slow_s = 0
    assert ask(tmp_path, server, QUESTIONS[:3]).tally(QUESTIONS[:3]).num_unanswered == 0


def test_asking_stops_when_nobody_is_there(server: Endpoint, tmp_path: Path) -> None:
    many = [question(number) for number in range(100)]
    ask(tmp_path, server, many[:3])
    for _ in range(300):
        server.replies("", 503)
    with pytest.raises(EndpointError, match=r"3 verdicts are kept in .*: the same command goes on"):
        ask(tmp_path, server, many)
    assert len(server.asked) < 60
    server.answers.clear()
    assert ask(tmp_path, server, many).tally(many).num_unanswered == 0


def test_a_judge_that_refuses_stops_it_at_once(server: Endpoint, tmp_path: Path) -> None:
    for _ in range(12):
        server.replies("no credit", 402)
    with pytest.raises(EndpointError, match=r"402 .*no credit.*0 verdicts are kept"):
        ask(tmp_path, server)
    assert len(server.asked) < 12
    assert threading.active_count() < 20


def test_the_cost_is_told_before(server: Endpoint) -> None:
    cost = estimate(QUESTIONS)
    assert cost.num_requests == 12
    chars = sum(len(q.messages[0]["content"]) for q in QUESTIONS)
    assert cost.prompt_tokens == round(chars / 4)
    assert (cost + cost).num_requests == 24
    assert server.asked == []
