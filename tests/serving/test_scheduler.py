"""The scheduler without any model: who runs, at what level, and that nothing leaks."""

import random

import pytest
from prism_serving.control import Bounds, Slo
from prism_serving.engine.costs import flat_model
from prism_serving.engine.policy import AIM_TTFT, Wish
from prism_serving.engine.ranges import RangePool
from prism_serving.engine.scheduler import Running, Scheduler
from prism_serving.protocol import Sampling


def scheduler(kv=4096, budget=64, max_running=8, **rest) -> Scheduler:
    costs = flat_model(2e-4, 0.001, (75, 50, 25))
    return Scheduler(RangePool(kv), costs, frozenset([0]), budget, max_running, **rest)


def sequence(name, prompt=10, new=4, *, received=0.0, wish=None, **sampling) -> Running:
    return Running(name, [1] * prompt, prompt, new, Sampling(**sampling), wish or Wish(), received)


def run(s: Scheduler, steps=1000, token=5):
    """Run to the end; returns (request, token, level, finish) in order."""
    out = []
    for step in range(steps):
        if s.is_idle:
            return out
        plan = s.plan(float(step))
        assert plan.rows <= s.budget
        samples = sum(c.samples for c in plan.chunks)
        out += s.complete(plan, [token] * samples, float(step))
    raise AssertionError("never finished")


def test_long_prompts_are_cut_into_chunks_and_sample_once():
    s = scheduler(budget=64)
    s.add(sequence("a", prompt=150, new=1))
    sizes = []
    while not s.is_idle:
        plan = s.plan(0.0)
        sizes.append([(c.start, c.count, c.samples) for c in plan.chunks])
        s.complete(plan, [7] * sum(c.samples for c in plan.chunks), 0.0)
    assert sizes == [[(0, 64, False)], [(64, 64, False)], [(128, 22, True)]]


def test_decode_goes_first_and_prompts_fill_the_rest():
    s = scheduler(budget=64)
    s.add(sequence("a", prompt=10, new=9))
    s.complete(s.plan(0.0), [5], 0.0)
    s.add(sequence("b", prompt=100, new=2))
    plan = s.plan(1.0)
    assert [(c.sequence.request, c.count, c.is_decode) for c in plan.chunks] == [
        ("a", 1, True),
        ("b", 63, False),
    ]
    assert plan.phase == "mixed"


def test_a_prompt_that_fits_a_step_is_not_cut_to_fill_anothers_rest():
    s = scheduler(budget=64)
    s.add(sequence("a", prompt=40))
    s.add(sequence("b", prompt=40))
    assert [c.sequence.request for c in s.plan(0.0).chunks] == ["a"]


def test_short_prompts_share_a_step():
    s = scheduler(budget=64)
    for name in "abc":
        s.add(sequence(name, prompt=20))
    assert [c.sequence.request for c in s.plan(0.0).chunks] == ["a", "b", "c"]


def test_end_of_sequence_stops_and_ignore_eos_does_not():
    s = scheduler()
    s.add(sequence("a", new=5))
    s.add(sequence("b", new=5, ignore_eos=True))
    out = run(s, token=0)
    by = {n: [t.finish for t in out if t.sequence.request == n] for n in "ab"}
    assert by == {"a": ["stop"], "b": [None, None, None, None, "length"]}


def test_memory_bounds_admission_and_order_is_kept():
    s = scheduler(kv=30)
    for name in "abc":
        s.add(sequence(name, prompt=10, new=4))  # 13 tokens each
    s.complete(s.plan(0.0), [5, 5], 0.0)
    assert [r.request for r in s.running] == ["a", "b"]
    assert s.pool.used == 26
    done = [t.sequence.request for t in run(s) if t.finish]
    assert done == ["a", "b", "c"]
    assert s.pool.used == 0


