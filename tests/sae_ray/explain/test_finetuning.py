import dataclasses

from sae_ray.artifacts import FileRecord, Source
from sae_ray.experts.card import ExpertCard, Measure
from sae_ray.explain.finetuning import Page, render


def measure(name: str, base: float, expert: float, low: float, high: float) -> Measure:
    gain = (low + high) / 2
    return Measure(name=name, base=base, expert=expert, gain=gain, low=low, high=high, num_rows=40)


def page_of(*measures: Measure) -> Page:
    card = ExpertCard(
        name="maths",
        description="Solve <script>alert(1)</script> sums",
        adapter="lora",
        objective="sft",
        base="tiny",
        base_sha256="b" * 64,
        files={"adapter_model.safetensors": FileRecord(sha256="a" * 64, bytes=10)},
        parents={"data": "c" * 64},
        sources={"data": Source(name="pool.jsonl")},
        num_parameters=1234,
        share=0.0021,
        measures=list(measures),
    )
    return Page(
        card=card,
        curves=[{"step": 0.0, "held_out_loss": 2.0}, {"step": 1.0, "loss": 3.0}]
        + [{"step": 2.0, "loss": 1.0, "held_out_loss": 1.5}],
        examples=["<|user|>What is </div> 1 + 1?<|assistant|>2"],
        num_train=100,
        num_held_out=20,
        num_tokens=5000,
        rejected={"reply longer than the context": 3},
        best_step=2,
        stopped_early=False,
        settings={"learning_rate": 0.001},
    )


def test_the_page_says_what_was_gained_and_lets_nothing_in() -> None:
    page = page_of(measure("held_out_loss", 2.0, 1.5, 0.4, 0.6))
    html = render(page)
    assert "It beats its base on rows that it never saw" in html
    assert "<script>" not in html
    assert "</div> 1" not in html
    for said in ("1,234 parameters", "0.21", "rejected: reply longer", "+0.500", "step 2"):
        assert said in html
    assert html.count("<polyline") == 2
    assert {curve.title for curve in page.drawn} == {"training loss", "held-out loss"}


def test_curves_run_from_their_highest_point_to_their_lowest() -> None:
    page = page_of(measure("held_out_loss", 2.0, 1.5, 0.4, 0.6))
    loss = next(curve for curve in page.drawn if curve.title == "training loss")
    assert loss.points == "320.0,0.0 640.0,160.0"
    assert (loss.low, loss.high, loss.last_step) == (1.0, 3.0, 2)


def test_what_is_lost_is_said_as_plainly() -> None:
    weak = measure("held_out_loss", 2.0, 1.9, -0.1, 0.3)
    forgets = measure("general_loss", 2.0, 2.5, -0.6, -0.4)
    page = page_of(weak, forgets)
    assert "does not beat its base" in page.verdict
    assert "lost 0.500 nats a token on general text [0.400, 0.600]" in (page.forgets or "")
    assert "Forgetting" in render(page)
    fine = dataclasses.replace(page_of(weak, measure("general_loss", 2.0, 2.0, -0.1, 0.1)))
    assert fine.forgets is None
