"""The cluster of the cluster tests: brought up once, left as it was found.

One session walks the demo's path; the tests look at what it recorded, then disturb what it made.
Where no cluster can be made here every test is skipped with that reason.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from hack.cluster import ClusterError, choose
from hack.cluster.local import Local
from hack.demo import journey, marks, report, site
from hack.demo.journey import Served
from hack.demo.record import Record
from hack.demo.site import Site
from hack.demo.story import Story

OUT = Path(__file__).parents[2] / "out" / "cluster-test"
NAMESPACE = "prism-test"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs a cluster."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


def runs_already(cluster: Local) -> bool:
    """Whether somebody else had the local cluster up before us."""
    access = cluster.access()
    if not Path(access.kubeconfig).exists():
        return False
    command = [access.kubectl, "--context", access.context, "--request-timeout=3s"]
    done = subprocess.run(
        [*command, "get", "--raw", "/readyz"],
        env={**os.environ, "KUBECONFIG": access.kubeconfig},
        capture_output=True,
        timeout=15,
        check=False,
    )
    return done.returncode == 0


@pytest.fixture(scope="session")
def log() -> Iterator[TextIO]:
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "story.log").open("w") as out:
        yield out


@pytest.fixture(scope="session")
def place(log: TextIO) -> Iterator[Site]:
    """A cluster with Prism on it."""
    try:
        cluster = choose()
    except ClusterError as reason:
        pytest.skip(f"no cluster here: {reason}")
    was_up = not isinstance(cluster, Local) or runs_already(cluster)
    made = site.bring_up(Story(out=log), cluster, NAMESPACE, stays=False)
    had_release = site.is_installed(made)
    try:
        site.install(made)
        yield made
    finally:
        site.leave(made, keep_release=had_release)
        if not was_up:
            cluster.down(purge=False)


@pytest.fixture(scope="session")
def served(place: Site) -> Iterator[Served]:
    """The example, applied and answering."""
    with journey.serve_example(place) as found:
        yield found


ATTEMPTS = 2


@pytest.fixture(scope="session")
def demo(place: Site, served: Served) -> Record:
    """The demo's measurements: capacities, the load step elastic and not.

    Another job on the machine can spoil a measurement of two minutes. Where a mark is missed the
    whole of it is measured once more, and the story keeps both.
    """
    quality = journey.show_artifact(place)
    journey.wait_for_metrics(place)
    for attempt in range(1, ATTEMPTS + 1):
        made = _measured(place, served, quality)
        place.story.say(report.summary(made))
        report.write(made, OUT)
        missed = marks.missed(made)
        for text in missed:
            place.story.say(f"attempt {attempt} of {ATTEMPTS}: {text}")
        if not missed:
            break
    return made


def _measured(place: Site, served: Served, quality: dict[int, float]) -> Record:
    capacities = journey.measure(place, served)
    elastic = journey.load_step(place, served, "Auto", capacities[0])
    off = journey.load_step(place, served, "Off", capacities[0])
    journey.ask_mode(place, "Auto")
    return journey.record(place, served, capacities, (elastic, off), quality)
