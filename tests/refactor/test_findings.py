"""What the passes note of each layer, against the plain sums it stands for."""

from types import SimpleNamespace

import pytest
import torch
from prism.architectures import find_expert_modules
from prism.artifact import Artifact
from prism.contract import MAX_LEVEL
from prism.experts import BatchContext, attach, batch_context
from prism.loading import load_model
from prism_refactor import findings
from prism_refactor.evaluation_pass import fewer_experts
from prism_refactor.findings import Routed
from torch import Tensor


def routing(tokens: int, experts: int = 6, slots: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    order = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :slots]
    return order, torch.rand(tokens, slots, generator=generator) + 0.1


def test_kept_mass_is_the_better_half_of_each_experts_output_mass() -> None:
    """One expert, identity-like weights: the mass of a neuron is known."""
    torch.manual_seed(0)
    module = SimpleNamespace(
        gate_up_proj=torch.nn.Parameter(torch.randn(2, 16, 4)),
        down_proj=torch.nn.Parameter(torch.randn(2, 4, 8)),
        act_fn=torch.nn.functional.silu,
        num_experts=2,
        is_transposed=False,
        has_bias=False,
        has_gate=True,
        is_concatenated=True,
        _apply_gate=lambda both: (
            torch.nn.functional.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1]
        ),
    )
    x = torch.randn(30, 4)
    index = torch.tensor([[0, 1]]).expand(30, 2)
    orders = torch.stack([torch.randperm(8), torch.randperm(8)])
    shares = {"cut": [], "source": []}  # type: dict[str, list[float]]
    for expert in (0, 1):
        gate, up = (x @ module.gate_up_proj[expert].t()).chunk(2, -1)
        mass = (torch.nn.functional.silu(gate) * up).square()
        mass = mass * module.down_proj[expert].square().sum(0)
        for name, order in (("cut", orders[expert]), ("source", torch.arange(8))):
            slices = mass[:, order].view(30, 4, 2).sum(2)
            best = slices.sort(descending=True).values[:, :2].sum(1)
            shares[name] += (best / slices.sum(1)).tolist()
    found = findings._kept_mass(module, orders, 4, Routed(x, index, torch.ones(30, 2)))
    assert found[0] == pytest.approx(sum(shares["cut"]) / 60, rel=1e-4)
    assert found[1] == pytest.approx(sum(shares["source"]) / 60, rel=1e-4)


@pytest.mark.parametrize("level", [75, 25])
def test_error_compares_the_reduced_output_with_whole_experts(
    artifact: Artifact, level: int
) -> None:
    model, _ = load_model(artifact.path, torch.float32)
    attach(model, artifact)
    module = find_expert_modules(model)[1][1]
    index, weights = routing(200)
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(5))
    outputs = {}
    for at in (level, MAX_LEVEL):
        with batch_context(BatchContext(torch.full((200,), at, dtype=torch.int32))):
            outputs[at] = module.forward(x, index, weights)
    given = Routed(x, index, weights)
    data = module._prism
    full = outputs[MAX_LEVEL]
    wrong = (outputs[level] - full).square().sum(1) / full.square().sum(1)
    found = findings._relative_error(data, given, outputs[level])
    assert found == pytest.approx(float(wrong.mean()), rel=1e-3)
    assert found > 0
    assert findings._relative_error(data, given, full) == pytest.approx(0.0, abs=1e-9)


def test_usage_counts_tokens_per_expert_and_choices_per_sub_expert(artifact: Artifact) -> None:
    model, _ = load_model(artifact.path, torch.float32)
    attach(model, artifact)
    module = find_expert_modules(model)[0][1]
    index, weights = routing(300)
    given = Routed(torch.randn(300, 32), index, weights)
    found = findings._usage(module._prism, MAX_LEVEL, given)
    assert float(found["routed"].sum()) == pytest.approx(2.0)
    assert torch.equal(found["selected"], torch.ones(6, 4))  # level 100 selects everything
    half = findings._usage(module._prism, 50, given)["selected"]
    counts = torch.bincount(index.flatten(), minlength=6).unsqueeze(1)
    whole = half * counts
    torch.testing.assert_close(whole, whole.round(), atol=1e-3, rtol=0)
    assert 0 < float(half.mean()) < 1


@pytest.mark.parametrize(
    ("slots", "expected"),
    [(8, (6, 4, 2)), (4, (3, 2, 1)), (2, (1,)), (1, ()), (10, (8, 5, 2)), (6, (4, 3, 2))],
)
def test_at_most_three_baselines_of_fewer_experts(slots: int, expected: tuple[int, ...]) -> None:
    assert fewer_experts(slots) == expected
