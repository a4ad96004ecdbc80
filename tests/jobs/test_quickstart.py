import json
from pathlib import Path

import psutil
import pytest

from jobs import quickstart
from sae_ray.config import run_job
from sae_ray.explain.asking import QUESTIONS


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_embedded_default_goes_from_a_sentence_to_a_mixture_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["--num_workers=0", "--budget_examples=120"]
    assert run_job(quickstart.main, quickstart.Config, line) == 0
    shown = capsys.readouterr().out
    assert shown.count("because: ") == 3 + 3 + len(QUESTIONS)
    assert Path("out/quickstart/selection/report.html").stat().st_size > 20_000
    page = Path("out/quickstart/why/report.html")
    assert f"   {page}\n" in shown.partition("Now open")[2]
    found = json.loads(page.with_name("explanation.json").read_text())
    assert found["summary"] in shown
    verified = [one for one in found["latents"] if one["verified"]]
    assert verified, found["summary"]
    assert page.read_text().count(">yes<") >= len(verified)
    for one in verified[:5]:
        assert f"latent {one['latent']}, {one['label']}: alone {one['share']:.0%}" in shown
    asked = shown.partition("both behind one address")[2]
    order, cooking, other = (asked.partition(one)[2].split()[0] for one in QUESTIONS)
    # Of few rows a router may be unsure, but it does not mistake one expert's task for another's.
    assert order in ("expert:", "base:"), asked
    assert cooking == "second:", asked
    assert other == "base:", asked
    assert not processes_of("serve.running"), "the service was left running"


def processes_of(words: str) -> list[psutil.Process]:
    running = psutil.process_iter(["cmdline"])
    return [one for one in running if words in " ".join(one.info["cmdline"] or ())]


def test_a_name_that_is_no_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("..", "a/b", ""):
        assert run_job(quickstart.main, quickstart.Config, [f"--name={name}"]) == 2
        assert "--name" in capsys.readouterr().err
