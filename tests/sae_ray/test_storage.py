import os
from pathlib import Path

import pytest

from sae_ray.artifacts import State, begin, inspect, open_artifact, read_file, write_atomically
from sae_ray.errors import ArtifactError
from sae_ray.storage import explain_storage, is_refusal, write_local

full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


@full_device
def test_a_full_disk_is_explained_for_files_that_others_write() -> None:
    with (
        pytest.raises(ArtifactError, match="free some, then run the same command"),
        explain_storage("out/0.parquet"),
    ):
        Path("/dev/full").write_bytes(b"x" * 10_000)


def test_what_is_not_there_stays_a_question_of_the_caller() -> None:
    with pytest.raises(FileNotFoundError), explain_storage("nowhere"):
        Path("nowhere-at-all").read_bytes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_a_file_that_may_not_be_read_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(ArtifactError, match="secret may not be used"):
        read_file(str(path))


def test_refusals_are_told_from_mistakes() -> None:
    assert is_refusal(PermissionError("Forbidden"))
    assert is_refusal(ConnectionResetError())
    assert not is_refusal(FileNotFoundError("x"))
    assert not is_refusal(OSError(5, "Input/output error"))
    assert not is_refusal(ValueError("x"))


def test_a_store_that_wants_other_credentials_is_one_clear_line(
    s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs  # noqa: PLC0415 - only where S3 is tested

    assert inspect(f"{s3_folder}/run", "bread", {}) is State.NEW
    # Nobody listens on port 1, and nobody's credentials lie in an empty folder.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ArtifactError, match=r"cannot be reached \(Endpoint.*credentials"):
        begin(f"{s3_folder}/run", "bread", {})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    for use in (
        lambda: open_artifact(f"{s3_folder}/run", "bread"),
        lambda: write_atomically(f"{s3_folder}/run/x", b"x"),
        lambda: read_file(f"{s3_folder}/run/x"),
    ):
        with pytest.raises(ArtifactError, match=r"NoCredentialsError: .*: check the address"):
            use()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_local_file_is_never_there_in_part(tmp_path: Path) -> None:
    write_local(tmp_path / "a" / "b", b"x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
