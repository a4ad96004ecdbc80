import json
import re
import shlex
import subprocess

import pytest

from jobs import curate
from sae_ray.config import JobConfig
from sae_ray.curate.request import Request
from sae_ray.explain.command import compose, next_flags, next_folder

HIDDEN = "a\x00b\x1b[31mc\rd\u202ee\ud800f"
IDS = ["plain-1.a/b:c", 'it\'s "q"', "<b>&amp;", "-x", "a,b", "new\nline", HIDDEN, "é"]


class Config(JobConfig):
    """Read what the page composes, as the job does."""

    task: str
    """Sentence."""
    index: str
    """Folder."""
    out: str
    """Folder."""
    keep: list[str] = []
    """Ids."""
    drop: list[str] = []
    """Ids."""


def run_by_a_shell(command: str) -> list[str]:
    """Return the arguments that a POSIX shell makes of a command."""
    printed = command.replace("python jobs/curate.py", "printf '%s\\0'", 1)
    output = subprocess.run(["sh", "-c", printed], capture_output=True, check=True).stdout
    return output.decode().split("\0")[:-1]


@pytest.mark.parametrize(
    "task", ["Do sums.", 'it\'s "here" $HOME `ls` \\ !x', "-v", "two\nlines", "", "<b>&"]
)
@pytest.mark.parametrize("ids", [[], ["r1"], ["r1", "a/b:c.d-e"], IDS])
def test_the_command_means_the_same_to_the_shell_and_the_job(task: str, ids: list[str]):
    settings = {"task": task, "index": "my runs/it's"}
    config = Config.parse(run_by_a_shell(compose(settings, "next run", ids, ids[:1])))
    assert config == Config(task=task, index="my runs/it's", out="next run", keep=ids, drop=ids[:1])


def test_plain_ids_make_a_plain_command():
    settings = {"task": "Do it", "index": "runs/index"}
    assert compose(settings, "runs/a-2", ["r1", "r2"], ["x:3"]) == (
        "python jobs/curate.py --task 'Do it' --index runs/index --keep r1,r2 --drop x:3 "
        "--out runs/a-2"
    )


def test_no_control_character_reaches_the_terminal_that_the_command_is_pasted_into():
    settings = {"task": HIDDEN, "index": "i"}
    command = compose(settings, HIDDEN, [HIDDEN, "x\x7f"], ["\x1b[201~"])
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", command)
    parsed = shlex.split(command)
    assert json.loads(parsed[parsed.index("--keep") + 1]) == [HIDDEN, "x\x7f"]


REQUESTS = [
    Request(task="Do it"),
    Request(
        task='it\'s "done"',
        budget_examples=7,
        budget_tokens=900,
        examples="my examples.jsonl",
        pseudo_queries="s3://bucket/a b.txt",
        evaluation=("one.parquet", "two, or three.jsonl"),
        scorer="jaccard",
        selector="round_robin",
        quota_column="-source",
        quota=0.125,
        explain_rows=40,
    ),
    Request(task="Do it", evaluation=("-e",), quota=1.0, quota_column="none of these"),
]


def next_config(request: Request, keep: list[str], drop: list[str]) -> curate.Config:
    flags = next_flags(request, "runs/index", "runs/a-1") | {"labels": "my labels", "strict": True}
    command = compose(flags, next_folder("runs/a-1"), keep, drop)
    return curate.Config.parse(shlex.split(command)[2:])


@pytest.mark.parametrize("request_", REQUESTS)
def test_the_next_command_asks_the_same_but_for_the_rows_judged(request_: Request):
    config = next_config(request_, ["r1", "a,b"], ["-c"])
    asked = config.model_dump(include=set(Request.model_fields))
    expected = request_.model_copy(update={"keep": ("r1", "a,b"), "drop": ("-c",)})
    assert Request.model_validate(asked) == expected
    assert (config.index, config.out) == ("runs/index", "runs/a-2")
    assert (config.labels, config.strict) == ("my labels", True)


def test_every_field_of_a_request_is_tried():
    tried = {name for one in REQUESTS for name in one.model_dump(exclude_defaults=True)}
    elsewhere = {"keep", "drop", "pseudo_url", "pseudo_model"}
    assert tried | elsewhere == set(Request.model_fields)


def test_what_an_endpoint_wrote_is_read_again_and_not_asked_again():
    asked = Request(task="t", pseudo_url="http://127.0.0.1:1/v1", pseudo_model="m")
    config = next_config(asked, [], [])
    assert config.pseudo_queries == "runs/a-1/pseudo_queries.jsonl"
    assert config.pseudo_url is None
    assert config.pseudo_model is None


@pytest.mark.parametrize(
    ("path", "following"),
    [
        ("maths", "maths-2"),
        ("runs/maths-2/", "runs/maths-3"),
        ("a-b", "a-b-2"),
        ("s3://b/x-9", "s3://b/x-10"),
        ("runs-1/x", "runs-1/x-2"),
    ],
)
def test_rounds_count_up(path: str, following: str):
    assert next_folder(path) == following
