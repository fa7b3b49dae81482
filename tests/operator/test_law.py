"""The control law against a small world: a queue in front of pods whose speed follows the level."""

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from prism_operator.scaler.law import decide
from prism_operator.scaler.model import CostModel, Demand, LevelCost
from prism_operator.scaler.state import (
    Decision,
    Events,
    Limits,
    Memory,
    Pods,
    Signals,
    memory_from_json,
)

TICK = 5.0
BEGIN = 1000.0
PROMPT = 400  # tokens per request
COSTS = CostModel(
    tuple(LevelCost(n, 0.0005 * (0.25 + 0.75 * n / 100), 0.0) for n in (25, 50, 75, 100))
)
CAPACITY = 1 / (PROMPT * 0.0005)  # requests/s of one pod at level 100
AUTO = Limits(floor=25, top=100, preferred=100, ttft_percentile=95)


@dataclass
class World:
    """Offered load in requests/s by time; the law is asked every tick, as in the operator."""

    load: Callable[[float], float]
    limits: Limits = AUTO
    costs: CostModel | None = COSTS
    true_costs: CostModel = COSTS
    pods: int = 1
    memory: Memory = field(default_factory=Memory)
    now: float = BEGIN
    queue: float = 0.0
    rates: list[float] = field(default_factory=list)
    good: list[tuple[float, float]] = field(default_factory=list)
    history: list[tuple[float, Decision]] = field(default_factory=list)
    blind: Callable[[float], bool] = lambda _: False
    window: float = 15.0

    def tick(self) -> Decision:
        """Five seconds of load, then one decision on what a 15 s window shows of them."""
        level, start = self.memory.ceiling or self.limits.top, BEGIN
        for _ in range(int(TICK)):
            offered = self.load(self.now - start)
            served = self.pods / self.true_costs.work(Demand(1, PROMPT, 0), level)
            waited = self.queue / served
            self.queue = max(0.0, self.queue + offered - served)
            self.rates.append(offered)
            self.good.append((offered if waited < 0.5 else 0.0, offered))
            self.now += 1
        n = int(self.window)
        rate = sum(self.rates[-n:]) / len(self.rates[-n:])
        events = self.good[-n:]
        signals = Signals(
            at=self.now,
            demand=Demand(rate, rate * PROMPT, 0),
            waiting=self.queue,
            ttft=Events(sum(g for g, _ in events), sum(t for _, t in events)),
        )
        seen = None if self.blind(self.now - start) else signals
        decision = decide(
            self.limits, seen, self.costs, Pods(self.pods, self.pods), self.memory, self.now
        )
        self.memory = decision.memory
        self.pods = decision.replicas
        self.history.append((self.now - start, decision))
        return decision

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.tick()

    def ceilings(self) -> list[tuple[float, int]]:
        return [(at, decision.ceiling) for at, decision in self.history]

    def changes(self, kind: str = "Level") -> list[tuple[float, int, int]]:
        return [
            (at, change.before, change.after)
            for at, decision in self.history
            for change in decision.changes
            if change.kind == kind
        ]


def steady(share: float) -> Callable[[float], float]:
    return lambda _: share * CAPACITY


def step(before: float, during: float, start: float, end: float) -> Callable[[float], float]:
    return lambda t: CAPACITY * (during if start <= t < end else before)


def test_a_load_step_lowers_the_level_within_20_s_and_it_is_back_within_3_min() -> None:
    world = World(step(0.4, 1.2, 60, 120))
    world.run(360)
    assert all(ceiling == 100 for at, ceiling in world.ceilings() if at <= 60)
    first = next(at for at, before, after in world.changes() if after < before)
    assert 60 < first <= 80
    back = next(at for at, c in world.ceilings() if at > 120 and c == 100)
    assert back <= 300
    assert all(c == 100 for at, c in world.ceilings() if at > back)
    assert all(decision.replicas == 1 for _, decision in world.history)


