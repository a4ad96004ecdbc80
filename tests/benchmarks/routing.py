"""Routing: does each prompt reach the expert that knows, and does the base keep what nobody knows.

Experts are known by 128 prompts of a domain's rows; no adapter is trained. In every division of the
domains some have an expert, some set the threshold, and some are left out for the report.

    python tests/benchmarks/routing.py --out routing.json
    python tests/benchmarks/routing.py --pool POOL --lm LM --sae SAE --real --out routing.json
    python tests/benchmarks/routing.py --answers DIR --num_experts 4 --out answers.json
"""

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from measure import Figure, Part, log, show
from rich.console import Console

from sae_ray import tiny
from sae_ray.adapters.settings import FinetuneSettings
from sae_ray.curate.block import IndexBlock
from sae_ray.curate.space import unit
from sae_ray.evaluate.mixture import Arm, evaluate_mixture, tabulate
from sae_ray.experts.fitting import Kind, fit
from sae_ray.experts.prototypes import Eyes, requests
from sae_ray.experts.router import Router

KINDS: tuple[Kind, ...] = ("zero_shot", "knn", "logistic")
TARGETS = {"zero_shot": 0.90, "knn": 0.95, "logistic": 0.95}
NUM_KNOWN, NUM_ASKED, NUM_NOBODYS = 128, 100, 150


@dataclasses.dataclass(frozen=True)
class Division:
    """Domains with an expert, domains that set the threshold, and domains that are left out."""

    experts: list[str]
    calibrating: list[str]
    left_out: list[str]


def read_domains(path: str, eyes: Eyes, num: int) -> dict[str, IndexBlock]:
    """Read the last requests of so many rows of each domain, drawn from all over the pool."""
    rows = pq.read_table(path, columns=["domain", "messages"]).to_pylist()
    asked: dict[str, list[str]] = {}
    for i in np.random.default_rng(0).permutation(len(rows)):
        mine = asked.setdefault(rows[i]["domain"], [])
        last = requests(rows[i]["messages"])[-1:]
        if len(mine) < num and last and last[0] not in mine:  # what is known is never asked
            mine += last
    blocks = {}
    for domain, prompts in sorted(asked.items()):
        blocks[domain] = eyes.read(prompts)
        log(f"read {len(blocks[domain])} prompts of {domain}")
    return blocks


def divisions(domains: Sequence[str], never: Sequence[str], num: int, count: int) -> list[Division]:
    """Divide domains at random, `never` to an expert."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        able = [one for one in domains if one not in never]
        experts = rng.choice(able, num, replace=False).tolist()
        rest = rng.permutation([one for one in domains if one not in experts]).tolist()
        found.append(Division(experts, rest[::2], rest[1::2]))
    return found


def known(block: IndexBlock) -> IndexBlock:
    """Return the prompts by which an expert is known."""
    return block.take(range(min(NUM_KNOWN, len(block) - NUM_ASKED // 2)))


def asked(block: IndexBlock) -> IndexBlock:
    """Return prompts of the same domain that no router has seen."""
    start = len(known(block))
    return block.take(range(start, min(start + NUM_ASKED, len(block))))


def mixed(blocks: Sequence[IndexBlock]) -> IndexBlock:
    """Return prompts of several domains in random order."""
    joined = IndexBlock.concatenate([one.take(range(min(NUM_NOBODYS, len(one)))) for one in blocks])
    return joined.take(np.random.default_rng(0).permutation(len(joined)))


def decide(router: Router, block: IndexBlock) -> list[str]:
    """Return who answers prompts that were read: an expert's id, or the base."""
    scores = router.scores(block)
    best, ids = scores.argmax(1), [one.id for one in router.experts]
    away = scores.max(1) >= 0
    return [ids[e] if gone else "base" for e, gone in zip(best, away, strict=True)]


