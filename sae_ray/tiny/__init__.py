"""The embedded default: a tiny instruct model, its SAE, labels and pool, and how they were made.

Everything lies in `default/`, made by `jobs/make_tiny.py`; README.md there beside is its card.
"""

from pathlib import Path

DEFAULT = Path(__file__).parent / "default"
MODEL_NAME = "sae-ray-tiny"
HOOK_POINT = "blocks.2.hook_resid_post"


def lm_path() -> Path:
    """Return the folder of the language model and its tokenizer."""
    return DEFAULT / "model"


def sae_path() -> Path:
    """Return the folder of the SAE, in sae-lens' format."""
    return DEFAULT / "sae"


def labels_path() -> Path:
    """Return the file that says what each latent fires on."""
    return DEFAULT / "labels.json"


def pool_path() -> Path:
    """Return the pool of conversations: id, domain, concepts, spans, messages."""
    return DEFAULT / "pool.parquet"


def eval_path() -> Path:
    """Return the questions with answers: the pool's columns and answer, metric."""
    return DEFAULT / "eval.parquet"


def preferences_path() -> Path:
    """Return the preference pairs: id, domain, prompt, chosen, rejected."""
    return DEFAULT / "preferences.parquet"


def safety_path() -> Path:
    """Return prompts to refuse (harmful) and look-alikes to answer: id, harmful, prompt."""
    return DEFAULT / "safety.parquet"


def text_path() -> Path:
    """Return plain text without any chat template: source, licence, text."""
    return DEFAULT / "text.parquet"
