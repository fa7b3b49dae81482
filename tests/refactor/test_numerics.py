"""Partition, sub-router, thresholds and compensation against plain formulas."""

import math

import pytest
import torch
from prism.selection import select
from prism_refactor.batches import BATCH_SIZES, batch_shares
from prism_refactor.compensate import PRIOR_TOKENS, compensate
from prism_refactor.layer_experts import Expert, expert_of, permute_neurons, routed
from prism_refactor.partition import (
    dropping_errors,
    neuron_mass,
    order_slices,
    partition,
    slice_norms,
)
from prism_refactor.subrouter import DEAD_LOG_COST, fit_subrouter
from prism_refactor.thresholds import log_threshold, scores
from torch import Tensor, nn

H, WIDTH, N = 12, 16, 4


class Experts(nn.Module):
    """What transformers' experts modules look like to us."""

    has_gate = is_concatenated = True
    is_transposed = has_bias = has_post_expert_norm = False

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * WIDTH, H, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(experts, H, WIDTH, generator=generator))

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


@pytest.fixture
def x() -> Tensor:
    return torch.randn(200, H, generator=torch.Generator().manual_seed(4))


def slice_outputs(expert: Expert, activations: Tensor) -> Tensor:
    """[t, N, H], the long way."""
    size = WIDTH // N
    parts = [
        activations[:, n * size : (n + 1) * size] @ expert.down[:, n * size : (n + 1) * size].t()
        for n in range(N)
    ]
    return torch.stack(parts, 1)


def test_slice_norms_are_norms_of_slice_outputs(x: Tensor) -> None:
    expert = expert_of(Experts(), 1)
    activations = expert.activate(x)
    found = slice_norms(expert, activations, N)
    torch.testing.assert_close(found, slice_outputs(expert, activations).norm(dim=2))


def test_dropping_errors_are_distances_from_the_quiet_mean(x: Tensor) -> None:
    expert = expert_of(Experts(), 1)
    activations = expert.activate(x)
    y = slice_outputs(expert, activations)
    norms = y.norm(dim=2)
    for n in range(N):
        quiet = y[norms[:, n] <= norms[:, n].median(), n].mean(0)
        found = dropping_errors(expert, activations, N)[:, n]
        torch.testing.assert_close(found, (y[:, n] - quiet).norm(dim=1))


def test_permuting_neurons_changes_no_output(x: Tensor) -> None:
    module = Experts()
    before = [expert_of(module, e) for e in range(3)]
    outputs = [expert.project(expert.activate(x)) for expert in before]
    columns = [expert.down.clone() for expert in before]
    generator = torch.Generator().manual_seed(0)
    permute_neurons(
        module, torch.stack([torch.randperm(WIDTH, generator=generator) for _ in before])
    )
    for e, output in enumerate(outputs):
        after = expert_of(module, e)
        assert not torch.equal(after.down, columns[e])
        torch.testing.assert_close(after.project(after.activate(x)), output)


def test_neuron_mass_sums_to_one_and_leaves_silent_tokens_out(x: Tensor) -> None:
    expert = expert_of(Experts(), 0)
    x[:5] = 0
    mass = neuron_mass(expert, x)
    assert mass.shape == (WIDTH, 195)
    torch.testing.assert_close(mass.sum(0), torch.ones(195))


def test_partition_finds_neurons_that_fire_together() -> None:
    generator = torch.Generator().manual_seed(0)
    group_of = torch.randperm(WIDTH, generator=generator) % N
    on = torch.rand(N, 640, generator=generator) < 0.5
    mass = on[group_of].float() + 1e-3
    mass /= mass.sum(0)
    groups = group_of[partition(mass, N, seed=1)].view(N, -1)
    assert all(len(set(row.tolist())) == 1 for row in groups)


def test_partition_of_a_dead_expert_keeps_its_order() -> None:
    assert torch.equal(partition(torch.zeros(WIDTH, 0), N, 0), torch.arange(WIDTH))


def test_slices_are_ordered_by_falling_mean() -> None:
    order = order_slices(torch.arange(8), torch.tensor([1.0, 3.0, 2.0, 0.5]))
    assert order.tolist() == [2, 3, 4, 5, 0, 1, 6, 7]


def test_subrouter_recovers_a_log_linear_norm(x: Tensor) -> None:
    weight = torch.randn(N, H, generator=torch.Generator().manual_seed(9)) * 0.1
    bias = torch.tensor([0.0, -1.0, 1.0, 2.0])
    many = torch.randn(5000, H, generator=torch.Generator().manual_seed(10))
    router = fit_subrouter(many, (many @ weight.t() + bias).exp())
    torch.testing.assert_close(router.weight, weight, atol=0.01, rtol=0)
    torch.testing.assert_close(router.bias, bias, atol=0.02, rtol=0)


