"""An explanation told in a terminal: its summary, what was verified, and nothing that was not."""

import json
from pathlib import Path

import pytest

from sae_ray.artifacts import begin, finish, write_atomically
from sae_ray.errors import ConfigError
from sae_ray.explain import telling
from sae_ray.explain.adapter import KIND


def written(path: Path, latents: list[dict], summary: str, warnings: list[str]) -> str:
    """Write a finished explanation of these latents."""
    begin(str(path), KIND, {}, {})
    write_atomically(f"{path}/explanation.json", json.dumps({"latents": latents}).encode())
    finish(str(path), {"summary": summary}, warnings)
    return str(path)


def latent(number: int, *, verified: bool) -> dict:
    return {"latent": number, "label": f"label {number}", "share": 0.25, "verified": verified}


def test_verified_latents_are_told_with_labels_and_no_others(tmp_path: Path) -> None:
    latents = [latent(i, verified=i != 2) for i in range(9)]
    lines = list(telling.told(written(tmp_path, latents, "What changed.", ["Look twice."])))
    assert lines[:2] == ["warning: Look twice.", "What changed."]
    assert lines[2] == "   latent 0, label 0: alone 25% of the change"
    assert [line.split(",")[0].split()[-1] for line in lines[2:]] == ["0", "1", "3", "4", "5"]


def test_where_nothing_is_verified_the_summary_alone_is_told(tmp_path: Path) -> None:
    latents = [latent(i, verified=False) for i in range(3)]
    path = written(tmp_path, latents, "No single latent is verified.", [])
    assert list(telling.told(path)) == ["No single latent is verified."]


def test_what_cannot_be_explained_is_told_in_place_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("the expert holds out 12 rows, and 20 are needed")

    monkeypatch.setattr(telling, "Explaining", refuse)
    lines = telling.why("expert", str(tmp_path / "why"), lambda steps: None)
    assert list(lines) == ["   not explained: the expert holds out 12 rows, and 20 are needed"]
