"""Trackers: curves arrive in TensorBoard, and one that fails never stops a training."""

import logging
import time
from pathlib import Path

import pytest

from sae_ray.errors import ConfigError
from sae_ray.explain import trackers
from sae_ray.explain.trackers import Trackers


def test_figures_arrive_in_tensorboard(tmp_path: Path) -> None:
    tracked = Trackers(["tensorboard"], str(tmp_path / "run"))
    tracked.log({"a/loss": 1.5}, 3)
    (file,) = (tmp_path / "run-tensorboard").glob("events*")
    # tensorboardX writes in a thread of its own.
    until = time.monotonic() + 60
    while b"a/loss" not in (content := file.read_bytes()):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert b"brain.Event:2" in content


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, monkeypatch, caplog) -> None:
    sent: list[int] = []

    def full(_figures, step: int) -> None:
        sent.append(step)
        raise OSError("no space left")

    monkeypatch.setattr(trackers, "_tensorboard", lambda _: full)
    tracked = Trackers(["tensorboard"], str(tmp_path / "run"))
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracked.log({"loss": 1.0}, step)
    assert sent == [0]
    assert caplog.text.count("training goes on without it") == 1


def test_a_library_that_is_not_there_is_told_before_training(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(ConfigError, match="trackers=mlflow: its library is not installed"):
        Trackers(["mlflow"], str(tmp_path / "run"))
