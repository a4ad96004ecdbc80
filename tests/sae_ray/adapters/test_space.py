"""A space: what counts for a kind of adapter, every combination looked at, wrong ones named."""

from pathlib import Path

import pytest

from sae_ray.adapters.settings import FinetuneSettings
from sae_ray.adapters.space import Knob, Point, Range, Space, key_of, tell
from sae_ray.errors import ConfigError

BASE = FinetuneSettings()
BOTH = "{adapter: [lora, residual], layers: [[0], [1, 2]], hidden: [8, 16, 32], l1: [0.0, 0.1]}"


def parse(text: str, base: FinetuneSettings = BASE) -> Space:
    return Space.parse(text, base)


def test_a_point_holds_what_counts_for_its_kind_and_nothing_else() -> None:
    points = list(parse(BOTH).grid())
    assert len(points) == len({key_of(one) for one in points}) == 2 + 3 * 2
    for one in points:
        others = {"hidden", "l1"} if one["adapter"] == "lora" else {"layers"}
        assert not others & one.keys()
        assert len(one) == (2 if one["adapter"] == "lora" else 3)


def test_what_is_proposed_is_asked_for_the_kind_first() -> None:
    asked: list[str] = []

    def suggest(name: str, knob: Knob) -> object:
        asked.append(name)
        assert isinstance(knob, list)
        return knob[-1]

    point = parse(BOTH).propose(suggest)  # pyright: ignore[reportArgumentType]
    assert asked == ["adapter", "hidden", "l1"]
    assert point == {"adapter": "residual", "hidden": 32, "l1": 0.1}


@pytest.mark.parametrize(
    ("low", "high", "log", "points", "expected"),
    [
        (1e-4, 1e-2, True, 3, [1e-4, 1e-3, 1e-2]),
        (0.0, 1.0, False, 3, [0.0, 0.5, 1.0]),
        (1, 100, True, 3, [1, 10, 100]),
        (1, 2, False, 5, [1, 2]),
    ],
)
def test_a_range_is_spread_from_end_to_end(
    low: float, high: float, log: bool, points: int, expected: list[float]
) -> None:
    spread = Range(low=low, high=high, log=log, points=points).spread()
    assert spread == pytest.approx(expected)
    assert spread[0] == low
    assert spread[-1] == high


def test_numbers_of_a_range_are_of_the_kind_that_the_setting_takes() -> None:
    knobs = parse("{r: {low: 4, high: 6.4e+1}, warmup_share: {low: 0, high: 1}}").knobs
    r, share = knobs["r"], knobs["warmup_share"]
    assert isinstance(r, Range)
    assert isinstance(share, Range)
    assert r.is_whole
    assert not share.is_whole


def test_settings_of_a_point_are_the_base_with_its_values() -> None:
    base = FinetuneSettings(r=4, num_epochs=2, max_rows=50)
    space = parse("{adapter: [lora, steering], learning_rate: [0.5], sae: [here]}", base)
    lora = space.settings({"adapter": "lora", "learning_rate": 0.5})
    assert (lora.r, lora.num_epochs, lora.max_rows, lora.rate) == (4, 2, 50, 0.5)
    assert lora.num_workers == 0
    steering = space.settings({"adapter": "steering", "learning_rate": 0.5, "sae": "here"})
    assert steering.sae == ["here"]  # one stands for a list of one
    assert "r" not in steering.model_fields_set  # lora's own does not trouble another kind


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "the space is empty"),
        ("{adaptor: [lora]}", "space.adaptor is no setting that may be searched"),
        ("{lm: [a, b]}", "space.lm is no setting"),
        ("{seed: [1, 2]}", "space.seed is no setting"),
        ("{adapter: [lora, prefix]}", "space.adapter='prefix' is no kind"),
        ("{adapter: lora}", "space.adapter='lora': give a list"),
        ("{adapter: []}", "space.adapter="),
        ("{r: [4, 4]}", "holds a choice twice"),
        ("{learning_rate: {low: 1, high: 0.1}}", "low below"),
        ("{learning_rate: {low: 0, high: 1, log: true}}", "a logarithm needs numbers above 0"),
        ("{learning_rate: {low: .nan, high: 1}}", "give finite ones"),
        ("{learning_rate: {lo: 1, high: 2}}", "is no range"),
        ("{max_rows: {low: 10, high: 100}}", "give a list of choices"),
        ("{hidden: [8, 16]}", "space.hidden counts for no adapter of lora"),
        ("{beta: [0.1, 0.5]}", "space.beta counts for dpo alone"),
        ("{max_steps: [5], num_epochs: [1, 2]}", "leave one out"),
        ("{r: {low: 1.5, high: 4}}", "give whole numbers"),
        ("nowhere.yaml", "cannot be read"),
        ("{adapter: [lora", "cannot be read"),
        ("{[1, 2]: 3}\n", "cannot be read"),
        ("- adapter\n- lora\n", "holds no settings"),
    ],
)
def test_what_is_no_space_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")) as found:
        parse(text)
    assert "\n" not in str(found.value)


def test_a_space_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("adapter: [lora]\nr: {low: 2, high: 8}\n")
    assert parse(str(path)).knobs == {"adapter": ["lora"], "r": Range(low=2, high=8)}
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        parse(str(path))


@pytest.mark.parametrize(
    ("text", "combination", "why"),
    [
        ("{adapter: [lora], r: [4, 0]}", "adapter=lora, r=0 cannot be", "greater than"),
        ("{adapter: [lora], r: [4, many]}", "r=many cannot be", "valid integer"),
        (
            "{adapter: [lora, steering], learning_rate: {low: -1.0, high: 1.0}}",
            "adapter=lora, learning_rate=-1 cannot be",
            "greater than 0",
        ),
    ],
)
def test_a_combination_that_cannot_be_is_named_before_anything_is_trained(
    text: str, combination: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=combination) as found:
        parse(text).require_possible(lambda _settings: None)
    assert why in str(found.value)


def test_every_combination_is_looked_at_and_what_the_look_refuses_is_named() -> None:
    seen: list[FinetuneSettings] = []
    assert parse(BOTH).require_possible(seen.append) == len(seen) == 8
    ends: list[FinetuneSettings] = []
    parse("{learning_rate: {low: 0.1, high: 0.4, points: 9}}").require_possible(ends.append)
    assert [one.rate for one in ends] == [0.1, 0.4]

    def refuse(settings: FinetuneSettings) -> None:
        if settings.adapter == "residual" and settings.hidden == 16:
            raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="hidden=16, l1=0 cannot be: no such thing"):
        parse(BOTH).require_possible(refuse)


def test_too_many_combinations_are_refused_before_they_are_all_looked_at() -> None:
    many = {"r": list(range(1, 200)), "batch_rows": list(range(1, 200))}
    looked: list[FinetuneSettings] = []
    with pytest.raises(ConfigError, match="more than 20,000 combinations"):
        Space.parse(many, BASE).require_possible(looked.append)
    assert len(looked) <= 20_000


def test_a_point_is_told_as_it_is_typed() -> None:
    point: Point = {"adapter": "lora", "learning_rate": 0.000123456, "layers": [0, 1]}
    assert tell(point) == "adapter=lora, learning_rate=0.0001235, layers=0+1"
