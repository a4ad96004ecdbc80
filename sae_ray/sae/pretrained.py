"""Where a SAE comes from: a sae-lens folder, or `release:sae_id` of sae-lens' registry.

sae-lens itself takes 8 s and 500 MB to import, so it is loaded only where its registry or one of
its older formats is asked for; what it gives is kept once in its current format and read from
there.
"""

import hashlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sae_ray.errors import ModelError
from sae_ray.sae.encoder import LatentEncoder

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"


def load_encoder(sae: str) -> LatentEncoder:
    """Load the encoder of a folder, or of a published SAE.

    Raises:
        ModelError: neither is there.
    """
    return LatentEncoder.load(resolve(sae))


def resolve(sae: str) -> Path:
    """Return the folder that holds a SAE, downloading and converting it where needed."""
    folder = Path(sae)
    if folder.is_dir():
        return _converted(sae, _content_hash(folder)) if _is_older_format(folder) else folder
    if ":" in sae and not sae.startswith(("/", ".")):
        return _converted(sae, "")
    raise ModelError(
        f"no SAE at {sae}: give a folder with {_CONFIG} and {_WEIGHTS}, or release:sae_id from "
        "sae-lens' registry, such as gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical"
    )


def _is_older_format(folder: Path) -> bool:
    """Say whether the config is flat, as sae-lens wrote it before version 6."""
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError):
        return False  # LatentEncoder.load says what is wrong with it
    return isinstance(config, dict) and "metadata" not in config and (folder / _WEIGHTS).is_file()


def _content_hash(folder: Path) -> str:
    """Hash what a conversion depends on, so that a folder that changed is converted again."""
    digests: list[str] = []
    for name in (_CONFIG, _WEIGHTS):
        with (folder / name).open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return " ".join(digests)


def _converted(sae: str, content: str) -> Path:
    """Let sae-lens read its registry or an older format, and keep what it gives."""
    key = "\n".join((version("sae-lens"), content or sae))
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = Path.home() / ".cache" / "sae_ray" / "saes" / name
    if folder.is_dir():
        return folder
    loaded = _load_with_sae_lens(sae)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as room:
            loaded.save_model(Path(room) / name)
            # A folder appears whole or not at all, also where several workers convert at once.
            (Path(room) / name).rename(folder)
    except OSError as error:
        if not folder.is_dir():  # another worker was not first either
            raise ModelError(
                f"SAE {sae} cannot be kept in {folder.parent}: {error}; make room there, or set "
                "HOME to a folder that can be written to"
            ) from error
    return folder


def _load_with_sae_lens(sae: str):
    from sae_lens import SAE  # noqa: PLC0415 (8 s: see above)

    try:
        if Path(sae).is_dir():
            return SAE.load_from_disk(sae)
        release, _, sae_id = sae.partition(":")
        loaded = SAE.from_pretrained(release, sae_id)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"sae-lens cannot load {sae}: {' '.join(str(error).split())}; its table of pretrained "
            "SAEs (decoderesearch.github.io/SAELens) lists releases and ids"
        ) from error
    if loaded.cfg.metadata.get("model_from_pretrained_kwargs", {}).get("center_writing_weights"):
        _centre_what_it_reads(sae, loaded)
    return loaded


def _centre_what_it_reads(name: str, sae: Any) -> None:
    """Let a SAE of a model whose writing weights are centred read the model as it is published.

    There each activation has mean 0 over d_in: (x - mean(x)) W_enc = x (W_enc - mean of its rows).

    Raises:
        ModelError: it is of an architecture, or a normalisation, to which this does not apply.
    """
    if sae.cfg.architecture() != "standard" or sae.cfg.normalize_activations != "none":
        raise ModelError(
            f"{name} was trained on a model whose writing weights are centred, and is no standard "
            "SAE without normalisation: what it would read here cannot be made the same; give an "
            "SAE of the model as it is published"
        )
    with torch.no_grad():
        if sae.cfg.apply_b_dec_to_input:
            sae.b_enc -= sae.b_dec @ sae.W_enc
            sae.cfg.apply_b_dec_to_input = False
        sae.W_enc -= sae.W_enc.mean(dim=0)
    sae.cfg.metadata.model_from_pretrained_kwargs = {}
