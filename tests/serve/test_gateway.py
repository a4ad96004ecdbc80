import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sae_ray.experts.answers import Sampling
from serve import gateway
from serve.deployments import EngineReplica
from serve.gateway import Backends, Gateway, Question
from serve.meters import Meters
from serve.schemas import ApiError
from tests.serve.conftest import Service

QUESTION = Question("Write a query", (), (), Sampling(temperature=0.0, max_tokens=8))


@pytest.fixture
def stopped(tiny_lm_of: Callable[[str], Path]) -> EngineReplica:
    """An engine that has stopped, before anybody has noticed."""
    limits: dict[str, float] = {"max_rows": 1, "max_waiting": 1}
    replica = EngineReplica(str(tiny_lm_of("llama")), None, limits, "float32", "cpu", 0.2, 1)
    replica.close()
    return replica


def gateway_before(*replicas: EngineReplica) -> Gateway:
    """A gateway whose every question goes to the next one."""
    turns: Iterator[EngineReplica] = itertools.cycle(replicas)
    backends = Backends(
        experts=replicas[0].experts,
        answer=lambda question: next(turns).answer(question),
        stream=lambda question: next(turns).stream(question),
        route=None,
        read=None,
    )
    return Gateway(backends, Meters(), timeout_s=30)


async def streamed(gateway: Gateway) -> str:
    return "".join([part.text async for part in gateway.stream(QUESTION)])


def test_another_is_asked_where_one_is_lost(service: Service, stopped: EngineReplica) -> None:
    said = asyncio.run(service.replica.answer(QUESTION)).text
    assert said
    assert asyncio.run(gateway_before(stopped, service.replica).answer(QUESTION)).text == said
    assert asyncio.run(streamed(gateway_before(stopped, service.replica))) == said


def test_where_all_are_lost_it_is_said_and_no_more_are_asked(
    stopped: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "_AGAIN_AFTER_S", (0.0, 0.0))
    alone = gateway_before(stopped)
    for asked in (alone.answer(QUESTION), streamed(alone)):
        with pytest.raises(ApiError, match="is gone: ask again") as caught:
            asyncio.run(asked)
        assert caught.value.status == 503
        assert caught.value.retry_after_s
