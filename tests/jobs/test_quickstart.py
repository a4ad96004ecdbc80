import os
from pathlib import Path

import pytest

from jobs import quickstart
from sae_ray.config import run_job


@pytest.mark.slow
def test_the_embedded_default_goes_from_a_sentence_to_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["--num_workers=0", "--budget_examples=20"]
    assert run_job(quickstart.main, quickstart.Config, line) == 0
    shown = capsys.readouterr().out
    assert shown.count("because: ") == 3
    assert Path("out/quickstart/selection/report.html").stat().st_size > 20_000
    # A second task reads the same index, and costs no pass over the pool.
    before = os.stat("out/embedded-index/manifest.json").st_mtime_ns
    line += ["--task=Say which day it will be", "--name=days"]
    assert run_job(quickstart.main, quickstart.Config, line) == 0
    assert os.stat("out/embedded-index/manifest.json").st_mtime_ns == before


def test_a_name_that_is_no_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("..", "a/b", ""):
        assert run_job(quickstart.main, quickstart.Config, [f"--name={name}"]) == 2
        assert "--name" in capsys.readouterr().err
