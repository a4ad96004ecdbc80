import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from sae_ray.artifacts import content_hash, read_file
from sae_ray.curate.index import KIND, FeatureIndex
from sae_ray.curate.request import Request
from sae_ray.curate.settings import IndexSettings
from sae_ray.curate.sources import fingerprint
from sae_ray.distributed.data import ShardWriter, Work, build_index
from sae_ray.errors import ConfigError, ModelError, WorkError
from sae_ray.explain.curation import Curator
from sae_ray.pool import plan


def built(settings: IndexSettings, path: str, num_workers: int) -> tuple[str, bytes]:
    """Return the content hash of an index and what is selected from it."""
    steps = list(build_index(settings.model_copy(update={"num_workers": num_workers}), path))
    assert [step.shards for step in steps] == [1, 2, 3, 4]
    request = Request(task="Write songs for the piano", budget_examples=20)
    Curator(FeatureIndex(path)).curate(request, f"{path}-selection")
    return content_hash(path, KIND), read_file(f"{path}-selection/selection.parquet")


def test_any_number_of_workers_gives_the_same_bytes(
    tiny_settings: IndexSettings, tmp_path: Path, ray_cluster: None
) -> None:
    here = built(tiny_settings, str(tmp_path / "here"), 0)
    assert built(tiny_settings, str(tmp_path / "one"), 1) == here
    assert built(tiny_settings, str(tmp_path / "two"), 2) == here


def test_an_error_in_a_worker_reaches_the_user_as_it_was_meant(
    tiny_settings: IndexSettings, tmp_path: Path, ray_cluster: None
) -> None:
    checked = tiny_settings.model_copy(update={"check_fit": True, "num_workers": 1})
    with pytest.raises(ModelError, match="another model or layer"):
        list(build_index(checked, str(tmp_path / "index")))


def test_index_and_pool_may_lie_on_s3(
    tiny_settings: IndexSettings, tmp_path: Path, s3_folder: str
) -> None:
    import s3fs  # noqa: PLC0415 - only where S3 is tested

    s3fs.S3FileSystem().put_file(tiny_settings.pool_source, f"{s3_folder}/pool.jsonl")
    on_s3 = tiny_settings.model_copy(update={"pool": f"{s3_folder}/pool.jsonl"})
    assert built(on_s3, f"{s3_folder}/index", 0) == built(tiny_settings, str(tmp_path / "i"), 0)


def test_a_fault_in_a_worker_is_told_at_once_with_its_rows(
    tiny_settings: IndexSettings,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    ray_cluster: None,
) -> None:
    # A tokenizer of another model: some of its ids are past the embedding.
    lm = shutil.copytree(str(tiny_settings.lm), tmp_path / "lm")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["piano", "river", "orders", "song", "water", "query"])
    tokenizer.save_pretrained(lm)
    wrong = tiny_settings.model_copy(update={"lm": str(lm), "num_workers": 1})
    with pytest.raises(WorkError, match=r"shard \d \(rows \d+ to \d+ of the pool\).*IndexError"):
        list(build_index(wrong, str(tmp_path / "index")))


def test_a_worker_with_another_sae_under_the_same_name_refuses(
    tiny_settings: IndexSettings, tiny_sae: Path, tmp_path: Path
) -> None:
    config = tiny_settings.scorer_config()
    work = Work(config, fingerprint("sae", str(tiny_sae)), str(tmp_path / "index"), (), ())
    batch = {"slice": [json.dumps(dataclasses.asdict(plan(str(tiny_settings.pool)).slices[0]))]}
    settings = json.loads((tiny_sae / "cfg.json").read_text())
    (tiny_sae / "cfg.json").write_text(json.dumps(settings | {"note": "another"}))
    (refused,) = ShardWriter(work, 1)(batch)["part"]
    assert json.loads(refused)["error"] == "ModelError"
    assert "another one on" in json.loads(refused)["message"]
    (tiny_sae / "cfg.json").write_text(json.dumps(settings))
    right = dataclasses.replace(work, sae=fingerprint("sae", str(tiny_sae)))
    (written,) = ShardWriter(right, 1)(batch)["part"]
    assert json.loads(written)["num_rows"] == 60


def test_workers_that_memory_does_not_hold_are_refused(
    tiny_settings: IndexSettings, tmp_path: Path, ray_cluster: None
) -> None:
    path = tmp_path / "index"
    with pytest.raises(ConfigError, match=r"1000 workers of 1\.\d GiB are asked for and memory"):
        list(build_index(tiny_settings.model_copy(update={"num_workers": 1000}), str(path)))
    assert not (path / "shards").exists()
