"""An expert explained: ranked and checked on rows apart; routes; and what is wrong refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import explain, finetune
from sae_ray.artifacts import open_artifact, verify
from sae_ray.config import run_job
from sae_ray.experts.router import Router
from sae_ray.explain.adapter import KIND
from sae_ray.explain.route import KIND as ROUTE_KIND
from tests.conftest import save_tiny_sae, write_pool
from tests.made_router import NOBODYS, SORT, make_router

SMALL = ("--num_top=2", "--num_drawn=2", "--audit_rows=6", "--num_answers=2")


def run(*words: str) -> int:
    return run_job(explain.main, explain.Config, list(words))


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_lm_of: Callable[[str], Path]
) -> Callable[..., Path]:
    """Trains an expert of a kind on a pool in which a row holds markup, once for each kind."""
    folder = tmp_path_factory.mktemp("experts")
    rows = [json.loads(line) for line in write_pool(folder / "plain", 120).read_text().splitlines()]
    for row in rows:
        row["messages"][-1]["content"] += " <script>alert(1)</script>"
    pool = folder / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sae = save_tiny_sae(folder / "sae")

    def make(adapter: str, family: str = "llama", seed: int = 0) -> Path:
        out = folder / (adapter if family == "llama" and not seed else f"{adapter}-{family}-{seed}")
        line = [
            f"--lm={tiny_lm_of(family)}",
            f"--seed={seed}",
            f"--data={pool}",
            f"--adapter={adapter}",
            "--general_rows=0",
        ]
        line += [f"--sae={sae}"] if adapter == "steering" else []
        line += ["--num_workers=0", "--max_steps=12", "--max_tokens=256", f"--out={out}"]
        assert run_job(finetune.main, finetune.Config, line) == 0
        return out

    return make


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_expert_on_latents_is_explained_with_the_same_facts_on_page_and_in_json(
    made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert, out = made("steering"), tmp_path / "why"
    about = {"modelId": "tiny", "layer": "1-res"}
    rows = [{**about, "index": str(n), "description": f"song {n}"} for n in reversed(range(64))]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = f"--labels={tmp_path}/e.jsonl"
    assert run(f"--expert={expert}", f"--out={out}", labels, *SMALL) == 0
    verify(str(out))
    told = json.loads((out / "explanation.json").read_text())
    page = (out / "report.html").read_text()
    shown = capsys.readouterr().out
    assert told["summary"] in shown
    assert told["summary"].split(" nats")[0].split("makes ")[1] in page
    assert told["attribution"]["gap"] <= 0.05
    assert told["num_ranking"] + told["num_checking"] == 24
    assert len(told["latents"]) == 2
    assert len(told["verification"]["drawn"]) == 2
    names = [curve["order"] for curve in told["verification"]["curves"]]
    assert names == ["attribution", "size of what is learnt", "random", "random, as dense"]
    assert page.count("<figure") == 4
    for one in told["latents"]:
        assert one["label"] == f"song {one['latent']}"
        assert f"{one['latent']} at blocks.1.hook_resid_post" in page
        assert (f"“song {one['latent']}”" in told["summary"]) == one["verified"]
    # Every row that is named was trained on, and says what it does as text.
    held = set(pq.read_table(expert / "held_out.parquet")["id"].to_pylist())
    named = [row[0] for one in told["pushed_by"] for row in one["rows"]]
    assert named
    assert not held & set(named)
    assert "<script>" not in page
    assert "&lt;script&gt;alert" in page
    table = pq.read_table(out / "latents.parquet").to_pylist()
    assert len(table) == 64
    assert all(row["score_nats"] is not None for row in table)
    assert sum(row["left_out_nats"] is not None for row in table) == 4
    assert len(told["places"]) == 4
    assert len(told["answers"]) == 2
    assert all(one["prompt"].split()[-1] in page for one in told["answers"])
    before = open_artifact(str(out), KIND).created
    assert run(f"--expert={expert}", f"--out={out}", labels, *SMALL) == 0
    assert open_artifact(str(out), KIND).created == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_has_changed_since_is_refused_and_what_has_moved_may_be_named(
    made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert = made("steering")
    weights = expert / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    capsys.readouterr()
    assert run(f"--expert={expert}", f"--out={tmp_path / 'other'}", *SMALL) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err
    weights.write_bytes(whole)
    sae = expert.parent / "sae"
    shutil.move(sae, sae.with_suffix(".gone"))
    assert run(f"--expert={expert}", f"--out={tmp_path / 'other'}", *SMALL) == 2
    assert str(sae) in capsys.readouterr().err
    # A copy may be named, if it is the SAE that the adapter was made on.
    assert run(f"--expert={expert}", f"--sae={tmp_path}", f"--out={tmp_path / 'no'}", *SMALL) == 2
    moved = f"--sae={sae.with_suffix('.gone')}"
    assert run(f"--expert={expert}", moved, f"--out={tmp_path / 'other'}", *SMALL) == 0
    again = json.loads((tmp_path / "other" / "explanation.json").read_text())
    assert len(again["latents"]) == 2
    shutil.move(sae.with_suffix(".gone"), sae)
    # Rows that were added might be taken for held out.
    pool = expert.parent / "pool.jsonl"
    rows = pool.read_text()
    pool.write_text(rows + rows.replace('"row-', '"more-'))
    capsys.readouterr()
    assert run(f"--expert={expert}", f"--out={tmp_path / 'third'}", *SMALL) == 2
    assert "does not hold the rows any more" in capsys.readouterr().err
    pool.write_text(rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_of_an_adapter_of_weights_drift_is_told_and_no_cause(
    made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert, out = made("lora"), tmp_path / "why"
    assert run(f"--expert={expert}", f"--out={out}", *SMALL) == 2
    assert "say with --sae through which SAE" in capsys.readouterr().err
    line = [f"--expert={expert}", f"--sae={expert.parent / 'sae'}", f"--out={out}"]
    assert run(*line, *SMALL) == 0
    told = json.loads((out / "explanation.json").read_text())
    assert "changes weights, not latents" in told["summary"]
    assert told["attribution"] is None
    assert told["latents"] == told["pushed_by"] == []
    (found,) = told["drift"].values()
    assert 0 <= found["share_true"] <= 1
    assert len(found["most"]) == 10
    assert any(before != after for *_, before, after in found["most"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_expert_agrees_with_itself_and_is_compared_with_its_like_alone(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert, out = made("steering"), tmp_path / "why"
    for other, why in {
        made("steering", "mistral"): "has another base",
        made("lora"): "of kind lora, sits on no SAE",
        made("steering", seed=1): "that are to be compared on",
    }.items():
        capsys.readouterr()
        assert run(f"--expert={expert}", f"--others={other}", f"--out={out}", *SMALL) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert why in error
        assert str(other) in error
        assert not out.exists()
    assert run(f"--expert={expert}", f"--others={expert}", f"--out={out}", *SMALL) == 0
    (found,) = json.loads((out / "explanation.json").read_text())["agreements"]
    assert (found["overlap"], found["num_rows"], found["num_top"]) == (1, 24, 2)
    assert found["rank_correlation"] == pytest.approx(1)
    assert found["expected"] == 2 / 64
    page = (out / "report.html").read_text()
    assert "Whether other seeds agree" in page
    assert found["one"] in page


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_give_the_explanation_of_one_process(
    ray_cluster: None, made: Callable[..., Path], tmp_path: Path
) -> None:
    told, expert = [], made("steering")
    for num in (0, 3):
        out = tmp_path / str(num)
        line = [f"--expert={expert}", f"--num_workers={num}", f"--out={out}"]
        # There is no room for both at once: the second expert's workers come when the first's go.
        line += [f"--others={expert}"] * (num > 0)
        assert run(*line, "--num_top=1", "--num_drawn=1", "--num_answers=0") == 0
        told.append(pq.read_table(out / "latents.parquet").to_pylist())
    for one, other in zip(*told, strict=True):
        assert one["score_nats"] == pytest.approx(other["score_nats"], rel=1e-5, abs=1e-7)
        assert (one["left_out_nats"] is None) == (other["left_out_nats"] is None)
        if one["left_out_nats"] is not None:
            assert one["left_out_nats"] == pytest.approx(other["left_out_nats"], abs=1e-4)


def test_what_is_no_expert_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"--expert={tmp_path / 'none'}", f"--out={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("routing") / "router"
    make_router(str(place))
    return place


def test_routes_are_explained_as_the_router_decides_them(
    router: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, prompts = tmp_path / "why", [f"{SORT} <script>alert(1)</script>", NOBODYS]
    line = [f"--router={router}", f"--prompt={json.dumps(prompts)}"]
    assert run(*line, f"--out={out}") == 0
    assert "2 prompts: 1 sent to experts, 1 answered by the base." in capsys.readouterr().out
    verify(str(out))
    told = json.loads((out / "route.json").read_text())
    loaded = Router.load(str(router))
    for prompt, one in zip(prompts, told["routes"], strict=True):
        route = loaded.route([{"role": "user", "content": prompt}])
        assert one["prompt"] == prompt
        assert [expert["id"] for expert in one["experts"]] == list(route.expert_ids)
        assert one["reasons"] == [dataclasses.asdict(reason) for reason in route.reasons]
        assert one["base_probability"] == route.scores["base"]
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "Sent to order</h2>" in page
    assert "The base answers</h2>" in page
    # The same does nothing; another is refused; one prompt keeps its commas.
    before = open_artifact(str(out), ROUTE_KIND).created
    assert run(*line, f"--out={out}") == 0
    assert open_artifact(str(out), ROUTE_KIND).created == before
    capsys.readouterr()
    assert run(*line, "--top_k=2", f"--out={out}") == 2
    assert "of another run (top_k: 1 there, 2 here)" in capsys.readouterr().err
    assert run(f"--router={router}", f"--prompt={SORT}", f"--out={tmp_path / 'one'}") == 0
    (one,) = json.loads((tmp_path / "one" / "route.json").read_text())["routes"]
    assert one["prompt"] == SORT
    changed = shutil.copytree(router, tmp_path / "changed")
    about = changed / "router.json"
    about.write_text(about.read_text().replace("id-order", "id-other"))
    capsys.readouterr()
    assert run(f"--router={changed}", "--prompt=a", f"--out={tmp_path / 'no'}") == 2
    assert "not what its manifest says (changed router.json)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "neither is given: give either --expert"),
        (["--expert=a", "--router=ROUTER"], "both are given: give either --expert"),
        (["--expert=a", "--prompt=b"], "--prompt given without --router"),
        (["--router=ROUTER", "--prompt=a", "--num_top=3"], "--num_top given without --expert"),
        (["--router=ROUTER"], "no prompt to route"),
        (["--router=ROUTER", '--prompt=["a", " "]'], "prompt 2 of 2 is blank"),
        (["--router=ROUTER", "--prompt=a", "--sae=b,c"], "--sae names 2, and a router has one"),
        (["--router=ROUTER", "--prompt=a", "--top_k=9"], "top_k=9 but the router knows 2 experts"),
        (["--router=ROUTER", "--prompt=a", "--lm=NONE"], "NONE"),
        (["--router=NONE", "--prompt=a"], "holds no manifest.json"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_one_line(
    router: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    places = {"ROUTER": str(router), "NONE": str(tmp_path / "none")}
    for name, place in places.items():
        words, said = [one.replace(name, place) for one in words], said.replace(name, place)
    assert run(*words, f"--out={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
