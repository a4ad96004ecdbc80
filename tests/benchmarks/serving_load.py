"""The service under load, over HTTP: what it can do, a steady share of it, and far too much.

    python tests/benchmarks/serving_load.py --out serving_load.json

The service is started as a user starts it. Clients are a process of its own, with an open loop:
requests leave at the times of a Poisson process, whether or not the earlier ones were answered.
Prompts have 128 tokens and answers 64: prompts whose greedy answer ends early were left out before.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from measure import Child, Figure, Part, answer, child_settings, log

from sae_ray import tiny
from sae_ray.adapters.attach import AdapterSpec
from sae_ray.chat import Message
from sae_ray.curate.block import IndexBlock
from sae_ray.curate.sources import EMBEDDED
from sae_ray.experts.answers import Ask, Limits, Piece, Sampling
from sae_ray.experts.engine import Engine
from sae_ray.experts.prototypes import Eyes, requests
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.router import Router

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.made_experts import add_expert
from tests.service import Service, serving

DOMAINS = ("velan", "sums", "measures", "tone", "order", "cooking", "tables", "days")
BACKGROUND = ("manners", "small_talk", "kinds", "rewriting")
PROMPT_TOKENS, ANSWER_TOKENS, ROUTED_TOKENS = 128, 64, 256
NUM_PROMPTS = 64


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lm", default=EMBEDDED, help="the embedded one alone has a router")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=600, help="of steady load")
    parser.add_argument("--probe_seconds", type=float, default=60, help="of every other phase")
    parser.add_argument("--share", type=float, default=0.8, help="of capacity, as steady load")
    parser.add_argument("--surge", type=float, default=3.0, help="times capacity")
    parser.add_argument("--rounds", type=int, default=6, help="of ten requests one by one")
    parser.add_argument("--max_rows", type=int, default=32)
    parser.add_argument("--max_waiting", type=int, default=64)
    return parser.parse_args()


@dataclasses.dataclass
class Client:
    """A process that asks over HTTP, and says how it was answered."""

    url: str
    bodies: list[dict]
    """What is asked, in turn."""

    def __call__(self, request: dict) -> dict:
        """Ask as requested; times are in seconds from its beginning."""
        started, cpu = time.perf_counter(), time.process_time()
        said = asyncio.run(self._ask_all(request, started))
        seconds = time.perf_counter() - started
        return {"answers": said, "s": seconds, "cpu": (time.process_time() - cpu) / seconds}

    async def _ask_all(self, request: dict, started: float) -> list[tuple]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(base_url=self.url, timeout=150, limits=limits) as client:
            if request["rate"] is None:
                return await self._closed(client, request, started)
            rng, due, tasks = random.Random(request["seed"]), 0.0, []
            while due < request["seconds"]:
                due += rng.expovariate(request["rate"])
                await asyncio.sleep(max(0.0, due - (time.perf_counter() - started)))
                body = self.bodies[len(tasks) % len(self.bodies)]
                tasks.append(asyncio.create_task(_ask(client, body, started, due)))
            return list(await asyncio.gather(*tasks))

    async def _closed(self, client: httpx.AsyncClient, request: dict, started: float) -> list:
        """Let so many ask one thing after the other."""
        said: list[tuple] = []

        async def repeat(turn: int) -> None:
            while (at := time.perf_counter() - started) < request["seconds"]:
                said.append(await _ask(client, self.bodies[turn % len(self.bodies)], started, at))
                turn += 1

        await asyncio.gather(*(repeat(turn) for turn in range(request["at_once"])))
        return said


async def _ask(client: httpx.AsyncClient, body: dict, started: float, due: float) -> tuple:
    """Return when it was due and answered, the status (0: none came) and the answer's tokens."""
    try:
        response = await client.post("/completions", json=body)
    except httpx.HTTPError:
        return due, time.perf_counter() - started, 0, 0
    tokens = response.json()["usage"]["completion_tokens"] if response.is_success else 0
    return due, time.perf_counter() - started, response.status_code, tokens


