"""Planted pools, written once a session."""

import pytest

from tests.sae_ray.curate.planted import Planted, plant


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A pool of three tasks."""
    return plant(tmp_path_factory.mktemp("planted") / "index")


@pytest.fixture(scope="session")
def absorbed(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """The same where a child latent fires instead of its parent in 30 % of a task's rows."""
    return plant(tmp_path_factory.mktemp("absorbed") / "index", absorbed=0.3)


@pytest.fixture(scope="session")
def repetitive(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """The same where half of the rows nearly copy an earlier one."""
    return plant(tmp_path_factory.mktemp("repetitive") / "index", copied=0.5)
