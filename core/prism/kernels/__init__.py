"""The one chooser: which sub-expert kernel runs here. Nobody else asks about device or ISA.

The choice and its reason are logged once per distinct question.
"""

import logging
from functools import cache

import torch

from prism.kernels.cpu_kernel import DTYPES, CpuKernel
from prism.kernels.interface import Kernel, Packed
from prism.kernels.reference import ReferenceKernel

__all__ = ["KERNELS", "Kernel", "Packed", "choose"]

KERNELS = ("auto", "reference", "cpu")

_log = logging.getLogger(__name__)


@cache
def choose(
    device: torch.device, dtype: torch.dtype, hidden: int, width: int, kernel: str = "auto"
) -> Kernel:
    """The kernel for weights of `dtype` [.., hidden] cut into sub-experts of `width` neurons.

    `kernel` other than "auto" asks for one by name. Raises ValueError for an unknown name or one
    that cannot run here.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r}: expected one of {', '.join(KERNELS)}")
    chosen, why = (
        (ReferenceKernel(), "asked for") if kernel == "reference" else _best(device, dtype, hidden)
    )
    if kernel != "auto" and kernel != "reference" and isinstance(chosen, ReferenceKernel):
        raise ValueError(f"kernel {kernel!r} cannot run here: {why}")
    _log.info("experts on %s in %s: %s (%s)", device, dtype, chosen.name, why)
    return chosen


def _best(device: torch.device, dtype: torch.dtype, hidden: int) -> tuple[Kernel, str]:
    """The fastest kernel here, and why it is that one."""
    if device.type != "cpu":
        return ReferenceKernel(), f"no kernel for {device.type}"
    if dtype not in DTYPES:
        return ReferenceKernel(), f"the C++ kernel computes float32 and bfloat16, not {dtype}"
    if dtype == torch.bfloat16 and hidden % 2:
        return ReferenceKernel(), f"the C++ kernel needs an even hidden size in bf16, not {hidden}"
    from prism.kernels import (
        build,
    )  # not at the top: `python -m prism.kernels.build` runs it as main

    try:
        origin = build.load()
    except build.BuildError as error:
        return ReferenceKernel(), f"lower levels save no time: no C++ extension: {error}"
    return CpuKernel(), origin
