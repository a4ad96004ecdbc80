"""Causal attention over blocks of queries."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sae_ray.attention import block_attention


@pytest.mark.parametrize("seq", [1, 5, 64, 65, 200, 256, 257, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (4, 1)])
def test_it_is_causal_attention(seq, heads, kv_heads):
    generator = torch.Generator().manual_seed(seq)

    def random(num_heads: int) -> torch.Tensor:
        # As models give it: heads lie beside each other in every token.
        x = torch.randn(2, seq, num_heads, 16, generator=generator, dtype=torch.float64)
        return x.transpose(1, 2)

    query, key, value = random(heads), random(kv_heads), random(kv_heads)
    expected = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    found = block_attention(query, key, value, 0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_in_bf16_it_is_as_exact_as_torchs():
    query, key, value = torch.randn(3, 2, 3, 300, 64, generator=torch.Generator().manual_seed(0))
    exact = scaled_dot_product_attention(query, key, value, is_causal=True)
    q, k, v = (x.bfloat16() for x in (query, key, value))

    def error(found: torch.Tensor) -> float:
        return float((found.float() - exact).norm() / exact.norm())

    ours = error(block_attention(q, k, v, 64**-0.5).transpose(1, 2))
    assert ours < 2 * error(scaled_dot_product_attention(q, k, v, is_causal=True))
