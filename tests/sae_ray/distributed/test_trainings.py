"""What points of a space stand for: rows, places, parents, and what cannot be trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_ray.adapters.search_settings import SearchSettings
from sae_ray.distributed.trainings import Trainings
from sae_ray.errors import ConfigError, PoolError
from tests.conftest import save_tiny_sae, write_pool


@pytest.fixture
def make(tiny_lm: Path, tmp_path: Path) -> Callable[..., Trainings]:
    """Makes the trainings of a space over a tiny model and sixty conversations."""
    pool = write_pool(tmp_path / "base", 60)

    def make(space: dict[str, Any], **changes: Any) -> Trainings:
        few: dict[str, Any] = {"lm": str(tiny_lm), "data": str(pool), "max_tokens": 256}
        few |= {"held_out_rows": 10, "general_rows": 0, "batch_rows": 4}
        given = {name: value for name, value in few.items() if name == "data" or name not in space}
        return Trainings(SearchSettings(space=space, **{**given, **changes}))

    return make


def test_rows_that_judge_are_learnt_by_no_selection_and_a_budget_is_what_is_learnt(
    make: Callable[..., Trainings], tmp_path: Path
) -> None:
    other = tmp_path / "other"  # the same conversations by other names: all that judge are there
    other.write_text(write_pool(tmp_path / "same", 60).read_text().replace('"row-', '"again-'))
    base = make({"max_rows": [5, 30]}).settings.data
    trainings = make({"data": [base, str(other)], "max_rows": [5, 30]})
    materials = trainings.materials(str(tmp_path))
    held = {tuple(row.id for row in one.held_out) for one in materials.values()}
    assert len(held) == 1
    judges = set(next(iter(held)))
    assert len(judges) == 10
    sizes = {}
    for data in (base, str(other)):
        for budget in (5, 30):
            plan = trainings.plan(0, {"data": data, "max_rows": budget}, 0)
            rows = materials[plan.data].train
            assert not judges & {row.id.replace("again-", "row-") for row in rows}
            sizes[data, budget] = len(rows)
    assert set(sizes.values()) == {5, 30}


def test_a_selection_that_leaves_too_little_is_refused(
    make: Callable[..., Trainings], tmp_path: Path
) -> None:
    tiny = tmp_path / "few.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    tiny.write_text("".join(json.dumps({"id": f"x{i}", **row}) + "\n" for i in range(3)))
    with pytest.raises(PoolError, match="leaves 3 rows to learn from"):
        make({"data": [str(tiny)]}).materials(str(tmp_path))


def test_where_a_point_trains_is_told_by_its_layers_matrices_or_saes(
    make: Callable[..., Trainings], tmp_path: Path
) -> None:
    saes = [
        str(save_tiny_sae(tmp_path / name, hook_point=point))
        for name, point in (("a", "blocks.0.hook_resid_post"), ("b", "blocks.1.hook_mlp_out"))
    ]
    trainings = make(
        {
            "adapter": ["lora", "steering"],
            "layers": [[0], [0, 2]],
            "targets": [["q_proj"], ["up_proj", "down_proj"]],
            "sae": saes,
        }
    )
    assert trainings.space.require_possible(trainings.check) == 4 + 2
    points = {
        ("0+2", "up_proj+down_proj"): {
            "adapter": "lora", "layers": [0, 2], "targets": ["up_proj", "down_proj"],
        },
        ("0", "resid_post"): {"adapter": "steering", "sae": saes[0]},
        ("1", "mlp_out"): {"adapter": "steering", "sae": saes[1]},
        ("all", "all"): {},
    }  # fmt: skip
    for place, point in points.items():
        assert trainings.place(trainings.settings_of(point)) == place
    plan = trainings.plan(3, {"adapter": "steering", "sae": saes[1]}, 9)
    assert plan.adapter is not None
    assert plan.adapter.sae == (saes[1],)
    assert plan.recipe.seed == 9


def test_the_default_lora_takes_over_what_is_learnt_and_not_how(
    make: Callable[..., Trainings],
) -> None:
    trainings = make({"r": [2, 4]}, learning_rate=0.5, num_epochs=2.0, weight_decay=0.1)
    default = trainings.settings_of({})
    assert (default.adapter, default.num_epochs, default.batch_rows) == ("lora", 2.0, 4)
    assert (default.r, default.learning_rate, default.weight_decay) == (16, None, 0.0)
    assert trainings.settings_of({"r": 2}).learning_rate == 0.5


def test_a_sae_of_another_width_or_point_is_named_with_its_combination(
    make: Callable[..., Trainings], tmp_path: Path
) -> None:
    wide = str(save_tiny_sae(tmp_path / "wide"))
    weights = load_file(f"{wide}/sae_weights.safetensors")
    weights["W_enc"], weights["W_dec"] = torch.zeros(48, 64), torch.ones(64, 48)
    save_file(weights | {"b_dec": torch.zeros(48)}, f"{wide}/sae_weights.safetensors")
    config = json.loads(Path(wide, "cfg.json").read_text())
    Path(wide, "cfg.json").write_text(json.dumps(config | {"d_in": 48}))
    deep = str(save_tiny_sae(tmp_path / "deep", hook_point="blocks.9.hook_resid_post"))
    good = str(save_tiny_sae(tmp_path / "good"))
    for wrong, said in ((wide, "reads 48 values"), (deep, "layers")):
        trainings = make({"adapter": ["steering"], "sae": [good, wrong]})
        with pytest.raises(ConfigError, match=f"sae={wrong} cannot be") as found:
            trainings.space.require_possible(trainings.check)
        assert said in str(found.value)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"targets": [["q_proj"], ["nope"]]}, "targets=nope cannot be: targets=nope and the model"),
        ({"layers": [[0], [1, 8]]}, "layers=1\\+8 cannot be: layers=8"),
        (
            {"adapter": ["scale"], "hook_point": [["blocks.0.hook_resid_post"] * 2]},
            "2 hook points and 1 SAEs",
        ),
    ],
)
def test_what_the_model_lacks_is_named_before_the_start(
    space: dict[str, Any], said: str, make: Callable[..., Trainings], tmp_path: Path
) -> None:
    trainings = make(space, sae=[str(save_tiny_sae(tmp_path / "sae"))])
    with pytest.raises(ConfigError, match=said):
        trainings.space.require_possible(trainings.check)


def test_a_step_larger_than_the_rows_is_refused(
    make: Callable[..., Trainings], tmp_path: Path
) -> None:
    with pytest.raises(PoolError, match="fewer than a step's 100"):
        make({"batch_rows": [4, 100]}).materials(str(tmp_path))


def test_parents_are_all_that_trials_are_made_of(
    make: Callable[..., Trainings], tmp_path: Path
) -> None:
    sae = save_tiny_sae(tmp_path / "sae")
    other = write_pool(tmp_path / "other", 20, seed=1)
    trainings = make({"adapter": ["lora", "scale"], "sae": [str(sae)], "data": [str(other)]})
    parents = trainings.parents()
    data = trainings.settings.data
    assert set(parents) == {"lm", f"data {data}", f"data {other}", f"sae {sae}"}
    assert parents[f"data {data}"] != parents[f"data {other}"]
    assert "sae embedded" in Trainings(SearchSettings(space={"adapter": ["scale"]})).parents()
    save_tiny_sae(tmp_path / "sae", seed=7)
    assert trainings.parents()[f"sae {sae}"] != parents[f"sae {sae}"]
