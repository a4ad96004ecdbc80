"""The job: from a model, a SAE and conversations to labels, with a judge and without one."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import label_latents
from sae_ray import tiny
from sae_ray.artifacts import content_hash, open_artifact, verify
from sae_ray.config import run_job
from sae_ray.explain.labelling import KIND
from sae_ray.sae.labels import read_labels
from tests.endpoint import Endpoint, serve

KEY = "sk-very-secret"


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A judge that decides from the text alone, by the commonest marked piece."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def rule(text: str) -> str:
        ask, _, rest = text.partition("\n\n")
        excerpts = re.split(r"(?:\A|\n\n)\d+:\n", rest)[1:]
        if '"label"' in ask:
            marked = Counter(one for one in re.findall("<<(.*?)>>", rest) if one.strip())
            return json.dumps({"label": marked.most_common(1)[0][0]})
        if '"score"' in ask:
            return '{"score": 4}'
        label = re.findall(r"respond to: (.*)", ask)[0]
        sought = f"<<{label}" if "marked" in ask else label
        return str([int(sought in one) for one in excerpts])

    with serve() as server:
        server.rule = rule
        yield server


@pytest.fixture
def line(
    tmp_path: Path, tiny_lm: Path, tiny_sae: Path, make_pool: Callable[[Path, int], Path]
) -> list[str]:
    pool = make_pool(tmp_path / "pool.jsonl", 60)
    with pool.open("a") as file:
        file.write("{broken\n")
    return [f"--lm={tiny_lm}", f"--sae={tiny_sae}", f"--data={pool}", f"--out={tmp_path}/out"]


def run(*flags: str) -> int:
    return run_job(label_latents.main, label_latents.Config, flags)


def test_without_flags_it_labels_the_embedded_sae(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    config = Path(label_latents.__file__).parent / "configs/smoke/label_latents.yaml"
    small = ("--max_conversations=200", f"--config={config}")
    assert run(f"--out={out}", *small) == 0
    assert "of 1,024 latents labelled" in capsys.readouterr().out
    verify(str(out))
    labels = read_labels(out / "labels.json", tiny.sae_path())
    assert len(labels) > 100
    assert read_labels(out / "neuronpedia", tiny.sae_path()) == labels
    assert read_labels(out, tiny.sae_path()) == labels
    embedded = read_labels(tiny.labels_path(), tiny.sae_path())
    shared = labels.keys() & embedded.keys()
    # Of a twentieth of the rows: chance would be two in a hundred.
    assert sum(labels[one] == embedded[one] for one in shared) > 0.2 * len(shared)
    rows = pq.read_table(out / "latents.parquet").to_pylist()
    assert [row["latent"] for row in rows] == list(range(1024))
    assert all(row["promoted"] and len(row["neighbours"]) == 4 for row in rows)
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "latents</b> have a label" in page


def test_a_judge_names_and_scores_latents(
    judge: Endpoint, line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*line, f"--judge_url={judge.url}", "--judge_model=m", "--judge_latents=10"]
    assert run(*flags) == 0
    manifest = open_artifact(f"{tmp_path}/out", KIND)
    found = manifest.extra["judge"]
    assert isinstance(found, dict)
    assert found["num_unparsed"] == found["num_unanswered"] == 0
    assert found["num_asked"] == len(judge.asked) == found["estimate"]["num_requests"]  # pyright: ignore
    assert found["rubric_4_or_5"]["share"] == 1  # pyright: ignore
    rows = pq.read_table(tmp_path / "out/latents.parquet").to_pylist()
    judged = [row for row in rows if row["rubric"] is not None]
    assert len(judged) == found["num_latents"]
    assert all(row["judge_label"] and row["fuzzing_num"] > 0 for row in judged)
    assert sum(row["detection_num"] > 0 for row in judged) > 3  # the others are on everywhere
    kept = [row for row in judged if row["label_kind"] == "judged"]
    assert all(row["detection_low"] > 0.5 and row["label"] == row["judge_label"] for row in kept)
    assert manifest.extra["num_rejected"] == 1
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()
    assert KEY not in "".join(capsys.readouterr())
    # A finished run asks nothing again.
    before = len(judge.asked)
    assert run(*flags) == 0
    assert len(judge.asked) == before


def test_a_judge_that_goes_away_loses_nothing(
    judge: Endpoint, line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*line, f"--judge_url={judge.url}", "--judge_model=m", "--judge_latents=6"]
    for _ in range(5):
        judge.says('{"label": "customer", "score": 3}')
    for _ in range(20):
        judge.replies("no credit", 402)
    assert run(*flags, "--judge_at_once=1") == 2
    error = capsys.readouterr().err
    assert "no credit" in error
    assert "5 verdicts are kept in" in error
    judge.answers.clear()
    judge.asked.clear()
    assert run(*flags) == 0
    found = open_artifact(f"{tmp_path}/out", KIND).extra["judge"]
    assert isinstance(found, dict)
    assert found["num_asked"] == len(judge.asked) + 5  # pyright: ignore[reportOperatorIssue]


def test_tags_that_a_pool_holds_become_labels_and_wrong_ones_are_rejected(
    tmp_path: Path, tiny_lm: Path, tiny_sae: Path
) -> None:
    rows = [
        {
            "id": f"{i}",
            "messages": [
                {"role": "user", "content": "Write a query that counts the orders"},
                {"role": "assistant", "content": "since the last day of May"},
            ],
            "concepts": ["travel"],
            "spans": [{"message": 0, "start": 8, "end": 13, "concept": "asking"}],
        }
        for i in range(40)
    ]
    rows[3]["spans"] = [{"message": 7, "start": 0, "end": 1, "concept": "x"}]
    rows[4]["concepts"] = "travel"
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = [f"--lm={tiny_lm}", f"--sae={tiny_sae}", f"--data={pool}", f"--out={tmp_path}/out"]
    for copy in ("", "-2"):
        assert run(*line[:-1], line[-1] + copy) == 0
    assert content_hash(f"{tmp_path}/out", KIND) == content_hash(f"{tmp_path}/out-2", KIND)
    rejected = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert [(row["row"], row["reason"]) for row in rejected] == [
        (3, "a span names a message that is not there"),
        (4, "concepts or spans are no tags"),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lm=x"], "--lm is given without --sae"),
        (["--judge_url=http://h/v1"], "--judge_url is given without --judge_model"),
        (["--judge_url=h", "--judge_model=m"], "is not on the web"),
        (["--data=nowhere.jsonl"], "does not exist"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*flags, f"--out={tmp_path}/out", "--max_conversations=40") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") - error.count("INFO") - error.count("WARNING") <= 1


def test_too_many_unreadable_rows_stop_it(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "pool.jsonl").open("a") as file:
        file.write("{broken\n" * 30)
    assert run(*line) == 2
    assert re.search(r"31 rows of .* cannot be read .*at most 10%", capsys.readouterr().err)