def test_from_the_lowest_level_it_is_back_at_100_within_3_min_after_the_load() -> None:
    world = World(lambda t: 3 * CAPACITY if t < 120 else 0.0)
    world.run(120)
    assert world.memory.ceiling == 45  # prompts are read at 25 then: lower would buy nothing
    world.queue = 0.0
    world.run(180)
    assert world.memory.ceiling == 100


@pytest.mark.parametrize("share", [0.3, 0.6, 0.74, 0.8, 0.84, 0.88, 0.95, 1.1, 1.4])
def test_steady_load_never_flaps(share: float) -> None:
    noise = itertools.cycle([1.0, 1.06, 0.95, 0.97, 1.04, 0.98])
    world = World(lambda _: share * CAPACITY * next(noise))
    world.run(120)
    world.history.clear()
    world.run(1800)
    assert len(world.changes()) <= 2, world.changes()


def test_overload_is_seen_although_completions_stay_flat() -> None:
    """Demand is what was received: what one pod completes cannot exceed its capacity."""
    world = World(steady(1.5))
    world.run(40)
    assert world.memory.ceiling < 60


def test_the_level_chosen_is_the_highest_safe_one() -> None:
    world = World(steady(1.0), limits=replace(AUTO, down_window_s=0))
    decision = world.tick()
    chosen = decision.ceiling
    demand = Demand(CAPACITY, CAPACITY * PROMPT, 0)
    assert COSTS.work(demand, chosen) <= 0.85
    assert COSTS.work(demand, chosen + 5) > 0.85
    change = decision.changes[0]
    assert change.reason == "LoadAboveCapacity"
    assert "5.0 requests/s" in change.why and "100 %" in change.why


def test_zero_traffic_releases_the_level() -> None:
    world = World(steady(0), memory=Memory(seq=3, floor=25, ceiling=25))
    world.run(180)
    assert world.memory.ceiling == 100
    assert all(after - before <= 20 for _, before, after in world.changes())


def test_an_outage_holds_level_and_replicas() -> None:
    limits = replace(AUTO, autoscaling=True, min_replicas=1, max_replicas=4)
    memory = Memory(seq=3, floor=25, ceiling=60)
    world = World(steady(0), limits, memory=memory, pods=3, blind=lambda _: True)
    world.run(900)
    assert {c for _, c in world.ceilings()} == {60}
    assert {d.replicas for _, d in world.history} == {3}
    assert not world.changes() and not world.changes("Replicas")
    assert world.history[0][1].data == "Held" and world.history[-1][1].data == "Lost"


@pytest.mark.parametrize(("policy", "level"), [("Hold", 60), ("MinLevel", 25), ("MaxLevel", 100)])
def test_after_stale_after_seconds_the_policy_decides_the_level(policy: str, level: int) -> None:
    limits = replace(AUTO, on_loss=policy, stale_after_s=60)
    world = World(
        steady(0.2), limits, memory=Memory(seq=3, floor=25, ceiling=60), blind=lambda _: True
    )
    world.run(60)
    assert world.memory.ceiling == 60
    world.run(30)
    assert world.memory.ceiling == level


def test_data_coming_back_after_an_outage_is_used_again() -> None:
    world = World(steady(0.2), memory=Memory(seq=1, floor=25, ceiling=60), blind=lambda t: t < 100)
    world.run(90)
    assert world.memory.ceiling == 60
    world.run(150)
    assert world.memory.ceiling == 100


def test_a_restart_in_the_middle_goes_on_with_the_clocks() -> None:
    whole, parts = (World(step(0.4, 1.2, 60, 120)) for _ in range(2))
    whole.run(400)
    while parts.now < BEGIN + 400:
        parts.tick()
        text = json.dumps(parts.memory.to_json())
        parts.memory = memory_from_json(json.loads(text))
    assert parts.changes() == whole.changes()


