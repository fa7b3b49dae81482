"""The C++ kernel against the torch reference, for every instruction set this machine has."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from prism.expert_weights import ExpertWeights
from prism.kernels import build, choose, pack
from prism.kernels.cpu_kernel import CpuKernel
from prism.kernels.reference import ReferenceKernel
from torch import Tensor

REFERENCE = ReferenceKernel()
ISAS = ("avx512_bf16", "avx512", "avx2", "portable")
# Largest error relative to the largest output: fp32 rounding, and bf16's 8 bits of mantissa.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Case:
    hidden: int
    intermediate: int
    n: int
    tokens: int
    experts: int = 5
    slots: int = 3


SHAPES = [
    Case(64, 64, 4, 1),
    Case(64, 128, 8, 2),
    Case(64, 128, 16, 3),
    Case(64, 256, 32, 5),  # 8 neurons: the narrowest panel
    Case(72, 96, 8, 7),  # 12 neurons: padded; hidden no multiple of 64
    Case(70, 144, 4, 13),  # 36 neurons: one whole panel and a padded one
    Case(600, 64, 4, 17),  # hidden beyond one block of the inner dimension
    Case(96, 1200, 4, 4),  # width beyond one block
    Case(64, 64, 8, 300),  # more rows than computed together
    Case(64, 64, 8, 600, 1, 1),
    Case(64, 64, 4, 1100, 2, 1),  # more tokens than a round
]


@pytest.fixture(scope="module", autouse=True)
def extension() -> None:
    build.load()


def zeros(rows: int, neurons: int) -> ExpertWeights:
    """One expert over 8 features; `rows` of gate and up together."""
    return ExpertWeights.swiglu(torch.zeros(1, rows, 8), torch.zeros(1, 8, neurons))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    x, i, w = torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1)
    kernel = CpuKernel(request.param)
    try:
        kernel.forward(kernel.pack(zeros(64, 32), 4), x, i, w, None)
    except RuntimeError as error:
        if "has no kernels named" not in str(error):
            raise
        pytest.skip(str(error).splitlines()[0])
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Layer:
    gate_up: Tensor
    down: Tensor
    x: Tensor
    index: Tensor
    weights: Tensor
    state: Tensor
    n: int


def layer(case: Case, dtype: torch.dtype = torch.float32, share: float = 0.5) -> Layer:
    g = torch.Generator().manual_seed(case.tokens)
    e, i, h, t = case.experts, case.intermediate, case.hidden, case.tokens
    return Layer(
        (torch.randn(e, 2 * i, h, generator=g) / h**0.5).to(dtype),
        (torch.randn(e, h, i, generator=g) / i**0.5).to(dtype),
        torch.randn(t, h, generator=g).to(dtype),
        torch.stack([torch.randperm(e, generator=g)[: case.slots] for _ in range(t)]),
        torch.rand(t, case.slots, generator=g),
        (torch.rand(t, case.slots, case.n, generator=g) < share).to(torch.uint8),
        case.n,
    )


def run(kernel: CpuKernel, at: Layer, state: Tensor | None) -> Tensor:
    packed = kernel.pack(ExpertWeights.swiglu(at.gate_up, at.down), at.n)
    return kernel.forward(packed, at.x, at.index, at.weights, state)


def reference(at: Layer, state: Tensor | None) -> Tensor:
    packed = REFERENCE.pack(ExpertWeights.swiglu(at.gate_up.float(), at.down.float()), at.n)
    return REFERENCE.forward(packed, at.x.float(), at.index, at.weights, state)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == torch.float32
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_forward_equals_the_reference(isa: str, case: Case, dtype: torch.dtype) -> None:
    at = layer(case, dtype)
    assert_close(run(CpuKernel(isa), at, at.state), reference(at, at.state), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [4, 8, 16, 32])
@pytest.mark.parametrize("tokens", [1, 9])
def test_no_state_means_all_on(dtype: torch.dtype, n: int, tokens: int) -> None:
    at = layer(Case(64, 256, n, tokens), dtype)
    whole = run(CpuKernel(), at, None)
    assert torch.equal(whole, run(CpuKernel(), at, torch.ones_like(at.state)))
    assert_close(whole, reference(at, None), dtype)


def test_all_off_is_zero() -> None:
    at = layer(SHAPES[5])
    assert not run(CpuKernel(), at, torch.zeros_like(at.state)).any()


def test_no_tokens_give_no_rows() -> None:
    at = layer(SHAPES[0])
    packed = CpuKernel().pack(ExpertWeights.swiglu(at.gate_up, at.down), at.n)
    out = CpuKernel().forward(packed, at.x[:0], at.index[:0], at.weights[:0], at.state[:0])
    assert out.shape == (0, 64)


def test_sentinel_experts_are_skipped() -> None:
    at = layer(Case(64, 64, 4, 6))
    index = at.index.clone()
    index[2, 1] = at.gate_up.shape[0]
    weights = at.weights.clone()
    weights[2, 1] = 0
    packed = CpuKernel().pack(ExpertWeights.swiglu(at.gate_up, at.down), at.n)
    skipped = CpuKernel().forward(packed, at.x, index, at.weights, at.state)
    zeroed = CpuKernel().forward(packed, at.x, at.index, weights, at.state)
    assert torch.equal(skipped, zeroed)


def test_one_token_may_have_an_expert_twice() -> None:
    at = layer(Case(64, 64, 4, 20))
    index = at.index.clone()
    index[:, 1] = index[:, 0]
    packed = CpuKernel().pack(ExpertWeights.swiglu(at.gate_up, at.down), at.n)
    found = CpuKernel().forward(packed, at.x, index, at.weights, at.state)
    whole = REFERENCE.pack(ExpertWeights.swiglu(at.gate_up, at.down), at.n)
    expected = REFERENCE.forward(whole, at.x, index, at.weights, at.state)
    assert_close(found, expected, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
def test_result_is_the_same_bits_for_any_number_of_threads(
    threads: None, dtype: torch.dtype, tokens: int
) -> None:
    at = layer(Case(320, 128, 4, tokens), dtype)
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(run(CpuKernel(), at, at.state))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_token_does_not_depend_on_its_neighbours(isa: str, dtype: torch.dtype) -> None:
    at = layer(Case(320, 128, 4, 150), dtype)
    kernel = CpuKernel(isa)
    packed = kernel.pack(ExpertWeights.swiglu(at.gate_up, at.down), at.n)
    together = kernel.forward(packed, at.x, at.index, at.weights, at.state)
    for t in (0, 7, 149):
        own = slice(t, t + 1)
        alone = kernel.forward(packed, at.x[own], at.index[own], at.weights[own], at.state[own])
        assert torch.equal(alone[0], together[t])


def test_nan_stays_in_its_row() -> None:
    at = layer(Case(64, 64, 4, 12))
    x = at.x.clone()
    x[5, 3] = torch.nan
    packed = CpuKernel().pack(ExpertWeights.swiglu(at.gate_up, at.down), at.n)
    found = CpuKernel().forward(packed, x, at.index, at.weights, None)
    assert found[5].isnan().all()
    assert not found[:5].isnan().any()
    assert not found[6:].isnan().any()


def test_huge_gates_saturate() -> None:
    at = layer(Case(64, 64, 4, 4))
    packed = CpuKernel().pack(ExpertWeights.swiglu(at.gate_up * 1e3, at.down), at.n)
    found = CpuKernel().forward(packed, at.x, at.index, at.weights, None)
    expected = REFERENCE.forward(
        REFERENCE.pack(ExpertWeights.swiglu(at.gate_up * 1e3, at.down), at.n),
        at.x,
        at.index,
        at.weights,
        None,
    )
    assert_close(found, expected, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_compensation_equals_the_reference(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    at = layer(Case(200, 64, 8, 30))
    means = torch.randn(3, 5, 8, 200, generator=g).to(dtype)
    knot = torch.randint(0, 3, (30,), generator=g)
    index = at.index.clone()
    index[4, 0] = 5
    found, expected = torch.ones(30, 200), torch.ones(30, 200)
    CpuKernel().compensate(found, index, at.weights, at.state, means, knot)
    REFERENCE.compensate(expected, index, at.weights, at.state, means, knot)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.equal(found, torch.ones(30, 200))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.full((2, 3), -1)}, "index holds -1"),
        ({"index": torch.zeros(2, 3, dtype=torch.int32)}, "index is Int"),
        ({"weights": torch.zeros(2, 3, dtype=torch.float64)}, "weights is Double"),
        ({"state": torch.zeros(2, 3, 5, dtype=torch.uint8)}, "state has shape"),
        ({"x": torch.zeros(2, 64, dtype=torch.float16)}, "x is Half"),
        ({"x": torch.zeros(2, 66)}, "gate_up has shape"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    at = layer(Case(64, 128, 8, 2))
    given = {"x": at.x, "index": at.index, "weights": at.weights, "state": at.state} | change
    packed = CpuKernel().pack(ExpertWeights.swiglu(at.gate_up, at.down), at.n)
    with pytest.raises(RuntimeError, match=message):
        CpuKernel().forward(packed, **given)


def test_pack_refuses_what_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="60 neurons cannot be cut into 8"):
        CpuKernel().pack(zeros(120, 60), 8)
    with pytest.raises(ValueError, match="does not fit down"):
        zeros(60, 60)
    with pytest.raises(ValueError, match="without biases, not gelu"):
        CpuKernel().pack(replace(zeros(64, 32), activation="gelu(gate) · up"), 4)


CPU = torch.device("cpu")


def test_chooser_takes_cpp_here_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    choose.cache_clear()
    with caplog.at_level("INFO", logger="prism.kernels"):
        for _ in range(3):
            assert isinstance(choose(CPU, torch.float32, 64, 8), CpuKernel)
    (record,) = caplog.records
    assert "C++" in record.getMessage()


@pytest.mark.parametrize(
    ("dtype", "hidden", "why"),
    [(torch.float16, 64, "not torch.float16"), (torch.bfloat16, 33, "even hidden size")],
)
def test_chooser_falls_back_with_the_reason(
    caplog: pytest.LogCaptureFixture, dtype: torch.dtype, hidden: int, why: str
) -> None:
    choose.cache_clear()
    with caplog.at_level("INFO", logger="prism.kernels"):
        assert isinstance(choose(CPU, dtype, hidden, 8), ReferenceKernel)
    assert why in caplog.text
    with pytest.raises(ValueError, match=why):
        choose(CPU, dtype, hidden, 8, "cpu")


def test_chooser_leaves_other_gates_to_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    choose.cache_clear()
    with caplog.at_level("WARNING", logger="prism.kernels"):
        plain = zeros(64, 32)
        kernel, _ = pack(replace(plain, activation="gelu(gate) · up"), 4)
        assert isinstance(kernel, ReferenceKernel)
        kernel, _ = pack(replace(plain, gate_bias=plain.up[:, 0], up_bias=plain.up[:, 0]), 4)
        assert isinstance(kernel, ReferenceKernel)
    assert "not gelu(gate) · up" in caplog.text
    assert "not silu(gate) · up with biases" in caplog.text


@pytest.mark.parametrize("kernel", ["triton", "fast"])
def test_chooser_refuses_what_cannot_run(kernel: str) -> None:
    with pytest.raises(ValueError, match=f"kernel '{kernel}'"):
        choose(CPU, torch.float32, 64, 8, kernel)
