"""kill -9 at random moments: the end state is reached, no whole answer is wrong, work continues.

Last of the folder, since it wears the pods out. Few moments in the normal run, twenty of each in
the long one. A container that dies often is restarted ever later by the kubelet; after a few deaths
the pod is replaced, which starts that clock anew.
"""

import itertools
import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prism import contract

from hack.cluster.made import SYSTEM
from hack.demo import ask, journey, observe
from hack.demo.journey import MODEL, Served
from hack.demo.kube import Kube, wait_until
from hack.demo.prompts import passages
from hack.demo.site import Site

from .disturb import kill, pods, questions, wait_replaced
from .test_bad_input import CLAIM, with_spec

SERVING = f"{contract.LABEL_MODEL}={MODEL},{contract.LABEL_ROLE}={contract.ROLE_SERVING}"
OPERATOR = ",".join(f"{k}={v}" for k, v in contract.OPERATOR_POD_LABELS.items())
RESULTS = Path(__file__).parents[2] / "bench" / "results" / "kills.json"
DEATHS_PER_POD = 3
FEW, MANY = 2, 20
counts = pytest.mark.parametrize(
    "moments", [FEW, pytest.param(MANY, marks=pytest.mark.long)], ids=["few", "many"]
)


@pytest.fixture(scope="module")
def exact(place: Site, served: Served) -> Iterator[Served]:
    """The example (float32) held at level 100, where the same question has one answer."""
    journey.set_mode(place, served, "Off")
    yield served
    journey.set_mode(place, served, "Auto")


def refresh(kube: Kube, selector: str) -> None:
    """A new pod in an old one's place."""
    (old,) = pods(kube, selector)
    kube.run("delete", "pod", old["metadata"]["name"], "--wait", timeout_s=180)

    def back() -> bool | None:
        ready = [
            p for p in pods(kube, selector)
            if any(
                c["type"] == "Ready" and c["status"] == "True"
                for c in p["status"].get("conditions", [])
            )
        ]  # fmt: skip
        return True if ready else None

    wait_until(back, 240, "a ready pod", every_s=1)


@counts
@pytest.mark.parametrize("container", ["engine", "gateway"])
def test_killed_serving_comes_back_and_answers_nothing_wrong(
    place: Site, exact: Served, container: str, moments: int
) -> None:
    chance = random.Random(f"{container}{moments}")
    refresh(place.kube, SERVING)
    with questions(exact.watched.url, MODEL, passages(6, tokens=60, seed=5)) as answers:
        for moment in range(moments):
            time.sleep(chance.uniform(0.5, 5))
            killed = kill(place.kube, SERVING, container)
            wait_replaced(place.kube, SERVING, container, killed, 240)
            if moment % DEATHS_PER_POD == DEATHS_PER_POD - 1:
                refresh(place.kube, SERVING)
        before = answers.good
        wait_until(lambda: answers.good > before + 3 or None, 60, "good answers at the end")
    place.story.say(f"{container} killed {moments} times: {answers}")
    assert answers.wrong == []
    assert answers.other == []
    write_result(container, moments, good=answers.good, refused=answers.refused,
                 broken=answers.broken, wrong=0)  # fmt: skip


@counts
def test_killed_operator_changes_no_pod_and_reaches_the_end_state(
    place: Site, served: Served, moments: int
) -> None:
    """Each time it dies a change is under way, which the next one has to finish."""
    system, chance = place.inside(SYSTEM), random.Random(moments)
    refresh(system, OPERATOR)
    serving = [p["metadata"]["uid"] for p in pods(place.kube, SERVING)]
    for moment in range(moments):
        level = 50 + moment % 2 * 25
        elasticity = {"mode": "Manual", "levelPercent": level}
        place.kube.patch_model(MODEL, {"elasticity": elasticity})
        time.sleep(chance.uniform(0, 2))
        kill(system, OPERATOR, "operator")
        journey.wait_for_bounds(served.watched, level, level)
        if moment % DEATHS_PER_POD == DEATHS_PER_POD - 1:
            refresh(system, OPERATOR)
    place.kube.patch_model(MODEL, {"elasticity": {"mode": "Auto", "levelPercent": None}})
    journey.wait_for_bounds(served.watched, served.targets.floor, 100)
    assert [p["metadata"]["uid"] for p in pods(place.kube, SERVING)] == serving
    ask.first_token(served.watched.url, MODEL)
    write_result("operator", moments, serving_pods_restarted=0)


@counts
def test_killed_refactoring_continues_where_it_was(
    place: Site, served: Served, moments: int
) -> None:
    """Two deaths for each model: the Job waits longer before each further attempt."""
    chance = random.Random(moments)
    for round_ in range(moments // 2):
        name = f"killed-{round_}"
        model = with_spec(name, f"pvc://{CLAIM}/tiny-moe", {"seed": 100 + round_})
        place.kube.run("apply", "-f", "-", stdin=json.dumps(model))
        try:
            _refactor_with_deaths(place.kube, name, chance)
        finally:
            place.kube.run("delete", "prismmodel", name, "--wait", "--timeout=60s", timeout_s=90)
    write_result("refactor", moments, artifacts_made=moments // 2, most_layers_lost=1)


def write_result(what: str, moments: int, **figures: int) -> None:
    """Keeps what the long run proved; the assertions before it hold the figures."""
    if moments < MANY:
        return
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    today = datetime.now(UTC).date().isoformat()
    known["command"] = "make test-long"
    known[what] = {"date": today, "kills": moments, **figures}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def _refactor_with_deaths(kube: Kube, name: str, chance: random.Random) -> None:
    selector = f"{contract.LABEL_MODEL}={name},{contract.LABEL_ROLE}={contract.ROLE_REFACTOR}"
    for _ in range(2):
        wait_until(lambda: _running(kube, selector), 120, "running Job", every_s=0.2)
        time.sleep(chance.uniform(2, 25))
        kill(kube, selector, "refactor")
        time.sleep(2)

    def refactored() -> bool | None:
        found = observe.condition(kube.get("prismmodel", name), "Refactored")
        return True if found.get("status") == "True" else None

    wait_until(refactored, 400, f"artifact of {name}", every_s=2)
    attempts = [progress(kube.run("logs", p["metadata"]["name"])) for p in pods(kube, selector)]
    assert len(attempts) == 3
    assert attempts[-1].done
    # One that was killed before its first word cannot have told what it found.
    for before, after in itertools.pairwise(one for one in attempts if one.done):
        assert after.found >= before.done - 1, f"more than one layer lost: {before} -> {after}"


@dataclass(frozen=True, slots=True)
class Attempt:
    """Units of work that a log tells of: all of them, and those an earlier attempt had done."""

    done: int
    found: int


def progress(log: str) -> Attempt:
    """A unit that was found on disk is logged before anything fresh, so without a time left."""
    lines = re.findall(r"\d+/\d+ total=\d+%( left=\d+s)?", log)
    return Attempt(len(lines), sum(not left for left in lines))


def _running(kube: Kube, selector: str) -> bool | None:
    return any(p["status"]["phase"] == "Running" for p in pods(kube, selector)) or None
