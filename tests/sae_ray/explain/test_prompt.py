import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.request import Request
from sae_ray.explain.curation import Curator
from sae_ray.explain.prompt import refine

ROOT = Path(__file__).parents[3]
ASKED = Request(task="Write songs for the piano", budget_examples=10)


class Terminal:
    """A person's lines, and what the prompt says between them."""

    def __init__(self, *lines: str) -> None:
        self.typed = io.StringIO("".join(f"{line}\n" for line in lines))
        self.said: list[str] = []

    def ask(self, prompt: str) -> str:
        """Read a line as `input` does."""
        self.said.append(prompt)
        if not (line := self.typed.readline()):
            raise EOFError
        return line.removesuffix("\n")

    def shown(self) -> list[list[str]]:
        """Return the rows shown in each round."""
        rounds: list[list[str]] = [[]]
        for line in self.said:
            if line.endswith("> "):
                rounds.append([])
            elif line[:3].strip().isdecimal():
                rounds[-1].append(line)
        return rounds[:-1]


@pytest.fixture(scope="module")
def curator(small_index: FeatureIndex) -> Curator:
    return Curator(small_index)


def judge(curator: Curator, *lines: str) -> tuple[Request | None, Terminal]:
    terminal = Terminal(*lines)
    return refine(curator, ASKED, terminal.ask, terminal.said.append), terminal


def lines_of(curator: Curator, ids: tuple[str, ...]) -> list[str]:
    """Return how rows are shown; two near-copies may look alike."""
    rows = [curator.index.ids.index(one) for one in ids]
    return [" ".join(one.text().split())[:160] for one in curator.index.conversations(rows)]


def test_judgements_of_all_rounds_are_in_the_request(curator: Curator) -> None:
    request, terminal = judge(curator, "+1 -2", "-1, +3", "w")
    assert request is not None
    shown = [[line.split(". ", 1)[1] for line in one] for one in terminal.shown()]
    assert lines_of(curator, request.keep) == [shown[0][0], shown[1][2]]
    assert lines_of(curator, request.drop) == [shown[0][1], shown[1][0]]
    assert request.model_copy(update={"keep": (), "drop": ()}) == ASKED


def test_no_row_is_shown_twice(curator: Curator) -> None:
    _, terminal = judge(curator, "", "+1", "", "", "q")
    rounds = terminal.shown()
    assert [len(one) for one in rounds] == [20, 20, 20, 20, 0]
    numbered = [line.split(". ", 1)[1] for one in rounds for line in one]
    pool = [" ".join(one.text().split())[:160] for one in curator.index.conversations(range(80))]
    assert sorted(numbered) == sorted(pool)
    assert terminal.said.count("no other row is left to judge") == 1


def test_what_judges_nothing_is_told_and_changes_nothing(curator: Curator) -> None:
    request, terminal = judge(curator, "3", "yes please", "+99 -0", "w")
    assert request == ASKED
    for line in (
        "'3' judges nothing: write +3 to keep row 3, -3 to drop it",
        "there is no row 99: give 1 to 20",
        "there is no row 0: give 1 to 20",
    ):
        assert line in terminal.said


def test_the_last_word_on_a_row_counts(curator: Curator) -> None:
    for line, kept, dropped in (("+1 -1", 0, 1), ("-1 +1", 1, 0), ("+1 +1", 1, 0)):
        request, _ = judge(curator, line, "w")
        assert request is not None
        assert (len(request.keep), len(request.drop)) == (kept, dropped)


@pytest.mark.parametrize("lines", [["q"], [], ["+1", " q "]])
def test_leaving_writes_nothing(curator: Curator, lines: list[str]) -> None:
    request, terminal = judge(curator, *lines)
    assert request is None
    assert terminal.said[-1] == "left without writing"


def test_warnings_are_said_before_the_rows(curator: Curator) -> None:
    terminal = Terminal("q")
    refine(curator, Request(task="Zzyzx", budget_examples=5), terminal.ask, terminal.said.append)
    assert terminal.said[0].startswith("warning: no row of the pool holds a word")


@pytest.mark.slow
def test_a_person_at_a_terminal_judges_and_writes(
    small_index: FeatureIndex, tmp_path: Path
) -> None:
    line = [sys.executable, "jobs/curate.py", "--interactive", "--task", ASKED.task]
    line += ["--budget_examples=10", f"--index={small_index.path}", f"--out={tmp_path}/out"]
    done = subprocess.run(
        line,
        input="+1 -2\n\nw\n",
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=110,
    )
    assert done.stdout.count("+1 +4") == 3
    assert "10 rows" in done.stdout
    profile = json.loads((tmp_path / "out/profile.json").read_text())
    assert len(profile["keep"]) == len(profile["drop"]) == 1
