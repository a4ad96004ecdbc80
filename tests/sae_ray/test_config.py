from pathlib import Path
from typing import Literal

import pytest
from botocore.exceptions import ClientError
from pydantic import Field, ValidationError

from sae_ray.config import JobConfig, OutputPath, run_job
from sae_ray.errors import ConfigError, TaskError


class Config(JobConfig):
    """Bake bread.

    python jobs/bake.py --flour rye --out out/rye
    """

    flour: str
    """What it is made of; 100 % of it."""
    out: OutputPath = "out"
    """Where it goes."""
    loaves: int = Field(default=2, gt=0)
    """How many."""
    num_ovens: int | None = None
    """Ovens, none = one a cook."""
    seeds: list[str] = []
    """What lies on top."""
    stage: Literal[0, 2, "all"] = 0
    """Which stage."""
    salted: bool = False
    """Add salt."""


def write_yaml(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(
    tmp_path, monkeypatch
):
    path = write_yaml(tmp_path, "flour: spelt\nloaves: 3\nstage: all\n")
    monkeypatch.setenv("SAE_RAY_FLOUR", "wheat")
    monkeypatch.setenv("SAE_RAY_LOAVES", "4")
    monkeypatch.setenv("SAE_RAY_OF_ANOTHER_JOB", "1")
    config = Config.parse(["--config", path, "--flour", "rye"])
    assert (config.flour, config.loaves, config.stage, config.salted) == ("rye", 4, "all", False)


@pytest.mark.parametrize(
    "argv",
    [
        ["--seeds", 'sesame,it"s,null,12'],
        ["--seeds", "sesame", 'it"s', "--seeds", "null,12"],
        ["--seeds", '["sesame", "it\\"s"]', "--seeds=null", "--seeds=12"],
        ["--seeds", '["sesame", "it\\"s", "null", 12]'],
    ],
)
def test_lists_are_commas_json_or_repeated_flags_and_their_items_stay_text(argv):
    assert Config.parse(["--flour", "rye", *argv]).seeds == ["sesame", 'it"s', "null", "12"]


class Asked(JobConfig):
    """What may be one text or several."""

    prompt: str | list[str] = []
    """One, or several."""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--prompt", "Sort 9, 2, 5"], ["Sort 9, 2, 5"]),
        (["--prompt", "a, b", "--prompt", '["c, d", 7]'], ["a, b", "c, d", "7"]),
    ],
)
def test_what_may_be_one_text_keeps_its_commas(argv, expected):
    assert Asked.parse(argv).prompt == expected
    with pytest.raises(ConfigError, match='write it as \\["a", "b"\\]'):
        Asked.parse(["--prompt", "[INST] a"])


def test_a_list_reads_the_same_from_the_environment_and_from_yaml(tmp_path, monkeypatch):
    path = write_yaml(tmp_path, "flour: rye\nseeds: [a, 12]\n")
    assert Config.parse(["--config", path]).seeds == ["a", "12"]
    monkeypatch.setenv("SAE_RAY_SEEDS", "b, c")
    assert Config.parse(["--config", path]).seeds == ["b", "c"]


