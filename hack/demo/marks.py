"""What the load step has to show, as marks that a record meets or misses. Pure.

The demo prints them, the cluster tests hold them. A mark is about behaviour (the ceiling moves, the
target is held, without elasticity it is missed), never about how fast this machine is.
"""

from collections.abc import Callable
from typing import Final

from hack.demo.record import Record, Run
from hack.demo.stats import window

CEILING_MOVES_S: Final = 20
QUALITY_BACK_S: Final = 180
FLOOR_GAIN: Final = 1.15  # below that the floor saves too little to hold anything


def elastic(record: Record) -> Run:
    return next(run for run in record.runs if run.mode == "Auto")


def off(record: Record) -> Run:
    return next(run for run in record.runs if run.mode == "Off")


def _floor_is_faster(record: Record) -> tuple[bool, str]:
    full, floor = record.capacities
    gain = floor.requests_per_s / full.requests_per_s
    return gain >= FLOOR_GAIN, f"the floor serves {gain:.2f} times the requests of level 100"


def _ceiling_moves(record: Record) -> tuple[bool, str]:
    after = elastic(record).lowered_after_s
    held = after is not None and after <= CEILING_MOVES_S
    text = "the ceiling did not move" if after is None else f"the ceiling moved after {after:.0f} s"
    return held, f"{text} of the step ({CEILING_MOVES_S} s allowed)"


def _quality_is_back(record: Record) -> tuple[bool, str]:
    after = elastic(record).restored_after_s
    held = after is not None and after <= QUALITY_BACK_S
    text = "level 100 did not come back" if after is None else f"level 100 was back {after:.0f} s"
    return held, f"{text} after the step ({QUALITY_BACK_S} s allowed)"


def _no_new_pod(record: Record) -> tuple[bool, str]:
    run = elastic(record)
    held = run.new_pods == 0 and {s.replicas for s in run.samples} == {1}
    return held, f"{run.new_pods} pods were added"


def _off_misses(record: Record) -> tuple[bool, str]:
    share = off(record).part("step", record.targets).ttft_attainment or 0.0
    held = share < record.targets.percentile / 100
    return held, f"with elasticity Off {100 * share:.1f} % of the step's requests were in time"


def _attainment_holds(record: Record) -> tuple[bool, str]:
    """From the moment by which the ceiling must have moved to the end of the step."""
    run, targets = elastic(record), record.targets
    begin = run.step_begin + CEILING_MOVES_S
    figures = window(run.sent, begin, run.step_end, targets.ttft_ms, targets.itl_ms)
    share = figures.ttft_attainment or 0.0
    held = share >= targets.percentile / 100
    return (
        held,
        f"once the ceiling had moved {100 * share:.1f} % of the step's requests were in time",
    )


MARKS: Final[dict[str, Callable[[Record], tuple[bool, str]]]] = {
    "floor is faster": _floor_is_faster,
    "ceiling moves": _ceiling_moves,
    "quality is back": _quality_is_back,
    "no new pod": _no_new_pod,
    "off misses": _off_misses,
    "attainment holds": _attainment_holds,
}


def verdicts(record: Record) -> list[str]:
    """One line for each mark."""
    lines = []
    for mark in MARKS.values():
        held, text = mark(record)
        lines.append(f"{'met   ' if held else 'MISSED'}  {text}")
    return lines


def missed(record: Record) -> list[str]:
    """The text of each mark that the record misses."""
    return [text for held, text in (mark(record) for mark in MARKS.values()) if not held]
