"""Neuronpedia's layout: the files, names and types that its own tools read."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from sae_ray.chat import ChatTokenizer
from sae_ray.errors import ModelError
from sae_ray.lm import HookPoint
from sae_ray.sae import neuronpedia
from sae_ray.sae.contexts import Context, LatentContexts
from sae_ray.sae.interpret import LatentFacts, TokenTexts
from sae_ray.sae.labels import fingerprint, read_labels
from sae_ray.sae.neuronpedia import Explained, ExportedLatent, Place, export

# Columns of its tables: db_models/*.py; its readers refuse any other name.
FEATURE_COLUMNS = """
modelId layer index creatorId createdAt maxActApprox hasVector vector vectorLabel
vectorDefaultSteerStrength hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices
neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices
correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices
correlated_features_pearson correlated_features_l1 neg_str neg_values pos_str pos_values
frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values logits_hist_data_bar_heights
logits_hist_data_bar_values decoder_weights_dist
"""
FEATURE = set(FEATURE_COLUMNS.split())
ACTIVATION_COLUMNS = """
id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId dataSource
dataIndex dfaValues dfaTargetIndex dfaMaxValue createdAt lossValues logitContributions binMin
binMax binContains qualifyingTokenIndex
"""
ACTIVATION = set(ACTIVATION_COLUMNS.split())
EXPLANATION_COLUMNS = """
id modelId layer index description authorId embedding triggeredById typeName
explanationModelName notes createdAt
"""
EXPLANATION = set(EXPLANATION_COLUMNS.split())
ACTIVATION_NEEDED = ACTIVATION - {
    *("dataSource", "dataIndex", "dfaValues", "dfaTargetIndex", "dfaMaxValue", "createdAt"),
    *("lossValues", "logitContributions", "binMin", "binMax", "binContains"),
    "qualifyingTokenIndex",
}
NEEDED = {
    "features": {"modelId", "layer", "index"},
    "activations": ACTIVATION_NEEDED,
    "explanations": {"id", "modelId", "layer", "index", "description", "authorId"},
}


def latent(number: int) -> ExportedLatent:
    contexts = [
        Context(
            np.arange(5, 12, dtype=np.int32),
            np.array([0, 0, strength, 0, 0.5, 0, 0], dtype=np.float32),
            row,
            3,
        )
        for row, strength in enumerate((4.0, 3.0, 2.0, 1.0))
    ]
    facts = LatentFacts(
        number, 0.25, 0.5, 4.0, 0.0, ["x"], [1, 2], [0.5, 0.25], [("up", 2.0)], [("down", -2.0)]
    )
    explained = Explained(f"label {number}", "sae-ray_judge", "m") if number % 2 else None
    return ExportedLatent(facts, LatentContexts(contexts, contexts[::-1], [], []), explained)


def write(root: Path, tiny_lm: Path, sae_sha256: str = "ab") -> Path:
    place = Place(
        *("tiny", "mine", HookPoint.parse("blocks.2.hook_resid_post"), "pool", list("abcd"), 7),
        sae_sha256=sae_sha256,
    )
    texts = TokenTexts(ChatTokenizer.load(tiny_lm))
    export(str(root), place, (latent(number) for number in range(5)), texts)
    return root / "tiny" / "2-mine"


def rows(folder: Path, table: str, batch: int) -> list[dict]:
    with gzip.open(folder / table / f"batch-{batch}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_tables_have_the_columns_that_are_read(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronpedia, "LATENTS_PER_BATCH", 2)
    folder = write(tmp_path, tiny_lm)
    known = {"features": FEATURE, "activations": ACTIVATION, "explanations": EXPLANATION}
    for batch, latents in enumerate((["0", "1"], ["2", "3"], ["4"])):
        for table in known:
            found = rows(folder, table, batch)
            indices = list(dict.fromkeys(row["index"] for row in found))
            assert indices == [one for one in latents if table != "explanations" or one in "13"]
            for row in found:
                assert NEEDED[table] <= row.keys() <= known[table]
                assert (row["modelId"], row["layer"]) == ("tiny", "2-mine")
    assert not (folder / "features" / "batch-3.jsonl.gz").exists()
    for name in ("release", "model", "sourceset", "source"):
        (line,) = (folder / f"{name}.jsonl").read_text().splitlines()
        assert json.loads(line)


def test_contexts_labels_and_statistics_are_all_there(tiny_lm: Path, tmp_path: Path) -> None:
    folder = write(tmp_path, tiny_lm)
    (explanation, _) = rows(folder, "explanations", 0)
    assert explanation["description"] == "label 1"
    assert explanation["explanationModelName"] == "m"
    found = [row for row in rows(folder, "activations", 0) if row["index"] == "1"]
    assert [row["maxValue"] for row in found] == [4, 3, 2, 1, 1, 2, 3, 4]
    assert found[0]["values"][found[0]["maxValueTokenIndex"]] == 4.0
    assert len(found[0]["tokens"]) == len(found[0]["values"]) == 7
    assert found[0]["dataIndex"] == "a:3"
    assert "binMin" not in found[0]
    assert (found[4]["binMin"], found[4]["binMax"]) == (1.0, 1.0)
    everything = [row["id"] for row in rows(folder, "activations", 0)]
    assert len(set(everything)) == len(everything)
    assert all(len(id) == 25 and id.isalnum() for id in everything)
    feature = rows(folder, "features", 0)[1]
    assert feature["pos_str"] == ["up"]
    assert feature["neg_values"] == [-2.0]
    assert feature["topkCosSimIndices"] == [1, 2]


def test_equal_results_are_equal_files(tiny_lm: Path, tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", tiny_lm), write(tmp_path / "other", tiny_lm)
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 8
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def test_what_is_exported_reads_back_as_the_labels_of_that_sae_alone(
    tiny_lm: Path, tiny_sae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronpedia, "LATENTS_PER_BATCH", 2)
    folder = write(tmp_path / "own", tiny_lm, fingerprint(tiny_sae))
    # The layer that it names is not the SAE's: whose weights they are is proved, and says more.
    for part in ("", "explanations", "explanations/batch-0.jsonl.gz"):
        there = {1: "label 1", 3: "label 3"} if "batch" not in part else {1: "label 1"}
        assert read_labels(folder / part, tiny_sae) == there
    with pytest.raises(ModelError, match="were made for another SAE"):
        read_labels(write(tmp_path / "other", tiny_lm, "cd"), tiny_sae)
