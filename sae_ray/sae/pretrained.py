"""Where a SAE comes from: a sae-lens folder, or `release:sae_id` of sae-lens' registry.

sae-lens itself takes 8 s and 500 MB to import, so it is loaded only where its registry or one of
its older formats is asked for; what it gives is saved once in its current format and read from
there.
"""

import hashlib
import json
from pathlib import Path

from sae_ray.errors import ModelError
from sae_ray.sae.encoder import LatentEncoder


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
        config = folder / "cfg.json"
        is_current = not config.is_file() or "metadata" in json.loads(config.read_text())
        return folder if is_current else _converted(sae)
    if ":" in sae and not sae.startswith(("/", ".")):
        return _converted(sae)
    raise ModelError(
        f"no SAE at {sae}: give a folder with cfg.json and sae_weights.safetensors, or release:sae_id "
        "from sae-lens' registry, such as gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical"
    )


def _converted(sae: str) -> Path:
    """Let sae-lens read its registry or an older format, and save what it gives."""
    name = hashlib.sha256(sae.encode()).hexdigest()[:16]
    folder = Path.home() / ".cache" / "sae_ray" / "saes" / name
    if (folder / "sae_weights.safetensors").is_file():
        return folder
    from sae_lens import SAE  # noqa: PLC0415 (8 s: see above)

    try:
        if Path(sae).is_dir():
            loaded = SAE.load_from_disk(sae)
        else:
            release, _, sae_id = sae.partition(":")
            loaded = SAE.from_pretrained(release, sae_id)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"sae-lens cannot load {sae}: {str(error).strip().splitlines()[0]}; see its table of "
            "pretrained SAEs for releases and ids"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    loaded.save_inference_model(str(folder)) if hasattr(loaded, "save_inference_model") else (
        loaded.save_model(str(folder))
    )
    return folder
