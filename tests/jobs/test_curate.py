import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import curate, index
from sae_ray.artifacts import content_hash, read_file, verify
from sae_ray.config import run_job
from sae_ray.explain.curation import KIND

TASK = "Write songs for the piano"


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_lm_of: Callable[[str], Path],
    make_tiny_sae: Callable[[Path], Path],
    make_pool: Callable[[Path, int], Path],
) -> dict[str, str]:
    """A pool with one nasty row, a model, a SAE and their index, made by the job."""
    folder = tmp_path_factory.mktemp("world")
    pool = make_pool(folder / "pool.jsonl", 60)
    nasty = {
        "id": "<b>nasty</b>",
        "source": "</script><script>alert(1)</script>",
        "messages": [
            {"role": "user", "content": "<script>alert('piano song')</script>"},
            {"role": "assistant", "content": "piano song voice </script>"},
        ],
    }
    with pool.open("a") as file:
        file.write(json.dumps(nasty) + "\n{broken\n")
    sae = make_tiny_sae(folder / "sae")
    flags = {"pool": pool, "lm": tiny_lm_of("llama"), "sae": sae, "dtype": "float32"}
    line = [f"--{name}={value}" for name, value in flags.items()]
    line += ["--no-check_fit", "--num_workers=0", "--rows_per_shard=16"]
    assert run_job(index.main, index.Config, [*line, f"--out={folder}/index"]) == 0
    return {"index": f"{folder}/index", "folder": str(folder)}


def run(world: dict[str, str], out: Path, *flags: str) -> int:
    line = [f"--task={TASK}", "--budget_examples=12", f"--index={world['index']}", f"--out={out}"]
    return run_job(curate.main, curate.Config, [*line, *flags])


def ids(out: Path) -> list[str]:
    return pq.read_table(out / "selection.parquet")["id"].to_pylist()


