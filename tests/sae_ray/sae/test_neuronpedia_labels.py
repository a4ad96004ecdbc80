"""Neuronpedia's explanations as labels: joined by index, one of several, never another SAE's."""

import gzip
import hashlib
import json
import logging
import random
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from sae_ray.errors import ModelError
from sae_ray.sae import neuronpedia_labels
from sae_ray.sae.labels import labels_of, read_labels

MODEL, SOURCE = "gemma-2-2b", "12-gemmascope-res-16k"
D_SAE = 8


def row(index: Any, description: Any, **more: Any) -> dict[str, Any]:
    """A row as its exports have it: the first of them wrote embeddings as text."""
    return {
        "id": f"cm{index}",
        "modelId": MODEL,
        "layer": SOURCE,
        "index": index,
        "authorId": "clkht01d40000jv08hvalcvly",
        "description": description,
        "embedding": "[0.1, 0.2]",
        "typeName": "oai_token-act-pair",
        "explanationModelName": "gpt-4o-mini",
        "umap_x": 0,
        **more,
    }


def scored(*values: Any) -> dict[str, Any]:
    names = {"explanationScoreTypeName": "recall_alt", "explanationScoreModelName": "m"}
    return {"scores": [{"value": value, **names} for value in values]}


ROWS = [
    row("5", " references to dogs"),
    row("0", "code in brackets"),
    row("3", ""),
    row("7", "the last latent"),
    row("2", "scored low", **scored(0.25)),
    row("5", " references to dogs"),
    row("2", "scored high", **scored(0.5, 1.0)),
    row("2", "a text that sorts first"),
    row(1, "of number form", typeName=None, explanationModelName=None),
    row("6", "   "),
    row("6", "said the second time"),
]
LABELS = {
    0: "code in brackets",
    1: "of number form",
    2: "scored high",
    5: "references to dogs",
    6: "said the second time",
    7: "the last latent",
}


@pytest.fixture
def make_sae(tmp_path: Path) -> Callable[..., str]:
    """Make what is read of a SAE here: its config, and weights to be hashed."""

    def make(name: str = "sae", **metadata: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        said = {"hook_name": "blocks.12.hook_resid_post", **metadata}
        (folder / "cfg.json").write_text(json.dumps({"d_sae": D_SAE, "metadata": said}))
        (folder / "sae_weights.safetensors").write_bytes(name.encode())
        return str(folder)

    return make


@pytest.fixture
def sae(make_sae: Callable[..., str]) -> str:
    return make_sae("named", neuronpedia_id=f"{MODEL}/{SOURCE}")


def write(url: str, rows: Iterable[dict[str, Any]], num_files: int = 1) -> str:
    """Write rows below a URL in the layout of a published export; return the source's folder."""
    folder, rows = f"{url}/{MODEL}/{SOURCE}", list(rows)
    for number in range(num_files):
        lines = "".join(json.dumps(one) + "\n" for one in rows[number::num_files])
        name = f"{folder}/explanations/batch-{number}.jsonl.gz"
        with fsspec.open(name, "wb", auto_mkdir=True) as file:
            file.write(gzip.compress(lines.encode()))  # pyright: ignore[reportAttributeAccessIssue]
    with fsspec.open(f"{folder}/release.jsonl", "w", auto_mkdir=True) as file:
        file.write("{}\n")  # pyright: ignore[reportAttributeAccessIssue]
    return folder


@pytest.mark.parametrize("scheme", ["", "file://", "memory:/"])
@pytest.mark.parametrize("part", ["", f"/{MODEL}", f"/{MODEL}/{SOURCE}", "explanations", "/"])
def test_a_published_export_is_joined_by_index_wherever_it_lies(
    scheme: str, part: str, sae: str, tmp_path: Path
) -> None:
    url = f"{scheme}{tmp_path}/export"
    folder = write(url, ROWS, num_files=3)
    given = f"{folder}/explanations" if part == "explanations" else url + part
    assert labels_of(sae, given) == LABELS
    assert list(labels_of(sae, given)) == sorted(LABELS)


def test_one_file_alone_is_read_packed_or_not(sae: str, tmp_path: Path) -> None:
    folder = write(str(tmp_path), ROWS)
    packed = Path(folder) / "explanations" / "batch-0.jsonl.gz"
    assert read_labels(packed, sae) == LABELS
    plain = tmp_path / "some.jsonl"
    plain.write_bytes(gzip.decompress(packed.read_bytes()).replace(b"\n", b"\n\n"))
    assert read_labels(plain, sae) == LABELS
    assert read_labels(plain.as_uri(), sae) == LABELS


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_the_list_that_the_api_gives_is_read_piece_by_piece(
    indent: int | None,
    packed: bool,
    sae: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(neuronpedia_labels, "_CHUNK_BYTES", 7)
    content = ("\n " + json.dumps([*ROWS, row("4", "ünïcode 犬")], indent=indent)).encode()
    path = tmp_path / "export.json"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read_labels(path, sae) == {**LABELS, 4: "ünïcode 犬"}
    path.write_text("[]")
    with pytest.raises(ModelError, match="holds no explanation"):
        read_labels(path, sae)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (row("1", "z", **scored(0.1)), row("1", "a")),  # scored before unscored
        (row("1", "z", **scored(0.9, 0.7)), row("1", "a", **scored(1.0, 0.5))),  # by the mean
        (row("1", "z", **scored(0.1)), row("1", "a", **scored(None, float("nan"), "1", True))),
        (row("1", "z", **scored(0.1)), row("1", "a", scores=3)),
        (row("1", "z", typeName="a"), row("1", "a", typeName="b")),
        (row("1", "z", explanationModelName="a"), row("1", "a", explanationModelName="b")),
        (row("1", "a"), row("1", "b")),
        (row("1", "z"), row("1", "", **scored(1.0))),  # nothing said is no explanation
    ],
)
def test_the_rule_by_which_one_is_taken(
    one: dict[str, Any], other: dict[str, Any], sae: str, tmp_path: Path
) -> None:
    path = tmp_path / "e.jsonl"
    for rows in ([one, other], [other, one], [other, one, other]):
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
        assert read_labels(path, sae) == {1: one["description"]}


