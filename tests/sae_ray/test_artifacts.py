import errno
import hashlib
import json
import os
import uuid
from pathlib import Path

import pytest

from sae_ray import artifacts
from sae_ray.artifacts import FileRecord, State, begin, finish, open_artifact, verify
from sae_ray.errors import ArtifactError

CONFIG = {"seed": 0, "task": "bake"}


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out" / "bread")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/bread"
    return request.getfixturevalue("s3_folder") + "/bread"


def make(folder: str, content: bytes = b"crust", config=CONFIG, parents=None) -> artifacts.Manifest:
    begin(folder, "bread", config, parents)
    artifacts.write_atomically(f"{folder}/slices/0.bin", content)
    return finish(folder, {"num_slices": 1}, ["dry"])


def overwrite(path: str, content: bytes) -> None:
    fs, target = artifacts.locate(path)
    fs.pipe_file(target, content)


def test_a_finished_artifact_reads_back_as_it_was_written(folder):
    made = make(folder, parents={"flour": "abc"})
    read = open_artifact(folder, "bread")
    assert read == made
    assert read.files == {
        "slices/0.bin": FileRecord(sha256=hashlib.sha256(b"crust").hexdigest(), bytes=5)
    }
    assert (read.config, read.parents) == (CONFIG, {"flour": "abc"})
    assert (read.extra, read.warnings) == ({"num_slices": 1}, ["dry"])
    assert read.versions.keys() >= {"python", "torch"}
    assert artifacts.content_hash(folder, "bread") == made.content_hash
    verify(folder)


def test_a_run_is_new_then_interrupted_then_finished(folder):
    assert begin(folder, "bread", CONFIG) is State.NEW
    with pytest.raises(ArtifactError, match="is not finished: run the job"):
        open_artifact(folder, "bread")
    artifacts.write_atomically(f"{folder}/slices/0.bin", b"crust")
    assert begin(folder, "bread", dict(reversed(CONFIG.items()))) is State.INTERRUPTED
    assert not artifacts.is_finished(folder, "bread")
    finish(folder)
    assert begin(folder, "bread", CONFIG) is State.FINISHED
    assert artifacts.is_finished(folder, "bread")
    assert not artifacts.is_finished(folder, "cake")
    fs, root = artifacts.locate(folder)
    assert not fs.exists(f"{root}/run.json")


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_run_is_refused_naming_what_differs(folder, finished):
    begin(folder, "bread", CONFIG, {"flour": "abc"})
    if finished:
        finish(folder)
    for kind, config, parents, difference in [
        ("bread", CONFIG | {"seed": 1}, {"flour": "abc"}, "seed: 0 there, 1 here"),
        ("bread", CONFIG, {"flour": "xyz"}, "parent flour: 'abc' there, 'xyz' here"),
        ("cake", CONFIG, {"flour": "abc"}, "kind: 'bread' there, 'cake' here"),
        ("bread", {"seed": 0}, {"flour": "abc"}, "task: 'bake' there, None here"),
    ]:
        with pytest.raises(ArtifactError, match="give another output folder") as caught:
            begin(folder, kind, config, parents)
        assert difference in str(caught.value)
        assert ("a finished" if finished else "an interrupted") in str(caught.value)


def test_a_folder_with_other_files_is_refused_and_left_alone(folder):
    for index in range(4):
        artifacts.write_atomically(f"{folder}/holiday{index}.jpg", b"x")
    with pytest.raises(ArtifactError, match=r"holiday0.jpg, .*holiday2.jpg and 1 more"):
        begin(folder, "bread", CONFIG)
    fs, root = artifacts.locate(folder)
    assert len(fs.find(root)) == 4


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "bread").write_text("x")
    with pytest.raises(ArtifactError, match="is a file or lies under one: give a folder"):
        begin(str(tmp_path / "bread"), "bread", CONFIG)
    with pytest.raises(ArtifactError, match="lies under one"):
        artifacts.write_atomically(str(tmp_path / "bread" / "a" / "b"), b"x")


