"""Pre-training of the tiny language model: isolated instances in length buckets, as steps.

An instance is one chat or one page, alone in its row of a batch: a causal model right-padded
cannot see past its own row, so nothing crosses from one instance to the next.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from sae_ray.tiny.tokens import END, PAD

IGNORED = -100


@dataclasses.dataclass(frozen=True, slots=True)
class PretrainConfig:
    """How long and how fast."""

    num_steps: int
    tokens_per_batch: int = 16_384
    """Positions of a batch, padding included."""
    learning_rate: float = 2e-3
    warmup_steps: int = 300
    decay_share: float = 0.25
    """The rate is constant, then falls linearly to zero over this last share of the steps, so
    that a run cut short is the start of a longer one."""
    weight_decay: float = 0.1
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What one step of training reports."""

    number: int
    num_tokens: int
    loss: float
    learning_rate: float


def new_model(
    tokenizer: PreTrainedTokenizerBase, seed: int, device: str = "cpu"
) -> PreTrainedModel:
    """Return an untrained Llama of about 2.6 million parameters; its weights depend on the seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.get_vocab()[PAD],
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()[END],
    )
    # Eager attention: on one core, short rows go faster so than through the fused kernel.
    attention = "eager" if device == "cpu" else "sdpa"
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    )
    return model.to(device)


def new_optimiser(model: PreTrainedModel, config: PretrainConfig) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Return the rate of a step: warm up, stay, fall to zero."""
    decay_steps = max(1, round(config.decay_share * config.num_steps))
    warm = min(1.0, (step + 1) / config.warmup_steps)
    fall = min(1.0, (config.num_steps - step) / decay_steps)
    return config.learning_rate * warm * fall


def batches(
    instances: Sequence[Int32[np.ndarray, " _"]], config: PretrainConfig
) -> Iterator[Int[Tensor, "rows tokens"]]:
    """Yield batches of rows of like length for ever, each epoch in another order."""
    epoch = 0
    lengths = np.array([len(instance) for instance in instances])
    while True:
        rng = np.random.default_rng([config.seed, epoch])
        noise = rng.uniform(0.95, 1.05, size=len(instances))
        order = np.argsort(lengths * noise, kind="stable")
        groups: list[list[int]] = [[]]
        longest = 0
        for index in order.tolist():
            longest = max(longest, int(lengths[index]))
            if longest * (len(groups[-1]) + 1) > config.tokens_per_batch and groups[-1]:
                groups.append([])
                longest = int(lengths[index])
            groups[-1].append(index)
        for group in rng.permutation(len(groups)).tolist():
            yield pad([instances[index] for index in groups[group]])
        epoch += 1


def pad(instances: Sequence[Int32[np.ndarray, " _"]]) -> Int[Tensor, "rows tokens"]:
    """Stack instances, filled on the right with -100."""
    width = max(map(len, instances))
    rows = np.full((len(instances), width), IGNORED, dtype=np.int64)
    for row, instance in zip(rows, instances, strict=True):
        row[: len(instance)] = instance
    return torch.from_numpy(rows)


def logits_at(
    model: PreTrainedModel,
    rows: Int[Tensor, "rows tokens"],
    kept: Bool[Tensor, "rows targets"],
) -> Float[Tensor, "kept vocabulary"]:
    """Return the logits of chosen next tokens of right-padded rows, and of no others."""
    head = model.get_output_embeddings()
    assert head is not None
    # No mask: with padding on the right a causal model never looks at it.
    hidden = model.get_decoder()(rows.clamp(min=0), use_cache=False).last_hidden_state
    return head(hidden[:, :-1][kept])


def next_token_loss(model: PreTrainedModel, rows: Int[Tensor, "rows tokens"]) -> Tensor:
    """Return the mean loss of each next token of right-padded rows, in bf16 compute."""
    rows = rows.to(model.device)
    targets = rows[:, 1:]
    kept = targets != IGNORED
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        logits = logits_at(model, rows, kept)
    return functional.cross_entropy(logits.float(), targets[kept])


def pretrain(
    model: PreTrainedModel,
    optimiser: torch.optim.Optimizer,
    instances: Sequence[Int32[np.ndarray, " _"]],
    config: PretrainConfig,
    start_step: int = 0,
) -> Iterator[Step]:
    """Train the model in place, one step a turn; the caller logs, saves and stops.

    To go on from a saved state, load model and optimiser and pass the number of steps done.
    """
    model.train()
    for number, rows in enumerate(batches(instances, config)):
        if number >= config.num_steps:
            return
        if number < start_step:
            continue
        rate = learning_rate(config, number)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = next_token_loss(model, rows)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        yield Step(number, int((rows != IGNORED).sum()), loss.item(), rate)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, instances: Sequence[Int32[np.ndarray, " _"]]) -> float:
    """Return the mean loss, in nats a token, over instances."""
    model.eval()
    total, count = 0.0, 0
    ordered = sorted(instances, key=len)
    for start in range(0, len(ordered), 16):
        rows = pad(ordered[start : start + 16])
        num_targets = int((rows[:, 1:] != IGNORED).sum())
        total += next_token_loss(model, rows).item() * num_targets
        count += num_targets
    return total / max(1, count)


def cut(ids: Sequence[int], max_tokens: int) -> list[Int32[np.ndarray, " _"]]:
    """Cut a long document into instances of at most so many tokens; a rest of one is left out."""
    array = np.asarray(ids, dtype=np.int32)
    pieces = [array[start : start + max_tokens] for start in range(0, len(array), max_tokens)]
    return [piece for piece in pieces if len(piece) > 1]