def test_order_of_rows_and_files_changes_nothing(sae: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [
        row(str(rng.randrange(D_SAE)), rng.choice("abcdef") + f" {n}", typeName=rng.choice("xy"))
        | (scored(rng.choice([0.1, 0.2, 0.3]), 0.7) if rng.random() < 0.3 else {})
        for n in range(200)
    ]
    found = []
    for number in range(8):
        rng.shuffle(rows)
        found.append(labels_of(sae, write(f"{tmp_path}/{number}", rows, 1 + number)))
    assert len(found[0]) == D_SAE
    assert all(one == found[0] for one in found)


def test_another_saes_explanations_are_refused_in_one_line(
    sae: str, make_sae: Callable[..., str], tmp_path: Path
) -> None:
    folder = write(str(tmp_path), ROWS)
    file = f"{folder}/explanations/batch-0.jsonl.gz"
    wider = write(f"{tmp_path}/wider", [*ROWS, row("8", "one too many")])
    others = {
        "unnamed": (make_sae("unnamed", hook_name="blocks.11.hook_resid_post"), folder,
                    rf"{file} explains {MODEL}/{SOURCE}, which reads layer 12, but .* layer 11"),
        "other name": (make_sae("other", neuronpedia_id="gemma-2-2b/12-gemmascope-res-65k"), folder,
                       f"explains {MODEL}/{SOURCE}, but .* is gemma-2-2b/12-gemmascope-res-65k"),
        "too many": (sae, wider, r"batch-0.jsonl.gz, line 12: index 8, but .* 8 latents \(0 to 7"),
    }  # fmt: skip
    for other, given, message in others.values():
        with pytest.raises(ModelError, match=message) as error:
            labels_of(other, given)
        assert "\n" not in str(error.value)
        assert "give that" in str(error.value)


def test_a_name_in_the_config_says_more_than_the_layer_in_it(
    make_sae: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # As gpt2-small's last residual SAE is called: of blocks.11, and 12-res-jb there.
    named = {"hook_name": "blocks.11.hook_resid_post", "neuronpedia_id": f"{MODEL}/{SOURCE}"}
    assert labels_of(make_sae("late", **named), write(str(tmp_path), ROWS)) == LABELS
    assert not caplog.messages


def test_what_could_not_be_checked_is_said(
    make_sae: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unnamed = make_sae(neuronpedia_id=None)
    with caplog.at_level(logging.WARNING):
        labels = labels_of(unnamed, write(str(tmp_path), ROWS))
    assert labels == LABELS
    (message,) = labels.warnings
    assert f"{MODEL}/{SOURCE} names the latents of {unnamed} could not be checked" in message
    assert caplog.messages == [message]


def test_several_sources_are_refused_with_what_to_give_instead(sae: str, tmp_path: Path) -> None:
    write(str(tmp_path), ROWS)
    other = tmp_path / MODEL / "13-gemmascope-res-16k" / "explanations"
    other.mkdir(parents=True)
    with pytest.raises(ModelError, match="several sources") as error:
        labels_of(sae, str(tmp_path))
    for source in (SOURCE, "13-gemmascope-res-16k"):
        assert f"{tmp_path}/{MODEL}/{source}/explanations" in str(error.value)
    mixed = tmp_path / "mixed.jsonl"
    rows = [*ROWS[:2], row("1", "x", layer="13-gemmascope-res-16k"), *ROWS[2:]]
    mixed.write_text("".join(json.dumps(one) + "\n" for one in rows))
    message = f"mixed.jsonl, line 3: an explanation of {MODEL}/13-gemmascope-res-16k among those of"
    with pytest.raises(ModelError, match=message):
        labels_of(sae, str(mixed))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "no JSON"),
        (json.dumps(row("1", "x"))[:-9], "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "no JSON object"),
        (json.dumps({"modelId": MODEL, "layer": SOURCE, "index": "1"}), "description is missing"),
        (json.dumps({"modelId": MODEL, "index": "1", "description": "x"}), "layer is missing"),
        *(
            (json.dumps(row(index, "x")), "index must be a whole number from 0")
            for index in ("x", "", "-1", -1, 1.0, "1.0", "1e0", True, None, "٣", "9" * 5000)
        ),
        (json.dumps(row("1", 5)), "description must be text"),
        (json.dumps(row("1", "x", layer=12)), "layer must be text"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    line: str, message: str, sae: str, tmp_path: Path
) -> None:
    path = tmp_path / "batch-3.jsonl"
    path.write_text("\n".join([*map(json.dumps, ROWS[:2]), line, json.dumps(ROWS[2])]))
    with pytest.raises(ModelError, match=rf"{path}, line 3: {message}") as error:
        labels_of(sae, str(path))
    assert len(str(error.value)) < 500


def test_bytes_that_are_no_text_and_lists_that_break_off_are_named(
    sae: str, tmp_path: Path
) -> None:
    lines, listed = tmp_path / "e.jsonl", tmp_path / "e.json"
    lines.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"a": "\xff"}\n')
    with pytest.raises(ModelError, match=rf"{lines}, line 2: no JSON"):
        labels_of(sae, str(lines))
    whole = json.dumps(ROWS[:3], indent=1)
    begins = whole[: whole.index("cm3")].count("\n")
    listed.write_text(whole[:-40])
    with pytest.raises(ModelError, match=rf"{listed}, line {begins}: no JSON"):
        labels_of(sae, str(listed))
    listed.write_bytes(whole.encode()[:-40] + b"\xff" + whole.encode()[-40:])
    with pytest.raises(ModelError, match=rf"{listed}, line 1: no UTF-8"):
        labels_of(sae, str(listed))


@pytest.mark.parametrize("name", ["e.jsonl.gz", "e.json.gz"])
@pytest.mark.parametrize("harm", ["cut", "bits", "sum"])
def test_broken_gzip_is_named(name: str, harm: str, sae: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [row(str(n % 8), f"{rng.random()}") for n in range(2000)]
    text = json.dumps(rows) if "json." in name else "".join(json.dumps(r) + "\n" for r in rows)
    packed = bytearray(gzip.compress(text.encode()))
    if harm == "cut":
        del packed[len(packed) // 2 :]
    elif harm == "bits":
        packed[len(packed) // 2 : len(packed) // 2 + 9] = b"\xff" * 9
    else:
        packed[-8] ^= 1
    path = tmp_path / name
    path.write_bytes(packed)
    with pytest.raises(ModelError, match=rf"{path}, (after )?line \d+: (damaged gzip|no JSON)"):
        labels_of(sae, str(path))


@pytest.mark.parametrize("content", ["", "{}", '{"latents": []}', "no json"])
def test_what_is_no_label_file_is_told_what_would_be_one(
    content: str, sae: str, tmp_path: Path
) -> None:
    path = tmp_path / "labels.json"
    path.write_text(content)
    with pytest.raises(ModelError, match="or a file or folder of Neuronpedia's explanations"):
        labels_of(sae, str(path))


def test_nothing_there_and_folders_of_other_tables_are_refused(sae: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere is not there: give a label file"):
        labels_of(sae, f"{tmp_path}/nowhere")
    with pytest.raises(ModelError, match="memory://nowhere is not there"):
        labels_of(sae, "memory://nowhere")
    features = tmp_path / "features"
    features.mkdir()
    with pytest.raises(ModelError, match="features holds no explanations: give a folder"):
        labels_of(sae, str(features))
    (features / "batch-0.jsonl").write_text(
        json.dumps({"modelId": MODEL, "layer": SOURCE, "index": "0"})
    )
    with pytest.raises(ModelError, match="line 1: description is missing"):
        labels_of(sae, str(features))


def test_weights_told_beside_the_explanations_decide(
    make_sae: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, other = make_sae("own", hook_name="blocks.3.hook_mlp_out"), make_sae("other")
    folder = write(f"memory:/{tmp_path}/export", ROWS)
    said = {"sae_sha256": hashlib.sha256(b"own").hexdigest()}
    with fsspec.open(f"{folder}/{neuronpedia_labels.FINGERPRINT}", "w") as file:
        file.write(json.dumps(said))  # pyright: ignore[reportAttributeAccessIssue]
    assert labels_of(own, folder) == labels_of(own, f"{folder}/explanations/batch-0.jsonl.gz")
    assert labels_of(own, folder) == LABELS
    assert not caplog.messages
    for given in (folder, f"{folder}/explanations/batch-0.jsonl.gz"):
        with pytest.raises(ModelError, match="were made for another SAE than .*other"):
            labels_of(other, given)
    with fsspec.open(f"{folder}/{neuronpedia_labels.FINGERPRINT}", "w") as file:
        file.write("{}")  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ModelError, match=r"sae-ray.json is damaged"):
        labels_of(own, folder)


def test_our_own_label_file_is_read_from_a_url_too(sae: str, tmp_path: Path) -> None:
    content = {
        "sae_sha256": hashlib.sha256(b"named").hexdigest(),
        "latents": [{"latent": 3, "label": "x"}, {"latent": 4, "label": "unlabelled"}],
    }
    url = f"memory:/{tmp_path}/labels.json"
    with fsspec.open(url, "w") as file:
        file.write(json.dumps(content))  # pyright: ignore[reportAttributeAccessIssue]
    assert labels_of(sae, url) == {3: "x"}


def test_a_large_export_is_read_in_little_memory(sae: str, tmp_path: Path) -> None:
    rows = [row(str(n % D_SAE), f"{n:06}", embedding="0" * 2500) for n in range(4000)]
    lines, listed = tmp_path / "e.jsonl", tmp_path / "e.json"
    lines.write_text("".join(json.dumps(one) + "\n" for one in rows))
    listed.write_text(json.dumps(rows))
    for path in (lines, listed):
        assert path.stat().st_size > 1e7
        tracemalloc.start()
        labels = labels_of(sae, str(path))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert labels == {n: f"{n:06}" for n in range(D_SAE)}
        assert peak < 2e6


def test_half_a_surrogate_pair_does_not_reach_files_of_text(sae: str, tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text(json.dumps(row("1", "broken \ud83d emoji")))
    assert labels_of(sae, str(path)) == {1: "broken ? emoji"}