def test_missed_targets_outrank_a_model_that_is_too_hopeful() -> None:
    truth = CostModel(tuple(LevelCost(p.level, 2 * p.prefill_s, 0) for p in COSTS.points))
    world = World(steady(0.65), true_costs=truth)
    world.run(300)
    assert world.memory.ceiling < 100
    reasons = {c.reason for _, d in world.history for c in d.changes}
    assert "TTFTAtRisk" in reasons
    world.history.clear()
    world.run(900)
    assert len(world.changes()) <= 3


def test_a_miss_on_an_idle_pod_is_not_cured_by_less_quality() -> None:
    signals = Signals(at=1, demand=Demand(0.1, 40, 0), ttft=Events(0, 5))
    assert decide(AUTO, signals, COSTS, Pods(1, 1), Memory(), 1).ceiling == 100


def test_one_missed_event_is_chance() -> None:
    signals = Signals(at=1, demand=Demand(4, 1600, 0), ttft=Events(9, 10))
    assert decide(AUTO, signals, COSTS, Pods(1, 1), Memory(), 1).ceiling == 100


def test_without_a_cost_model_missed_targets_move_the_level() -> None:
    world = World(steady(1.2), costs=None)
    world.run(120)
    assert world.memory.ceiling < 100


def test_levels_that_cost_no_less_are_not_used() -> None:
    flat = CostModel(
        (LevelCost(25, 0.0005, 0), LevelCost(50, 0.0005, 0), LevelCost(100, 0.0005, 0))
    )
    world = World(steady(1.5), costs=flat, true_costs=flat)
    world.run(60)
    assert world.memory.ceiling == 100


def test_down_steps_and_the_wait_between_them_are_honoured() -> None:
    limits = replace(AUTO, down_step=10, down_window_s=20)
    world = World(steady(3.0), limits)
    world.run(120)
    falls = world.changes()
    assert falls and all(before - after <= 10 for _, before, after in falls)
    times = [at for at, _, _ in falls]
    assert all(b - a >= 20 for a, b in itertools.pairwise(times))


def test_manual_and_off_pin_the_level() -> None:
    pinned = Limits(floor=40, top=40, preferred=40, fixed=40)
    decision = decide(pinned, None, COSTS, Pods(1, 1), Memory(), 1)
    assert (decision.floor, decision.ceiling) == (40, 40)
    world = World(steady(3.0), replace(pinned, floor=100, top=100, preferred=100, fixed=100))
    world.run(60)
    assert {c for _, c in world.ceilings()} == {100}


def test_bounds_that_moved_move_the_ceiling_at_once() -> None:
    memory = Memory(seq=7, floor=25, ceiling=100)
    decision = decide(replace(AUTO, top=60, preferred=60), None, COSTS, Pods(1, 1), memory, 1)
    assert decision.ceiling == 60 and decision.write and decision.memory.seq == 8


def test_a_pod_that_knows_a_higher_number_is_overtaken() -> None:
    memory = Memory(seq=7, floor=25, ceiling=100)
    decision = decide(AUTO, None, COSTS, Pods(1, 1, seq=30), memory, 1)
    assert decision.write and decision.memory.seq == 31


def test_replicas_grow_when_the_level_stays_low_and_shrink_when_one_less_is_safe() -> None:
    limits = replace(AUTO, autoscaling=True, min_replicas=1, max_replicas=3)
    world = World(lambda t: 2.2 * CAPACITY if t < 300 else 0.3 * CAPACITY, limits)
    world.run(300)
    assert world.pods == 3
    world.run(1200)
    assert world.pods == 1 and world.memory.ceiling == 100


def test_two_pods_at_the_boundary_do_not_flap() -> None:
    limits = replace(AUTO, autoscaling=True, min_replicas=1, max_replicas=2)
    for share in (0.7, 0.8, 0.9, 1.0, 1.2):
        world = World(steady(share), limits)
        world.run(3600)
        assert len(world.changes("Replicas")) <= 1, (share, world.changes("Replicas"))


