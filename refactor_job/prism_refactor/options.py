"""What a refactoring is asked to do, and the constants of the method.

Knows numbers only. The decision worth arguing about: method constants are not flags; a flag nobody
can choose well is a worse default, and each constant here is part of the key that makes a re-run
resumable.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prism.contract import DEFAULT_SUB_EXPERTS

WINDOW: Final = 256  # tokens per calibration sequence
CALIBRATION_TOKENS: Final = 40_960  # partition, sub-router, thresholds
EVALUATION_TOKENS: Final = 8_192
MIN_CALIBRATION_TOKENS: Final = 2_048
MIN_EVALUATION_TOKENS: Final = 512
MAX_SEED: Final = 2**31 - 1  # as in the CRD; each search's own seed is made from it in 64 bits

SEARCH_TOKENS: Final = 3_072  # per expert, for the swap search
SEARCH_PROPOSALS_PER_NEURON: Final = 256
FIT_TOKENS: Final = 6_144  # per expert, for the sub-router
COMPENSATION_TOKENS: Final = 1_024  # per expert and knot, for means and scalars
KNOT_STRIDE: Final = 2  # every second calibration window is used for a knot
KNOTS: Final = (90, 75, 50, 35, 25, 10)
EVALUATION_LEVELS: Final = (100, 90, 75, 60, 50, 40, 35, 25, 15, 10)
SERVED_LEVELS: Final = (75, 50, 25)  # measured in decode batches that ride along, too
SERVED_BATCHES: Final = (8, 32)
TOP_K_SHARES: Final = (0.75, 0.5, 0.25)  # of a model's experts per token: baselines beside levels

METHODS: Final = {
    "partition": "swap search from importance order, squared output mass, half-budget objective",
    "sub_router": "log-ridge on the distance of a slice's output from its stand-in, penalty by GCV",
    "threshold": "per layer, per token, quantile on the reduced stream",
    "compensation": "mean conditioned on being dropped, least-squares scalar per expert and count",
}
METHOD_VERSION: Final = 2  # part of the resume key: raise it when the numbers change


@dataclass(frozen=True, slots=True)
class Options:
    """One ``prism refactor`` command, parsed."""

    source: str
    out: Path
    calibration: Path | None = None
    sub_experts: int | None = DEFAULT_SUB_EXPERTS  # None: tried on a few experts
    seed: int = 0
    tokens: int = CALIBRATION_TOKENS
    shard: tuple[int, int] = (0, 1)  # (index, count): this process cuts its part of the layers
    source_uri: str | None = None
    source_wait_s: int = 0  # for a directory that another Job is about to put there
    servable: bool = False  # refuse what the serving part would refuse
    termination_message: Path | None = None
    metrics_port: int | None = None