def test_scratch_is_no_part_of_an_artifact_and_goes_when_it_is_finished(folder):
    begin(folder, "bread", CONFIG)
    for name in (".checkpoint/7.bin", ".write-dead", "slices/0.bin"):
        artifacts.write_atomically(f"{folder}/{name}", b"x")
    assert finish(folder).files.keys() == {"slices/0.bin"}
    fs, root = artifacts.locate(folder)
    names = {name[len(root) :].lstrip("/") for name in fs.find(root)}
    assert names == {"slices/0.bin", "manifest.json"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: overwrite(f"{folder}/slices/0.bin", b"crumb"), "changed slices/0.bin"),
        (lambda folder: overwrite(f"{folder}/more.bin", b""), "added more.bin"),
        (lambda folder: remove(f"{folder}/slices/0.bin"), "missing slices/0.bin"),
    ],
)
def test_verify_names_the_file_that_is_not_as_it_was(folder, damage, said):
    make(folder)
    damage(folder)
    with pytest.raises(ArtifactError, match=said):
        verify(folder)


def remove(path: str) -> None:
    fs, target = artifacts.locate(path)
    fs.rm_file(target)


def test_the_content_hash_tells_what_was_made_and_not_when_where_or_from_what(tmp_path):
    first = make(str(tmp_path / "first"))
    again = make(str(tmp_path / "again"), config={"seed": 1}, parents={"flour": "abc"})
    other = make(str(tmp_path / "other"), content=b"crumb")
    assert first.created != again.created
    assert first.content_hash == again.content_hash != other.content_hash
    relabelled = first.model_copy(update={"versions": {"python": "4"}})
    assert relabelled.content_hash == first.content_hash


def test_the_config_hash_does_not_depend_on_the_order_of_the_settings():
    assert artifacts.config_hash({"a": 1, "b": [2]}) == artifacts.config_hash({"b": [2], "a": 1})
    assert artifacts.config_hash({"a": 1, "b": [2]}) != artifacts.config_hash({"a": 1, "b": [3]})


def test_files_whose_hash_is_known_are_not_read_again_unless_their_size_says_otherwise(tmp_path):
    folder = str(tmp_path / "bread")
    begin(folder, "bread", CONFIG)
    known = {name: artifacts.write_atomically(f"{folder}/{name}", b"12345") for name in "ab"}
    known["a"] = known["a"].model_copy(update={"sha256": "told"})
    overwrite(f"{folder}/b", b"123456")
    files = finish(folder, known=known).files
    assert files["a"].sha256 == "told"
    assert files["b"] == artifacts.hash_file(f"{folder}/b")


def test_finishing_without_a_file_that_was_written_is_refused(tmp_path):
    folder = str(tmp_path / "bread")
    begin(folder, "bread", CONFIG)
    with pytest.raises(ArtifactError, match="lost files while it was written"):
        finish(folder, known={"0.bin": FileRecord(sha256="x", bytes=1)})
    assert begin(folder, "bread", CONFIG) is State.INTERRUPTED


def rewrite_manifest(folder: str, changes: dict[str, object]) -> None:
    path = Path(folder) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_opening_something_else_says_what_it_is_and_what_is_needed(tmp_path):
    folder = str(tmp_path / "bread")
    with pytest.raises(ArtifactError, match=r"holds no manifest.json.*\(bread needed\)"):
        open_artifact(folder, "bread")
    make(folder)
    with pytest.raises(ArtifactError, match="holds a bread, not the cake needed"):
        open_artifact(folder, "cake")
    rewrite_manifest(folder, {"schema_version": 99})
    with pytest.raises(ArtifactError, match="has schema 99 and this sae-ray reads up to 1"):
        open_artifact(folder, "bread")
    rewrite_manifest(folder, {"schema_version": 1, "files": "lost"})
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged \(files\)"):
        open_artifact(folder, "bread")
    (tmp_path / "bread" / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged"):
        open_artifact(folder, "bread")
    with pytest.raises(ArtifactError, match="'nosuch://x' is on a file system"):
        open_artifact("nosuch://x", "bread")


def test_a_file_is_whole_or_not_there_when_the_disk_fills_up(tmp_path, monkeypatch):
    path = tmp_path / "0.bin"
    artifacts.write_atomically(str(path), b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="no space left to write .*0.bin: free some"):
        artifacts.write_atomically(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_are_as_open_as_the_users_umask_says(tmp_path):
    artifacts.write_atomically(str(tmp_path / "ours"), b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
