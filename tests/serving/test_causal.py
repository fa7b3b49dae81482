"""Blocked attention against SDPA, over chunks, cached keys and shared heads."""

import pytest
import torch
import torch.nn.functional as F
from prism_serving.engine.causal import attend


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("past", [0, 1, 100])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
def test_attend_matches_masked_sdpa(rows, past, heads, kv_heads):
    torch.manual_seed(rows + past)
    q = torch.randn(rows, heads, 16)
    k, v = torch.randn(rows + past, kv_heads, 16), torch.randn(rows + past, kv_heads, 24)
    mask = torch.ones(rows, rows + past, dtype=torch.bool).tril(past)
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        scale=0.2,
        enable_gqa=True,
    )[0].transpose(0, 1)
    torch.testing.assert_close(attend(q, k, v, 0.2), expected, atol=1e-5, rtol=1e-5)


def test_scale_defaults_to_the_usual_one():
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, 16) for _ in range(3))
    torch.testing.assert_close(attend(q, k, v, None), attend(q, k, v, 0.25))
