import gzip
import html
import json
import logging
import re
import shlex
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import curate
from sae_ray.artifacts import hash_file
from sae_ray.config import run_job
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.request import Request
from sae_ray.errors import ConfigError, PoolError, SaeRayError
from sae_ray.explain.curation import Curator
from tests.endpoint import serve

TASK = "Write songs for the piano"
KEY = "sk-very-secret"


@pytest.fixture(scope="module")
def curator(small_index: FeatureIndex) -> Curator:
    return Curator(small_index)


def text_of(page: Path) -> str:
    """Return what a page shows."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def next_command(page: Path) -> list[str]:
    """Return the arguments of the command that a page composes."""
    found = re.search(r'<pre id="command"[^>]*>(.*?)</pre>', page.read_text(), re.DOTALL)
    assert found
    python, job, *arguments = shlex.split(html.unescape(found[1]))
    assert (python, job) == ("python", "jobs/curate.py")
    return arguments


def test_columns_that_the_user_named_are_shown_beside_the_selection(
    curator: Curator, tmp_path: Path
) -> None:
    manifest = curator.curate(Request(task=TASK, budget_examples=10), str(tmp_path / "out"))
    shown = text_of(tmp_path / "out/report.html")
    # 20 of the 80 rows are in the pool under each of three names, and 20 under none.
    assert re.search(r"shelf pool chosen .*<shelf of rivers> 25 % \d", shown)
    assert "(none) 25 %" in shown
    assert re.search(r"score [\d.]+ \d+ tokens <shelf of \w+> (row|copy)-\d+", shown)
    assert manifest.extra["num_over_quota"] == 0


def test_the_page_says_what_share_of_the_score_each_part_carries(
    curator: Curator, tmp_path: Path
) -> None:
    asked = Request(task=TASK, budget_examples=10)
    outcome = curator.answer(asked)
    rows, scores = outcome.selection.rows, outcome.scores
    lifts = {name: max(float(part[rows].mean()), 0.0) for name, part in scores.parts.items()}
    assert set(lifts) == {"latents", "hidden", "lexical"}
    assert sum(part[rows].mean() for part in scores.parts.values()) == pytest.approx(
        float(scores.total[rows].mean()), abs=1e-4
    )
    curator.curate(asked, str(tmp_path / "out"))
    said = re.search(
        r"What lifts the selection above the pool: latents ([\d.]+) %, the mean hidden state "
        r"([\d.]+) %, the words ([\d.]+) %",
        text_of(tmp_path / "out/report.html"),
    )
    assert said
    for share, name in zip(said.groups(), ("latents", "hidden", "lexical"), strict=True):
        assert float(share) == pytest.approx(100 * lifts[name] / sum(lifts.values()), abs=0.5)


def tokens_named(out: Path) -> list[bool]:
    """Return for each row of a selection whether its reasons name tokens."""
    rows = pq.read_table(out / "selection.parquet")["reasons"].to_pylist()
    return [any(reason["tokens"] for reason in reasons) for reasons in rows]


def test_a_large_model_reads_again_what_the_page_shows_in_full_and_more_if_asked(
    curator: Curator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Request(task=TASK, budget_examples=30)
    curator.curate(asked, str(tmp_path / "small"))
    assert tokens_named(tmp_path / "small") == [True] * 30
    assert "were not read again" not in text_of(tmp_path / "small/report.html")
    monkeypatch.setattr("sae_ray.explain.curation.LIGHT_BYTES", 0)
    manifest = curator.curate(asked, str(tmp_path / "large"))
    assert tokens_named(tmp_path / "large") == [True] * 12 + [False] * 18
    assert manifest.extra["num_rows_with_tokens"] == 12
    shown = text_of(tmp_path / "large/report.html")
    assert "18 of the rows chosen were not read again" in shown
    assert "--explain_rows 30" in shown
    more = asked.model_copy(update={"explain_rows": 20})
    curator.curate(more, str(tmp_path / "more"))
    assert tokens_named(tmp_path / "more") == [True] * 20 + [False] * 10
    # Which rows, in which order and why does not depend on it.
    small, large = (
        pq.read_table(tmp_path / name / "selection.parquet").to_pylist()
        for name in ("small", "large")
    )
    for row in (*small, *large):
        row["reasons"] = [(one["latent"], one["weight"]) for one in row["reasons"]]
    assert small == large


def test_near_copies_are_passed_over_and_counted(curator: Curator, tmp_path: Path) -> None:
    manifest = curator.curate(Request(task=TASK, budget_examples=40), str(tmp_path / "out"))
    passed = manifest.extra["num_near_duplicates"]
    assert isinstance(passed, int)
    assert passed > 0
    shown = text_of(tmp_path / "out/report.html")
    assert re.search(r"Of 80 rows spread evenly over the pool, (19|20) \(2\d %\) nearly", shown)
    assert f"On the way to the 40 rows chosen, {passed} were passed over" in shown


def test_a_quota_holds_and_says_whom_it_kept_out(curator: Curator, tmp_path: Path) -> None:
    wanted = Request(task=TASK, budget_examples=20)
    column = curator.index.column("shelf")
    freely = curator.answer(wanted).selection.rows
    value, count = Counter(column[row] for row in freely).most_common(1)[0]
    assert count > 8
    limited = wanted.model_copy(update={"quota": 0.4, "quota_column": "shelf"})
    rows = curator.answer(limited).selection.rows
    assert Counter(column[row] for row in rows)[value] == 8
    manifest = curator.curate(limited, str(tmp_path / "out"))
    kept_out = len(set(freely.tolist()) - set(rows.tolist()))
    assert manifest.extra["num_over_quota"] == kept_out >= count - 8
    shown = text_of(tmp_path / "out/report.html")
    assert f"{kept_out} rows gave way, so that no shelf has over 40% of the selection" in shown


@pytest.mark.parametrize("form", ["messages", "prompt", "instruction", "conversations"])
def test_rows_that_an_evaluation_file_holds_are_counted_in_every_form(
    curator: Curator, tmp_path: Path, form: str
) -> None:
    first, second = curator.index.conversations(
        curator.answer(Request(task=TASK, budget_examples=40)).selection.rows[:2]
    )
    rows = []
    for one in (first, second):
        asked, answered = (m["content"] for m in one.messages)
        rows.append(
            {
                "messages": {"messages": one.messages},
                "prompt": {"prompt": asked, "completion": "another answer"},
                "instruction": {"instruction": asked, "input": "", "output": "another"},
                "conversations": {"conversations": [{"from": "human", "value": asked},
                                                    {"from": "gpt", "value": answered}]},
            }[form]
        )  # fmt: skip
    leaky, clean = tmp_path / "leaky.jsonl", tmp_path / "clean.jsonl"
    leaky.write_text("".join(json.dumps(row) + "\n" for row in rows))
    clean.write_text(json.dumps({"prompt": "Nothing of the pool", "completion": "is here"}))
    asked = Request(task=TASK, budget_examples=40, evaluation=(str(leaky), str(clean)))
    manifest = curator.curate(asked, str(tmp_path / "out"))
    counts = manifest.extra["contaminated"]
    assert counts == {str(leaky): 2, str(clean): 0}
    (warning,) = [one for one in manifest.warnings if "repeat what" in one]
    assert first.id in warning
    assert second.id in warning
    assert warning in text_of(tmp_path / "out/report.html")


def test_an_endpoint_is_asked_once_and_its_key_is_kept_to_itself(
    curator: Curator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    written = [{"prompt": "sing piano song voice chord", "response": "song"}] * 3
    out = tmp_path / "out"
    with serve() as endpoint:
        endpoint.says(json.dumps(written))
        asked = Request(task="Zzyzx", budget_examples=10, pseudo_url=endpoint.url, pseudo_model="m")
        curator.curate(asked, str(out))
        ((_, headers, _),) = endpoint.asked
    assert headers["Authorization"] == f"Bearer {KEY}"
    for file in out.rglob("*"):
        assert KEY.encode() not in file.read_bytes()
    said = capfd.readouterr()
    assert KEY not in said.out + said.err + caplog.text
    profile = json.loads((out / "profile.json").read_text())
    assert {seed["channel"] for seed in profile["seeds"]} == {"pseudo"}
    # The page's command reads what was written: the endpoint is gone, the answer the same.
    assert run_job(curate.main, curate.Config, next_command(out / "report.html")) == 0
    again = pq.read_table(f"{out}-2/selection.parquet")
    assert again.equals(pq.read_table(out / "selection.parquet"))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"budget_examples": 81}, "80 readable rows"),
        ({"quota": 0.5}, "quota_column"),
        ({"quota": 0.5, "quota_column": "source"}, "carries shelf"),
        ({"examples": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"evaluation": ("nowhere.jsonl",)}, "nowhere.jsonl"),
    ],
)
def test_what_can_be_refused_at_once_asks_nothing_of_an_endpoint(
    curator: Curator, tmp_path: Path, wrong: dict[str, object], says: str
) -> None:
    with serve() as endpoint:
        asked = {"task": TASK, "budget_examples": 5, "pseudo_url": endpoint.url} | wrong
        with pytest.raises(SaeRayError, match=says):
            curator.curate(Request(**asked, pseudo_model="m"), str(tmp_path / "out"))  # pyright: ignore
        assert endpoint.asked == []
    assert not (tmp_path / "out").exists()


def test_half_of_an_endpoint_is_refused(curator: Curator) -> None:
    with pytest.raises(ConfigError, match="pseudo_url and pseudo_model go together"):
        curator.answer(Request(task=TASK, pseudo_model="m", budget_examples=5))


def test_pseudo_queries_come_from_a_file_or_an_endpoint_and_not_from_both(
    curator: Curator, tmp_path: Path
) -> None:
    file = tmp_path / "written.txt"
    file.write_text("Write a song for the piano\n")
    with serve() as endpoint:
        for url in (endpoint.url, None):
            asked = Request(
                task=TASK,
                budget_examples=5,
                pseudo_queries=str(file),
                pseudo_url=url,
                pseudo_model="m",
            )
            with pytest.raises(ConfigError, match=r"pseudo_queries='.*leave one of them out"):
                curator.answer(asked)
        assert endpoint.asked == []


def test_an_evaluation_file_with_a_bad_row_is_refused(curator: Curator, tmp_path: Path) -> None:
    file = tmp_path / "e.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{broken\n')
    with pytest.raises(PoolError, match="1 rows cannot be read, the first being row 1"):
        curator.answer(Request(task=TASK, evaluation=(str(file),), budget_examples=5))


def test_the_command_that_a_page_composes_runs_and_keeps_labels_and_strictness(
    small_index: FeatureIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_for = small_index.manifest.sources["sae"].name
    labels = tmp_path / "my labels.json"
    weights = Path(made_for) / "sae_weights.safetensors"
    named = [{"latent": latent, "label": f"piano song {latent}"} for latent in range(64)]
    labels.write_text(json.dumps({"sae_sha256": hash_file(str(weights)).sha256, "latents": named}))
    line = ["--task=Zzyzx", "--budget_examples=5", f"--index={small_index.path}", "--strict"]
    line += [f"--labels={labels}", f"--out={tmp_path}/out", "--scorer=hidden", "--selector=topk"]
    assert run_job(curate.main, curate.Config, line) == 3
    assert run_job(curate.main, curate.Config, next_command(tmp_path / "out/report.html")) == 3
    for out in ("out", "out-2"):
        rows = pq.read_table(tmp_path / out / "selection.parquet").to_pylist()
        assert {r["label"].split()[0] for row in rows for r in row["reasons"]} == {"piano"}
    configs = [json.loads((tmp_path / out / "manifest.json").read_text())["config"]
               for out in ("out", "out-2")]  # fmt: skip
    assert configs[0] == configs[1]
    assert configs[0]["selector"] == "topk"


def test_labels_may_be_a_folder_of_neuronpedias(
    small_index: FeatureIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny/1-res/explanations"
    folder.mkdir(parents=True)
    about = {"modelId": "tiny", "layer": "1-res"}
    rows = [
        {**about, "index": str(latent), "description": f"piano song {latent}"}
        for latent in reversed(range(64))
    ]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (folder / "batch-0.jsonl.gz").write_bytes(packed)
    line = ["--task=Zzyzx", "--budget_examples=5", f"--index={small_index.path}"]
    line += [f"--labels={tmp_path}/tiny", f"--out={tmp_path}/out", "--scorer=hidden"]
    assert run_job(curate.main, curate.Config, line) == 0
    assert "warning: whether tiny/1-res names the latents of" in capsys.readouterr().out
    named = pq.read_table(tmp_path / "out/selection.parquet")["reasons"].to_pylist()
    assert all(one["label"] == f"piano song {one['latent']}" for row in named for one in row)
    (folder / "batch-1.jsonl.gz").write_bytes(packed[:-30])
    assert run_job(curate.main, curate.Config, [*line[:-2], f"--out={tmp_path}/two"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{folder}/batch-1.jsonl.gz, after line" in error
