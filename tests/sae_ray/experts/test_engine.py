import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.errors import BusyError, ModelError, RequestError, WorkError
from sae_ray.experts.answers import Ask, Limits, Piece, Sampling, Ticket
from sae_ray.experts.engine import Engine
from sae_ray.experts.registry import ExpertRegistry
from tests.made_experts import add_expert, alone

LORAS = {"small": 2, "large": 5}
PROMPTS = ((5, 6, 7), tuple(range(20, 60)), (9,), (50, 40, 30, 20, 10, 11))


class Asked:
    """An engine's answers as they come."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.pieces: list[list[Piece]] = []
        self.tickets: list[Ticket] = []

    def ask(
        self, ids: tuple[int, ...], *experts: str, weights: tuple[float, ...] = (), **how: object
    ) -> int:
        sampling = Sampling(**({"temperature": 0.0, "max_tokens": 12} | how))  # pyright: ignore
        pieces: list[Piece] = []
        self.pieces.append(pieces)
        known = self.engine.experts
        ids_of = tuple(known[name].id for name in experts)
        ask = Ask(ids, ids_of, weights or (1.0,) * len(experts), sampling)
        self.tickets.append(self.engine.submit(ask, pieces.append))
        return len(self.pieces) - 1

    def text(self, number: int) -> str:
        return "".join(piece.text for piece in self.pieces[number])

    def finish(self) -> None:
        while self.engine.step():
            pass


def generate(model: torch.nn.Module, engine: Engine, ids: tuple[int, ...], num: int) -> str:
    given = torch.tensor([ids])
    out = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=num,
    )
    return engine.chat.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)  # pyright: ignore


@pytest.fixture
def registry(tmp_path: Path, tiny_lm: Path) -> ExpertRegistry:
    registry = ExpertRegistry(str(tmp_path / "registry"))
    for seed, (name, r) in enumerate(LORAS.items()):
        spec = AdapterSpec(kind="lora", r=r, alpha=2 * r)
        add_expert(registry, name, spec, lm=str(tiny_lm), seed=seed)
    return registry


@pytest.fixture
def engine(registry: ExpertRegistry, tiny_lm: Path) -> Engine:
    return Engine(str(tiny_lm), registry.path, limits=Limits(max_rows=6, max_waiting=8))


def expect_same_as_alone(
    asked: Asked, registry: ExpertRegistry, lm: Path, folder: Path, who: list[str | None]
) -> None:
    """Compare the answers to all prompts, asked of each in turn, with plain generate's."""
    said = set()
    for k, name in enumerate(who):
        id = name and asked.engine.experts[name].id
        model = alone(registry, id, str(lm), folder)
        for j, prompt in enumerate(PROMPTS):
            wanted = generate(model, asked.engine, prompt, 12)
            assert asked.text(j * len(who) + k) == wanted, (name, prompt)
            said.add((j, wanted))
    assert len(said) > len(PROMPTS), "experts that say the same tell nothing"


def test_greedy_answers_are_those_of_each_expert_alone_also_of_who_joins_midway(
    engine: Engine, registry: ExpertRegistry, tiny_lm: Path, tmp_path: Path
) -> None:
    asked = Asked(engine)
    for prompt in PROMPTS:
        for experts in ((), ("small",), ("large",)):
            asked.ask(prompt, *experts)
            engine.step()  # twelve requests and six rows: they join as others grow and leave
    asked.finish()
    expect_same_as_alone(asked, registry, tiny_lm, tmp_path, [None, "small", "large"])
    assert engine.load.rows == 0
    assert all(pieces[-1].finish in ("stop", "length") for pieces in asked.pieces)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT, of GPT-2
def test_every_family_of_models_answers_as_plain_generate_does(
    any_tiny_lm: Path, tmp_path: Path
) -> None:
    registry = ExpertRegistry(str(tmp_path / "registry"))
    add_expert(registry, "one", AdapterSpec(kind="lora", r=2), lm=str(any_tiny_lm))
    engine = Engine(str(any_tiny_lm), registry.path, limits=Limits(max_rows=8))
    asked = Asked(engine)
    for prompt in PROMPTS:
        for experts in ((), ("one",)):
            asked.ask(prompt, *experts)
        engine.step()
    asked.finish()
    expect_same_as_alone(asked, registry, any_tiny_lm, tmp_path, [None, "one"])