def test_subrouter_of_a_dead_slice_never_selects_it(x: Tensor) -> None:
    norms = torch.rand(200, N, generator=torch.Generator().manual_seed(1)) + 0.5
    norms[:, 2] = 0
    router = fit_subrouter(x, norms)
    assert router.bias[2] == DEAD_LOG_COST
    assert not router.weight[2].any()
    assert torch.isfinite(router.weight).all()


def test_subrouter_with_fewer_tokens_than_dimensions(x: Tensor) -> None:
    router = fit_subrouter(x[:3], torch.ones(3, N))
    torch.testing.assert_close(router.bias, torch.zeros(N), atol=1e-5, rtol=0)


def test_subrouter_refuses_what_is_not_finite(x: Tensor) -> None:
    with pytest.raises(ValueError, match="not finite"):
        fit_subrouter(x, torch.full((200, N), math.nan))


def routing(tokens: int, experts: int, slots: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    gates = torch.rand(tokens, experts, generator=generator)
    weights, index = gates.topk(slots)
    return index, weights


@pytest.mark.parametrize("level", [10, 25, 50, 90])
def test_threshold_selects_the_share_asked_for_as_serving_does(x: Tensor, level: int) -> None:
    index, weights = routing(200, 3, 2)
    generator = torch.Generator().manual_seed(6)
    router = torch.randn(3, N, H, generator=generator), torch.randn(3, N, generator=generator)
    score = scores(x, index, weights, *router)
    theta = log_threshold(score, level)
    assert (score > theta).float().mean().item() == pytest.approx(level / 100, abs=1e-3)
    state = select(x, index, weights, *router, torch.full((200,), theta))
    assert (state.bool() != (score > theta)).float().mean() < 2e-3  # rounding at the edge alone


def test_routed_covers_every_pair_once() -> None:
    index, _ = routing(50, 4, 2)
    pairs = [
        (int(t), int(s), expert)
        for expert, tokens, slots in routed(index, 4)
        for t, s in zip(tokens, slots, strict=True)
    ]
    assert sorted(pairs) == [(t, s, int(index[t, s])) for t in range(50) for s in range(2)]


def test_compensation_matches_the_long_way(x: Tensor) -> None:
    expert = expert_of(Experts(), 2)
    activations = expert.activate(x)
    kept = torch.rand(200, N, generator=torch.Generator().manual_seed(7)) < 0.5
    gate = torch.rand(200, generator=torch.Generator().manual_seed(8))
    found = compensate(expert, activations, kept, gate)
    y = slice_outputs(expert, activations)
    dropped = ~kept
    means = torch.einsum("tn,tnh->nh", dropped.float(), y)
    means /= (dropped.sum(0) + PRIOR_TOKENS)[:, None]
    torch.testing.assert_close(found.means, means)

    for count in range(1, N):
        mine = kept.sum(1) == count
        power = gate[mine] ** 2 * (y * kept[..., None]).sum(1)[mine].square().sum(1)
        missing = y.sum(1) - dropped.float() @ means - (y * kept[..., None]).sum(1)
        gain = gate[mine] ** 2 * (missing * (y * kept[..., None]).sum(1))[mine].sum(1)
        alone = 1 + float(gain.sum() / power.sum())
        assert abs(float(found.scalars[count]) - alone) < 0.1  # shrunk a little to the others


def test_a_count_with_many_tokens_gets_its_own_scalar(x: Tensor) -> None:
    expert = expert_of(Experts(), 2)
    activations = expert.activate(x)
    kept = torch.zeros(200, N, dtype=torch.bool)
    kept[:100, 0], kept[100:, : N - 1] = True, True
    found = compensate(expert, activations, kept, torch.ones(200)).scalars
    assert abs(float(found[1] - found[N - 1])) > 0.004
    assert found[0] == found[N] == 1.0


def test_compensation_where_nothing_is_kept_or_dropped(x: Tensor) -> None:
    expert = expert_of(Experts(), 0)
    activations = expert.activate(x)
    nothing = torch.zeros(200, N, dtype=torch.bool)
    assert torch.equal(
        compensate(expert, activations, nothing, torch.ones(200)).scalars, torch.ones(N + 1)
    )
    whole = compensate(expert, activations, ~nothing, torch.ones(200))
    torch.testing.assert_close(whole.scalars, torch.ones(N + 1))
    assert not whole.means.any()


def test_batches_read_the_union_of_what_tokens_select() -> None:
    # Two sequences of one token, one expert: slices {0} and {1} of four.
    selected = torch.tensor([[[1, 0, 0, 0]], [[0, 1, 0, 0]]], dtype=torch.bool)
    index = torch.zeros(2, 1, dtype=torch.int64)
    shares = batch_shares(selected, index, experts=3, sequence_length=1)
    one, two = BATCH_SIZES.index(1), BATCH_SIZES.index(2)
    assert shares.read[one] == 0.25
    assert shares.read[two] == 0.5
    assert shares.computed[two] == 0.5
    assert shares.dropped[one] == 0.75
    assert shares.dropped[two] == 1.0
    assert shares.read[-1] == shares.read[two]  # 64 does not fit in two sequences
