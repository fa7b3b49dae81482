"""A made-up demo for the tests of figures and page: a queue in front of one server with two speeds.

It stands for no measurement; it only has the shape of one, so that every branch has data.
"""

import random

from hack.demo.load import Sent, arrivals
from hack.demo.observe import Sample
from hack.demo.record import Capacity, Record, Run, Targets

BEFORE, STEP, AFTER = 30.0, 60.0, 90.0
SERVICE_S = {100: 0.125, 25: 0.07}


def run(title: str, mode: str, elastic: bool) -> Run:
    times = arrivals([(BEFORE, 3.2), (STEP, 9.6), (AFTER, 3.2)], seed=1)
    chance = random.Random(2)
    sent, free = [], 0.0
    for i, due in enumerate(times):
        low = elastic and BEFORE + 6 < due < BEFORE + STEP + 20
        level = 25 if low else 100
        free = max(free, due) + SERVICE_S[level] * chance.uniform(0.8, 1.2)
        failed = not elastic and i % 97 == 50
        sent.append(
            Sent(due, free + 0.1, 503 if failed else 200, None if failed else free - due,
                 () if failed else (0.02, 0.03), None if failed else level,
                 "shed" if failed else "")
        )  # fmt: skip
    samples = []
    for second in range(int(BEFORE + STEP + AFTER)):
        low = elastic and BEFORE + 8 <= second < BEFORE + STEP + 40
        samples.append(Sample(float(second), 25 if low else 100, 25 if elastic else 100,
                              100, 1, 1, ("a",)))  # fmt: skip
    return Run(title, mode, BEFORE, BEFORE + STEP, BEFORE + STEP + AFTER, 3.2, 9.6,
               tuple(sent), tuple(samples))  # fmt: skip


def record() -> Record:
    return Record(
        date="2026-01-02 03:04",
        machine="2 cores",
        cluster="local",
        targets=Targets(600, 100, 95, 25),
        capacities=(Capacity(100, 8.0, 480.0), Capacity(25, 14.0, 300.0)),
        runs=(run("Elastic", "Auto", True), run("Not elastic", "Off", False)),
        quality={75: 0.2, 50: 0.8, 25: 4.0},
        steps={"cluster": 5.2, "images <fast>": 3.0},
        decisions=({"time": "t", "kind": "Level", "from": 100, "to": 25,
                    "reason": "TTFTAtRisk", "observed": "p95 <900> ms"},),
        figures={"apply to first token": 120.0},
    )  # fmt: skip