def test_experts_on_latents_share_the_batch_with_others(
    tmp_path: Path, tiny_lm: Path, tiny_sae: Path
) -> None:
    registry = ExpertRegistry(str(tmp_path / "registry"))
    sae = (str(tiny_sae),)
    specs = {
        "steering": AdapterSpec(kind="steering", sae=sae),
        "scale": AdapterSpec(kind="scale", sae=sae, positions="completion"),
        "affine": AdapterSpec(kind="affine", sae=sae, positions="non_bos"),
        "residual": AdapterSpec(kind="residual", sae=sae, hidden=3),
        "lora": AdapterSpec(kind="lora", r=2),
    }
    for seed, (name, spec) in enumerate(specs.items()):
        add_expert(registry, name, spec, lm=str(tiny_lm), seed=seed, size=0.3)
    engine = Engine(str(tiny_lm), registry.path, limits=Limits(max_rows=16, max_waiting=40))
    asked = Asked(engine)
    for prompt in PROMPTS:
        for experts in ((), *((name,) for name in specs)):
            asked.ask(prompt, *experts)
        engine.step()
    asked.finish()
    expect_same_as_alone(asked, registry, tiny_lm, tmp_path, [None, *specs])


def test_two_experts_answer_by_their_averaged_logits(
    engine: Engine, registry: ExpertRegistry, tiny_lm: Path, tmp_path: Path
) -> None:
    asked = Asked(engine)
    asked.ask(PROMPTS[1], "small", "large", weights=(3.0, 1.0), max_tokens=6)
    asked.ask(PROMPTS[0], "small")
    asked.ask(PROMPTS[1], "small", "large", weights=(1.0, 0.0), max_tokens=6)
    asked.ask(PROMPTS[1], "small", max_tokens=6)
    asked.finish()
    ids = list(PROMPTS[1])
    models = [alone(registry, engine.experts[name].id, str(tiny_lm), tmp_path) for name in LORAS]
    for _ in range(6):
        logits = [model(torch.tensor([ids])).logits[0, -1] for model in models]
        ids.append(int((0.75 * logits[0] + 0.25 * logits[1]).argmax()))
    said = engine.chat.tokenizer.decode(ids[len(PROMPTS[1]) :], skip_special_tokens=True)
    assert asked.text(0) == said
    assert asked.text(2) == asked.text(3)


def test_a_seed_draws_the_same_answer_whoever_else_is_there(engine: Engine) -> None:
    asked = Asked(engine)
    how = {"temperature": 1.0, "top_p": 0.9, "seed": 4}
    first = asked.ask(PROMPTS[0], "small", **how)
    asked.finish()
    others = [asked.ask(prompt, "large", temperature=1.0) for prompt in PROMPTS]
    engine.step()
    again = asked.ask(PROMPTS[0], "small", **how)
    other = asked.ask(PROMPTS[0], "small", **(how | {"seed": 5}))  # pyright: ignore
    asked.finish()
    assert asked.text(first) == asked.text(again) != asked.text(other)
    assert all(asked.pieces[one][-1].finish for one in others)


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(engine: Engine) -> None:
    asked = Asked(engine)
    whole = asked.ask(PROMPTS[0], "small")
    asked.finish()
    text = asked.text(whole)
    stop = text[3:6]
    cut = asked.ask(PROMPTS[0], "small", stop=("never said", stop))
    asked.finish()
    assert asked.text(cut) == text[: text.index(stop)]
    assert asked.pieces[cut][-1].finish == "stop"
    assert not any(stop[:2] in piece.text for piece in asked.pieces[cut])


def test_logarithmic_probabilities_are_those_of_the_model(
    engine: Engine, registry: ExpertRegistry, tiny_lm: Path, tmp_path: Path
) -> None:
    asked = Asked(engine)
    asked.ask(PROMPTS[0], "large", top_logprobs=2, max_tokens=1)
    asked.ask(PROMPTS[1])
    asked.finish()
    (token,) = asked.pieces[0][0].tokens
    model = alone(registry, engine.experts["large"].id, str(tiny_lm), tmp_path)
    logprobs = model(torch.tensor([PROMPTS[0]])).logits[0, -1].log_softmax(-1)
    assert token.logprob == pytest.approx(float(logprobs.max()), abs=1e-4)
    assert [value for _, value in token.top] == pytest.approx(
        logprobs.topk(2).values.tolist(), abs=1e-4
    )
    assert asked.pieces[1][0].tokens == ()


def test_who_is_cancelled_leaves_and_the_others_do_not_notice(engine: Engine) -> None:
    asked = Asked(engine)
    for prompt in PROMPTS:
        asked.ask(prompt, "small")
    asked.finish()
    wanted = [asked.text(k) for k in range(4)]
    for prompt in PROMPTS:
        asked.ask(prompt, "small")
    engine.step()
    engine.step()
    asked.tickets[4].cancel()
    asked.finish()
    assert asked.pieces[4][-1].finish == "cancelled"
    assert len(asked.pieces[4]) == 4
    assert [asked.text(k) for k in range(5, 8)] == wanted[1:]
    assert all(engine.residents.pin(one.id).pins == 1 for one in engine.experts.values())


