"""The stages on another device than the CPU: nothing stays behind, nothing comes out different."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from prism.streaming import StreamedModel
from prism_refactor import granularity
from prism_refactor.cut import Cutter
from prism_refactor.layer_experts import full_output
from prism_refactor.reduce import LayerReduction
from torch import Tensor

from tests.refactor.elsewhere import DEVICE, Elsewhere, Pretended, away, back, move_module

TOKENS, WINDOW = 512, 64


@pytest.fixture(scope="module")
def layer(checkpoint: Path) -> tuple[Any, Tensor, Tensor, Tensor]:
    """(experts module of the first layer, x [T, H], index and weights [T, K])."""
    model = StreamedModel(checkpoint, torch.float32)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, 32, generator=draw)
    index = torch.rand(TOKENS, 6, generator=draw).argsort(1)[:, :2].contiguous()
    weights = torch.rand(TOKENS, 2, generator=draw).softmax(-1)
    with model.loaded(0):
        module = copy.deepcopy(model.experts(0))
    return module, x, index, weights


def moved(module: Any) -> Any:
    there = copy.deepcopy(module)
    move_module(there)
    return there


def test_mixing_devices_is_noticed() -> None:
    with Pretended():
        there = torch.zeros(3, device=DEVICE)
        assert there.device == DEVICE
        assert isinstance(there + 1, Elsewhere)
        assert float((there + torch.tensor(2.0)).sum()) == 6.0
        with pytest.raises(RuntimeError, match="on the CPU beside tensors on another device"):
            there + torch.zeros(3)
        assert torch.equal(there.cpu() + torch.ones(3), torch.ones(3))


def test_a_layer_is_cut_and_computed_there(layer: tuple[Any, Tensor, Tensor, Tensor]) -> None:
    module, *given = layer
    here = Cutter(4, 0, 1).fit(0, module, *given)
    expected = full_output(module, *given)
    with Pretended():
        there = moved(module)
        cut = Cutter(4, 0, 1).fit(0, there, *away(given))
        found = full_output(there, *away(given))
        assert found.device == DEVICE
    for name, value in here.tensors().items():
        assert torch.equal(back(cut.tensors()[name]), value), name
    assert torch.equal(back(found), expected)


def test_a_knot_is_fitted_and_applied_there(
    layer: tuple[Any, Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prism.expert_weights import ExpertWeights
    from prism.kernels.reference import ReferenceKernel

    def reference(weights: ExpertWeights, n: int, kernel: str = "auto") -> Any:
        return ReferenceKernel(), ReferenceKernel().pack(weights, n)

    monkeypatch.setattr("prism_refactor.reduce.pack", reference)
    module, *given = layer
    cut = Cutter(4, 0, 1).fit(0, module, *given)
    reduction = LayerReduction(copy.deepcopy(module), cut, WINDOW)
    here = reduction.fit(50, *given)
    expected = reduction.output(here, *given)
    with Pretended():
        # The cut comes from a file, so it lies on the CPU; so does a knot that was kept.
        there = LayerReduction(moved(module), cut, WINDOW)
        knot = there.fit(50, *away(given))
        found = there.output(here, *away(given))
        assert found.device == DEVICE
    for name, value in here.tensors().items():
        assert torch.allclose(back(knot.tensors()[name]), value), name
    assert torch.allclose(back(found), expected, atol=1e-6)


def test_the_number_of_sub_experts_is_tried_there(
    layer: tuple[Any, Tensor, Tensor, Tensor],
) -> None:
    module, *given = layer
    here = granularity._tried(module, *given, (4, 8), 0)
    with Pretended():
        there = granularity._tried(moved(module), *away(given), (4, 8), 0)
    assert there == here
