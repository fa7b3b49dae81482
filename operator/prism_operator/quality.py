"""The quality gate: which of an artifact's levels are good enough to be offered.

Pure. Knows the measured points as status holds them. Decided here: only what was measured passes. A
level between two measured ones could be judged by a line between them, but the gate is a promise,
and the lowest measured level that keeps it is one. A figure that is missing fails.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import expm1
from typing import Any, Final

from prism import contract

from prism_operator.api import Json, QualityGate

MAX_POINTS: Final = 32
FIELDS: Final = {
    "perplexity": "lossBasisPoints",
    "kl": "klBasisPoints",
    "topOneDisagreement": "topOneBasisPoints",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """``floor``: the lowest level to offer; ``text`` says which are not, with their figures."""

    floor: int
    text: str = ""

    @property
    def failed(self) -> bool:
        """No level below 100 is left."""
        return self.floor == contract.MAX_LEVEL


def points(result: Mapping[str, Any]) -> list[Json]:
    """The points of a termination message as status holds them: integers, as an API's should be.

    Raises what a message of another shape leads to: KeyError, TypeError, ValueError, OverflowError.
    """
    return [_point(point) for point in (result.get("points") or ())][:MAX_POINTS]


def _point(point: Mapping[str, Any]) -> Json:
    found = {
        "levelPercent": int(point["level"]),
        "ownSharePermille": round(1000 * float(point.get("own_share", 0))),
        "lossBasisPoints": round(100 * float(point.get("loss", 0))),
        "errorBasisPoints": round(100 * float(point.get("se", 0))),
    }
    if "kl" in point:  # nats
        found["klBasisPoints"] = round(10_000 * expm1(float(point["kl"])))
    if "top1" in point:
        found["topOneBasisPoints"] = round(10_000 * (1 - float(point["top1"])))
    return found


def judge(gate: QualityGate | None, measured: Sequence[Mapping[str, Any]]) -> Verdict:
    """A level passes when it and all measured ones above it keep the gate."""
    if gate is None:
        return Verdict(contract.MIN_LEVEL)
    floor = contract.MAX_LEVEL
    left: list[str] = []
    limit = f"{gate.metric} at most {gate.max_increase_percent:g} % above level 100's"
    for point in sorted(measured, key=lambda one: int(one["levelPercent"]), reverse=True):
        level, basis_points = int(point["levelPercent"]), point.get(FIELDS[gate.metric])
        if level == contract.MAX_LEVEL:
            continue
        if (
            not left
            and basis_points is not None
            and basis_points / 100 <= gate.max_increase_percent
        ):
            floor = level
            continue
        figure = "not measured" if basis_points is None else f"{basis_points / 100:.2f} %"
        left.append(f"{level} ({figure})")
    if floor == contract.MAX_LEVEL:
        figures = ", ".join(left) or "none was measured"
        text = f"no level below 100 passes the quality gate ({limit}): {figures}"
        return Verdict(floor, f"{text}; level 100 alone is served")
    barred = f"; not offered: {', '.join(left)}" if left else ""
    return Verdict(floor, f"quality gate ({limit}) passed down to level {floor}{barred}")
