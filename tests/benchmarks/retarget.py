"""Re-targeting: how soon another sentence is answered from an index that is there.

    python tests/benchmarks/retarget.py --work DIR --out retarget.json

Once in a process that is ready, and once as the whole command with its report. Says, too, what the
index takes on disk, and that a finished one starts neither Ray nor the whole model.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import memory
from measure import (
    ROOT,
    Child,
    Crew,
    Figure,
    Part,
    add_inputs,
    answer,
    child_settings,
    descriptions,
    log,
    run_watched,
    spread,
)

from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.sources import locate_source
from sae_ray.explain.curation import Curator, Request
from sae_ray.lm import load_config


def prepare_ready(settings: dict) -> Callable[[dict], dict]:
    """Open an index in a process that stays."""
    curator = Curator(FeatureIndex(settings["index"]))

    def repeat(request: dict) -> dict:
        started = time.time()
        curator.curate(Request(task=request["task"]), request["path"])
        written = Path(request["path"], "selection.parquet").stat().st_mtime
        model = curator.index.scorer.lm.model
        return {
            "selection_s": written - started,
            "all_s": time.time() - started,
            "layers": model.config.num_hidden_layers,
            "head": model.get_output_embeddings() is not None,
            "ray": "ray" in sys.modules,
        }

    return repeat


def main() -> None:
    """Ask several sentences in both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_inputs(parser)
    parser.add_argument("--index", help="a finished one; if not given, it is made in WORK")
    parser.add_argument("--size", type=int, default=91_092, help="rows, if it has to be made")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="retarget.json")
    options = parser.parse_args()
    options.index = options.index or str(memory.index(options, options.size)[0])
    part, index = Part("retarget"), FeatureIndex(options.index)
    tasks = descriptions()[: options.repeats + 1]
    ready = Crew([Child(__file__, {"index": options.index}, {})])
    answers: list[dict] = []
    commands: list[float] = []
    names: list[str] = []
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
        for i, task in enumerate(tasks):
            _, (one,) = ready.run({"task": task, "path": f"{folder}/ready-{i}"})
            command = [sys.executable, str(ROOT / "jobs" / "curate.py"), "--task", task]
            command += ["--index", options.index, "--out", f"{folder}/command-{i}"]
            seconds, peaks = run_watched(command, every_s=0.2)
            log(f"ready {one['selection_s']:.2f} s, command {seconds:.2f} s: {task}")
            answers.append(one)
            commands.append(seconds)
            names += [peak.name for peak in peaks]
    ready.close()
    daemons = [name for name in names if "raylet" in name or "gcs_server" in name]
    layers = load_config(locate_source("lm", index.source("lm"))).num_hidden_layers
    num_bytes = sum(file.bytes for file in index.manifest.files.values())
    later = [one["selection_s"] for one in answers[1:]]
    whole = statistics.median(one["all_s"] for one in answers[1:])
    loaded, head = answers[0]["layers"], answers[0]["head"]
    part.figures += [
        Figure("another description, ready process", statistics.median(later), "s", at_most=5),
        Figure("the same with its report", whole, "s"),
        Figure("the first description, process just started", answers[0]["selection_s"], "s"),
        Figure("the whole command", statistics.median(commands), "s", at_most=15),
        Figure("processes of Ray started", len(daemons), "", at_most=0),
        Figure("layers loaded", loaded, f"of {layers}", note="and the head" if head else "no head"),
        Figure("bytes per row of the index", num_bytes / index.num_rows, "B", at_most=6144),
    ]
    part.details |= {
        "rows": index.num_rows,
        "index_mb": num_bytes / 1e6,
        "ready_selection_s": spread(later),
        "command_s": spread(commands),
        "ready": answers,
        "tasks": tasks,
    }
    part.write(options.out)


if __name__ == "__main__":
    if settings := child_settings():
        answer(prepare_ready(settings))
    else:
        main()