def test_too_long_too_many_and_nobody_are_refused(engine: Engine) -> None:
    asked = Asked(engine)
    with pytest.raises(RequestError, match=r"600 tokens.* context is 512 tokens"):
        asked.ask((5,) * 600)
    with pytest.raises(RequestError, match=r"500 tokens and 20 more.* context is 512"):
        asked.ask((5,) * 500, max_tokens=20)
    with pytest.raises(RequestError, match="empty"):
        asked.ask(())
    with pytest.raises(RequestError, match="none of 0 to"):
        engine.prompts.of_tokens([5, 10**9])
    for _ in range(8):
        asked.ask(PROMPTS[0])
    with pytest.raises(BusyError, match="8 requests are waiting"):
        asked.ask(PROMPTS[0])
    asked.finish()


def test_experts_are_loaded_on_demand_and_the_one_used_last_stays(
    registry: ExpertRegistry, tiny_lm: Path
) -> None:
    sizes = {
        e.card.name: e.card.files["adapter_model.safetensors"].bytes for e in registry.active()
    }
    limits = Limits(max_rows=2, adapter_memory_mb=max(sizes.values()) * 1.05 / 2**20)
    engine = Engine(str(tiny_lm), registry.path, limits=limits)
    ids = {name: expert.id for name, expert in engine.experts.items()}
    asked = Asked(engine)
    assert engine.residents.ids == ()
    asked.ask(PROMPTS[0], "large")
    with pytest.raises(BusyError, match="no room for another"):
        asked.ask(PROMPTS[0], "small")
    asked.finish()
    asked.ask(PROMPTS[0], "small")
    assert engine.residents.ids == (ids["small"],)
    asked.finish()
    asked.ask(PROMPTS[0], "large")
    asked.finish()
    assert asked.text(0) == asked.text(3) != asked.text(2)


def test_an_evicted_expert_on_latents_is_taken_out_of_the_model(
    tmp_path: Path, tiny_lm: Path, tiny_sae: Path
) -> None:
    registry = ExpertRegistry(str(tmp_path / "registry"))
    for seed, name in enumerate(("one", "two")):
        spec = AdapterSpec(kind="steering", sae=(str(tiny_sae),))
        add_expert(registry, name, spec, lm=str(tiny_lm), seed=seed, size=0.3)
    engine = Engine(str(tiny_lm), registry.path, limits=Limits(max_rows=2, adapter_memory_mb=0.012))
    asked = Asked(engine)
    for name in ("one", "two", "one"):
        asked.ask(PROMPTS[0], name)
        asked.finish()
        assert len(engine.residents.ids) == 1
    asked.ask(PROMPTS[0])
    asked.finish()
    assert asked.text(0) == asked.text(2)
    assert len({asked.text(k) for k in (0, 1, 3)}) == 3


def test_a_new_version_answers_from_the_next_request_on(
    engine: Engine, registry: ExpertRegistry, tiny_lm: Path
) -> None:
    asked = Asked(engine)
    asked.ask(PROMPTS[0], "small")
    asked.finish()
    old = asked.ask(PROMPTS[0], "small")
    engine.step()
    add_expert(registry, "small", AdapterSpec(kind="lora", r=2), lm=str(tiny_lm), seed=77)
    registry.retire("large")
    engine.refresh()
    assert set(engine.experts) == {"small"}
    new = asked.ask(PROMPTS[0], "small")
    asked.finish()
    assert asked.text(0) == asked.text(old) != asked.text(new)


