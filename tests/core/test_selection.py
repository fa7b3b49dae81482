"""Selection: the rule itself, its edges, and that the C++ form agrees."""

import pytest
import torch
from prism.kernels import build
from prism.kernels.cpu_kernel import CpuKernel
from prism.selection import select

T, K, E, N, H = 5, 2, 4, 8, 48


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(T, H, generator=g),
        "index": torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]),
        "weights": torch.rand(T, K, generator=g) + 0.01,
        "router_weight": torch.randn(E, N, H, generator=g) * 0.1,
        "router_bias": torch.randn(E, N, generator=g),
        "log_theta": torch.full((T,), -1.0),
    }


def test_state_follows_the_formula() -> None:
    given = inputs()
    state = select(**given)
    assert state.dtype == torch.uint8
    for t in range(T):
        for k in range(K):
            e = given["index"][t, k]
            score = given["weights"][t, k].log() + given["router_bias"][e]
            score = score + given["router_weight"][e] @ given["x"][t]
            assert torch.equal(state[t, k].bool(), score > -1.0)
    assert 0 < state.sum() < state.numel()


def test_minus_infinity_keeps_all_even_at_weight_zero() -> None:
    given = inputs()
    given["weights"][0, 0] = 0
    given["log_theta"][0] = -torch.inf
    assert select(**given)[0].all()


def test_sentinel_experts_are_off() -> None:
    given = inputs()
    given["index"][2, 1] = E
    given["log_theta"][:] = -torch.inf
    state = select(**given)
    assert not state[2, 1].any()
    assert state[2, 0].all()


def test_each_token_has_its_own_threshold() -> None:
    given = inputs()
    given["log_theta"] = torch.tensor([-torch.inf, -3.0, -1.0, 0.0, torch.inf])
    shares = select(**given).float().mean(dim=(1, 2))
    assert shares[0] == 1
    assert shares[-1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_cpp_form_agrees(dtype: torch.dtype, seed: int) -> None:
    build.load()
    given = inputs(seed)
    given["x"] = given["x"].to(dtype)
    given["index"][1, 0] = E
    given["log_theta"][3] = -torch.inf
    given["weights"][3, 0] = 0
    given["router_weight"] = given["router_weight"].to(dtype)  # tables have the weights' dtype
    assert torch.equal(CpuKernel().select(**given), select(**given))