@dataclasses.dataclass(frozen=True)
class Answers:
    """How requests were answered."""

    rows: np.ndarray
    """[n, 4] as `_ask` returns them."""
    cpu: float
    """Cores that the client took."""
    seconds: float

    @classmethod
    def of(cls, reply: dict) -> "Answers":
        """Read a client's reply."""
        return cls(np.array(reply["answers"], float).reshape(-1, 4), reply["cpu"], reply["s"])

    def latency_ms(self, *statuses: int) -> np.ndarray:
        """Return milliseconds from when a request was due, of those answered so."""
        rows = self.rows[np.isin(self.rows[:, 2], statuses)]
        return 1000 * (rows[:, 1] - rows[:, 0])

    def count(self, *statuses: int) -> int:
        """Count those answered so."""
        return int(np.isin(self.rows[:, 2], statuses).sum())

    @property
    def rate(self) -> float:
        """Return whole answers a second."""
        return self.count(200) / self.seconds


def percentile(values: np.ndarray, at: float) -> float:
    return float(np.percentile(values, at)) if len(values) else float("nan")


@dataclasses.dataclass
class Memory:
    """What each process of the service keeps to itself, looked at now and then."""

    service: Service
    every_s: float
    seen: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    names: dict[int, str] = dataclasses.field(default_factory=dict)

    def __enter__(self) -> "Memory":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.every_s):
            root = psutil.Process(self.service.process.pid)
            for one in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.names[one.pid] = " ".join(one.cmdline())[:60]
                    mb = one.memory_full_info().uss / 2**20
                    self.seen.setdefault(one.pid, []).append(mb)

    def growth(self) -> dict[str, float]:
        """Return by how much each grew from the second quarter of the time to the last, in %."""
        grown = {}
        for pid, values in self.seen.items():
            if len(values) >= 8:
                quarter = len(values) // 4
                early = statistics.median(values[quarter : 2 * quarter])
                late = statistics.median(values[-quarter:])
                grown[f"{self.names[pid]} ({pid}), {late:.0f} MiB"] = 100 * (late / early - 1)
        return grown


