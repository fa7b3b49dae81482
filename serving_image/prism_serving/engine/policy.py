"""The elastic policy: which level a prompt is computed at, which one decode runs at now.

Knows: bounds, targets, the cost model, the queue as numbers. Must not know: torch, sockets, clocks.

Prefill: at admission the head of the queue takes the highest allowed level at which it *and those
waiting behind it* are predicted to meet the TTFT target. Looking only at itself the head would
always find time for level 100 and hand its delay to the others. A request that is already late is
no reason to hurry by itself (it is lost), but a queue of them is: it makes the next one late too.

Decode: per step the highest level inside the bounds whose predicted step meets the ITL target.

One decision worth arguing about: predictions aim at a share of the target, `AIM_TTFT` or `AIM_ITL`.
The queue settles where the prediction says "just in time", so the rest of the target is the room
for what cannot be predicted: a step that takes longer and, for TTFT, the next burst of arrivals.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from prism import contract

from prism_serving.control import Bounds, Slo
from prism_serving.engine.costs import CostModel, StepShape

AIM_TTFT: Final = 0.6
AIM_ITL: Final = 0.8
DECODE_STEP: Final = 5  # decode levels tried: ceiling, multiples of this, floor
MIN_CHUNK: Final = 64  # prompt tokens a step always has room for, whatever the ITL target


@dataclass(frozen=True, slots=True)
class Wish:
    """What one request says about its level; `pinned` is an exact level."""

    pinned: int | None = None
    min_level: int | None = None

    def clip(self, level: int) -> int:
        """The level this request is served at when the policy says `level`."""
        if self.pinned is not None:
            return self.pinned
        return max(level, self.min_level or 0)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue: seconds since receipt, prompt tokens still to compute."""

    waited_s: float
    tokens: int
    wish: Wish = Wish()


def allowed_prefill_levels(bounds: Bounds) -> tuple[int, ...]:
    """{100, 75, 50, 25} inside the bounds, high to low; when none is inside, the ceiling itself:
    neither the user's floor nor the operator's ceiling is ever broken by rounding."""
    inside = [x for x in contract.PREFILL_LEVELS if bounds.floor <= x <= bounds.ceiling]
    return tuple(sorted(inside, reverse=True)) or (bounds.ceiling,)


def decode_levels(bounds: Bounds) -> tuple[int, ...]:
    """Levels decode may run at, high to low."""
    grid = range(bounds.floor, bounds.ceiling + 1)
    steps = {x for x in grid if x % DECODE_STEP == 0}
    return tuple(sorted({bounds.floor, bounds.ceiling, *steps}, reverse=True))


@dataclass(frozen=True, slots=True)
class Ahead:
    """What a waiting request waits for besides the queue: `work_s` of admitted prompts not yet
    computed, and `drag_s` that decode adds to every prefill step of `chunk` tokens."""

    work_s: float = 0.0
    drag_s: float = 0.0
    chunk: int = 512


def meets_ttft(
    level: int, ahead: Ahead, queue: Iterable[Waiting], target_s: float, costs: CostModel
) -> bool:
    """Whether all of `queue` (head first) that can still be in time are, at `level`, and whether
    one arriving behind them would find the queue short enough."""
    clock_s = ahead.work_s
    per_token: dict[int, float] = {}
    pair_s = costs.per_pair_s * costs.pace
    for request in queue:
        at, n = request.wish.clip(level), request.tokens
        if at not in per_token:
            per_token[at] = (costs.rows_s(at, ahead.chunk) + ahead.drag_s) / ahead.chunk
        clock_s += n * per_token[at] + pair_s * n * (n + 1) / 2
        # One who is late anyway counts as if it came now: its delay is lost, the next one's is not.
        waited_s = 0.0 if request.waited_s > target_s else request.waited_s
        if waited_s + clock_s > AIM_TTFT * target_s:
            return False
    return True


def prefill_level(
    queue: Sequence[Waiting], ahead: Ahead, bounds: Bounds, slo: Slo, costs: CostModel
) -> int:
    """Level for the head of `queue`, fixed from here on."""
    head = queue[0]
    if head.wish.pinned is not None:
        return head.wish.pinned
    levels = allowed_prefill_levels(bounds)
    target_s = slo.ttft_s
    if target_s is None:
        return head.wish.clip(levels[0])
    # Levels no faster than 100 buy nothing and cost quality.
    useful = [x for x in levels if x == levels[0] or costs.is_useful(x, ahead.chunk)]
    for level in useful:
        if meets_ttft(level, ahead, queue, target_s, costs):
            return head.wish.clip(level)
    return head.wish.clip(useful[-1])


def decode_level(
    shape_at: Sequence[tuple[Wish, int]], bounds: Bounds, slo: Slo, costs: CostModel, prefill: int
) -> int:
    """Level for this step's decode rows: `shape_at` holds (wish, keys) per sequence; `prefill` is
    the level of prompt rows that share the step, 0 when there are none."""
    levels = decode_levels(bounds)
    target_s = slo.itl_s
    if target_s is None or not shape_at:
        return levels[0]
    rows = len(shape_at) + (MIN_CHUNK if prefill else 0)
    useful = [x for x in levels if x == levels[0] or costs.is_useful(x, rows)]
    for level in useful:
        if costs.step_s(_decode_shape(shape_at, level, prefill)) <= AIM_ITL * target_s:
            return level
    return useful[-1]


def prefill_room(
    shape_at: Sequence[tuple[Wish, int]],
    level: int,
    prefill: int,
    budget: int,
    slo: Slo,
    costs: CostModel,
) -> int:
    """Prompt tokens this step has room for beside its decode rows without missing the ITL target:
    between MIN_CHUNK and `budget`."""
    target_s = slo.itl_s
    if target_s is None or not shape_at:
        return budget
    room = budget
    while room > MIN_CHUNK:
        if costs.step_s(_decode_shape(shape_at, level, prefill, room)) <= AIM_ITL * target_s:
            return room
        room = max(room // 2, MIN_CHUNK)
    return min(room, budget)


def _decode_shape(
    shape_at: Sequence[tuple[Wish, int]], level: int, prefill: int, chunk: int = MIN_CHUNK
) -> StepShape:
    rows: dict[int, int] = {}
    for wish, _ in shape_at:
        at = wish.clip(level)
        rows[at] = rows.get(at, 0) + 1
    if prefill:
        rows[prefill] = rows.get(prefill, 0) + chunk
    keys = sum(k for _, k in shape_at)
    pairs = chunk * chunk // 2 if prefill else 0
    return StepShape(rows, len(shape_at) + bool(prefill), pairs, keys)