def test_experts_that_cannot_share_the_batch_are_left_out_or_refused(
    registry: ExpertRegistry,
    tiny_lm: Path,
    tiny_lm_of: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    add_expert(registry, "foreign", AdapterSpec(kind="lora", r=2), lm=str(tiny_lm_of("qwen2")))
    with caplog.at_level("WARNING", logger="sae_ray.experts.engine"):
        engine = Engine(str(tiny_lm), registry.path)
        engine.refresh()
    assert set(engine.experts) == set(LORAS)
    (said,) = [one.getMessage() for one in caplog.records if one.name == "sae_ray.experts.engine"]
    assert said.startswith("left out: expert foreign was trained on another base")
    found = registry.find("small")
    card = found.card.model_copy(update={"adapter": "full", "name": "whole"})
    registry.register(card, f"{registry.path}/experts/{found.id}/adapter")
    with pytest.raises(RequestError, match="whole model of its own"):
        engine.residents.pin(card.id)


def test_a_thread_runs_it_and_tells_who_still_waits_when_it_stops(engine: Engine) -> None:
    asked, stop = Asked(engine), threading.Event()
    thread = threading.Thread(target=engine.run, args=(stop,))
    thread.start()
    done = threading.Event()
    ids = engine.prompts.of_messages([{"role": "user", "content": "Write a query"}])
    engine.submit(Ask(ids, sampling=Sampling(max_tokens=5)), lambda p: p.finish and done.set())
    assert done.wait(20)
    asked.ask(PROMPTS[0], max_tokens=400)
    stop.set()
    thread.join()
    assert asked.pieces[0][-1].finish is not None


def test_a_request_that_the_model_cannot_be_run_on_ends_alone(engine: Engine) -> None:
    def refuse(_module: object, _args: object, given: dict) -> None:
        if (given["input_ids"] == 99).any():
            raise ValueError("not this one")

    asked = Asked(engine)
    wanted = [asked.ask(PROMPTS[k], name) for k, name in ((0, "small"), (1, "large"))]
    asked.finish()
    engine.model.register_forward_pre_hook(refuse, with_kwargs=True)
    first = asked.ask(PROMPTS[0], "small")
    engine.step()
    bad, good = asked.ask((5, 99), "large"), asked.ask(PROMPTS[1], "large")
    asked.finish()
    assert asked.pieces[bad][-1].finish == "failed"
    assert [asked.text(first), asked.text(good)] == [asked.text(k) for k in wanted]
    assert all(engine.residents.pin(one.id).pins == 1 for one in engine.experts.values())


def test_an_expert_without_numbers_ends_its_own_requests_alone(
    engine: Engine, registry: ExpertRegistry
) -> None:
    asked = Asked(engine)
    asked.ask(PROMPTS[0], "small")
    asked.finish()
    broken = engine.residents.pin(engine.experts["large"].id)
    for factors in broken.factors.values():
        factors.B.fill_(float("nan"))
    asked.ask(PROMPTS[0], "large", temperature=1.0)
    asked.ask(PROMPTS[0], "small")
    asked.finish()
    assert asked.pieces[1][-1].finish == "failed"
    assert asked.text(0) == asked.text(2)


def test_a_model_that_cannot_be_run_any_more_stops_the_engine(engine: Engine) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("the device is gone")

    asked = Asked(engine)
    asked.ask(PROMPTS[0])
    engine.step()
    asked.ask(PROMPTS[1])
    engine.model.register_forward_pre_hook(refuse)
    with pytest.raises(WorkError, match="cannot be run any more"):
        engine.run(threading.Event())
    assert [pieces[-1].finish for pieces in asked.pieces] == ["cancelled", "failed"]
    with pytest.raises(WorkError, match="has stopped"):
        asked.ask(PROMPTS[0])


def test_a_model_that_cannot_answer_in_batches_is_refused_at_the_start(
    tiny_lm: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_lm, tmp_path / "lm")
    path = tmp_path / "lm" / "config.json"
    kinds = {"layer_types": ["chunked_attention"] * 3}
    path.write_text(json.dumps(json.loads(path.read_text()) | kinds))
    with pytest.raises(ModelError, match="cannot answer in batches"):
        Engine(str(tmp_path / "lm"))


def test_who_does_not_fit_into_memory_waits_again_and_answers_the_same(
    registry: ExpertRegistry, tiny_lm: Path
) -> None:
    told = []
    for kv_memory_mb in (64.0, 0.1):
        limits = Limits(max_rows=6, kv_memory_mb=kv_memory_mb)
        engine = Engine(str(tiny_lm), registry.path, limits=limits)
        asked, most = Asked(engine), 0
        for k, name in enumerate(("small", "large", "small", "large")):
            asked.ask(PROMPTS[k], name, max_tokens=70, temperature=0.7, seed=k)
        while engine.step():
            most = max(most, engine.batch.cache.num_bytes)
        told.append([asked.text(k) for k in range(4)])
        assert most <= kv_memory_mb * 2**20
        assert engine.batch.cache.num_bytes == 0
    assert told[0] == told[1]
    with pytest.raises(RequestError, match=r"context is \d+ tokens here"):
        asked.ask((5,) * 300, max_tokens=200)


def test_an_expert_is_loaded_while_others_answer(engine: Engine) -> None:
    asked, stop = Asked(engine), threading.Event()
    thread = threading.Thread(target=engine.run, args=(stop,))
    thread.start()
    done = [threading.Event() for _ in LORAS]
    asked.ask(PROMPTS[0], max_tokens=400)
    for name, event in zip(LORAS, done, strict=True):
        ask = Ask(PROMPTS[0], (engine.experts[name].id,), (1.0,), Sampling(max_tokens=5))
        engine.submit(ask, lambda p, event=event: p.finish and event.set())
    assert all(event.wait(30) for event in done)
    stop.set()
    thread.join()
