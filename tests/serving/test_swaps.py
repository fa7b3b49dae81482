"""Which parts of a model are swapped, which stay, and that the whole stays the model."""

import logging
import types

import pytest
import torch
from prism.kernels.layers import ReferenceLayers, choose_layers
from prism_serving.engine import loading, swaps
from prism_serving.engine.attention import ProbeResult
from prism_serving.engine.measure import Measuring
from prism_serving.engine.runner import Runner
from prism_serving.engine.scheduler import StepPlan
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves
from transformers.models.olmoe import modeling_olmoe

KV = ProbeResult([(2, 16, torch.float32)], [(2, 16, torch.float32)])


@pytest.fixture
def layers():
    return choose_layers(torch.device("cpu"), torch.float32, 16)


def random_weight(norm):
    nn.init.normal_(norm.weight)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_norm_is_swapped_and_stays_the_same(layers, dtype):
    model = nn.Sequential(random_weight(LlamaRMSNorm(48))).to(dtype)
    x = torch.randn(1, 5, 48).to(dtype)
    before = model(x)
    assert swaps.swap_norms(model, layers) == 1
    assert "forward" in vars(model[0])
    torch.testing.assert_close(model(x), before)


def test_a_norm_that_computes_something_else_stays_and_says_why(layers, caplog):
    model = nn.Sequential(random_weight(Gemma2RMSNorm(48)))
    x = torch.randn(1, 5, 48)
    before = model(x)
    with caplog.at_level(logging.INFO):
        assert swaps.swap_norms(model, layers) == 0
    assert "Gemma2RMSNorm" in caplog.text and "ours differs by" in caplog.text
    assert torch.equal(model(x), before)


def test_interleaved_rotation_stays_and_says_why(layers, caplog):
    def interleaved(q, k, cos, sin):
        def turn(x):
            pairs = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            return x * cos.unsqueeze(1) + pairs * sin.unsqueeze(1)

        return turn(q), turn(k)

    modelling = types.SimpleNamespace(apply_rotary_pos_emb=interleaved)
    with caplog.at_level(logging.INFO):
        assert not swaps.swap_rope(modelling, layers, KV)
    assert "ours differs by" in caplog.text
    assert modelling.apply_rotary_pos_emb is interleaved


@pytest.mark.parametrize("modelling", [{}, {"apply_rotary_pos_emb": lambda q, freqs: q}])
def test_a_rotation_of_another_form_stays(layers, modelling):
    assert not swaps.swap_rope(types.SimpleNamespace(**modelling), layers, KV)


def test_outside_of_an_engine_step_the_models_own_rotation_runs():
    class Breaks(ReferenceLayers):
        broken = False

        def rotate(self, x, cosine, sine):
            assert not self.broken
            return super().rotate(x, cosine, sine)

    breaks = Breaks()
    modelling = types.SimpleNamespace(apply_rotary_pos_emb=halves)
    assert swaps.swap_rope(modelling, breaks, KV)
    breaks.broken = True
    q, cos = torch.randn(1, 2, 3, 16), torch.randn(1, 3, 16)
    found, expected = modelling.apply_rotary_pos_emb(q, q, cos, cos), halves(q, q, cos, cos)
    assert torch.equal(found[0], expected[0])
    assert swaps.swap_rope(modelling, ReferenceLayers(), KV)  # again: no wrapping of wrappers
    assert modelling.apply_rotary_pos_emb.prism_own is halves


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_logits_at_level_100_are_those_of_stock_transformers(artifact, dtype, tolerance):
    """Prompt, chunk after cached keys, decode rows, all in one model with all parts swapped."""
    loaded = loading.load(artifact, dtype, "cpu")
    assert modeling_olmoe.apply_rotary_pos_emb.prism_own
    runner = Runner(loaded.model, loading.kv_buffers(loaded, 1024), loaded.device)
    m = Measuring(runner.logits, loaded.vocab, 1024, 256, 1024, 1.0)
    stock = AutoModelForCausalLM.from_pretrained(artifact, dtype=getattr(torch, dtype)).eval()
    whole = m._chunk(0, 0, 200, 100).sequence.tokens
    with torch.inference_mode():
        expected = stock(torch.tensor([whole])).logits[0]
    for past, rows in [(0, 120), (120, 79), (199, 1)]:
        chunk = m._chunk(0, past, rows, 100)
        chunk.sequence.tokens[:] = whole[: past + rows]
        found = runner.logits(StepPlan((chunk,)))
        torch.testing.assert_close(
            found[0], expected[past + rows - 1], atol=tolerance, rtol=0, msg=f"{past} + {rows}"
        )
