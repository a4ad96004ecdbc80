"""Labels of the SAEs that an adapter sits on: each its own, and none where that cannot be told."""

import json
from pathlib import Path

import pytest

from sae_ray.errors import ConfigError, ModelError
from sae_ray.explain.adapter import Explaining, ExplainSettings


def make_sae(folder: Path, hook_name: str, **metadata: str) -> str:
    folder.mkdir()
    config = {"d_sae": 4, "metadata": {"hook_name": hook_name, **metadata}}
    (folder / "cfg.json").write_text(json.dumps(config))
    (folder / "sae_weights.safetensors").write_bytes(hook_name.encode())
    return str(folder)


def labels_read(labels: Path, **saes: str) -> dict[str, dict[int, str]]:
    one = object.__new__(Explaining)
    one.settings = ExplainSettings.model_construct(labels=str(labels))
    one._saes = saes
    return {name: dict(found) for name, found in one._labels().items()}


def test_given_labels_go_to_the_sae_that_they_are_of_and_to_no_other(tmp_path: Path) -> None:
    labels = tmp_path / "e.jsonl"
    row = {"modelId": "m", "layer": "2-x", "index": "3", "description": "told"}
    labels.write_text(json.dumps(row))
    low = make_sae(tmp_path / "low", "blocks.1.hook_resid_post")
    high = make_sae(tmp_path / "high", "blocks.2.hook_resid_post")
    assert labels_read(labels, low=low, high=high) == {"low": {}, "high": {3: "told"}}
    with pytest.raises(ModelError, match="which reads layer 2, but .* reads layer 1"):
        labels_read(labels, low=low)
    attn = make_sae(tmp_path / "attn", "blocks.2.attn.hook_z")
    with pytest.raises(ConfigError, match="may be the labels of high or attn, and are one SAE's"):
        labels_read(labels, low=low, high=high, attn=attn)
    named = make_sae(tmp_path / "named", "blocks.2.hook_mlp_out", neuronpedia_id="m/2-y")
    assert labels_read(labels, named=named, high=high) == {"named": {}, "high": {3: "told"}}
