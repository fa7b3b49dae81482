"""Norm, rotary embedding and attention in C++ against torch, for every instruction set here."""

import pytest
import torch
import torch.nn.functional as F
from prism.kernels import build
from prism.kernels.layers import CpuLayers, ReferenceLayers, StepRows, choose_layers
from torch import Tensor

REFERENCE = ReferenceLayers()
DTYPES = (torch.float32, torch.bfloat16)
# bf16 differs where sums of another order fall on the other side of a rounding: one ulp.
TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 1e-2, "rtol": 2**-7},
}


@pytest.fixture(scope="module", autouse=True)
def extension() -> None:
    build.load()


@pytest.fixture(params=("avx512_bf16", "avx512", "avx2", "portable"))
def layers(request: pytest.FixtureRequest) -> CpuLayers:
    one = CpuLayers(request.param)
    try:
        one.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-5)
    except RuntimeError as error:
        if "has no kernels named" not in str(error):
            raise
        pytest.skip(str(error).splitlines()[0])
    return one


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 64), (450, 256), (4, 1023), (0, 16)])
def test_norm_matches_the_reference(layers, shape, dtype):
    x, weight = draw(*shape, dtype=dtype) * 3, draw(shape[-1], dtype=dtype, seed=1)
    expected = REFERENCE.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(layers.rms_norm(x, weight, 1e-5), expected, **TOLERANCE[dtype])


def test_norm_adds_eps_to_the_mean(layers):
    out = layers.rms_norm(torch.zeros(1, 8), torch.ones(8), 1e-5)
    assert out.count_nonzero() == 0
    small = torch.full((1, 8), 1e-3)
    expected = 1e-3 / (1e-6 + 3e-6) ** 0.5
    assert layers.rms_norm(small, torch.ones(8), 3e-6)[0, 0].item() == pytest.approx(expected, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, heads, dim", [(1, 1, 2), (5, 3, 16), (7, 2, 24), (450, 4, 128)])
def test_rotation_matches_the_reference(layers, tokens, heads, dim, dtype):
    x = draw(heads, tokens, dim, dtype=dtype).transpose(0, 1)  # strided, as models pass it
    cosine, sine = (draw(tokens, dim, dtype=dtype, seed=i) for i in (1, 2))
    expected = REFERENCE.rotate(x, cosine, sine)
    torch.testing.assert_close(layers.rotate(x, cosine, sine), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("dim, value_dim", [(16, 16), (64, 64), (24, 80), (256, 8)])
def test_attention_of_a_mixed_step_matches_the_reference(
    layers, heads, kv_heads, dim, value_dim, dtype
):
    """Decode rows, prompts, a chunk after cached keys; cached keys beyond a block."""
    rows = StepRows.of(
        [
            (0, 1, 0, 0),
            (1, 2, 10, 300),
            (2, 4, 400, 5),
            (4, 69, 500, 0),
            (69, 370, 600, 0),
            (370, 470, 1000, 290),
        ]
    )
    keys = draw(kv_heads, 1400, dim, dtype=dtype, seed=1)
    values = draw(kv_heads, 1400, value_dim, dtype=dtype, seed=2)
    q, k = (draw(470, n, dim, dtype=dtype, seed=i) for n, i in ((heads, 3), (kv_heads, 4)))
    v = draw(kv_heads, 470, value_dim, dtype=dtype, seed=5).transpose(0, 1)
    known = keys.clone().float(), values.clone().float()
    expected = REFERENCE.attend(q, k, v, *known, rows, 0.2)
    found = layers.attend(q, k, v, keys, values, rows, 0.2)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    torch.testing.assert_close(keys.float(), known[0], atol=0, rtol=0)
    torch.testing.assert_close(values.float(), known[1], atol=0, rtol=0)


def test_reference_attention_is_masked_sdpa():
    rows = StepRows.of([(0, 7, 3, 4)])
    q, k, v = draw(7, 4, 16), draw(7, 2, 16, seed=1), draw(7, 2, 16, seed=2)
    keys, values = draw(2, 20, 16, seed=3), draw(2, 20, 16, seed=4)
    found = REFERENCE.attend(q, k, v, keys, values, rows, 0.3)
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None, :, 3:14],
        values[None, :, 3:14],
        attn_mask=torch.ones(7, 11, dtype=torch.bool).tril(4),
        scale=0.3,
        enable_gqa=True,
    )
    torch.testing.assert_close(found, expected[0].transpose(0, 1))
    assert torch.equal(keys[:, 7:14], k.transpose(0, 1))


def test_a_rows_attention_depends_neither_on_chunks_nor_on_neighbours(layers):
    """Bit for bit: what a seed promises must survive other requests."""
    tokens, room = 600, 2000
    q, k, v = (draw(tokens, 2, 32, seed=i) for i in range(3))

    def run(steps: list[tuple[int, int]], kv_start: int, before: int) -> Tensor:
        keys, values = torch.zeros(2, room, 32), torch.zeros(2, room, 32)
        outs = []
        for begin, end in steps:
            other = draw(before, 2, 32, seed=9)
            q1, k1, v1 = (torch.cat([other, x[begin:end]]) for x in (q, k, v))
            own = (before, before + end - begin, kv_start, begin)
            rows = StepRows.of(([(0, before, 1500, 0)] if before else []) + [own])
            outs.append(layers.attend(q1, k1, v1, keys, values, rows, 0.2)[before:])
        return torch.cat(outs)

    whole = run([(0, tokens)], 0, 0)
    assert torch.equal(whole, run([(0, 100), (100, 333), (333, tokens)], 700, 3))


def test_threads_do_not_change_the_result():
    rows = StepRows.of([(0, 1, 0, 40), (1, 301, 100, 20)])
    q, k, v = (draw(301, 4, 64, seed=i) for i in range(3))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            buffers = torch.zeros(4, 500, 64), torch.zeros(4, 500, 64)
            results.append(CpuLayers().attend(q, k, v, *buffers, rows, 0.1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "segments",
    [[(0, 2, 0, 0)], [(0, 3, 6, 0)], [(0, 1, 0, 0), (2, 3, 4, 0)], [(0, 3, -1, 0)], [(0, 4, 0, 0)]],
)
def test_segments_that_do_not_fit_are_refused(segments):
    rows = StepRows(torch.tensor(segments), torch.zeros(3, dtype=torch.int64))
    q = draw(3, 1, 8)
    with pytest.raises(RuntimeError, match="segment"):
        CpuLayers().attend(q, q, q, torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), rows, 1.0)


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    with pytest.raises(RuntimeError, match="norm of"):
        CpuLayers().rms_norm(draw(2, 8), draw(7), 1e-5)
    with pytest.raises(RuntimeError, match="weight is"):
        CpuLayers().rms_norm(draw(2, 8), draw(8).bfloat16(), 1e-5)
    with pytest.raises(RuntimeError, match="rotary embedding"):
        CpuLayers().rotate(draw(2, 1, 7), draw(2, 7), draw(2, 7))
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        CpuLayers().rms_norm(draw(2, 8).double(), draw(8).double(), 1e-5)


def test_the_choice_falls_back_to_torch(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_layers(cpu, torch.float32, 64).name.startswith("C++")
    assert choose_layers(cpu, torch.float16, 64).name == "torch reference"
    assert choose_layers(cpu, torch.float32, 512).name == "torch reference"

    def broken() -> str:
        raise build.BuildError("no compiler")

    monkeypatch.setattr(build, "load", broken)
    choose_layers.cache_clear()
    assert choose_layers(cpu, torch.float32, 64).name == "torch reference"
    choose_layers.cache_clear()
