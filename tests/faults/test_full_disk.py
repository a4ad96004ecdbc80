"""A disk that fills up ends a run with one line, and the same line goes on when there is room."""

import json
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from sae_ray.curate.settings import IndexSettings

ROOT = Path(__file__).parent.parent.parent
DEADLINE_S = 100

LIMITED = """
import resource, sys
from sae_ray.config import run_job
sys.path.insert(0, {root!r})
from jobs import {job} as job

limit = int(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
sys.exit(run_job(job.main, job.Config, sys.argv[2:]))
"""


def run(folder: Path, job: str, largest_file: int, *flags: str) -> tuple[int, str]:
    """Run a job that may write no larger file, as on a disk without more room than that."""
    script = folder / f"{job}.py"
    script.write_text(LIMITED.format(root=str(ROOT), job=job))
    line = [sys.executable, str(script), str(largest_file), *flags]
    done = subprocess.run(line, capture_output=True, text=True, timeout=DEADLINE_S)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_index_and_selection_go_on_when_there_is_room_again(
    tiny_settings: IndexSettings, tmp_path: Path
) -> None:
    # Of words that occur once, the lexical index is the largest file.
    rng = random.Random(0)
    words = (f"{rng.getrandbits(64):x}" for _ in range(60 * 200))
    rows = [{"prompt": " ".join(islice(words, 200)), "completion": "piano"} for _ in range(60)]
    Path(tiny_settings.pool_source).write_text("".join(json.dumps(one) + "\n" for one in rows))
    flags = tiny_settings.model_dump(exclude={"keep_columns", "check_fit"}) | {"max_tokens": 8}
    line = ["--no-check_fit", *(f"--{name}={value}" for name, value in flags.items())]
    index, out = tmp_path / "index", tmp_path / "out"
    for limit, place in ((20_000, "shards/00000.parquet"), (100_000, "lexical index")):
        code, said = run(tmp_path, "index", limit, *line, f"--out={index}")
        errors = [one for one in said.splitlines() if one.startswith("error: ")]
        assert code == 2, said
        assert len(errors) == 1
        assert place in errors[0]
        assert "free some" in errors[0]
        assert "Traceback" not in said
        assert not (index / "manifest.json").exists()
    assert len(list(index.glob("shards/*"))) == 4
    assert run(tmp_path, "index", 0, *line, f"--out={index}")[0] == 0

    request = ["--task=Write songs for the piano", "--budget_examples=12", f"--index={index}"]
    code, said = run(tmp_path, "curate", 20_000, *request, f"--out={out}")
    assert code == 2, said
    assert "no space left to write" in said
    assert "Traceback" not in said
    assert run(tmp_path, "curate", 0, *request, f"--out={out}")[0] == 0
    assert not list(out.glob(".*"))
