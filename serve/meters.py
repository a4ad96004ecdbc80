"""Meters: what is counted and timed, through Ray's own metrics, which Prometheus reads.

Each node of a Ray cluster exports the metrics of all replicas on it, so that a page of one replica
never stands for all of them:

    moie_routes_total{expert}         decisions of the router; `base` where it chose none
    moie_abstentions_total            of these, how often it abstained
    moie_tokens_total{kind}           prompt and answer
    moie_refusals_total{status}       errors told, by HTTP status
    moie_retries_total                times that another replica was asked, since one was lost
    moie_phase_s{phase}               seconds to a route, to the first token, to the whole answer
    moie_engine{of}                   rows, requests waiting, experts and bytes in memory
"""

from collections.abc import Sequence
from typing import Literal

from ray.serve.metrics import Counter, Gauge, Histogram

from sae_ray.experts.answers import Load
from serve.schemas import BASE

Phase = Literal["route", "first_token", "answer"]
_BOUNDS_S = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300]


class Meters:
    """What an ingress counts."""

    def __init__(self) -> None:
        self._routes = Counter("moie_routes_total", "Decisions of the router.", ("expert",))
        self._abstentions = Counter("moie_abstentions_total", "How often the router abstained.")
        self._tokens = Counter("moie_tokens_total", "Tokens read and answered.", ("kind",))
        self._refusals = Counter("moie_refusals_total", "Errors told.", ("status",))
        self._retries = Counter("moie_retries_total", "Replicas asked in place of a lost one.")
        self._phases = Histogram("moie_phase_s", "Seconds of a phase.", _BOUNDS_S, ("phase",))

    def observe(self, phase: Phase, seconds: float) -> None:
        """Note how long a phase took."""
        self._phases.observe(seconds, {"phase": phase})

    def count_route(self, experts: Sequence[str], *, abstained: bool) -> None:
        """Count a decision."""
        for name in experts or (BASE,):
            self._routes.inc(1, {"expert": name})
        if abstained:
            self._abstentions.inc(1)

    def count_tokens(self, prompt: int, answer: int) -> None:
        """Count the tokens of an answer and of what it answers."""
        for kind, num in (("prompt", prompt), ("answer", answer)):
            if num:  # Ray: a counter is never increased by nothing
                self._tokens.inc(num, {"kind": kind})

    def count_refusal(self, status: int) -> None:
        """Count an error that was told."""
        self._refusals.inc(1, {"status": str(status)})

    def count_retry(self) -> None:
        """Count that another replica is asked, since one was lost."""
        self._retries.inc(1)


class EngineMeters:
    """What an engine shows of itself."""

    def __init__(self) -> None:
        self._gauge = Gauge("moie_engine", "What an engine is busy with.", ("of",))

    def show(self, load: Load) -> None:
        """Show what it is busy with."""
        shown = {"rows": load.rows, "waiting": load.waiting, "experts": load.residents}
        for name, value in {**shown, "adapter_bytes": load.adapter_bytes}.items():
            self._gauge.set(value, {"of": name})
