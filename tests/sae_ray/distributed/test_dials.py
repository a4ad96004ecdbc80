"""Latents are scored and checked alike by workers and without; what is wrong is one line."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_ray.adapters.attach import AdapterSpec, attach
from sae_ray.distributed.dials import dials_over
from sae_ray.errors import ConfigError, ModelError
from sae_ray.explain.attribution import attribute, pushes
from sae_ray.explain.dial import Dial, units_of
from sae_ray.explain.tuned import Tuned
from tests.sae_ray.explain.planted import edit_of, rows_said_by


@pytest.fixture
def tuned(tiny_lm, whole, sae_at, tmp_path: Path) -> Tuned:
    sae = sae_at("blocks.1.hook_resid_post")
    model = attach(whole(tiny_lm), AdapterSpec(kind="steering", sae=(sae,)))
    with torch.no_grad():
        edit_of(model).steering.normal_(0, 0.2)
    folder = tmp_path / "adapter"
    model.save_pretrained(str(folder))
    return Tuned(str(tiny_lm), {one.name: one.read_bytes() for one in folder.iterdir()}, (sae,), 0)


def test_two_workers_give_the_scores_of_one_process(ray_cluster, tuned, whole, tiny_lm):
    units = units_of(rows_said_by(whole(tiny_lm), 41, 0))
    alone = tuned.dial()
    expected = attribute(alone, units)
    assert np.abs(expected.scores).max() > 0.1
    some = np.linspace(0, 1, alone.num_latents, dtype=np.float32)
    model = tuned.load()
    with dials_over(tuned, 2) as spread:
        asked: list[int] = []

        def counted(pieces):
            asked.append(len(pieces))
            return spread(pieces)

        dial = Dial(model, tuned.pad, spread=counted)
        found = attribute(dial, units)
        np.testing.assert_allclose(dial.looks(units, some), alone.looks(units, some), rtol=1e-6)
        np.testing.assert_allclose(pushes(dial, units[:3]), pushes(alone, units[:3]), rtol=1e-5)
    assert max(asked) >= 32
    assert found.num_points == expected.num_points
    size = float(np.abs(expected.scores).max())
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6, atol=1e-6 * size)
    np.testing.assert_allclose(found.spread, expected.spread, rtol=1e-6, atol=1e-6 * size)
    assert found.effect == pytest.approx(expected.effect, rel=1e-6)
    assert found.chance == pytest.approx(expected.chance, rel=1e-6)


def test_what_a_worker_cannot_load_is_said_in_one_line(
    ray_cluster, tuned, whole, tiny_lm, tmp_path
):
    units = units_of(rows_said_by(whole(tiny_lm), 4, 0))
    gone = dataclasses.replace(tuned, lm=str(tmp_path / "gone"))
    with dials_over(gone, 2) as spread, pytest.raises(ModelError, match="gone") as caught:
        attribute(Dial(tuned.load(), tuned.pad, spread=spread), units)
    assert "\n" not in str(caught.value)


def test_more_workers_than_there_is_room_for_are_refused(ray_cluster, tuned):
    with (
        pytest.raises(ConfigError, match="9 workers are asked for .* give --num_workers 4"),
        dials_over(tuned, 9),
    ):
        pass
