"""Running a model layer by layer with a visitor, and resuming in the middle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from prism.loading import load_model
from prism_refactor.calibrate import run_layers
from prism_refactor.cut import CutVisitor
from prism_refactor.layer_experts import full_output
from prism_refactor.errors import Reason, RefactorError
from torch import Tensor, nn


class States:
    """Hidden states in memory."""

    def __init__(self, kept: tuple[int, Tensor] | None = None) -> None:
        self.kept = kept
        self.all: dict[int, Tensor] = {}

    def load(self) -> tuple[int, Tensor] | None:
        return self.kept

    def save(self, done: int, hidden: Tensor) -> None:
        self.all[done] = hidden.clone()


class Full:
    """Answers like the model itself, and counts."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def __call__(
        self, layer: int, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        self.layers.append(layer)
        return full_output(module, x, index, weights)


@pytest.fixture
def model(checkpoint: Path) -> Any:
    return load_model(checkpoint, torch.float32)[0]


IDS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))


def test_visitor_sees_each_layer_once_and_the_stream_is_the_models(model: Any) -> None:
    states, visitor = States(), Full()
    before = model.get_experts_implementation()
    run_layers(model, IDS, visitor, states)
    assert visitor.layers == [0, 1]
    assert model.get_experts_implementation() == before
    with torch.inference_mode():
        expected = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
        found = model.base_model.norm(states.all[2])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_resuming_skips_finished_layers_and_gives_the_same(model: Any) -> None:
    first = States()
    run_layers(model, IDS, Full(), first)
    resumed, visitor = States((1, first.all[1])), Full()
    run_layers(model, IDS, visitor, resumed)
    assert visitor.layers == [1]
    assert torch.equal(resumed.all[2], first.all[2])
    assert "forward" not in vars(model.base_model.layers[0])  # nothing of ours stays


def test_nothing_runs_when_all_layers_are_done(model: Any) -> None:
    visitor = Full()
    run_layers(model, IDS, visitor, States((2, torch.empty(0))))
    assert visitor.layers == []


def test_an_expert_that_no_token_reaches_still_gets_a_sub_router(model: Any) -> None:
    """The random router sends tokens everywhere; shut one expert out and fit."""
    kept: dict[int, Any] = {}
    for layer in model.base_model.layers:
        layer.mlp.gate.weight[2] = -layer.mlp.gate.weight[[0, 1, 3, 4, 5]].sum(0) * 10
    visitor = CutVisitor(4, 0, 2, 2, kept.get, kept.__setitem__)
    run_layers(model, IDS, visitor, States())
    for cut in kept.values():
        assert torch.isfinite(cut.router_weight).all()
        assert cut.router_weight[2].any()
        assert torch.equal(cut.permutations[2].sort()[0], torch.arange(48, dtype=torch.int32))
        assert cut.usage.sum() == pytest.approx(2.0)


def test_weights_that_are_not_finite_are_named(model: Any) -> None:
    model.base_model.layers[1].mlp.experts.down_proj[3, 0, 0] = float("nan")
    kept: dict[int, Any] = {}
    with pytest.raises(RefactorError, match="Expert 3 of MoE layer 1: ") as caught:
        run_layers(model, IDS, CutVisitor(4, 0, 2, 2, kept.get, kept.__setitem__), States())
    assert caught.value.reason is Reason.CORRUPT_CHECKPOINT
    assert list(kept) == [0]
