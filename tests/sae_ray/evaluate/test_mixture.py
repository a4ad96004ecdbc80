from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_ray import tiny
from sae_ray.curate.block import IndexBlock
from sae_ray.evaluate.mixture import answer, evaluate_mixture, tabulate
from sae_ray.experts.prototypes import Eyes, requests
from sae_ray.experts.router import Router
from sae_ray.tiny.exam import replies

DOMAINS = ("order", "velan")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs that change the base, each in its own way."""
    folders = {}
    for seed, name in enumerate(DOMAINS):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tiny.lm_path(), dtype=torch.float32)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        folders[name] = tmp_path_factory.mktemp(name)
        get_peft_model(base, config).save_pretrained(str(folders[name]))
    return folders


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    rows = pq.read_table(tiny.eval_path()).to_pylist()
    return [
        row
        for domain in (*DOMAINS, "tables")
        for row in [one for one in rows if one["domain"] == domain][:6]
    ]


def test_every_arm_is_answered_by_whom_its_plan_names(
    adapters: dict[str, Path], questions: list[dict]
) -> None:
    eyes = Eyes.open("embedded", "embedded")
    rows = pq.read_table(tiny.pool_path(), columns=["domain", "messages"]).to_pylist()

    def read(domain: str, num: int) -> IndexBlock:
        mine = [row["messages"] for row in rows if row["domain"] == domain][:num]
        return eyes.read([requests(messages)[-1] for messages in mine])

    known = {one: (one, one, read(one, 40)) for one in DOMAINS}
    router = Router.fit(eyes, known, read("small_talk", 60))
    own = dict(zip(DOMAINS, DOMAINS, strict=True))
    arms = list(
        evaluate_mixture(tiny.lm_path(), adapters, own, router, questions, union=adapters["order"])  # pyright: ignore
    )
    by_name = {arm.name: arm for arm in arms}
    assert [arm.name.split(" (")[0] for arm in arms] == [
        *("base", "best single", "union", "random router", "uniform merge", "mixture", "oracle")
    ]
    assert by_name["base"].stays == 1
    assert by_name["oracle"].regret == 0
    assert by_name["oracle"].out_of_domain == by_name["base"].out_of_domain
    # The base knows some of the tables, and these adapters spoil all of them.
    assert by_name["base"].out_of_domain > 0.2
    assert by_name["union"].stays == 0
    # The mixture does as its router says, which may err.
    routes = router.route_many([one["messages"][:-1] for one in questions])
    stay = [
        not r.expert_ids for r, q in zip(routes, questions, strict=True) if q["domain"] not in own
    ]
    assert by_name["mixture"].stays == pytest.approx(sum(stay) / len(stay))
    assert by_name["mixture"].regret >= 0
    assert len(tabulate(arms).rows) == 7


def test_the_merge_is_the_mean_of_the_updates(
    adapters: dict[str, Path], questions: list[dict]
) -> None:
    said = dict(answer(tiny.lm_path(), adapters, questions[:3]))
    assert list(said) == ["base", *DOMAINS, "merged"]
    base = AutoModelForCausalLM.from_pretrained(tiny.lm_path(), dtype=torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    total = dict.fromkeys(before, 0.0)
    for folder in adapters.values():
        one = AutoModelForCausalLM.from_pretrained(tiny.lm_path(), dtype=torch.float32)
        whole = PeftModel.from_pretrained(one, str(folder)).merge_and_unload()
        for name, value in whole.state_dict().items():
            total[name] = total[name] + (value - before[name]) / len(adapters)
    base.load_state_dict({name: before[name] + total[name] for name in before})
    chats = [one["messages"][:-1] for one in questions[:3]]
    wanted = list(replies(base, AutoTokenizer.from_pretrained(tiny.lm_path()), chats))
    assert said["merged"] == wanted
    assert np.mean([a != b for a, b in zip(said["base"], wanted, strict=True)]) > 0