def test_text_becomes_the_fields_type_and_text_alone_stays_as_typed():
    argv = ["--flour", "null", "--num_ovens", "none", "--stage", "2", "--salted"]
    config = Config.parse(argv)
    assert (config.flour, config.num_ovens, config.stage, config.salted) == ("null", None, 2, True)
    assert not Config.parse([*argv, "--no-salted"]).salted


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "--flour is missing (What it is made of; 100 % of it.): give it as a flag"),
        (["--flor", "rye"], "unknown flag '--flor': did you mean --flour?"),
        (["--flour=rye", "--num-ovens=2"], "'--num-ovens': did you mean --num_ovens?"),
        (["--flour=rye", "--zzz=1"], "see --help Known: flour, out, loaves"),
        (["--flour", "rye", "bread"], "'bread' belongs to no flag: put quotes round"),
        (["--flour"], "argument --flour: expected one argument"),
        (["--flour=rye", "--loaves=0"], "--loaves='0': input should be greater than 0"),
        (["--flour=rye", "--loaves=many"], "--loaves='many': input should be a valid integer"),
        (["--flour=rye", "--stage=3"], "--stage='3': input should be 0, 2 or 'all'"),
        (["--flour=rye", "--seeds=[a"], "'[a' is not a JSON list"),
        (["--flour=rye", "--trust_remote_code=1"], "unknown flag '--trust_remote_code'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    ],
)
def test_a_wrong_line_is_answered_with_what_to_do(argv, expected):
    with pytest.raises(ConfigError) as caught:
        Config.parse(argv)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flour: rye\nloafs: 3\n", "unknown key 'loafs': did you mean loaves?"),
        ("flour: [rye\n", "is not YAML"),
        ("rye\n", "holds no settings"),
        ("flour: rye\nloaves: 0\n", "--loaves=0: input should be greater"),
        ("flour: rye\ntrust_remote_code: true\n", "unknown key 'trust_remote_code'"),
        ("", "--flour is missing"),
    ],
)
def test_a_wrong_file_is_answered_with_what_to_do(tmp_path, text, expected):
    with pytest.raises(ConfigError) as caught:
        Config.parse(["--config", write_yaml(tmp_path, text)])
    assert expected in str(caught.value)


def test_help_opens_with_a_line_to_run_and_tells_each_fields_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        Config.parse(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "python jobs/bake.py --flour rye --out out/rye" in printed
    assert "What it is made of; 100 % of it. (required)" in printed
    assert "How many. (default: 2)" in printed
    assert "Ovens, none = one a cook. (default: none)" in printed


def test_a_config_cannot_be_changed_or_given_unknown_fields():
    config = Config(flour="rye")
    with pytest.raises(ValidationError):
        config.loaves = 3
    with pytest.raises(ValidationError):
        Config.model_validate({"flour": "rye", "loafs": 1})


def test_inside_a_ray_job_a_relative_output_path_is_refused(monkeypatch, tmp_path):
    assert Config.parse(["--flour=rye", "--out=bread"]).out == "bread"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for path in (str(tmp_path), "s3://bucket/bread"):
        assert Config.parse(["--flour=rye", f"--out={path}"]).out == path
    with pytest.raises(ConfigError, match="'bread' is relative"):
        Config.parse(["--flour=rye", "--out=bread"])


def bake(config: Config) -> int | None:
    if config.flour == "sand":
        raise TaskError("flour=sand\nis no flour: give another")
    if config.flour == "none left":
        raise OSError(28, "No space left on device")
    if config.flour == "none of yours":
        raise ClientError({"Error": {"Code": "403"}}, "GetFlour")
    if config.flour == "burnt":
        raise KeyboardInterrupt
    return 3 if config.salted else None


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--flour=rye"], 0, ""),
        (["--flour=rye", "--salted"], 3, ""),
        (["--flour=sand"], 2, "error: flour=sand is no flour: give another\n"),
        (["--flour=burnt"], 130, ""),
        (["--flr=1"], 2, "error: unknown flag '--flr': did you mean --flour? Known: "),
        (["--flour=none left"], 2, "error: no space left to write"),
        (["--flour=none of yours"], 2, "error: storage cannot be reached (ClientError: An error"),
    ],
)
def test_a_job_ends_with_one_line_and_an_exit_code(capsys, argv, code, said):
    assert run_job(bake, Config, argv) == code
    printed = capsys.readouterr().err
    assert printed.startswith(said)
    assert printed.count("\n") == (1 if said else 0)


@pytest.mark.parametrize("mistake", [ZeroDivisionError(), OSError(5, "Input/output error")])
def test_a_mistake_of_ours_is_not_hidden(mistake):
    def broken(config: Config) -> None:
        raise mistake

    with pytest.raises(type(mistake)):
        run_job(broken, Config, ["--flour=rye"])
