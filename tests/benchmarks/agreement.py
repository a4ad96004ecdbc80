"""Agreement: pooled latents with the plain way's, and selections of bf16 with those of fp32.

python tests/benchmarks/agreement.py --pool POOL --lm LM --sae SAE --out agreement.json
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from measure import Figure, Part, add_inputs, descriptions, log, read_sample, sample_pool
from plain import PlainWay

from sae_ray.chat import Kind, Tokens
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.scorer import LatentScorer, ScorerConfig
from sae_ray.curate.settings import IndexSettings
from sae_ray.distributed.data import build_index
from sae_ray.explain.curation import Curator, Request

BUDGET = 500


def compare_pooled(config: ScorerConfig, sample: str, part: Part) -> None:
    """Hold mean-pooled latents in both precisions against the plain way in fp32."""
    conversations = read_sample(sample)
    scorers = {
        dtype: LatentScorer.load(dataclasses.replace(config, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    }
    exact = scorers["float32"]
    tokenised = exact._tokenize(conversations)
    content = [t.kinds == Kind.CONTENT for t in tokenised if isinstance(t, Tokens)]
    expected = PlainWay(config.lm, config.sae, "float32")(
        conversations, content, batch_rows=32, max_tokens=exact.max_tokens, length_sorted=True
    )
    norms = np.linalg.norm(expected, axis=1)
    for dtype, scorer in scorers.items():
        scored = scorer(conversations, range(len(conversations)))
        assert not scored.unreadable
        gap = scored.block.pooled("mean").toarray() - expected
        relative = (np.linalg.norm(gap, axis=1) / norms).astype(float)
        largest = float(np.abs(gap).max())
        p99 = float(np.quantile(relative, 0.99))
        part.details[f"pooled_{dtype}"] = {
            "rows": len(conversations),
            "largest_difference": largest,
            "relative_l2_mean": float(relative.mean()),
            "relative_l2_p99": p99,
            "relative_l2_max": float(relative.max()),
        }
        if dtype == "float32":
            part.figures += [
                Figure("fp32: largest difference from plain", largest, "", at_most=1e-4),
                Figure("fp32: relative L2 a row, most", relative.max(), "", at_most=1e-4),
            ]
        else:
            part.figures += [
                Figure("bf16: relative L2 a row, mean", 100 * relative.mean(), "%", at_most=2),
                Figure("bf16: relative L2 a row, 99th percentile", 100 * p99, "%"),
            ]


def compare_selections(config: ScorerConfig, sample: str, folder: str, part: Part) -> None:
    """Select from an index in each precision and count what both chose."""
    curators: dict[str, Curator] = {}
    for dtype in ("float32", "bfloat16"):
        path = f"{folder}/{dtype}"
        write_index(dataclasses.replace(config, dtype=dtype), sample, path)
        curators[dtype] = Curator(FeatureIndex(path))
        log(f"indexed in {dtype}")
    overlaps: dict[str, float] = {}
    for task in descriptions():
        chosen = [
            set(curator.answer(Request(task=task, budget_examples=BUDGET)).selection.ids)
            for curator in curators.values()
        ]
        overlaps[task] = len(chosen[0] & chosen[1]) / BUDGET
    values = list(overlaps.values())
    part.details |= {"selection_overlap": overlaps}
    part.figures += [
        Figure(f"selections at {BUDGET}: overlap, mean", 100 * float(np.mean(values)), "%", 97),
        Figure(f"selections at {BUDGET}: overlap, least", 100 * min(values), "%"),
    ]


def write_index(config: ScorerConfig, sample: str, path: str) -> None:
    """Index a sample in this process."""
    settings = IndexSettings(
        pool=sample, lm=config.lm, sae=config.sae, dtype=config.dtype, num_workers=0
    )
    for _ in build_index(settings, path):
        pass


def main() -> None:
    """Compare latents, then selections."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_inputs(parser)
    parser.add_argument("--rows", type=int, default=500, help="whose latents are compared")
    parser.add_argument("--index_rows", type=int, default=20_000, help="to select from")
    parser.add_argument("--out", default="agreement.json")
    options = parser.parse_args()
    config, part = ScorerConfig(options.lm, options.sae), Part("agreement")
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
        small, large = (str(Path(folder, name)) for name in ("small.parquet", "large.parquet"))
        sample_pool(options.pool, options.rows, small)
        compare_pooled(config, small, part)
        sample_pool(options.pool, options.index_rows, large)
        compare_selections(config, large, folder, part)
    part.write(options.out)


if __name__ == "__main__":
    main()
