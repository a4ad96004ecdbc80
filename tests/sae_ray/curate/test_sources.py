import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from safetensors.torch import load_file, save_file

from sae_ray import tiny
from sae_ray.artifacts import content_hash
from sae_ray.curate import sources
from sae_ray.curate.index import KIND, FeatureIndex
from sae_ray.curate.settings import IndexSettings
from sae_ray.curate.sources import EMBEDDED, Role, describe_source, fingerprint, locate_source
from sae_ray.distributed.data import build_index
from sae_ray.distributed.indexes import ensure_index
from sae_ray.errors import ArtifactError

MODELS: tuple[Role, ...] = ("lm", "sae")


@pytest.fixture
def index(tiny_settings: IndexSettings, tmp_path: Path) -> str:
    path = str(tmp_path / "index")
    list(build_index(tiny_settings, path))
    return path


def move(settings: IndexSettings, folder: Path) -> dict[str, str]:
    """Move pool, model and SAE to where the index does not know them, in copies of other times."""
    folder.mkdir()
    moved = {}
    for role in ("pool", "lm", "sae"):
        old = Path(str(getattr(settings, role)))
        new = folder / old.name
        # The model is shared by other tests.
        shutil.copytree(old, new) if old.is_dir() else shutil.copyfile(old, new)
        for file in [new, *new.rglob("*")]:
            os.utime(file, (1, 1))
        if role != "lm":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        moved[role] = str(new)
    return moved


def test_an_index_outlives_the_places_of_its_pool_model_and_sae(
    index: str, tiny_settings: IndexSettings, tmp_path: Path
) -> None:
    before = FeatureIndex(index).describe("piano")
    moved = move(tiny_settings, tmp_path / "moved")
    there = tiny_settings.model_copy(update=moved)
    assert list(ensure_index(there, index)) == list(build_index(there, index)) == []
    opened = FeatureIndex(index, lm=moved["lm"], sae=moved["sae"])
    np.testing.assert_array_equal(opened.describe("piano").hidden, before.hidden)
    with pytest.raises(ArtifactError, match="is not there now: give --sae with a copy"):
        _ = FeatureIndex(index).scorer
    with pytest.raises(ArtifactError, match=r"sae .*, which is not there now"):
        list(build_index(tiny_settings, index))


@pytest.mark.parametrize(
    ("role", "file"),
    [
        ("lm", "tokenizer.json"),
        ("lm", "merges.txt"),
        ("lm", "tokenizer.model"),
        ("sae", "cfg.json"),
        ("sae", "sae_weights.safetensors"),
    ],
)
def test_what_decides_results_may_not_differ(
    index: str, tiny_settings: IndexSettings, tmp_path: Path, role: Role, file: str
) -> None:
    copied = Path(shutil.copytree(str(getattr(tiny_settings, role)), tmp_path / "copied"))
    with (copied / file).open("ab") as opened:
        opened.write(b" ")
    changed = tiny_settings.model_copy(update={role: str(copied)})
    for use in (build_index, ensure_index):
        with pytest.raises(ArtifactError, match=rf"made with the {role} .* holds something else"):
            list(use(changed, index))
    given = {role: str(copied)}
    with pytest.raises(ArtifactError, match=f"give --{role} with a copy"):
        _ = FeatureIndex(index, lm=given.get("lm"), sae=given.get("sae")).scorer


def test_labels_beside_the_weights_decide_nothing(tiny_sae: Path) -> None:
    before = fingerprint("sae", str(tiny_sae)), describe_source("sae", str(tiny_sae))
    (tiny_sae / "labels.json").write_text("{}")
    assert fingerprint("sae", str(tiny_sae)) == before[0]
    assert describe_source("sae", str(tiny_sae)) != before[1]


def test_a_finished_index_that_lies_where_it_did_reads_no_weights_and_no_pool(
    index: str, tiny_settings: IndexSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(role: Role, name: str) -> str:
        raise AssertionError(f"{role} {name} was read")

    monkeypatch.setattr(sources, "fingerprint", refuse)
    assert list(build_index(tiny_settings, index)) == []
    _ = FeatureIndex(index).scorer
    for role in ("pool", "lm", "sae"):
        source = Path(str(getattr(tiny_settings, role)))
        some = next(file for file in [source, *source.rglob("*")] if file.is_file())
        stat = some.stat()
        os.utime(some, (1, 1))
        with pytest.raises(AssertionError, match=f"{role} .* was read"):
            list(build_index(tiny_settings, index))
        os.utime(some, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_the_embedded_default_is_recorded_by_name(tmp_path: Path) -> None:
    for role in ("pool", "lm", "sae"):
        assert IndexSettings().source(role) == EMBEDDED
        assert describe_source(role, EMBEDDED).name == EMBEDDED
        assert locate_source(role, EMBEDDED).startswith(str(tiny.DEFAULT))
        assert str(tmp_path.anchor) not in EMBEDDED


def test_a_model_of_the_hub_is_known_by_its_revision(
    tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(os.environ["HF_HOME"]) / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_lm, cache / "snapshots" / "a1b2")
    shutil.copytree(tiny_lm, cache / "snapshots" / "c3d4")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a1b2")
    assert fingerprint("lm", "someone/tiny") == "someone/tiny@a1b2"
    (cache / "refs" / "main").write_text("c3d4")
    assert fingerprint("lm", "someone/tiny") == "someone/tiny@c3d4"
    assert describe_source("lm", "someone/tiny").stamp is None


def test_a_model_of_the_hub_is_read_at_the_revision_that_began(
    tiny_settings: IndexSettings, tmp_path: Path
) -> None:
    old, new = "a" * 40, "b" * 40
    cache = Path(os.environ["HF_HOME"]) / "hub" / "models--someone--moving"
    for revision in (old, new):
        shutil.copytree(str(tiny_settings.lm), cache / "snapshots" / revision)
    weights = cache / "snapshots" / new / "model.safetensors"
    changed = {name: 2 * tensor for name, tensor in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(old)
    path = str(tmp_path / "index")
    steps = build_index(tiny_settings.model_copy(update={"lm": "someone/moving"}), path)
    next(steps)
    (cache / "refs" / "main").write_text(new)  # while the index is being made
    list(steps)
    index = FeatureIndex(path)
    assert index.scorer.config.lm == f"someone/moving@{old}"
    here = str(tmp_path / "here")
    list(build_index(tiny_settings, here))
    assert content_hash(path, KIND) == content_hash(here, KIND)
    text = "Write songs for the piano"
    alike = FeatureIndex(here).describe(text).hidden
    assert_array_equal(index.describe(text).hidden, alike)
    # A name may hold a revision itself.
    given = tiny_settings.model_copy(update={"lm": f"someone/moving@{old}"})
    assert given.scorer_config().lm == f"someone/moving@{old}"
