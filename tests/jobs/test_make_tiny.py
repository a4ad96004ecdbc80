"""The job that makes the embedded default: what is finished is not done again."""

import shutil
from pathlib import Path

import pytest

from jobs.make_tiny import Config, main
from sae_ray import tiny


def test_a_finished_folder_is_left_as_it_is_but_for_its_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny"
    shutil.copytree(tiny.DEFAULT, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    main(Config(out=out, work=tmp_path / "work"))
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert after.pop(out / "README.md")
    assert after == before
    assert not (tmp_path / "work").exists()
    assert str(out / "README.md") in capsys.readouterr().out
