"""How good a routed mixture is: right answers beside those of all that it must beat.

    base            the base alone
    best single     one expert for everything: the best there is
    union           one adapter trained on all the experts' data together, if given
    random router   each prompt to an expert drawn at random
    uniform merge   one LoRA whose update is the mean of the experts'
    mixture         each prompt to the expert that the router names, or the base
    oracle          each prompt to the expert of its domain

Questions of no expert's domain are out of domain: there the mixture should do as the base does.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_ray.experts.router import Router
from sae_ray.lm import quiet_loading
from sae_ray.tiny.exam import is_correct, replies

MERGED = "merged"
Answers = dict[str, np.ndarray]
"""Who answers -> whether each question is answered right."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to answer, over all questions."""

    name: str
    in_domain: float
    """Share of right answers to questions of the experts' domains."""
    regret: float
    """What the oracle gets right beyond it, in domain."""
    out_of_domain: float
    """Share of right answers to the other questions; NaN where there are none."""
    stays: float
    """Share of the other questions that the base answers; NaN where there are none."""


def evaluate_mixture(
    lm: str | Path,
    experts: Mapping[str, str | Path],
    domains: Mapping[str, str],
    router: Router,
    questions: Sequence[Mapping[str, Any]],
    *,
    union: str | Path | None = None,
    seed: int = 0,
) -> Iterator[Arm]:
    """Answer every question in every way, from one base in memory; yield the arms in order.

    Args:
        lm: folder of the base.
        experts: id -> PEFT folder; LoRA, for the merge.
        domains: id -> the domain that the expert is for.
        router: over these experts.
        questions: rows with messages (the right reply last), domain, answer and metric.
        union: PEFT folder of one adapter trained on the data of all.
        seed: of the random router.
    """
    right = {
        who: np.array(
            [is_correct(r, q["answer"], q["metric"]) for r, q in zip(said, questions, strict=True)]
        )
        for who, said in answer(lm, experts, questions, union=union)
    }
    ids = list(experts)
    routes = router.route_many([question["messages"][:-1] for question in questions])
    chosen = [route.expert_ids[0] if route.expert_ids else "base" for route in routes]
    expert_of = {domain: id for id, domain in domains.items()}
    owners = [expert_of.get(question["domain"], "base") for question in questions]
    inside = np.array([owner != "base" for owner in owners])
    drawn = np.random.default_rng(seed).choice(ids, len(questions)).tolist()
    best = max(ids, key=lambda id: right[id][inside].mean())
    plans = {
        "base": ["base"] * len(questions),
        f"best single ({domains[best]})": [best] * len(questions),
        **({"union": ["union"] * len(questions)} if union is not None else {}),
        "random router": drawn,
        "uniform merge": [MERGED] * len(questions),
        "mixture": chosen,
        "oracle": owners,
    }
    top = _hits(right, owners)[inside].mean()
    for name, plan in plans.items():
        hits = _hits(right, plan)
        stays = np.array([who == "base" for who in plan])
        yield Arm(
            name,
            float(hits[inside].mean()),
            float(top - hits[inside].mean()),
            float(hits[~inside].mean()) if not inside.all() else float("nan"),
            float(stays[~inside].mean()) if not inside.all() else float("nan"),
        )


def answer(
    lm: str | Path,
    experts: Mapping[str, str | Path],
    questions: Sequence[Mapping[str, Any]],
    *,
    union: str | Path | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """Yield the greedy replies of the base, of each expert, of the union and of the merge."""
    tokenizer = AutoTokenizer.from_pretrained(lm)
    chats = [question["messages"][:-1] for question in questions]
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32)
    yield "base", list(replies(model, tokenizer, chats))
    folders = {**experts, **({"union": union} if union is not None else {})}
    adapted = None
    for name, folder in folders.items():
        if adapted is None:
            adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        else:
            adapted.load_adapter(str(folder), adapter_name=name)
        adapted.set_adapter(name)
        yield name, list(replies(model, tokenizer, chats))
    assert adapted is not None, "a mixture of no experts"
    each = [1 / len(experts)] * len(experts)
    # The mean of the updates themselves: of factors alone it would be another product.
    adapted.base_model.add_weighted_adapter(list(experts), each, MERGED, combination_type="cat")  # pyright: ignore
    adapted.set_adapter(MERGED)
    yield MERGED, list(replies(model, tokenizer, chats))


def tabulate(arms: Sequence[Arm]) -> Table:
    """Return a row an arm."""
    table = Table(
        "who answers", "in domain", "regret to oracle", "out of domain", "stays with base"
    )
    for arm in arms:
        figures = (arm.in_domain, arm.regret, arm.out_of_domain, arm.stays)
        table.add_row(arm.name, *(f"{100 * one:.1f} %" for one in figures))
    return table


def _hits(right: Answers, plan: Sequence[str]) -> np.ndarray:
    return np.array([right[who][i] for i, who in enumerate(plan)], dtype=float)