def measure(eyes: Eyes, blocks: Mapping[str, IndexBlock], division: Division, kind: Kind) -> dict:
    """Fit a router and return its figures; adding and retiring too, where nothing is trained."""
    experts = {one: (one, one, known(blocks[one])) for one in division.experts}
    background = mixed([blocks[one] for one in division.calibrating])
    router = Router.fit(eyes, experts, background, kind=kind)
    right = [[who == one for who in decide(router, asked(blocks[one]))] for one in experts]
    stays = {
        one: np.mean([who == "base" for who in decide(router, blocks[one])])
        for one in division.left_out
    }
    unseen = [
        blocks[one].take(range(NUM_NOBODYS, len(blocks[one]))) for one in division.calibrating
    ]
    figures = {
        "accuracy": float(np.mean(np.concatenate(right))),
        "like_calibrated": float(
            np.mean([who == "base" for one in unseen for who in decide(router, one)])
        ),
        "stays": float(np.mean(list(stays.values()))),
        "least": float(min(stays.values())),
        "stays_by_domain": {one: float(share) for one, share in stays.items()},
        "thresholds": router.fitted.thresholds.tolist(),
    }
    if kind != "logistic":
        figures["changed"] = changed(router, blocks, division)
    return figures


def changed(router: Router, blocks: Mapping[str, IndexBlock], division: Division) -> float:
    """Return the share of decisions about others that change when an expert comes and goes.

    Of prompts of the other experts and of nobody: with the last expert retired, and added again.
    """
    last = division.experts[-1]
    prompts = IndexBlock.concatenate(
        [
            *(asked(blocks[one]) for one in division.experts[:-1]),
            *(blocks[one].take(range(NUM_ASKED)) for one in division.left_out),
        ]
    )
    without = router.retire(last)
    again = without.add(last, last, last, known(blocks[last]))
    before, between = decide(router, prompts), decide(without, prompts)
    assert decide(again, prompts) == before
    # What the expert itself took goes elsewhere, of course: those are not others' decisions.
    others = [(a, b) for a, b in zip(before, between, strict=True) if a != last]
    return float(np.mean([a != b for a, b in others]))


SPACES = ("latents", "log latents", "Jaccard of latents")


def in_space(block: IndexBlock, space: str) -> np.ndarray:
    """Return prompts as unit vectors whose cosines say how like they are, from their latents."""
    dense = np.zeros((len(block), block.d_sae), dtype=np.float32)
    dense[np.repeat(np.arange(len(block)), np.diff(block.indptr)), block.latents] = (
        block.means[:, 0] if space != "Jaccard of latents" else 1
    )
    return unit(np.log1p(dense) if space == "log latents" else dense).astype(np.float32)


def from_latents(blocks: Mapping[str, IndexBlock], division: Division, space: str) -> dict:
    """Decide as kNN does, by the same rule, from latents alone; return accuracy and what stays."""
    ids = division.experts
    background = in_space(mixed([blocks[one] for one in division.calibrating]), space)
    fitted = fit("knn", ids, [in_space(known(blocks[one]), space) for one in ids], background)

    def who(block: IndexBlock) -> list[str]:
        scores = fitted.scores(in_space(block, space))
        best, away = scores.argmax(1), scores.max(1) >= 0
        return [ids[e] if gone else "base" for e, gone in zip(best, away, strict=True)]

    right = [name == one for one in ids for name in who(asked(blocks[one]))]
    stays = [np.mean([n == "base" for n in who(blocks[one])]) for one in division.left_out]
    return {"accuracy": float(np.mean(right)), "stays": float(np.mean(stays))}


def figures_of(results: Mapping[Kind, Sequence[dict]], what: str, real: bool) -> list[Figure]:
    """Turn the results of all divisions into figures."""
    figures = []
    names = ("accuracy", "like_calibrated", "stays")
    for kind, each in results.items():
        mean = {k: float(np.mean([one[k] for one in each])) for k in names}
        target = None if real else TARGETS[kind]
        worst = min(one["accuracy"] for one in each)
        figures += [
            Figure(f"{kind}: accuracy", mean["accuracy"], what, target, note=f"least {worst:.3f}"),
            Figure(f"{kind}: background that stays", mean["like_calibrated"], what, 0.95),
            Figure(f"{kind}: left-out background that stays", mean["stays"], what, 0.95),
            Figure(f"{kind}: the same of the worst domain", min(x["least"] for x in each), what),
        ]
        if kind != "logistic":
            share = float(np.mean([one["changed"] for one in each]))
            figures.append(
                Figure(f"{kind}: others' decisions changed", share, "share", at_most=0.01)
            )
    return figures


