import gzip
import json
from pathlib import Path

import datasets
import datasets.config
import huggingface_hub.constants
import pytest

from sae_ray.errors import PoolError
from sae_ray.pool import plan, read

ROWS = [
    {"id": str(i), "source": "here", "messages": [
        {"role": "user", "content": f"question {i}"},
        {"role": "assistant", "content": "ja"},
    ]}
    for i in range(5)
]  # fmt: skip


def _ids(source: str, staging: Path) -> list[str]:
    planned = plan(source, rows_per_shard=2, staging=str(staging))
    rows = [read(part, keep_columns=["source"]) for part in planned.slices]
    assert all(name == "here" for part in rows for name in part.columns["source"])
    return [conversation.id for part in rows for conversation in part.conversations]


def _write_gzip(path: Path) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    return path


def _stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_gzip_pool_is_unpacked_once(tmp_path: Path) -> None:
    packed = _write_gzip(tmp_path / "pool.jsonl.gz")
    staging = tmp_path / "staging"
    assert _ids(str(packed), staging) == ["0", "1", "2", "3", "4"]
    made = _stamps(staging)
    assert _ids(str(packed), staging) == ["0", "1", "2", "3", "4"]
    assert _stamps(staging) == made
    assert len(made) == 1


def test_a_gzip_pool_is_the_pool_that_it_packs(tmp_path: Path) -> None:
    packed = _write_gzip(tmp_path / "pool.jsonl.gz")
    plain = tmp_path / "pool.jsonl"
    plain.write_bytes(gzip.decompress(packed.read_bytes()))
    unpacked = plan(str(packed), staging=str(tmp_path / "staging"))
    assert unpacked.fingerprint == plan(str(plain)).fingerprint


def test_half_a_gzip_file_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    packed = _write_gzip(tmp_path / "pool.jsonl.gz")
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(PoolError, match="is not a whole gzip file"):
        plan(str(packed), staging=str(tmp_path / "staging"))
    assert not _stamps(tmp_path / "staging")


def test_what_must_be_converted_asks_for_a_place(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="staging folder"):
        plan(str(_write_gzip(tmp_path / "pool.jsonl.gz")))


def test_a_staging_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    packed = _write_gzip(tmp_path / "pool.jsonl.gz")
    (tmp_path / "file").write_text("")
    with pytest.raises(PoolError, match="could not be converted to .*file/staging"):
        plan(str(packed), staging=str(tmp_path / "file/staging"))


def test_a_saved_dataset_is_a_pool(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    staging = tmp_path / "staging"
    assert _ids(str(tmp_path / "saved"), staging) == ["0", "1", "2", "3", "4"]
    with pytest.raises(PoolError, match="no splits"):
        plan(f"{tmp_path / 'saved'}@test", staging=str(staging))


def test_a_split_of_a_saved_dataset_is_chosen_by_name(tmp_path: Path) -> None:
    saved = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(ROWS[:3]),
            "test": datasets.Dataset.from_list(ROWS[3:]),
        }
    )
    saved.save_to_disk(tmp_path / "saved")
    staging = tmp_path / "staging"
    assert _ids(f"{tmp_path / 'saved'}@test", staging) == ["3", "4"]
    assert _ids(str(tmp_path / "saved"), staging) == ["0", "1", "2"]
    with pytest.raises(PoolError, match="its splits are train, test"):
        plan(f"{tmp_path / 'saved'}@dev", staging=str(staging))


def test_a_split_of_a_dataset_folder_is_chosen_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (("train", ROWS[:3]), ("test", ROWS[3:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    staging = tmp_path / "staging"
    assert _ids(f"{folder}@test", staging) == ["3", "4"]
    assert _ids(str(folder), staging) == ["3", "4", "0", "1", "2"]  # all of its files, by name


def test_a_changed_dataset_is_converted_again(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert len(_ids(str(tmp_path / "saved"), staging)) == 5
    datasets.Dataset.from_list(ROWS[:2]).save_to_disk(tmp_path / "saved")
    assert _ids(str(tmp_path / "saved"), staging) == ["0", "1"]


def test_a_dataset_of_another_schema_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "x"}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(PoolError, match="has the columns text: needed are"):
        plan(str(tmp_path / "saved"), staging=str(tmp_path / "staging"))
    assert not _stamps(tmp_path / "staging")


def test_a_name_out_of_reach_may_be_a_path_that_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(PoolError, match="no such file or folder, and as a Hugging Face dataset"):
        plan("nobody/nothing:config@test", staging=str(tmp_path))