def test_a_sentence_gives_rows_with_reasons(world: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(world, out) == 0
    rows = pq.read_table(out / "selection.parquet").to_pylist()
    assert [row["rank"] for row in rows] == list(range(1, 13))
    assert [row["score"] for row in rows] == sorted((r["score"] for r in rows), reverse=True) or (
        len({row["id"] for row in rows}) == 12  # coverage may let a lower score in front
    )
    said = [str(row["messages"]) for row in rows]
    right = [text for text in said if "piano" in text or "song" in text]
    assert len(right) >= 10
    for row in rows:
        assert row["n_tokens"] > 0
        assert row["reasons"]
        for reason in row["reasons"]:
            assert 0 < reason["weight"] <= 1
            assert reason["tokens"]
    profile = json.loads((out / "profile.json").read_text())
    assert profile["task"] == TASK
    assert all(latent["evidence"] for latent in profile["latents"])
    assert pq.read_table(out / "rejected.parquet").num_rows == 1
    verify(str(out))


def test_the_page_shows_what_the_data_says_and_runs_none_of_it(
    world: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(world, out, "--keep", '["<b>nasty</b>"]') == 0
    page = (out / "report.html").read_text()
    assert TASK in page
    assert "<b>nasty" not in page
    assert "<script>alert" not in page
    assert "alert(&#39;piano song&#39;)" in page
    assert page.count("<script") == page.count("</script>")


def test_the_same_request_gives_the_same_bytes_and_a_finished_one_is_left_alone(
    world: dict[str, str], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(world, first) == 0
    assert run(world, second) == 0
    assert (first / "selection.parquet").read_bytes() == (second / "selection.parquet").read_bytes()
    written = (first / "manifest.json").stat().st_mtime_ns
    assert run(world, first) == 0
    assert (first / "manifest.json").stat().st_mtime_ns == written
    assert len(content_hash(str(first), KIND)) == 64


def test_rows_that_are_kept_pull_their_like_in(world: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Rows 2, 5, 8 ... are about rivers; the task is about music.
    rivers = [f"row-{i}" for i in range(2, 60, 3)]
    assert run(world, out, "--keep", *rivers[:6]) == 0
    assert sum(one in rivers for one in ids(out)) >= 9


def test_another_request_does_not_overwrite_an_answer(
    world: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(world, tmp_path / "out") == 0
    assert run(world, tmp_path / "out", "--keep=row-1") == 2
    error = capsys.readouterr().err
    assert "another run" in error
    assert "keep" in error


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--task="], "task is empty"),
        (["--task= \t", "--budget_examples=500"], "task is empty"),
        (["--task=\ud800 piano"], "half a character"),
        (["--task=\0 piano"], "holds a NUL"),
        (["--budget_examples=62"], "61 readable rows"),
        (["--keep=row-1", "--drop=row-1"], "is in keep and in drop"),
        (["--keep=row_1"], "row-1"),
        (["--selector=best"], "selector"),
        (["--budgets=3"], "did you mean --budget"),
        (["--quota=0.5"], "quota_column"),
        (["--labels=nowhere.json"], "nowhere.json"),
    ],
)
def test_nonsense_is_answered_in_one_line(
    world: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    says: str,
) -> None:
    assert run(world, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
    # A refused request leaves its folder to the one put right.
    assert run(world, tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max_tokens=64"], "max_tokens: 2048 there, 64 here"),
        (["--dtype=bfloat16"], "dtype"),
        (["--budget_tokens=1"], "holds no row"),
    ],
)
def test_no_setting_is_ignored(
    world: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    says: str,
) -> None:
    assert run(world, tmp_path / "out", *flags) == 2
    assert says in capsys.readouterr().err


def test_examples_count_and_a_broken_one_is_not_passed_over(
    world: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = tmp_path / "examples.jsonl"
    rivers = [{"prompt": "river water bridge boat", "response": "rain"}] * 3
    examples.write_text("".join(json.dumps(one) + "\n" for one in rivers))
    assert run(world, tmp_path / "one", f"--examples={examples}", "--task=Zzyzx") == 0
    chosen = pq.read_table(tmp_path / "one/selection.parquet").to_pylist()
    assert sum("river" in str(row["messages"]) for row in chosen) >= 8
    # The same command over another file is another request.
    examples.write_text(examples.read_text() + "{broken\n")
    assert run(world, tmp_path / "one", f"--examples={examples}", "--task=Zzyzx") == 2
    assert run(world, tmp_path / "two", f"--examples={examples}") == 2
    assert "1 rows cannot be read" in capsys.readouterr().err


def test_a_task_that_finds_nothing_abstains_and_still_ranks(
    world: dict[str, str], tmp_path: Path
) -> None:
    lost = "--task=Zzyzx qwertz"
    assert run(world, tmp_path / "lenient", lost) == 0
    assert run(world, tmp_path / "strict", lost, "--strict") == 3
    manifest = json.loads((tmp_path / "strict/manifest.json").read_text())
    assert manifest["extra"]["abstained"] is True
    assert "no row of the pool holds a word" in manifest["warnings"][0]
    assert len(ids(tmp_path / "strict")) == 12


def test_judging_at_the_prompt_changes_what_is_written(
    world: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replies = iter(["+1 -2 +99", "", "w"])
    monkeypatch.setattr("builtins.input", lambda _: next(replies))
    assert run(world, tmp_path / "out", "--interactive") == 0
    shown = capsys.readouterr().out
    assert "there is no row 99" in shown
    profile = json.loads((tmp_path / "out/profile.json").read_text())
    assert len(profile["keep"]) == len(profile["drop"]) == 1


def test_a_taken_folder_is_refused_before_a_person_judges_anything(
    world: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(_: str) -> str:
        raise AssertionError("a person was asked")

    monkeypatch.setattr("builtins.input", never)
    assert run(world, tmp_path / "out") == 0
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("x")
    for taken in ("out", "notes"):
        assert run(world, tmp_path / taken, "--interactive") == 2
        assert f"{taken} holds" in capsys.readouterr().err


def test_a_model_is_asked_once_for_all_rounds(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal asked
            asked += 1
            written = json.dumps([{"prompt": "piano chord song", "response": "voice"}])
            body = json.dumps({"choices": [{"message": {"content": written}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    replies = iter(["+1", "", "w"])
    monkeypatch.setattr("builtins.input", lambda _: next(replies))
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"--pseudo_url=http://127.0.0.1:{server.server_port}/v1"
        assert run(world, tmp_path / "out", "--interactive", url, "--pseudo_model=any") == 0
        server.shutdown()
    assert asked == 1


def test_index_selection_and_page_may_lie_on_s3(
    world: dict[str, str], tmp_path: Path, s3_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import s3fs  # noqa: PLC0415 - only where S3 is tested

    assert run(world, tmp_path / "here") == 0
    s3fs.S3FileSystem().put(world["index"], f"{s3_folder}/index", recursive=True)
    line = [f"--task={TASK}", "--budget_examples=12", f"--index={s3_folder}/index"]
    line += [f"--out={s3_folder}/out"]
    for _ in range(2):  # the second time, it is there
        assert run_job(curate.main, curate.Config, line) == 0
    assert "12 rows (1 of the pool rejected)" in capsys.readouterr().out
    there = read_file(f"{s3_folder}/out/selection.parquet")
    assert there == (tmp_path / "here/selection.parquet").read_bytes()
    assert TASK.encode() in read_file(f"{s3_folder}/out/report.html")
    verify(f"{s3_folder}/out")