def measure_answers(folder: Path, num: int, part: Part) -> None:
    """Train experts of the embedded default's domains and one on all, and let them answer."""
    from sae_ray.distributed.expert import ExpertMaker  # noqa: PLC0415 - imports Ray

    eyes = Eyes.open("embedded", "embedded")
    blocks = read_domains(str(tiny.pool_path()), eyes, NUM_KNOWN + NUM_ASKED)
    skills = [one for one in sorted(blocks) if one not in ("manners", "small_talk", "tables")]
    domains = skills[:num]
    pool = pq.read_table(tiny.pool_path(), columns=["id", "domain", "messages"])
    names = np.array(pool["domain"].to_pylist())
    folder.mkdir(parents=True, exist_ok=True)
    union = f"union-of-{num}"
    for name, chosen in {**{one: [one] for one in domains}, union: domains}.items():
        rows = np.concatenate([np.flatnonzero(names == one)[:500] for one in chosen])
        pq.write_table(pool.take(rows), folder / f"{name}.parquet")
        settings = FinetuneSettings(
            data=str(folder / f"{name}.parquet"),
            num_epochs=6,
            held_out_rows=32,
            micro_rows=16,
            num_workers=0,
            general_rows=0,
        )
        maker = ExpertMaker(settings, str(folder / name), name=name)
        for _ in maker.make():
            pass
        log(f"trained {name}")
    experts = {one: (one, one, known(blocks[one])) for one in domains}
    rest = [blocks[one] for one in ("manners", "small_talk")]
    questions = pq.read_table(tiny.eval_path()).to_pylist()
    kept = [row for one in skills for row in [q for q in questions if q["domain"] == one][:40]]
    arms: list[Arm] = []
    for arm in evaluate_mixture(
        tiny.lm_path(),
        {one: folder / one / "adapter" for one in domains},
        {one: one for one in domains},
        Router.fit(eyes, experts, mixed(rest)),
        kept,
        union=folder / union / "adapter",
    ):
        log(f"{arm.name}: {arm.in_domain:.3f}")
        arms.append(arm)
    Console(width=140).print(tabulate(arms))
    mixture = next(arm for arm in arms if arm.name == "mixture")
    part.figures += [
        Figure(f"N = {num}, {arm.name}: right in domain", 100 * arm.in_domain, "%") for arm in arms
    ]
    part.figures.append(Figure(f"N = {num}: regret to the oracle", 100 * mixture.regret, "points"))
    part.details["arms"] = [dataclasses.asdict(arm) for arm in arms]


def main() -> None:
    """Measure all kinds over all divisions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", default=str(tiny.pool_path()), help="with a column `domain`")
    parser.add_argument("--lm", default="embedded")
    parser.add_argument("--sae", default="embedded")
    parser.add_argument("--real", action="store_true", help="every domain may have an expert")
    parser.add_argument("--rows", type=int, default=230, help="of every domain")
    parser.add_argument("--num_experts", type=int, default=6)
    parser.add_argument("--divisions", type=int, default=10)
    parser.add_argument("--answers", type=Path, help="folder: train experts and let them answer")
    parser.add_argument("--out", default="routing.json")
    options = parser.parse_args()
    part = Part("routing")
    if options.answers:
        measure_answers(options.answers, options.num_experts, part)
        part.write(options.out)
        return
    eyes = Eyes.open(options.lm, options.sae)
    blocks = read_domains(options.pool, eyes, options.rows)
    never = [] if options.real else ["manners", "small_talk"]
    each = divisions(list(blocks), never, options.num_experts, options.divisions)
    results = {kind: [measure(eyes, blocks, one, kind) for one in each] for kind in KINDS}
    part.figures += figures_of(results, "share", options.real)  # pyright: ignore
    part.details |= {"divisions": [dataclasses.asdict(one) for one in each], "results": results}
    for space in SPACES:
        found = [from_latents(blocks, one, space) for one in each]
        for name, label in (("accuracy", "accuracy"), ("stays", "left-out background that stays")):
            share = float(np.mean([one[name] for one in found]))
            part.figures.append(Figure(f"knn on {space}: {label}", share, "share"))
        part.details[f"knn on {space}"] = found
    show(
        "accuracy, and left-out background that stays, by division",
        ("division", *KINDS),
        (
            (
                str(i),
                *(f"{results[k][i]['accuracy']:.3f} {results[k][i]['stays']:.3f}" for k in KINDS),
            )
            for i in range(len(each))
        ),
    )
    part.write(options.out)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
