"""The Triton kernel: interpreted against the reference, and compiled for sm_90 without a GPU.

Both run in processes of their own: the interpreter is chosen by an environment variable at import.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = """
import torch
from prism.expert_weights import ExpertWeights
from prism.kernels.reference import ReferenceKernel
from prism.kernels.triton_experts import TritonKernel

torch.manual_seed(0)
reference, kernel = ReferenceKernel(), TritonKernel()
tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
for dtype, limit in tolerance.items():
    for hidden, inner, n, experts, slots, tokens in [
        (64, 64, 4, 4, 2, 1), (96, 80, 8, 4, 2, 5), (64, 128, 4, 3, 2, 70)
    ]:
        gate_up = (torch.randn(experts, 2 * inner, hidden) / hidden**0.5).to(dtype)
        down = (torch.randn(experts, hidden, inner) / inner**0.5).to(dtype)
        x = torch.randn(tokens, hidden).to(dtype)
        index = torch.stack([torch.randperm(experts + 1)[:slots] for _ in range(tokens)])
        weights = torch.rand(tokens, slots)
        half = (torch.rand(tokens, slots, n) < 0.5).to(torch.uint8)
        for state in (half, None, torch.zeros_like(half)):
            floats = ExpertWeights.swiglu(gate_up.float(), down.float())
            whole = reference.pack(floats, n)
            expected = reference.forward(whole, x.float(), index, weights, state)
            packed = kernel.pack(ExpertWeights.swiglu(gate_up, down), n)
            found = kernel.forward(packed, x, index, weights, state)
            error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
            assert error < limit, (dtype, tokens, error)
turned = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (gate_up, down))
own = kernel.pack(ExpertWeights.swiglu(gate_up, down), n)
copy = kernel.pack(ExpertWeights.swiglu(*turned), n)  # as transposed experts lie in memory
assert (own.owns_copy, copy.owns_copy) == (False, True)
assert own.gate_up.data_ptr() == gate_up.data_ptr()
assert torch.equal(own.gate_up, copy.gate_up) and torch.equal(own.down, copy.down)
fake = torch.empty(3, 64, device="meta")
ids = torch.empty(3, 2, dtype=torch.long, device="meta")
state = torch.empty(3, 2, 4, dtype=torch.uint8, device="meta")
w = torch.empty(2, 8, 64, device="meta")
out = torch.ops.prism.triton_forward(fake, ids, fake[:, :2], state, w, w)
assert out.shape == (3, 64) and out.dtype == torch.float32
print("equal")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from prism.kernels import triton_experts as t

pointers = {"weight_ptr": "*fp32", "out_ptr": "*fp32"}
pointers |= dict.fromkeys(("x_ptr", "gate_up_ptr", "inner_ptr", "down_ptr"), "*bf16")
shape = {"H": 2048, "W": 128, "N": 8, "K": 8, "SUBS": 512, "BK": t.BLOCK_INNER, "UPCAST": False}
for kernel, own in (
    (t.gate_up_kernel, {"BW": t.BLOCK_NEURONS}), (t.down_kernel, {"BH": t.BLOCK_HIDDEN})
):
    for rows in (t.FEW_ROWS, t.MANY_ROWS):
        constants = shape | own | {"BM": rows}
        signature = {
            name: "constexpr" if name in constants else pointers.get(name, "*i32")
            for name in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=None)
        target = GPUTarget("cuda", 90, 32)
        built = triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 3})
        assert built.metadata.shared <= 227 * 1024, built.metadata.shared
        assert ("wgmma" if rows >= 64 else "mma.sync") in built.asm["ptx"], rows
        assert built.asm["cubin"]
print("compiled")
"""


def python(code: str, cache: Path, **environ: str) -> str:
    """Triton reads the source of kernels from files, so the code comes from one too."""
    file = cache / "case.py"
    file.write_text(code)
    given = {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    result = subprocess.run(
        [sys.executable, str(file)],
        env=os.environ | given | environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


def test_interpreted_kernel_equals_the_reference(tmp_path: Path) -> None:
    assert python(INTERPRETED, tmp_path, TRITON_INTERPRET="1") == "equal"


def test_kernel_compiles_for_sm_90_within_its_limits(tmp_path: Path) -> None:
    assert python(COMPILED, tmp_path) == "compiled"
