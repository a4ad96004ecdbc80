import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.curate.block import IndexBlock
from sae_ray.curate.sources import locate_source
from sae_ray.errors import ConfigError, ModelError
from sae_ray.experts.agreement import agreed
from sae_ray.experts.prototypes import Eyes
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.router import Router
from sae_ray.experts.settings import ServeSettings
from tests.made_experts import add_expert

LORA = AdapterSpec(kind="lora", r=2)


@pytest.fixture
def llama(tiny_lm_of: Callable[[str], Path]) -> str:
    return str(tiny_lm_of("llama"))


@pytest.fixture
def registry(tmp_path: Path) -> ExpertRegistry:
    return ExpertRegistry(str(tmp_path / "experts"))


@pytest.fixture
def router(
    tmp_path: Path, eyes: Eyes, blocks: Mapping[str, IndexBlock], background: IndexBlock
) -> str:
    """A router over the embedded base."""
    known = {"0" * 16: ("velan", "", blocks["velan"])}
    Router.fit(eyes, known, background).save(str(tmp_path / "router"), "embedded", "embedded")
    return str(tmp_path / "router")


def test_the_base_is_the_experts_own_unless_given(registry: ExpertRegistry, llama: str) -> None:
    assert agreed(ServeSettings()).lm == "embedded"
    add_expert(registry, "sums", LORA, lm=llama)
    assert agreed(ServeSettings(registry=registry.path)).lm == llama
    assert agreed(ServeSettings(registry=registry.path, lm=llama)).lm == llama


def test_the_base_is_the_routers_own_unless_given(
    registry: ExpertRegistry, router: str, tmp_path: Path, llama: str
) -> None:
    add_expert(registry, "velan", LORA)
    given = ServeSettings(registry=registry.path, router=router)

    def agreed_with(**more: str) -> str | None:
        return agreed(given.model_copy(update=more)).lm

    assert agreed_with() == "embedded"
    # A copy of the base is as good as the base itself; another model or SAE is not.
    copy = shutil.copytree(locate_source("lm", "embedded"), tmp_path / "copy")
    assert agreed_with(lm=str(copy)) == str(copy)
    with pytest.raises(ConfigError, match=f"another lm than {llama} holds"):
        agreed_with(lm=llama)
    sae = Path(shutil.copytree(locate_source("sae", "embedded"), tmp_path / "sae"))
    agreed_with(sae=str(sae))
    about = json.loads((sae / "cfg.json").read_text())
    (sae / "cfg.json").write_text(json.dumps(about | {"changed": True}))
    with pytest.raises(ConfigError, match="another sae than"):
        agreed_with(sae=str(sae))


def test_experts_of_other_bases_are_refused_where_none_would_be_served(
    registry: ExpertRegistry, router: str, llama: str
) -> None:
    add_expert(registry, "sums", LORA, lm=llama)
    with pytest.raises(ConfigError, match="none of the 1 experts in use") as caught:
        agreed(ServeSettings(registry=registry.path, lm="embedded"))
    assert llama in str(caught.value)
    with pytest.raises(ConfigError, match="none of the 1 experts in use"):
        agreed(ServeSettings(registry=registry.path, router=router))
    add_expert(registry, "velan", LORA)
    with pytest.raises(ConfigError, match="trained on several bases"):
        agreed(ServeSettings(registry=registry.path))
    assert agreed(ServeSettings(registry=registry.path, router=router)).lm == "embedded"


def test_what_is_missing_is_said(
    tmp_path: Path, router: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="there is no --registry"):
        agreed(ServeSettings(router=router))
    with pytest.raises(ModelError):
        agreed(ServeSettings(lm=str(tmp_path / "nothing")))
    with caplog.at_level(logging.WARNING):
        assert agreed(ServeSettings(registry=str(tmp_path / "none"))).lm == "embedded"
    assert "the base answers until one is" in caplog.text


def test_paths_hold_in_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: str
) -> None:
    shutil.copytree(llama, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    found = agreed(ServeSettings(lm="base", registry="experts", keys="keys"))
    assert found.lm == str(tmp_path / "base")
    assert (found.registry, found.keys) == (str(tmp_path / "experts"), str(tmp_path / "keys"))
    far = agreed(ServeSettings(registry="memory://none"))
    assert (far.lm, far.registry) == ("embedded", "memory://none")
