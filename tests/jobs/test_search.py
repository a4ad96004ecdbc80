"""A search from its line to its page: nothing lost when it is killed, wrong lines told at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from jobs import finetune, search
from sae_ray import tiny
from sae_ray.artifacts import open_artifact, verify
from sae_ray.config import run_job
from sae_ray.distributed.study import KIND
from tests.conftest import ROOT

SMOKE = f"--config={ROOT}/jobs/configs/smoke/search.yaml"


def run(*words: str) -> int:
    return run_job(search.main, search.Config, list(words))


def trials(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "trials").glob("*.json"))}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_that_is_killed_goes_on_and_trains_nothing_twice(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    command = [sys.executable, str(ROOT / "jobs/search.py"), SMOKE, f"--out={out}"]
    job = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while job.poll() is None and len(trials(out)) < 2:
        time.sleep(0.1)
    assert job.poll() is None, "it ended before it could be killed"
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    before = trials(out)
    assert not (out / "manifest.json").exists()
    # What was being written is no record; a record that cannot be read is named, not skipped.
    (out / "trials" / ".write-0123456789ab").write_text("{")
    torn = out / "trials" / "00003.json"
    if torn.name not in before:
        torn.write_bytes(next(iter(before.values()))[:50])
        assert run(SMOKE, f"--out={out}") == 2
        assert "00003.json is no record of a trial" in capsys.readouterr().err
        torn.unlink()
    assert run(SMOKE, f"--out={out}") == 0
    (out / "trials" / ".write-0123456789ab").unlink(missing_ok=True)
    verify(str(out))
    after = trials(out)
    assert before.items() <= after.items()
    rows = pq.read_table(out / "trials.parquet").to_pylist()
    searched = [row for row in rows if row["role"] == "searched"]
    assert [row["number"] for row in searched] == [0, 1, 2, 3]
    assert len({row["point"] for row in searched}) == 4
    assert [row["seed"] for row in rows if row["role"] == "reference"] == [1, 2, 3]
    assert all(row["steps"] < row["total_steps"] for row in rows if row["status"] == "pruned")
    assert all(row["gain_low"] <= row["gain"] <= row["gain_high"] for row in rows)
    for row in searched:
        point = json.loads(row["point"])
        place = ("2", "resid_post") if point["adapter"] == "steering" else (
            "+".join(map(str, point["layers"])), "all"
        )  # fmt: skip
        assert (row["layer"], row["component"]) == place
    shown = capsys.readouterr().out
    summary = str(open_artifact(str(out), KIND).extra["summary"])
    assert summary in shown
    assert summary.split(":")[0] in (out / "report.html").read_text()
    # A finished study is left alone; its folder is no other study's.
    assert run(SMOKE, f"--out={out}") == 0
    assert trials(out) == after
    assert run(SMOKE, f"--out={out}", "--space={adapter: [lora], r: [2, 4]}") == 2
    assert "holds a finished study of another run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_best_settings_are_a_config_that_trains_as_it_is(
    ray_cluster: None, tmp_path: Path
) -> None:
    out, pool = tmp_path / "study", tmp_path / "order.parquet"
    table = pq.read_table(tiny.pool_path())
    pq.write_table(table.filter([one == "order" for one in table["domain"].to_pylist()]), pool)
    few = ["--space={adapter: [subspace, steering], learning_rate: [0.001, 0.01]}"]
    few += ["--num_trials=4", "--no-prune", "--span_rows=60", f"--data={pool}"]
    assert run(SMOKE, *few, f"--out={out}") == 0
    best = yaml.safe_load((out / "best.yaml").read_text())
    rows = pq.read_table(out / "trials.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"finished"}
    assert {row["component"] for row in rows} == {"all", "subspace", "resid_post"}
    assert best["adapter"] in ("lora", "subspace", "steering")
    assert "num_workers" not in best
    line = [f"--config={out}/best.yaml", "--num_workers=0", f"--out={tmp_path / 'expert'}"]
    assert run_job(finetune.main, finetune.Config, line) == 0
    card = json.loads((tmp_path / "expert" / "card.json").read_text())
    assert card["adapter"] == best["adapter"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_preferences_are_searched_at_like_distances_from_the_base(
    ray_cluster: None, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    few = ["--objective=dpo", "--space={adapter: [lora, scale]}", "--num_trials=3", "--no-prune"]
    assert run(SMOKE, *few, "--max_divergence=0.5", f"--out={out}") == 0
    rows = pq.read_table(out / "trials.parquet").to_pylist()
    assert all(0 <= row["divergence"] <= 0.5 for row in rows if row["loss"] is not None)
    assert any(row["loss"] is not None for row in rows)
    (warning,) = open_artifact(str(out), KIND).warnings
    assert warning.startswith("2 trials of the 3 asked for")
    assert "pairs ranked right" in str(open_artifact(str(out), KIND).extra["summary"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--space {adaptor:[lora]}", "space.adaptor is no setting that may be searched"),
        ("--space nowhere.yaml", "--space 'nowhere.yaml' cannot be read"),
        ("--space {adapter:[lora],layers:[[9]]}", "adapter=lora, layers=9 cannot be: layers=9"),
        (
            "--space {adapter:[steering],hook_point:[blocks.9.hook_resid_post]}",
            "hook_point=blocks.9.hook_resid_post cannot be",
        ),
        ("--space {adapter:[steering],sae:[nowhere]}", "sae=nowhere cannot be"),
        ("--space {adapter:[full]} --objective dpo", "adapter=full cannot be"),
        ("--space {r:[4,8]} --r 2", "is given and searched too"),
        ("--space {adapter:[steering]} --hidden 4", "--hidden does nothing for --adapter steering"),
        ("--lm elsewhere", "--lm needs --space"),
        ("--zero_stage 3", "--zero_stage does nothing in a search"),
        ("--num_trials 0", "--num_trials="),
        ("--sampler bohb", "--sampler="),
        ("--data nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_wrong_lines_are_refused_at_once_and_write_nothing(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    assert run(*line.replace(":[", ": [").replace(",", ", ").split(" --")[0].split(" ", 1),
               *[word for more in line.split(" --")[1:] for word in f"--{more}".split(" ", 1)],
               f"--out={out}") == 2  # fmt: skip
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_where_every_trial_fails_the_reason_is_told(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    few = ["--space={learning_rate: [1e30, 1e31]}", "--num_trials=2"]
    assert run(SMOKE, *few, f"--out={out}") == 2
    told = capsys.readouterr().err
    assert "none of 2 trials may be chosen" in told
    assert "learning_rate" in told
    assert len(trials(out)) == 2
    shutil.rmtree(out)
