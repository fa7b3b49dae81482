"""The one chooser: which sub-expert kernel runs here. Nobody else asks about device or ISA.

The choice and its reason are logged once per distinct question.
"""

import logging
from functools import cache

import torch

from prism.kernels.interface import Kernel, Packed
from prism.kernels.reference import ReferenceKernel

__all__ = ["Kernel", "Packed", "choose"]

_log = logging.getLogger(__name__)


@cache
def choose(
    device: torch.device, dtype: torch.dtype, hidden: int, width: int, kernel: str = "auto"
) -> Kernel:
    """The kernel for weights of `dtype` [.., hidden] cut into sub-experts of `width` neurons."""
    if kernel not in ("auto", "reference"):
        raise ValueError(f"kernel {kernel!r}: expected auto or reference")
    _log.info("kernel: torch reference on %s", device)
    return ReferenceKernel()
