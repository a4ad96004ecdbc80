"""One batch over many experts: how fast it is, beside other ways to answer, and how large.

    python tests/benchmarks/serving.py --out serving.json

Experts are LoRA of rank 8 with random weights; prompts are of one length and answers never end
early, so that every arm makes the same number of tokens. Arms take turns, and each is given as the
median of its turns.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Figure, Part, log, spread
from peft import PeftModel

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.curate.sources import EMBEDDED
from sae_ray.experts.answers import Ask, Limits, Piece, Sampling
from sae_ray.experts.engine import Engine
from sae_ray.experts.registry import ExpertRegistry

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.made_experts import add_expert, alone


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lm", default=EMBEDDED)
    parser.add_argument("--out", required=True)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--answer_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


@dataclasses.dataclass
class Contest:
    """What the arms share."""

    arguments: argparse.Namespace
    registry: ExpertRegistry
    engine: Engine
    folder: Path

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = (self.arguments.requests, self.arguments.prompt_tokens)
        self.prompts = torch.randint(
            10, self.engine.model.config.vocab_size, sizes, generator=generator
        )
        self.ids = [expert.id for expert in self.engine.experts.values()]
        self.engine._ends = frozenset()  # answers of one length
        self._models: dict[str, torch.nn.Module] = {}

    def ours(self, ids: list[str], *, together: bool = True, **how: Any) -> int:
        """Answer every prompt, the experts in turn; return the number of tokens."""
        pieces: list[Piece] = []
        how.setdefault("temperature", 0.0)
        sampling = Sampling(self.arguments.answer_tokens, **how)
        for prompt, id in zip(self.prompts.tolist(), itertools.cycle(ids)):
            experts = () if id == "base" else (id,)
            self.engine.submit(Ask(tuple(prompt), experts, (1.0,), sampling), pieces.append)
            while not together and self.engine.step():
                pass
        while self.engine.step():
            pass
        return sum(piece.num_tokens for piece in pieces)

    def plain(self, which: str) -> int:
        """Answer with transformers' own generate: one adapter, it merged, or PEFT's mixed batch."""
        if which not in self._models:
            model = alone(self.registry, self.ids[0], self.arguments.lm, self.folder)
            assert isinstance(model, PeftModel)
            if which == "merged":
                model = model.merge_and_unload()
            if which == "mixed":
                for id in self.ids[1:]:
                    model.load_adapter(str(self.registry.fetch(id, self.folder / id)), id)
            self._models[which] = model.eval()
        names = ["default", *self.ids[1:]]
        mixed = [names[i % len(names)] for i in range(len(self.prompts))]
        out = self._models[which].generate(  # pyright: ignore[reportCallIssue]
            input_ids=self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            do_sample=False,
            max_new_tokens=self.arguments.answer_tokens,
            min_new_tokens=self.arguments.answer_tokens,
            **({"adapter_names": mixed} if which == "mixed" else {}),
        )
        return int(out[:, self.prompts.shape[1] :].numel())


def rates(contest: Contest, rounds: int) -> dict[str, list[float]]:
    """Return each arm's tokens a second, turn by turn."""
    eight, one = contest.ids, contest.ids[:1]
    arms: dict[str, Callable[[], int]] = {
        "many experts": lambda: contest.ours(eight),
        "many experts, drawn": lambda: contest.ours(eight, temperature=1.0),
        "many experts, drawn from the likeliest": lambda: contest.ours(
            eight, temperature=1.0, top_p=0.9
        ),
        "one expert": lambda: contest.ours(one),
        "base": lambda: contest.ours(["base"]),
        "one by one": lambda: contest.ours(eight, together=False),
        "generate, one expert": lambda: contest.plain("one"),
        "generate, merged": lambda: contest.plain("merged"),
        "generate, PEFT mixed": lambda: contest.plain("mixed"),
    }
    turns: dict[str, list[float]] = {name: [] for name in arms}
    for k in range(rounds + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            tokens = arm()
            rate = tokens / (time.perf_counter() - started)
            log(f"{name}: {rate:,.0f} tokens/s" + " (to warm up)" * (k == 0))
            turns[name] += [rate] * (k > 0)
    return turns


def in_process(part: Part, contest: Contest) -> None:
    """Measure the engine by itself."""
    turns = rates(contest, contest.arguments.rounds)
    part.details["tokens_per_s"] = {name: spread(values) for name, values in turns.items()}
    middle = {name: statistics.median(values) for name, values in turns.items()}
    many = middle["many experts"]
    for name, least in (("one expert", 0.85), ("one by one", 5.0)):
        part.figures.append(Figure(f"over {name}", many / middle[name], "x", at_least=least))
    drawn = ("many experts, drawn", "many experts, drawn from the likeliest")
    for name in (
        *drawn,
        "base",
        "generate, one expert",
        "generate, merged",
        "generate, PEFT mixed",
    ):
        part.figures.append(Figure(f"over {name}", many / middle[name], "x"))
    part.figures.insert(0, Figure("many experts, one batch", many, "tokens/s"))
    base = sum(p.nbytes for p in contest.engine.model.parameters())
    adapters = contest.engine.residents.num_bytes
    rows = contest.engine.batch.lora.num_bytes
    arguments = contest.arguments
    longest = arguments.prompt_tokens + arguments.answer_tokens
    kept = contest.engine.batch.cache.bytes_for(arguments.requests, longest)
    num = len(contest.ids)
    ratio = (base + adapters + rows) / (base + adapters / num + rows)
    part.figures += [
        Figure("memory of all experts over one", ratio, "x", at_most=1.3),
        Figure("adapters", adapters / 2**20, "MiB", note=f"{num} of them"),
        Figure("factors of the rows", rows / 2**20, "MiB"),
        Figure("keys and values", kept / 2**20, "MiB"),
        Figure("base", base / 2**20, "MiB"),
    ]


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    part = Part("serving")
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        registry = ExpertRegistry(f"{folder}/registry")
        for k in range(arguments.experts):
            spec = AdapterSpec(kind="lora", r=arguments.r)
            add_expert(registry, f"expert-{k}", spec, lm=arguments.lm, seed=k, size=0.05)
        lm = None if arguments.lm == EMBEDDED else arguments.lm
        limits = Limits(max_rows=arguments.requests, max_waiting=arguments.requests)
        engine = Engine(lm, registry.path, limits=limits)
        in_process(part, Contest(arguments, registry, engine, Path(folder)))
        part.details["arguments"] = vars(arguments)
        part.write(arguments.out)


if __name__ == "__main__":
    main()
