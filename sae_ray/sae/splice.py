"""A whole language model with its activations replaced on the way: what a SAE's errors cost it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from sae_ray.errors import ModelError
from sae_ray.lm import (
    DTypeName,
    HookPoint,
    family_of,
    keep_layers,
    load_config,
    quiet_loading,
    require_layer,
    visiting,
)
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.sequences import TOKEN, Lanes

Edit = Callable[[Tensor], Tensor]
"""Takes activations [batch, seq, d_in] and returns what the model goes on with."""


class WholeModel:
    """A causal language model, head included, that can be edited at hook points."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.family = family_of(model.config)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        num_layers: int | None = None,
        dtype: DTypeName = "float32",
        device: str | torch.device = "cpu",
    ) -> "WholeModel":
        """Load a model with its head from safetensors; of the layers all, or the lowest so many.

        Raises:
            ModelError: there is no such model, or none of a family that is known.
        """
        config = load_config(path)
        family_of(config)
        keep_layers(config, config.num_hidden_layers if num_layers is None else num_layers)
        try:
            with quiet_loading():
                model = AutoModelForCausalLM.from_pretrained(
                    str(path),
                    config=config,
                    dtype=getattr(torch, dtype),
                    use_safetensors=True,
                    trust_remote_code=False,
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(
                f"cannot load the weights of {path}: {str(error).splitlines()[0]}; weights are "
                "read from safetensors only (convert .bin files with save_pretrained)"
            ) from error
        return cls(model.to(device))  # pyright: ignore[reportArgumentType]

    @property
    def end_tokens(self) -> list[int]:
        """Ids that end an answer, as the model's generation settings have them."""
        settings = self.model.generation_config
        ends = settings.eos_token_id if settings is not None else self.model.config.eos_token_id
        return [ends] if isinstance(ends, int) else list(ends or ())

    @torch.inference_mode()
    def logits(
        self, ids: Int[Tensor, "batch seq"], edits: Mapping[HookPoint, Edit] | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Run right-padded ids, each edit applied at its hook point."""
        with contextlib.ExitStack() as stack:
            for point, edit in (edits or {}).items():
                require_layer(point, self.model.config, str(self.model.name_or_path))
                stack.enter_context(visiting(self.model.base_model, self.family, point, edit))
            return self.model(input_ids=ids.to(self.model.device), use_cache=False).logits


@dataclasses.dataclass(frozen=True, slots=True)
class Recovered:
    """What splicing a SAE in costs the model, beside what losing the activations does."""

    ce: float
    """Loss of the next token, as the model is."""
    ce_spliced: float
    ce_zero: float
    """With zeros in the place of the activations."""
    kl: float
    """Of the model as it is from the model with the SAE in it."""
    kl_zero: float
    num_tokens: int

    @property
    def ce_recovered(self) -> float:
        """1 where nothing is lost, 0 where as much as with zeros."""
        return (self.ce_zero - self.ce_spliced) / (self.ce_zero - self.ce)

    @property
    def kl_recovered(self) -> float:
        """1 where nothing is lost, 0 where as much as with zeros."""
        return (self.kl_zero - self.kl) / self.kl_zero


def recovered(
    model: WholeModel, encoders: Mapping[str, LatentEncoder], batches: Iterable[Sequence[Lanes]]
) -> dict[str, Recovered]:
    """Measure losses with each SAE in turn in the whole model, over batches of sequences.

    The model as it is runs once for all of them, and once with zeros for each hook point.

    Raises:
        ModelError: one is a transcoder, which does not give back what it reads.
    """
    if any(encoder.is_transcoder for encoder in encoders.values()):
        raise ModelError("a transcoder cannot be spliced in where it reads: give a SAE")
    sums = {name: torch.zeros(5, dtype=torch.float64) for name in encoders}
    num_predicted = num_tokens = 0
    for sequences in batches:
        ids, real = (one.to(model.model.device) for one in _padded(sequences))
        clean = model.logits(ids)
        loss = _loss(clean, ids, real)
        zeros: dict[HookPoint, tuple[float, float]] = {}
        for name, encoder in encoders.items():
            point = encoder.hook_point
            if point not in zeros:
                other = model.logits(ids, {point: torch.zeros_like})
                zeros[point] = _loss(other, ids, real), _divergence(clean, other, real)
            other = model.logits(ids, {point: _splice(encoder)})
            ce, kl = _loss(other, ids, real), _divergence(clean, other, real)
            sums[name] += torch.tensor([loss, ce, zeros[point][0], kl, zeros[point][1]])
        num_predicted += int(real[:, 1:].sum())
        num_tokens += int(real.sum())
    counts = torch.tensor([num_predicted] * 3 + [num_tokens] * 2)
    return {
        name: Recovered(*(one / counts).tolist(), num_tokens=num_tokens)
        for name, one in sums.items()
    }


def _splice(encoder: LatentEncoder) -> Edit:
    return lambda x: encoder.reconstruct(x).to(x.dtype)


def _padded(sequences: Sequence[Lanes]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(one) for one in sequences])
    real = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    ids = torch.zeros(real.shape, dtype=torch.long)
    for row, one in enumerate(sequences):
        ids[row, : len(one)] = torch.from_numpy(one[:, TOKEN])
    return ids, real


_ROWS_AT_ONCE = 1024
"""Of log probabilities, each as wide as the vocabulary."""


def _loss(logits: Tensor, ids: Tensor, real: Tensor) -> float:
    """Return the summed loss of the next token, where there is one."""
    predicts = real[:, 1:]
    rows, targets = logits[:, :-1][predicts], ids[:, 1:][predicts]
    parts = zip(rows.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True)
    return sum(float(cross_entropy(x.float(), t, reduction="sum").double()) for x, t in parts)


def _divergence(clean: Tensor, other: Tensor, real: Tensor) -> float:
    """Return the summed divergence of the model as it is from another, over real tokens."""
    total = 0.0
    rows = [one[real].split(_ROWS_AT_ONCE) for one in (clean, other)]
    for p, q in zip(*rows, strict=True):
        mine, its = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float((mine.exp() * (mine - its)).sum(-1).double().sum())
    return total
