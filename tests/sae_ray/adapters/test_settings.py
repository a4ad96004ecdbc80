import pytest

from sae_ray.adapters.settings import LEARNING_RATES, FinetuneSettings
from sae_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--retain_weight 0.1", "needs --retain"),
        ("--offload cpu --zero_stage 1", "needs --zero_stage 2 or 3"),
        ("--offload nvme --zero_stage 3", "and --nvme_path"),
        ("--packing --zero_stage 3", "does not work at --zero_stage 3"),
        ("--adapter full --start_from x", "does not go with full"),
        ("--adapter steering --lm x", "needs --sae"),
        ("--packing --objective dpo", "packing goes with sft"),
        ("--zero_stage 4", "--zero_stage="),
        ("--adapter prefix", "--adapter="),
        ("--adapter steering --r 4", "--r does nothing for --adapter steering"),
        ("--adapter lora --l1 0.1", "--l1 does nothing for --adapter lora"),
        ("--start_from x --r 4", "--r does nothing with --start_from"),
        ("--offload cpu --num_workers 0", "--offload does nothing with --num_workers 0"),
        ("--adapter subspace --mode core --objective dpo", "core does not go with dpo"),
        ("--adapter subspace --mode soft --zero_stage 3", "needs whole weights"),
        ("--adapter subspace --lm x --sae y", "needs --reference"),
        (
            "--adapter scale --retain x --retain_weight 1 --gradient_checkpointing",
            "leave one of them out",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_one_line(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as found:
        FinetuneSettings.parse(line.split())
    assert "\n" not in str(found.value)


def test_the_rate_is_that_of_the_kind_unless_one_is_given() -> None:
    for kind, rate in LEARNING_RATES.items():
        line = ["--adapter", kind, "--lm", "any", "--sae", "any"]
        line += ["--reference", "any"] * (kind == "subspace")
        settings = FinetuneSettings.parse(line)
        assert settings.recipe.learning_rate == rate
        assert settings.identity()["learning_rate"] == rate
    assert FinetuneSettings.parse([]).rate == 10 * LEARNING_RATES["lora"]
    assert FinetuneSettings.parse(["--learning_rate", "0.5"]).recipe.learning_rate == 0.5


def test_how_fast_it_goes_is_no_part_of_what_it_is() -> None:
    one = FinetuneSettings.parse(["--num_workers", "1", "--max_failures", "0"])
    other = FinetuneSettings.parse(["--num_workers", "2"])
    assert one.identity() == other.identity()
    assert one.identity() != FinetuneSettings.parse(["--seed", "1"]).identity()
