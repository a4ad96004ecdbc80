"""Tuned: an adapter and its base as what travels to other processes, which load them there."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import PeftModel

from sae_ray.adapters.edits import LATENT_KINDS
from sae_ray.adapters.loading import adapted, load_causal
from sae_ray.chat import ChatTokenizer
from sae_ray.experts.card import ADAPTER, ExpertCard
from sae_ray.experts.files import read_checked
from sae_ray.explain.dial import Dial, Spread


@dataclasses.dataclass(frozen=True)
class Tuned:
    """An adapter on its base; both lie where every process finds them, or are in here."""

    lm: str
    files: Mapping[str, bytes]
    """The adapter's, by name below its folder. They name the SAEs that it sits on."""
    saes: tuple[str, ...]
    pad: int

    @classmethod
    def of(cls, expert: str, card: ExpertCard, lm: str, saes: Mapping[str, str]) -> "Tuned":
        """Read an expert's adapter, each file held against the card's SHA-256.

        Args:
            expert: its folder or URL.
            card: its card.
            lm: where its base lies.
            saes: where the SAE of each hook point lies.

        Raises:
            SaeRayError: a file is not what it was.
        """
        files = {
            name: read_checked(f"{expert}/{ADAPTER}/{name}", record)
            for name, record in card.files.items()
        }
        if card.adapter in LATENT_KINDS:
            config = json.loads(files["adapter_config.json"])
            for site in config["sites"]:
                site["sae"] = saes[site["hook_point"]]
            files["adapter_config.json"] = json.dumps(config).encode()
        pad = ChatTokenizer.load(lm).tokenizer.pad_token_id
        return cls(lm, files, tuple(saes.values()), pad if isinstance(pad, int) else 0)

    def load(self) -> PeftModel:
        """Load the base and put the adapter on it, on a GPU if there is one.

        Raises:
            ModelError: base, SAE or adapter cannot be used.
        """
        with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
            for name, content in self.files.items():
                file = Path(folder) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            model = adapted(load_causal(self.lm, "float32"), None, Path(folder))
        assert isinstance(model, PeftModel)
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def dial(self, spread: Spread | None = None) -> Dial:
        """Load it, to be turned down."""
        return Dial(self.load(), self.pad, spread=spread)


Spreading = Callable[[Tuned, int], AbstractContextManager[Spread]]
"""Lets so many other processes load a tuned model, and answer for it until the context ends."""