def test_no_pod_is_added_while_one_is_coming_and_the_limit_is_told() -> None:
    limits = replace(AUTO, autoscaling=True, min_replicas=1, max_replicas=2)
    memory = Memory(seq=1, floor=25, ceiling=50, below_since=0.0, last_data=99)
    load = Signals(at=100, demand=Demand(8, 3200, 0))
    assert decide(limits, load, COSTS, Pods(2, 1), memory, 100).limited == ""
    full = decide(limits, load, COSTS, Pods(2, 2), memory, 100)
    assert full.replicas == 2 and "all 2 replicas" in full.limited


def test_a_pinned_level_scales_by_use() -> None:
    limits = Limits(100, 100, 100, fixed=100, autoscaling=True, min_replicas=1, max_replicas=3)
    world = World(steady(1.5), limits)
    world.run(120)
    assert world.pods == 2 and world.memory.ceiling == 100


def test_the_memory_of_long_windows_stays_small() -> None:
    world = World(steady(0.5), replace(AUTO, up_window_s=3600))
    world.run(40_000)
    assert len(world.memory.samples) <= 2 * 120 + 2
    assert len(json.dumps(world.memory.to_json())) < 20_000


@dataclass
class Chance:
    """Poisson arrivals at one pod, first come first served; first tokens within 1 s are good."""

    share: Callable[[float], float]
    seed: int
    slower: float = 1.0  # than the cost model believes
    changes: list[tuple[float, int, int]] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    def run(self, seconds: float) -> "Chance":
        chance, now, free, next_at = random.Random(self.seed), 0.0, 0.0, 0.0
        rows: list[tuple[float, float]] = []  # (arrival, first token)
        while now < seconds:
            now += TICK
            work = COSTS.work(Demand(1, PROMPT, 0), self.memory.ceiling or 100) * self.slower
            while next_at < now:
                free = max(next_at, free) + work
                rows.append((next_at, free))
                next_at += chance.expovariate(self.share(next_at) * CAPACITY)
            rate = sum(1 for at, _ in rows if at > now - 15) / 15
            waits = [done - at for at, done in rows if now - 15 < done <= now]
            signals = Signals(
                at=now,
                demand=Demand(rate, rate * PROMPT, 0),
                waiting=max(0, sum(1 for at, done in rows if done > now) - 1),
                ttft=Events(sum(1 for wait in waits if wait <= 1), len(waits)),
            )
            decision = decide(AUTO, signals, COSTS, Pods(1, 1), self.memory, now)
            self.memory = decision.memory
            self.changes += [(now, c.before, c.after) for c in decision.changes]
            rows = rows[-800:]
        return self


@pytest.mark.parametrize(("share", "most"), [(0.4, 0), (0.6, 12), (0.8, 12), (1.0, 12), (1.2, 6)])
def test_chance_moves_the_level_rarely_in_half_an_hour(share: float, most: int) -> None:
    counts = [len(Chance(lambda _: share, seed).run(1800).changes) for seed in range(4)]
    assert sum(counts) / len(counts) <= most, counts


def test_a_step_of_random_arrivals_is_met_in_time_and_left_in_time() -> None:
    for seed in range(20):
        world = Chance(lambda t: 1.2 if 60 <= t < 120 else 0.4, seed).run(300)
        falls = [at for at, before, after in world.changes if after < before]
        assert 60 < falls[0] <= 80, (seed, world.changes)
        assert world.memory.ceiling == 100, (seed, world.changes)


def test_a_model_that_believes_in_faster_pods_settles_below_full_level() -> None:
    world = Chance(lambda _: 0.6, 1, slower=1.7).run(1800)
    assert world.memory.ceiling < 100 and len(world.changes) <= 20


def test_steady_state_decides_nothing() -> None:
    world = World(steady(0))
    world.run(30)
    world.history.clear()
    world.run(120)
    assert not any(decision.write or decision.changes for _, decision in world.history)