def test_a_request_that_can_never_fit_is_refused_at_once():
    with pytest.raises(ValueError, match="does not fit"):
        scheduler(kv=10).add(sequence("a", prompt=10, new=4))


def test_cancel_frees_waiting_running_and_mid_step():
    s = scheduler(kv=26)
    for name in "abc":
        s.add(sequence(name, prompt=10, new=4))
    plan = s.plan(0.0)
    assert s.cancel(["a", "c", "nobody"]) == 2
    assert s.pool.used == 13
    produced = s.complete(plan, [5, 5], 0.0)  # "a" was cancelled while the step ran
    assert [t.sequence.request for t in produced] == ["b"]
    assert s.cancel_all() == 1
    assert s.pool.used == 0 and s.is_idle


def test_prefill_level_is_fixed_at_admission_and_decode_follows_the_bounds():
    s = scheduler(bounds=Bounds(1, 25, 100))
    s.add(sequence("a", prompt=100, new=4))
    s.complete(s.plan(0.0), [], 0.0)
    s.bounds = Bounds(2, 25, 50)
    plan = s.plan(1.0)
    assert [c.level for c in plan.chunks] == [100]  # the rest of the prompt
    s.complete(plan, [5], 1.0)
    assert [c.level for c in s.plan(2.0).chunks] == [50]


@pytest.mark.parametrize("how", ["seed", "server"])
def test_seed_and_reproducible_pin_the_level(how):
    s = scheduler(bounds=Bounds(1, 25, 75), reproducible=how == "server")
    seeded = {"seed": 1} if how == "seed" else {}
    s.add(sequence("a", prompt=10, new=4, **seeded))
    levels = []
    while not s.is_idle:
        plan = s.plan(0.0)
        levels += [c.level for c in plan.chunks]
        s.complete(plan, [5], 0.0)
        s.bounds = Bounds(s.bounds.seq + 1, 25, 25)
    assert levels == [75, 75, 75, 75]


def test_requests_choose_their_own_levels_in_one_batch():
    s = scheduler(bounds=Bounds(1, 25, 50))
    s.add(sequence("plain"))
    s.add(sequence("pinned", wish=Wish(pinned=90)))
    s.add(sequence("careful", wish=Wish(min_level=80)))
    plan = s.plan(0.0)
    assert {c.sequence.request: c.level for c in plan.chunks} == {
        "plain": 50,
        "pinned": 90,
        "careful": 80,
    }


def test_a_queue_lowers_the_prefill_level_and_an_empty_one_restores_it():
    s = scheduler(bounds=Bounds(1, 25, 100), slo=Slo(ttft_ms=round(80 / AIM_TTFT)))
    s.costs = flat_model(2e-4, 0.0, (75, 50, 25))
    for i in range(7):
        s.add(sequence(f"q{i}", prompt=64, new=1))
    first = s.plan(0.0)
    assert [c.level for c in first.chunks] == [75]
    while not s.is_idle:
        plan = s.plan(0.0) if first is None else first
        s.complete(plan, [5] * len(plan.chunks), 0.0)
        first = None
    s.add(sequence("later", prompt=64, new=1, received=5.0))
    assert [c.level for c in s.plan(5.0).chunks] == [100]


def test_random_traffic_leaks_nothing():
    draw = random.Random(1)
    s = scheduler(kv=400, budget=32, max_running=5)
    for i in range(300):
        if draw.random() < 0.5:
            s.add(sequence(f"r{i}", draw.randint(1, 90), draw.randint(1, 9)))
        if draw.random() < 0.1 and s.running:
            s.cancel([draw.choice(s.running).request])
        plan = s.plan(float(i))
        assert plan.chunks or s.is_idle
        s.complete(plan, [draw.choice([0, 5])] * sum(c.samples for c in plan.chunks), float(i))
        assert len(s.running) <= 5
        assert s.pool.used == sum(r.kv_needed for r in s.running)
    run(s)
    assert s.pool.used == 0
