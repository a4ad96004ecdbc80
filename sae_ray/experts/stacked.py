"""Stacked LoRA: each row of a batch has an adapter's factors of its own, in two batched products.

    y_i = W x_i + (x_i A_iᵀ) B_i        A_i [r, d_in], B_i [r, d_out], scaled, of row i's adapter

The factors of all rows lie side by side in one tensor a matrix, put there when a row joins, so that
a step gathers nothing and costs the same whether rows share an adapter or not. Smaller adapters
are filled up with zeros, which is also what rows without one have.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sae_ray.errors import RequestError

_KEY = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.weight$")
_PLAIN = {
    **{"use_dora": False, "bias": "none", "modules_to_save": None, "lora_bias": False},
    **{"layer_replication": None, "trainable_token_indices": None, "use_qalora": False},
    **{"alora_invocation_tokens": None, "target_parameters": None, "use_bdlora": None},
}
"""What a LoRA must say of itself to be no more than its two factors."""


@dataclasses.dataclass(frozen=True)
class Factors:
    """The two factors of a LoRA at one matrix, its scale multiplied into B."""

    A: Float[Tensor, "r d_in"]
    B: Float[Tensor, "r d_out"]

    @property
    def num_bytes(self) -> int:
        """Return what they take in memory."""
        return self.A.nbytes + self.B.nbytes


def read_lora(folder: Path, config: PeftConfig, model: PreTrainedModel) -> dict[str, Factors]:
    """Read a LoRA in PEFT's layout as factors by the path of the matrix that they change.

    Raises:
        RequestError: it is more than two factors a matrix, or of another model.
    """
    assert isinstance(config, LoraConfig)
    if odd := [name for name, plain in _PLAIN.items() if getattr(config, name, plain) != plain]:
        raise RequestError(
            f"this expert is a LoRA with {', '.join(odd)}, and a shared batch takes plain ones: "
            "merge it into a model of its own, or train it without"
        )
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        if not (match := _KEY.match(key)):
            raise RequestError(
                "this expert's file holds weights that are no factors of a LoRA, and a shared "
                "batch takes nothing else: train it as lora or subspace"
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    modules = dict(model.named_modules())
    factors = {}
    for path, half in halves.items():
        module = modules.get(path)
        if set(half) != {"A", "B"} or not _fits(module, half):
            raise RequestError(
                "this expert changes a matrix that this model does not have: serve it with the "
                "model that it was trained on"
            )
        scale = _scale(config, path, len(half["A"]))
        factors[path] = Factors(
            half["A"].to(model.device, model.dtype).contiguous(),
            (scale * half["B"].float()).T.to(model.device, model.dtype).contiguous(),
        )
    return factors


def _fits(module: nn.Module | None, half: Mapping[str, Tensor]) -> bool:
    """Say whether factors are as wide as a matrix."""
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    out_in = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
    return (half["B"].shape[0], half["A"].shape[1]) == tuple(out_in)


def _scale(config: LoraConfig, path: str, r: int) -> float:
    """Return what a product of factors is multiplied by, as PEFT has it."""
    pattern = next((p for p in config.alpha_pattern or {} if re.match(rf"(.*\.)?({p})$", path)), "")
    alpha = (config.alpha_pattern or {}).get(pattern, config.lora_alpha)
    return alpha / (math.sqrt(r) if config.use_rslora else r)


class _Place:
    """The factors of every row at one matrix."""

    def __init__(self, module: nn.Module, max_rows: int, like: Factors) -> None:
        self.max_rows = max_rows
        self.A = like.A.new_zeros(max_rows, 0, like.A.shape[1])
        self.B = like.B.new_zeros(max_rows, 0, like.B.shape[1])
        self.used = [False] * max_rows
        self.rows = slice(0, 0)
        self.on = False
        module.register_forward_hook(self)

    def __call__(self, _module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        if not self.on:
            return out
        down = torch.bmm(args[0], self.A[self.rows].transpose(1, 2))
        return torch.baddbmm(out, down, self.B[self.rows])

    def look_at(self, rows: slice) -> None:
        self.rows, self.on = rows, any(self.used[rows])

    def put(self, row: int, factors: Factors | None) -> None:
        if factors is None and not self.used[row]:
            return
        if factors is not None and len(factors.A) > self.A.shape[1]:
            more = len(factors.A) - self.A.shape[1]
            self.A, self.B = (nn.functional.pad(one, (0, 0, 0, more)) for one in (self.A, self.B))
        r = 0 if factors is None else len(factors.A)
        for mine, given in ((self.A, factors and factors.A), (self.B, factors and factors.B)):
            mine[row, r:] = 0
            if given is not None:
                mine[row, :r] = given
        self.used[row] = factors is not None

    def move(self, source: int, target: int) -> None:
        if self.used[source] or self.used[target]:
            self.A[target], self.B[target] = self.A[source], self.B[source]
            self.used[target] = self.used[source]


class StackedLora:
    """The LoRA of every row of a batch, inside a model."""

    def __init__(self, model: PreTrainedModel, max_rows: int) -> None:
        self._model = model
        self._max_rows = max_rows
        self._places: dict[str, _Place] = {}

    def put(self, row: int, factors: Mapping[str, Factors]) -> None:
        """Give a row an adapter, or none."""
        for path, one in factors.items():
            if path not in self._places:
                module = self._model.get_submodule(path)
                self._places[path] = _Place(module, self._max_rows, one)
        for path, place in self._places.items():
            place.put(row, factors.get(path))

    def move(self, source: int, target: int) -> None:
        """Put a row into the place of another, which has left."""
        for place in self._places.values():
            place.move(source, target)

    def look_at(self, rows: slice) -> None:
        """Say which rows the next forward is of."""
        for place in self._places.values():
            place.look_at(rows)

    @property
    def num_bytes(self) -> int:
        """Return what the factors of the rows take, in bytes."""
        return sum(place.A.nbytes + place.B.nbytes for place in self._places.values())


def read_config(folder: Path) -> PeftConfig:
    """Read what PEFT says of an adapter.

    Raises:
        RequestError: it is of a kind that PEFT does not know.
    """
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise RequestError(
            f"this expert's adapter_config.json is none of PEFT's ({type(error).__name__}): make "
            "the expert again"
        ) from error
