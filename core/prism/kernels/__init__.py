"""The one chooser: which sub-expert kernel runs here. Nobody else asks about device or ISA.

The choice and its reason are logged once per distinct question.
"""

import logging
from functools import cache

import torch

from prism.expert_weights import SWIGLU, ExpertWeights
from prism.kernels.cpu_kernel import DTYPES, CpuKernel
from prism.kernels.interface import Kernel, Packed
from prism.kernels.reference import ReferenceKernel

__all__ = ["KERNELS", "Kernel", "Packed", "choose", "pack"]

KERNELS = ("auto", "reference", "cpu", "triton")

_log = logging.getLogger(__name__)


def pack(weights: ExpertWeights, n: int, kernel: str = "auto") -> tuple[Kernel, Packed]:
    """Choose the kernel for one layer's experts and pack them into n sub-experts each."""
    biased = "" if weights.up_bias is None else " with biases"
    chosen = choose(
        weights.down.device,
        weights.down.dtype,
        weights.hidden,
        weights.intermediate // n,
        kernel,
        weights.activation + biased,
    )
    return chosen, chosen.pack(weights, n)


@cache
def choose(
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    width: int,
    kernel: str = "auto",
    activation: str = SWIGLU,
) -> Kernel:
    """The kernel for weights of `dtype` [.., hidden] cut into sub-experts of `width` neurons.

    `activation` says what the experts compute between their projections. `kernel` other than
    "auto" asks for one by name. Raises ValueError for an unknown name or one that cannot run here.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r}: expected one of {', '.join(KERNELS)}")
    if kernel == "reference":
        name, chosen, why = _reference("asked for")
    elif activation != SWIGLU:
        name, chosen, why = _reference(
            f"lower levels will save no time: the fast kernels compute {SWIGLU}, not {activation}"
        )
    else:
        name, chosen, why = _best(device, dtype, hidden)
    if kernel not in ("auto", name):
        raise ValueError(f"kernel {kernel!r} cannot run {dtype} on {device}: {why}")
    shape = f"{hidden} x {width}"
    slow = name == "reference" and kernel == "auto"
    level = logging.WARNING if slow else logging.INFO
    _log.log(level, "experts of %s in %s on %s: %s (%s)", shape, dtype, device, chosen.name, why)
    return chosen


def _reference(why: str) -> tuple[str, Kernel, str]:
    return "reference", ReferenceKernel(), why


def _best(device: torch.device, dtype: torch.dtype, hidden: int) -> tuple[str, Kernel, str]:
    """(name, the fastest kernel here, why it is that one)."""
    if device.type == "cuda":
        return _best_cuda()
    if device.type != "cpu":
        return _reference(f"no kernel for {device.type}")
    if dtype not in DTYPES:
        return _reference(f"the C++ kernel computes float32 and bfloat16, not {dtype}")
    if dtype == torch.bfloat16 and hidden % 2:
        return _reference(f"the C++ kernel needs an even hidden size in bf16, not {hidden}")
    from prism.kernels import (
        build,
    )  # not at the top: `python -m prism.kernels.build` runs it as main

    try:
        origin = build.load()
    except build.BuildError as error:
        return _reference(f"lower levels will save no time: no C++ extension: {error}")
    return "cpu", CpuKernel(), origin


def _best_cuda() -> tuple[str, Kernel, str]:
    try:
        from prism.kernels.triton_experts import TritonKernel
    except ImportError as error:
        return _reference(f"lower levels will save no time: no Triton: {error}")
    return "triton", TritonKernel(), "grouped sub-expert kernel"
