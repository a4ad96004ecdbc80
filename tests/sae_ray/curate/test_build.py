import gzip
import hashlib
import shutil
from pathlib import Path

import pytest
from pydantic import JsonValue

from sae_ray.artifacts import begin, open_artifact
from sae_ray.curate.index import KIND
from sae_ray.curate.settings import IndexSettings
from sae_ray.distributed.data import build_index
from sae_ray.errors import ArtifactError, ConfigError, ModelError


def hashes(path: str) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(Path(path).rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tiny_settings: IndexSettings, tmp_path: Path
) -> None:
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    list(build_index(tiny_settings, whole))
    steps = build_index(tiny_settings, stopped)
    next(steps)
    del steps  # a generator that is let go is closed
    written = (tmp_path / "stopped/shards/00000.parquet").stat().st_mtime_ns
    steps = list(build_index(tiny_settings, stopped))
    assert len(steps) == 4
    assert steps[-1].rows == 60
    assert (tmp_path / "stopped/shards/00000.parquet").stat().st_mtime_ns == written
    assert hashes(stopped) == hashes(whole)


def test_a_finished_index_is_not_made_again(tiny_settings: IndexSettings, tmp_path: Path) -> None:
    path = str(tmp_path / "index")
    list(build_index(tiny_settings, path))
    before = open_artifact(path, KIND)
    assert list(build_index(tiny_settings, path)) == []
    assert open_artifact(path, KIND).created == before.created


def test_a_folder_with_the_index_of_another_pool_is_refused(
    tiny_settings: IndexSettings, tmp_path: Path
) -> None:
    path = str(tmp_path / "index")
    list(build_index(tiny_settings, path))
    pool = Path(tiny_settings.pool_source)
    pool.write_text(pool.read_text().replace("river", "lake"))
    with pytest.raises(ArtifactError, match="made with the pool .* holds something else now"):
        list(build_index(tiny_settings, path))


def test_other_settings_are_refused_by_name(tiny_settings: IndexSettings, tmp_path: Path) -> None:
    path = str(tmp_path / "index")
    list(build_index(tiny_settings, path))
    other = tiny_settings.model_copy(update={"max_tokens": 64})
    with pytest.raises(ArtifactError, match="max_tokens: 2048 there, 64 here"):
        list(build_index(other, path))


def test_a_sae_without_its_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="--sae is given without --lm"):
        IndexSettings.parse(["--sae", "somewhere"])


def test_a_sae_of_another_width_is_refused_before_anything_is_written(
    tiny_settings: IndexSettings, tiny_sae: Path, tmp_path: Path
) -> None:
    config = tiny_sae / "cfg.json"
    config.write_text(
        config.read_text().replace("blocks.1.hook_resid_post", "blocks.9.hook_mlp_out")
    )
    with pytest.raises(ModelError, match=r"blocks\.9.*layers 0 to 2"):
        list(build_index(tiny_settings, str(tmp_path / "index")))
    assert not (tmp_path / "index").exists()


def test_a_sae_that_does_not_reconstruct_is_refused(
    tiny_settings: IndexSettings, tmp_path: Path
) -> None:
    checked = tiny_settings.model_copy(update={"check_fit": True})
    with pytest.raises(ModelError, match=r"of the variance.*another model or layer"):
        list(build_index(checked, str(tmp_path / "index")))


@pytest.fixture
def packed(tiny_settings: IndexSettings, tmp_path: Path) -> IndexSettings:
    """Settings with the tiny pool as a gzip file, which must be unpacked somewhere."""
    pool = tmp_path / "pool.jsonl.gz"
    pool.write_bytes(gzip.compress(Path(tiny_settings.pool_source).read_bytes()))
    return tiny_settings.model_copy(update={"pool": str(pool)})


def test_a_pool_is_not_unpacked_again_for_a_finished_index(
    packed: IndexSettings, tmp_path: Path
) -> None:
    path = tmp_path / "index"
    list(build_index(packed, str(path)))
    before = sorted(path.rglob("*"))
    assert path / ".staging" not in before
    path.chmod(0o500)  # and root, who may write all the same, leaves nothing
    assert list(build_index(packed, str(path))) == []
    path.chmod(0o700)
    assert sorted(path.rglob("*")) == before


@pytest.mark.parametrize(
    ("other", "says"), [("bread", "kind: 'bread' there"), (KIND, "max_tokens: 64 there, 2048 here")]
)
def test_a_pool_is_not_unpacked_into_the_folder_of_another_run(
    packed: IndexSettings, tmp_path: Path, other: str, says: str
) -> None:
    path = tmp_path / "index"
    begin(str(path), other, {**packed.identity(), "max_tokens": 64})
    with pytest.raises(ArtifactError, match=says):
        list(build_index(packed, str(path)))
    assert [file.name for file in path.iterdir()] == ["run.json"]


def test_a_run_goes_on_with_a_copy_of_its_model(
    tiny_settings: IndexSettings, tmp_path: Path
) -> None:
    path = str(tmp_path / "index")
    steps = build_index(tiny_settings, path)
    next(steps)
    del steps  # a generator that is let go is closed
    copied = shutil.copytree(str(tiny_settings.sae), tmp_path / "copied")
    elsewhere = tiny_settings.model_copy(update={"sae": str(copied)})
    assert len(list(build_index(elsewhere, path))) == 4
    assert open_artifact(path, KIND).sources["sae"].name == tiny_settings.sae


def test_how_well_a_sae_fits_does_not_depend_on_the_cut_of_the_pool(
    tiny_settings: IndexSettings, tmp_path: Path
) -> None:
    def unexplained(rows_per_shard: int) -> JsonValue:
        path = str(tmp_path / str(rows_per_shard))
        cut = tiny_settings.model_copy(update={"rows_per_shard": rows_per_shard})
        list(build_index(cut, path))
        return open_artifact(path, KIND).extra["unexplained_variance"]

    assert unexplained(1) == unexplained(60) is not None


def test_a_pool_too_small_to_judge_the_sae_is_said(
    tiny_settings: IndexSettings, tmp_path: Path
) -> None:
    path = str(tmp_path / "index")
    Path(tiny_settings.pool_source).write_text('{"prompt": "a", "completion": "b"}\n')
    list(build_index(tiny_settings, path))
    (warning,) = open_artifact(path, KIND).warnings
    assert "whether the SAE fits the model was not judged" in warning
