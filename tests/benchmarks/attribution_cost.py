"""What attribution costs: time beside a pass of training over the same rows, and memory.

    python tests/benchmarks/attribution_cost.py --rows 200 --out cost.json

A steering adapter on the embedded model is trained on half of a domain's rows, with few latents (a
strong L1) and with many; of the others, the pass of training and the attribution take the same
batches in turn, in one process. Memory is what a process holds at most while it attributes, beyond
what it held before, for SAEs of several widths and batches of several sizes, each in a process of
its own: what grows with d_sae times the tokens of a batch is there for one batch at a time, and
twice the rows take none.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from measure import Child, Figure, Part, answer, child_settings, log, spread
from peft import PeftModel
from safetensors.torch import save_file

from sae_ray import tiny
from sae_ray.adapters.attach import AdapterSpec, attach
from sae_ray.adapters.examples import Example, read_examples
from sae_ray.adapters.loading import load_causal
from sae_ray.adapters.replies import labels_of, padded
from sae_ray.chat import ChatTokenizer
from sae_ray.explain.attribution import Attribution, attribute, screen
from sae_ray.explain.dial import Dial, units_of

NUM_BATCHES = 32
"""As many as an attribution reads rows in at least."""
LENGTH = 64
WIDTHS, TOKENS = (1024, 8192), (256, 512)
L1S = {"few latents": 0.01, "many latents": 0.0005}


def read_rows(domain: str, num: int, folder: str) -> list[Example]:
    """Return rows of a domain of the embedded pool, or of all of them where it holds too few."""
    table = pq.read_table(tiny.pool_path())
    mine = table.filter(pc.equal(table["domain"], domain))  # pyright: ignore
    path = f"{folder}/rows.parquet"
    table = mine if mine.num_rows >= num else table
    order = np.random.default_rng(0).permutation(table.num_rows)[:num]
    pq.write_table(table.take(np.sort(order)), path)
    return list(read_examples(path, ChatTokenizer.load(str(tiny.lm_path())), max_tokens=512).rows)


class Learner:
    """One adapter that learns, a batch a step, as the trainer's steps do."""

    def __init__(self, l1: float, sae: str) -> None:
        base = load_causal(str(tiny.lm_path()), "float32")
        self.model: PeftModel = attach(base, AdapterSpec(kind="steering", sae=(sae,), l1=l1))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=0.02)

    def learn(self, rows: Sequence[Example], batches: Sequence[Sequence[int]]) -> None:
        """Make a pass over the rows."""
        for batch in batches:
            ids, real, learnt = padded([rows[i] for i in batch], 0)
            labels = labels_of(ids, learnt)
            inputs = {"input_ids": ids, "attention_mask": real.long(), "labels": labels}
            self.model(**inputs, use_cache=False).loss.backward()
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)


