"""How fast this machine is, measured in about a second, and what a refactoring will take on it.

Knows two loops that stand for all work: a matrix product and a swap search. The decision worth
arguing about: the estimate is derated by one measured factor (bench: real stages against their bare
products), and called about right within a factor of two.
"""

import time
from typing import Final

import torch
from prism.kernels.swap_search import importance_order, swap_search

from prism_refactor.resources import Needs

_ROWS: Final = 512
_SIZE: Final = 2048
_NEURONS: Final = 256
_TOKENS: Final = 512
_PROPOSALS: Final = 4096
_REPEATS: Final = 3
_EFFICIENCY: Final = 0.35  # of the bare product's speed that whole stages reached
_WRITE_BYTES_PER_S: Final = 300e6  # read, hash, reorder and write one weight file


def operations_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Of a matrix product [512, 2048] x [2048, 2048] in ``dtype``."""
    a = torch.randn(_ROWS, _SIZE, device=device).to(dtype)
    b = torch.randn(_SIZE, _SIZE, device=device).to(dtype)
    best = float("inf")
    for _ in range(_REPEATS + 1):  # the first one pays for starting
        started = time.perf_counter()
        float((a @ b)[0, 0])  # reading a value waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2.0 * _ROWS * _SIZE * _SIZE / best


def search_per_second(sub_experts: int) -> float:
    """Proposals x tokens of the swap search, on one core."""
    mass = torch.rand(_NEURONS, _TOKENS, generator=torch.Generator().manual_seed(0))
    start = importance_order(mass)
    swap_search(mass, sub_experts, start, 1, 0)  # builds the extension where it is missing
    started = time.perf_counter()
    swap_search(mass, sub_experts, start, _PROPOSALS, 0)
    return _PROPOSALS * _TOKENS / (time.perf_counter() - started)


def seconds(
    needs: Needs, dtype: torch.dtype, device: torch.device, cores: int, sub_experts: int
) -> dict[str, float]:
    """Stage -> seconds on this machine."""
    rate = operations_per_second(dtype, device) * _EFFICIENCY
    found = {stage: operations / rate for stage, operations in needs.operations.items()}
    found["partition"] += needs.search_work / search_per_second(sub_experts) / cores
    found["write"] = needs.written_bytes / _WRITE_BYTES_PER_S
    return found
