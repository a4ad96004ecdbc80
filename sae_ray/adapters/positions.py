"""Positions: at which tokens of a forward an adapter acts."""

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sae_ray.errors import ModelError

Where = Literal["all", "non_bos", "completion"]


def acts_on_answers(model: nn.Module) -> bool:
    """Say whether a forward must be told, by its labels, which tokens are the answer's."""
    configs = getattr(model, "peft_config", {})
    return any(getattr(one, "positions", "all") == "completion" for one in configs.values())


class Positions:
    """What the forward in progress says of its tokens, kept for the layers inside.

    It watches what enters the model, with hooks that are put on once. The masks stay until the next
    forward, because gradient checkpointing runs layers again in the backward pass.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._labels: Tensor | None = None
        self._non_bos: Tensor | None = None
        self._completion: Tensor | None = None

    def watch(self, model: PreTrainedModel) -> None:
        """Read labels where they enter a model and ids where they enter its layers, from now on."""
        if not self._handles:
            for module, hook in ((model, self._enter_model), (model.get_decoder(), self._enter)):
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def unwatch(self) -> None:
        """Take the hooks off again."""
        while self._handles:
            self._handles.pop().remove()

    def mask(self, where: Where) -> Bool[Tensor, "batch seq"] | None:
        """Return the tokens of the forward in progress to act at; None for all of them.

        Raises:
            ModelError: nothing says which tokens are the completion's.
        """
        if where == "all":
            return None
        if where == "completion" and self._completion is None:
            raise ModelError(
                "an adapter with positions=completion acts on the tokens of the answer, and this "
                "forward does not say which they are: pass labels, or generate with the KV cache "
                "(use_cache=True)"
            )
        return self._non_bos if where == "non_bos" else self._completion

    def _enter_model(self, _module: nn.Module, _args: tuple, kwargs: dict) -> None:
        self._labels = kwargs.get("labels")

    def _enter(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs["inputs_embeds"][..., 0] if given is None else given
        cache = kwargs.get("past_key_values")
        num_before = 0 if cache is None else int(cache.get_seq_length())
        self._non_bos = ~_is_first(given, num_before, kwargs)
        # Labels of one forward are not those of the next.
        labels, self._labels = self._labels, None
        if labels is not None:
            self._completion = labels != -100
        elif cache is not None:
            # Generation: first the prompt at once, then the answer.
            self._completion = torch.full_like(given, num_before > 0, dtype=torch.bool)
        else:
            self._completion = None


def _is_first(given: Tensor, num_before: int, kwargs: dict) -> Bool[Tensor, "batch seq"]:
    """Say which tokens begin a sequence: position 0, also of each of several packed in a row."""
    position_ids, attention_mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if position_ids is not None:
        return (position_ids == 0).expand(given.shape)
    at = torch.arange(num_before, num_before + given.shape[1], device=given.device)
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return at == attention_mask.int().argmax(-1, keepdim=True)  # behind the padding on the left
    return (at == 0).expand(given.shape)
