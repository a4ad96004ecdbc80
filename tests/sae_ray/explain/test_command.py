import json
import re
import shlex
import subprocess

import pytest

from sae_ray.config import JobConfig
from sae_ray.explain.command import compose

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
