"""The plain way to pooled latents: Hugging Face forward, sae-lens encode, mean pool.

What the benchmarks compare with, written as somebody who knows both libraries would write it. The
mask of content tokens is given to it, so that both sides pool the same tokens; finding them costs
it nothing.
"""

from collections.abc import Sequence

import numpy as np
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_ray.chat import PLAIN_TEMPLATE, Conversation
from sae_ray.lm import HookPoint


class PlainWay:
    """Whole model, padded batches, every latent of every token in memory."""

    def __init__(self, lm: str, sae: str, dtype: str, device: str = "cpu") -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(lm)
        self.tokenizer.padding_side = "right"
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = PLAIN_TEMPLATE
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        torch_dtype = getattr(torch, dtype)
        self.model = AutoModelForCausalLM.from_pretrained(lm, dtype=torch_dtype).eval()
        self.model.to(torch.device(device))  # pyright: ignore
        self.sae = SAE.load_from_disk(sae).to(dtype=torch_dtype, device=device).eval()
        hook_point = HookPoint.parse(self.sae.cfg.metadata.hook_name)
        assert hook_point.site == "resid_post"
        # The last entry of `hidden_states` is behind the final norm.
        assert hook_point.layer + 1 < self.model.config.num_hidden_layers
        self.layer = hook_point.layer

    @torch.inference_mode()
    def __call__(
        self,
        conversations: Sequence[Conversation],
        content: Sequence[np.ndarray],
        *,
        batch_rows: int,
        max_tokens: int,
        length_sorted: bool,
    ) -> np.ndarray:
        """Return mean-pooled latents [conversations, d_sae], in the order given."""
        texts = self.tokenizer.apply_chat_template(
            [one.messages for one in conversations], tokenize=False
        )
        ids = self.tokenizer(
            texts, add_special_tokens=False, truncation=True, max_length=max_tokens
        )["input_ids"]
        order = list(range(len(ids)))
        if length_sorted:
            order.sort(key=lambda i: len(ids[i]), reverse=True)
        pooled = np.zeros((len(ids), self.sae.cfg.d_sae), dtype=np.float32)
        for start in range(0, len(order), batch_rows):
            rows = order[start : start + batch_rows]
            batch = self.tokenizer.pad(
                {"input_ids": [ids[i] for i in rows]}, padding=True, return_tensors="pt"
            ).to(self.model.device)
            keep = torch.zeros(batch["input_ids"].shape, dtype=self.sae.dtype)
            for one, i in zip(keep, rows, strict=True):
                one[: len(ids[i])] = torch.from_numpy(content[i])
            keep = keep.to(self.model.device)
            output = self.model(**batch, output_hidden_states=True, use_cache=False)
            z = self.sae.encode(output.hidden_states[self.layer + 1])
            # One product, with sums in fp32 inside; z * mask would write tokens x d_sae again.
            sums = torch.bmm(keep[:, None], z)[:, 0].float()
            pooled[rows] = (sums / keep.float().sum(1, keepdim=True).clamp(min=1)).cpu().numpy()
        return pooled