@dataclasses.dataclass
class World:
    """What all phases share: experts, a router, an engine in this process, and prompts."""

    folder: Path
    arguments: argparse.Namespace

    def __post_init__(self) -> None:
        lm = self.arguments.lm
        self.registry = ExpertRegistry(str(self.folder / "registry"))
        spec = AdapterSpec(kind="lora", r=8)
        self.ids = {
            name: add_expert(self.registry, name, spec, lm=lm, seed=k, size=0.05).id
            for k, name in enumerate(DOMAINS)
        }
        limits = Limits(self.arguments.max_rows, max(32, self.arguments.max_waiting))
        self.engine = Engine(None if lm == EMBEDDED else lm, self.registry.path, limits=limits)
        self.router = self._router() if lm == EMBEDDED else None
        self.bodies = list(self._long_answers())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.engine.run, args=(self._stop,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the engine."""
        self._stop.set()
        self._thread.join()

    def _router(self) -> str:
        eyes, domains = Eyes.open(EMBEDDED, EMBEDDED), dict[str, list[str]]()
        rows = pq.read_table(tiny.pool_path(), columns=["domain", "messages"]).to_pylist()
        for row in rows:
            domains.setdefault(row["domain"], []).extend(requests(row["messages"])[-1:])
        known = {id: (name, name, eyes.read(domains[name][:100])) for name, id in self.ids.items()}
        background = IndexBlock.concatenate([eyes.read(domains[one][:100]) for one in BACKGROUND])
        background = background.take(np.random.default_rng(0).permutation(len(background)))
        path = str(self.folder / "router")
        Router.fit(eyes, known, background).save(path, EMBEDDED, EMBEDDED)
        words = " ".join(domains["cooking"]).split()
        self.routed = [self._routed(words[k:]) for k in range(0, 800, 100)]
        return path

    def _routed(self, words: list[str]) -> list[Message]:
        """Return a request of as many words as make a prompt of the wanted length."""
        num = ROUTED_TOKENS
        while True:
            messages: list[Message] = [{"role": "user", "content": " ".join(words[:num])}]
            if len(self.engine.prompts.of_messages(messages)) <= ROUTED_TOKENS:
                return messages
            num -= 1

    def _long_answers(self) -> Iterator[dict]:
        """Find prompts that each expert answers at full length, as one asks for them."""
        rng = random.Random(0)
        found = 0
        while found < NUM_PROMPTS:
            tried = [(rng.choice(DOMAINS), self._prompt(rng)) for _ in range(32)]
            said: list[list[Piece]] = [[] for _ in tried]
            for (name, ids), pieces in zip(tried, said, strict=True):
                self.engine.submit(self.ask(name, ids), pieces.append)
            while self.engine.step():
                pass
            for (name, ids), pieces in zip(tried, said, strict=True):
                if sum(one.num_tokens for one in pieces) == ANSWER_TOKENS:
                    found += 1
                    body = {"model": name, "prompt": ids, "temperature": 0}
                    yield {**body, "max_tokens": ANSWER_TOKENS}

    def _prompt(self, rng: random.Random) -> list[int]:
        return [rng.randrange(10, self.engine.prompts.vocab_size) for _ in range(PROMPT_TOKENS)]

    def ask(self, name: str, ids: Sequence[int]) -> Ask:
        """Return what an engine is asked."""
        sampling = Sampling(max_tokens=ANSWER_TOKENS, temperature=0)
        return Ask(tuple(ids), (self.ids[name],), (1.0,), sampling)

    def answer(self, body: Mapping) -> float:
        """Answer in this process; return the seconds it took."""
        done, started = threading.Event(), time.perf_counter()
        self.engine.submit(
            self.ask(body["model"], body["prompt"]), lambda piece: piece.finish and done.set()
        )
        done.wait()
        return time.perf_counter() - started


def load_phases(part: Part, service: Service, client: Child, arguments: argparse.Namespace) -> None:
    """Find the capacity; then ask less than that for long, and far more for a while."""

    def ask(seconds: float, rate: float | None, at_once: int = 0) -> Answers:
        client.send({"seconds": seconds, "rate": rate, "at_once": at_once, "seed": 0})
        return Answers.of(client.receive())

    ask(min(20.0, arguments.probe_seconds), None, 4)  # every expert is in memory after it
    full = ask(arguments.probe_seconds, None, arguments.max_rows)
    capacity = full.rate
    log(f"capacity: {capacity:.2f} requests/s; client {full.cpu:.2f} cores")
    with Memory(service, every_s=max(0.5, arguments.seconds / 100)) as memory:
        steady = ask(arguments.seconds, arguments.share * capacity)
    surge = ask(arguments.probe_seconds, arguments.surge * capacity)
    growth = memory.growth()
    part.details["memory_growth_percent"] = growth
    p50, p99 = (percentile(steady.latency_ms(200), at) for at in (50, 99))
    accepted, refused = surge.latency_ms(200), surge.latency_ms(429, 503)
    part.figures += [
        Figure("capacity", capacity, "requests/s", note=f"{arguments.max_rows} at once"),
        Figure("steady load", len(steady.rows) / arguments.seconds, "requests/s"),
        Figure("failed requests", len(steady.rows) - steady.count(200), "", at_most=0),
        Figure("p50", p50, "ms"),
        Figure("p99", p99, "ms"),
        Figure("p99 over p50", p99 / p50, "x", at_most=5),
        Figure("memory of a process grew by", max(growth.values(), default=0.0), "%", at_most=5),
        Figure("client", steady.cpu, "cores"),
        Figure("surge", len(surge.rows) / arguments.probe_seconds, "requests/s"),
        Figure("refused", 100 * surge.count(429, 503) / len(surge.rows), "%"),
        Figure("neither answered nor refused", len(surge.rows) - len(accepted) - len(refused), ""),
        Figure("refusal, p50", percentile(refused, 50), "ms"),
        Figure("refusal, p99", percentile(refused, 99), "ms"),
        Figure("answers a second", surge.count(200) / surge.seconds / capacity, "x of capacity"),
        Figure("accepted, p50", percentile(accepted, 50) / p50, "x of steady"),
        Figure("accepted, p99", percentile(accepted, 99) / p99, "x of steady"),
        Figure("client in the surge", surge.cpu, "cores"),
    ]


def timed(ask: Callable[[], object]) -> float:
    started = time.perf_counter()
    ask()
    return 1000 * (time.perf_counter() - started)


def one_by_one(part: Part, world: World, url: str) -> None:
    """Compare answers over HTTP with those of an engine here, and routed with unrouted ones."""
    with httpx.Client(base_url=url, timeout=150) as client:

        def served(body: dict) -> None:
            client.post("/completions", json=body).raise_for_status()

        def first_token(model: str, messages: list[Message]) -> None:
            body = {"model": model, "messages": messages, "temperature": 0, "stream": True}
            body["max_tokens"] = 1
            client.post("/chat/completions", json=body).raise_for_status()

        arms: dict[str, list[float]] = {"http": [], "here": [], "routed": [], "direct": []}
        for k in range(world.arguments.rounds + 1):  # the first one warms up
            for body in world.bodies[:10]:
                arms["here"].append(1000 * world.answer(body))
                arms["http"].append(timed(lambda body=body: served(body)))
            for messages in world.routed if world.router else ():
                arms["routed"].append(timed(lambda m=messages: first_token("moie", m)))
                arms["direct"].append(timed(lambda m=messages: first_token("cooking", m)))
            if not k:
                arms = {name: [] for name in arms}
    middle = {name: percentile(np.array(values), 50) for name, values in arms.items()}
    part.details["one_by_one_ms"] = arms
    part.figures += [
        Figure("engine in process, p50", middle["here"], "ms"),
        Figure("Serve and HTTP add, p50", middle["http"] - middle["here"], "ms", at_most=10),
    ]
    if world.router:
        share = 100 * (middle["routed"] / middle["direct"] - 1)
        part.figures += [
            Figure("first token, p50", middle["direct"], "ms", note=f"{ROUTED_TOKENS} tokens"),
            Figure("the routing decision adds", share, "%", at_most=10),
        ]


def main() -> None:
    if (settings := child_settings()) is not None:
        answer(Client(str(settings["url"]), settings["bodies"]))
        return
    arguments = read_arguments()
    torch.set_num_threads(1)  # as many as a replica of one CPU has
    part = Part("serving_load")
    with tempfile.TemporaryDirectory(prefix="serving-") as name:
        world = World(Path(name), arguments)
        flags = [f"--registry={world.registry.path}", f"--max_rows={arguments.max_rows}"]
        flags += [f"--max_waiting={arguments.max_waiting}", "--num_cpus=1", "--router_cpus=1"]
        flags += [f"--router={world.router}"] * bool(world.router)
        flags += [f"--lm={arguments.lm}"] * (arguments.lm != EMBEDDED)
        with serving(world.folder, flags) as service:
            one_by_one(part, world, service.url)
            world.close()
            settings = {"url": service.url, "bodies": world.bodies}
            client = Child(__file__, settings, {"OMP_NUM_THREADS": "1"})
            load_phases(part, service, client, arguments)
            client.close()
        part.details["arguments"] = vars(arguments)
        part.details["cores"] = os.cpu_count()
        part.write(arguments.out)


if __name__ == "__main__":
    main()