def timing(options: argparse.Namespace, part: Part) -> None:
    """Time passes of training and attributions in turn, on the same batches."""
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
        rows = read_rows("order", 2 * options.rows, folder)
    train, held = rows[::2], rows[1::2]
    for name, l1 in L1S.items():
        learner = Learner(l1, str(tiny.sae_path()))
        units = units_of(held)
        batches = list(Dial(learner.model, 0).batches(units_of(train), NUM_BATCHES))
        for _ in range(options.passes):
            learner.learn(train, batches)
        state = {k: v.clone() for k, v in learner.model.state_dict().items()}
        dial = Dial(learner.model, 0)
        batches = list(dial.batches(units, NUM_BATCHES))
        seconds: dict[str, list[float]] = {"training": [], "attribution": []}
        cpu_s: dict[str, list[float]] = {"training": [], "attribution": []}
        found: Attribution | None = None
        learner.learn(held[:8], [range(8)])  # warms up
        for _ in range(options.rounds):
            started, cpu = time.perf_counter(), time.process_time()
            learner.learn(held, batches)
            seconds["training"].append(time.perf_counter() - started)
            cpu_s["training"].append(time.process_time() - cpu)
            learner.model.load_state_dict(state)
            started, cpu = time.perf_counter(), time.process_time()
            found = attribute(dial, units)
            seconds["attribution"].append(time.perf_counter() - started)
            cpu_s["attribution"].append(time.process_time() - cpu)
            log(f"{name}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in seconds.items()))
            log(f"{name}: {found.num_points} points, gap {found.gap:.1%}")
        assert found is not None
        ratios, by_cpu = (
            [a / b for a, b in zip(one["attribution"], one["training"], strict=True)]
            for one in (seconds, cpu_s)
        )
        points = (
            f"{found.num_points} points, gap {found.gap:.1%}, {found.effect:+.0f} nats; processor "
            f"time {np.median(by_cpu):.1f}x"
        )
        label = f"attribution over a pass of training, {name}"
        ratio = float(np.median(ratios))
        part.figures.append(Figure(label, ratio, "x", at_most=20, note=points))
        part.details[name] = {
            **{what: spread(values) for what, values in seconds.items()},
            "ratio": spread(ratios),
            "ratio of processor time": spread(by_cpu),
            "num_rows": len(held),
            "num_batches": len(batches),
            "num_points": found.num_points,
            "gap": found.gap,
        }


def save_sae(folder: Path, d_sae: int) -> str:
    """Save a random SAE of this width on the embedded model's own hook point."""
    config = json.loads((tiny.sae_path() / "cfg.json").read_text())
    d_in = int(config["d_in"])
    generator = torch.Generator().manual_seed(d_sae)
    W_dec = torch.randn(d_sae, d_in, generator=generator)
    W_dec /= W_dec.norm(dim=-1, keepdim=True)
    weights = {"W_enc": W_dec.T.contiguous(), "W_dec": W_dec, "threshold": torch.ones(d_sae)}
    weights |= {"b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(d_in)}
    folder.mkdir()
    save_file(weights, folder / "sae_weights.safetensors")
    hook = config["metadata"]["hook_name"]
    about = {
        **{"d_in": d_in, "d_sae": d_sae, "dtype": "float32", "architecture": "jumprelu"},
        **{"apply_b_dec_to_input": False, "normalize_activations": "none"},
        "metadata": {"hook_name": hook, "model_name": config["metadata"].get("model_name", "")},
    }
    (folder / "cfg.json").write_text(json.dumps(about))
    return str(folder)


def prepare(settings: dict) -> Callable[[dict], dict]:
    """Make an adapter on a SAE; on request, take slopes and say what was held beyond before."""
    torch.set_num_threads(1)
    model = Learner(0.0, settings["sae"]).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    rng, learnt = np.random.default_rng(0), np.arange(LENGTH) > 0

    def repeat(request: dict) -> dict:
        rows = [
            Example(f"row-{i}", rng.integers(10, 500, LENGTH).astype(np.int32), learnt)
            for i in range(request["rows"])
        ]
        units, dial = units_of(rows), Dial(model, 0, batch_tokens=request["tokens"])
        screen(dial, units[:1])  # what is loaded once is loaded
        # The greatest size so far is forgotten: that of loading, and of the process that forked.
        Path("/proc/self/clear_refs").write_text("5")
        before = _held("VmRSS")
        screen(dial, units)  # one point of the path: they come one after the other
        assert max(map(len, dial.batches(units, NUM_BATCHES))) * LENGTH == request["tokens"]
        return {"mib": (_held("VmHWM") - before) / 2**20}

    return repeat


def _held(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def memory(part: Part) -> None:
    """Attribute with SAEs of two widths and batches of two sizes, and with twice the rows."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    grown: dict[tuple[int, int, int], float] = {}
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
        saes = {width: save_sae(Path(folder) / str(width), width) for width in WIDTHS}
        for width, sae in saes.items():
            child = Child(__file__, {"sae": sae}, settings)
            for tokens, times in ((TOKENS[0], 1), (TOKENS[1], 1), (TOKENS[0], 2)):
                rows = times * NUM_BATCHES * tokens // LENGTH
                child.send({"tokens": tokens, "rows": rows})
                held = grown[width, tokens, times] = child.receive()["mib"]
                log(f"d_sae {width}, batches of {tokens} tokens, {rows} rows: {held:.1f} MiB")
            child.close()
    narrow, wide = (grown[width, TOKENS[0], 1] for width in WIDTHS)
    longer = [grown[width, TOKENS[1], 1] for width in WIDTHS]
    cells = (WIDTHS[1] - WIDTHS[0]) * (TOKENS[1] - TOKENS[0])
    each = 2**20 * (longer[1] - longer[0] - wide + narrow) / cells
    times, batch = WIDTHS[1] // WIDTHS[0], f"batches of {TOKENS[0]:,} tokens"
    more = grown[WIDTHS[1], TOKENS[0], 2] / wide
    wider = f"{wide / narrow:.1f}x for {times}x"
    part.figures += [
        Figure(f"memory of attribution, d_sae {WIDTHS[0]:,}, {batch}", narrow, "MiB"),
        Figure(f"the same, d_sae {WIDTHS[1]:,}", wide, "MiB", note=wider),
        Figure(f"the same, d_sae {WIDTHS[0]:,}, twice the tokens a batch", longer[0] / narrow, "x"),
        Figure(f"the same, d_sae {WIDTHS[1]:,}, twice the tokens a batch", longer[1] / wide, "x"),
        Figure("twice the rows, the same batches", more, "x", at_most=1.1),
        Figure("bytes for a latent and a token of a batch", each, "B"),
    ]  # fmt: skip
    part.details["MiB by d_sae, tokens a batch and times the rows"] = {
        " ".join(map(str, key)): value for key, value in grown.items()
    }


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200, help="attributed, and as many learnt")
    parser.add_argument("--passes", type=int, default=3, help="of training before it")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--out", default="attribution_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    part = Part("attribution_cost")
    if options.only != "memory":
        timing(options, part)
    if options.only != "time":
        memory(part)
    part.write(options.out)


if __name__ == "__main__":
    if settings := child_settings():
        answer(prepare(settings))
    else:
        main()
