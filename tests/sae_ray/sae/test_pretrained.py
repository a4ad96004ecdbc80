"""Where SAEs come from: folders of any age, the registry, and the cache of what was converted."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_ray.errors import ModelError
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.pretrained import _centre_what_it_reads, load_encoder, resolve

# sae-lens imports what it knows to be deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated")

HOOK = "blocks.0.hook_resid_pre"


def weights(d_in: int = 6, d_sae: int = 20, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def old_folder(path: Path, *, seed: int = 0, **config) -> Path:
    """A folder as sae-lens 3 wrote it: everything in one flat object."""
    path.mkdir(parents=True, exist_ok=True)
    flat = {"model_name": "tiny", "hook_point": HOOK, "hook_point_layer": 0, "dtype": "float32"}
    flat |= {"d_in": 6, "d_sae": 20, "device": "cpu", "activation_fn_str": "relu", **config}
    (path / "cfg.json").write_text(json.dumps(flat))
    save_file(weights(seed=seed), path / "sae_weights.safetensors")
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_an_older_flat_folder_is_read(tmp_path):
    encoder = load_encoder(str(old_folder(tmp_path / "old")))
    x = torch.randn(5, 6)
    w = weights()
    expected = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    torch.testing.assert_close(encoder.encode(x), expected)
    assert (str(encoder.hook_point), encoder.model_name) == (HOOK, "tiny")


def test_an_older_topk_is_read_as_topk(tmp_path):
    config = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    encoder = load_encoder(str(old_folder(tmp_path / "old", **config)))
    assert encoder.k == 3
    assert ((encoder.encode(torch.randn(9, 6)) > 0).sum(1) <= 3).all()


FAST = {
    "activation_fn_kwargs": {}, "apply_b_dec_to_input": False, "context_size": 2048,
    "dataset_path": "chats", "dataset_trust_remote_code": True, "finetuning_scaling_factor": False,
    "hook_head_index": None, "hook_layer": 4, "hook_name": "blocks.4.hook_resid_post",
    "lr": 7e-05, "model_from_pretrained_kwargs": {}, "model_name": "Qwen/Qwen2.5-0.5B-Instruct",
    "neuronpedia_id": None, "normalize_activations": "none", "prepend_bos": False,
    "sae_lens_training_version": "5.3.3", "seqpos_slice": [None],
}  # fmt: skip
"""What a folder of FAST's release says: sae-lens 5 wrote settings of the run beside the SAE's."""


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_a_folder_of_fasts_release_is_read(tmp_path, architecture):
    folder = tmp_path / "FAST" / f"blocks_4_hook_resid_post_8X_2048_{architecture}"
    config = {"architecture": architecture, "d_in": 6, "d_sae": 20, "dtype": "torch.float32"}
    config |= {"device": "cuda:0", "activation_fn_str": "relu", **FAST}
    w = weights()
    if architecture == "jumprelu":
        w["threshold"] = torch.rand(20)
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(w, folder / "sae_weights.safetensors")
    encoder = load_encoder(str(folder))
    x = torch.randn(50, 6)
    pre = x @ w["W_enc"] + w["b_enc"]
    expected = torch.where(pre > w.get("threshold", torch.zeros(20)), pre, 0)
    torch.testing.assert_close(encoder.encode(x), expected)
    torch.testing.assert_close(encoder.reconstruct(x), expected @ w["W_dec"] + w["b_dec"])
    assert str(encoder.hook_point) == "blocks.4.hook_resid_post"
    assert encoder.model_name == "Qwen/Qwen2.5-0.5B-Instruct"


def test_a_current_folder_is_read_in_place_without_sae_lens(tmp_path, home):
    folder = old_folder(tmp_path / "new", metadata={"hook_name": HOOK}, architecture="standard")
    assert resolve(str(folder)) == folder
    assert not home.exists()


def test_a_conversion_is_made_once_and_again_when_the_folder_changes(tmp_path):
    folder = old_folder(tmp_path / "old")
    first = resolve(str(folder))
    made = (first / "cfg.json").stat().st_mtime_ns
    assert resolve(str(folder)) == first
    assert (first / "cfg.json").stat().st_mtime_ns == made
    assert resolve(os.path.relpath(folder)) == first
    times = (folder / "cfg.json").stat()
    old_folder(folder, seed=1)
    for name in ("cfg.json", "sae_weights.safetensors"):
        os.utime(folder / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    torch.testing.assert_close(load_encoder(str(folder)).W, weights(seed=1)["W_enc"])
    torch.testing.assert_close(LatentEncoder.load(first).W, weights(seed=0)["W_enc"])


def test_workers_that_convert_at_once_all_get_a_whole_folder(tmp_path, home):
    folder = str(old_folder(tmp_path / "old"))
    resolve(str(old_folder(tmp_path / "other", seed=1)))  # sae-lens is imported now

    def convert(_: int) -> torch.Tensor:
        return load_encoder(folder).W

    with ThreadPoolExecutor(8) as workers:
        for W in workers.map(convert, range(16)):
            torch.testing.assert_close(W, weights()["W_enc"])
    left = sorted(path.name for path in (home / ".cache" / "sae_ray" / "saes").iterdir())
    assert len(left) == 2
    assert not any(name.startswith(".") for name in left)


def test_a_conversion_that_was_cut_off_is_not_taken_for_whole(tmp_path, home):
    folder = old_folder(tmp_path / "old")
    whole = resolve(str(folder))
    cut = whole.parent / ".new-cut" / whole.name
    cut.mkdir(parents=True)
    (whole / "sae_weights.safetensors").rename(cut / "sae_weights.safetensors")
    (whole / "cfg.json").unlink()
    whole.rmdir()
    torch.testing.assert_close(load_encoder(str(folder)).W, weights()["W_enc"])


def test_a_home_that_is_no_folder_is_named(tmp_path, home):
    home.write_text("a file")
    with pytest.raises(ModelError, match="cannot be kept in .*; make room there, or set HOME"):
        resolve(str(old_folder(tmp_path / "old")))


def refused(sae: str, match: str) -> None:
    with pytest.raises(ModelError, match=match) as error:
        load_encoder(sae)
    assert "\n" not in str(error.value)


def test_an_older_folder_that_lacks_a_weight_is_refused(tmp_path):
    folder = old_folder(tmp_path / "old")
    kept = load_file(folder / "sae_weights.safetensors")
    del kept["b_enc"]
    save_file(kept, folder / "sae_weights.safetensors")
    refused(str(folder), r"sae-lens cannot load .*b_enc.*; its table of pretrained")


def test_an_older_folder_with_broken_weights_is_refused(tmp_path):
    folder = old_folder(tmp_path / "old")
    (folder / "sae_weights.safetensors").write_bytes(b"broken")
    refused(str(folder), "sae-lens cannot load")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_a_folder_with_a_broken_config_is_refused(tmp_path, content):
    folder = old_folder(tmp_path / "old")
    (folder / "cfg.json").write_bytes(content)
    refused(str(folder), "cannot be read")


@pytest.mark.parametrize("sae", ["no/such/folder", "/no/such:folder", "./no:such"])
def test_what_is_neither_folder_nor_release_is_refused(sae):
    refused(sae, f"no SAE at {sae}: give a folder with cfg.json")


@pytest.mark.parametrize(
    ("sae", "why"),
    [
        ("no-such-release:id", "Release no-such-release not found"),
        ("gpt2-small-res-jb:blocks.99.hook_resid_pre", r"ID blocks\.99\.hook_resid_pre not found"),
    ],
)
def test_an_unknown_release_or_id_is_refused_in_one_line(sae, why):
    refused(sae, f"^sae-lens cannot load {sae}: {why}.*; its table of pretrained SAEs")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_release_is_read_from_the_registry_once(tmp_path):
    """Its repository lies in the hub's cache, as if downloaded; the network is off."""
    repo = tmp_path / "hub" / "hub" / "models--jbloom--GPT2-Small-SAEs-Reformatted"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    old_folder(repo / "snapshots" / ("0" * 40) / HOOK)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def run(script: str) -> str:
        script = "import sys\nfrom sae_ray.sae.pretrained import load_encoder\n" + script
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        return done.stdout + done.stderr

    load = f"encoder = load_encoder('gpt2-small-res-jb:{HOOK}')\n"
    say = "print(f'{encoder.W[0, 0]:.5f}', encoder.hook_point, 'sae_lens' in sys.modules)\n"
    # Of a model whose activations are centred: read are those of the model as it is published.
    W_enc = weights()["W_enc"]
    expected = f"{W_enc[0, 0] - W_enc[:, 0].mean():.5f} {HOOK}"
    not_there = load.replace(HOOK, "blocks.1.hook_resid_pre")
    first = run(load + say + not_there)
    assert f"{expected} True" in first
    assert "ModelError: sae-lens cannot load gpt2-small-res-jb:blocks.1.hook_resid_pre" in first
    assert f"{expected} False" in run(load + say)


def test_a_sae_of_centred_activations_reads_what_it_was_trained_on(tmp_path):
    old_folder(tmp_path / "sae")
    from sae_lens import SAE  # noqa: PLC0415 (8 s)

    sae = SAE.load_from_disk(str(tmp_path / "sae"))
    x = torch.randn(7, sae.cfg.d_in) + 3
    expected = sae.encode(x - x.mean(1, keepdim=True))
    _centre_what_it_reads("sae", sae)
    torch.testing.assert_close(sae.encode(x), expected, atol=1e-4, rtol=1e-4)
    assert (expected > 0).any()
