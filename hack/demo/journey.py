"""The demo's path, in the order a user walks it; the cluster test walks the same with assertions.

Each function is one stretch and returns what it found. Nothing sleeps to look busy: every wait is
for something, with a limit and a message that says what was missing.
"""

import asyncio
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import openai
from prism import contract

from hack.demo import ask, experiment, observe, site
from hack.demo.kube import Json, api_client, endpoint, proxy, wait_until
from hack.demo.load import Target
from hack.demo.observe import Phase, Watched, condition
from hack.demo.prompts import passages
from hack.demo.record import Capacity, Record, Run, Targets
from hack.demo.site import ROOT, Site

EXAMPLE = ROOT / "examples" / "tiny-moe.yaml"
MODEL = "tiny-moe"
READY_S = 600.0
LOW, HIGH = 0.4, 1.2  # of the capacity at level 100
QUIET_S = 20.0  # control looks at 15 s: what was before shall be out of its sight


@dataclass(frozen=True, slots=True)
class Served:
    """A model that answers: how it came to be, and how to look at it."""

    phases: tuple[Phase, ...]
    apply_to_first_token_s: float
    watched: Watched
    target: Target
    targets: Targets


@contextmanager
def serve_example(place: Site) -> Iterator[Served]:
    """Applies the example and waits for its first token."""
    story = place.story
    with story.step(f"Empty the namespace {place.kube.namespace}"):
        site.fresh_namespace(place.kube)
        place.kube.run("apply", "-f", str(ROOT / "examples" / "prometheus" / "targets.yaml"))
    with proxy(place.kube) as api:
        with story.step("kubectl apply -f examples/tiny-moe.yaml"):
            begin = time.monotonic()
            text = EXAMPLE.read_text()
            image = place.images["example-model"]
            place.kube.run(
                "apply", "-f", "-", stdin=text.replace("localhost/prism-example-model:demo", image)
            )
            phases = observe.follow_phases(
                api, place.kube.namespace, MODEL, is_ready, story.say, READY_S
            )
        with endpoint(place.kube, MODEL, 80) as url:
            wait_until(lambda: _answers(url), 30, "first token")
            took = time.monotonic() - begin
            story.say(f"first token {took:.1f} s after apply, at {url}")
            document = place.kube.get("prismmodel", MODEL)
            watched = Watched(api, url, place.kube.namespace, MODEL)
            yield Served(tuple(phases), took, watched, Target(url, MODEL), targets_of(document))


def is_ready(document: Json) -> bool:
    return condition(document, "Ready").get("status") == "True"


def _answers(url: str) -> bool | None:
    try:
        ask.first_token(url, MODEL)
    except openai.APIStatusError as refusal:
        if refusal.status_code != 503:
            raise
        return None
    except openai.APIConnectionError:
        return None
    return True


def targets_of(document: Json) -> Targets:
    """The objectives in the object's spec."""
    slo = document["spec"]["slo"]
    return Targets(
        slo["ttft"]["targetMilliseconds"],
        slo["itl"]["targetMilliseconds"] if "itl" in slo else None,
        slo["ttft"]["percentile"],
        document["spec"]["elasticity"]["minLevelPercent"],
    )


def quality_of(document: Json) -> dict[int, float]:
    """Level -> measured quality loss in percent, as the refactoring reported it."""
    points = document["status"]["artifact"]["points"]
    return {p["levelPercent"]: p["lossBasisPoints"] / 100 for p in points}


def show_artifact(place: Site) -> dict[int, float]:
    """Prints the operating points."""
    document = place.kube.get("prismmodel", MODEL)
    artifact = document["status"]["artifact"]
    say = place.story.say
    say(f"{artifact['architecture']}, {artifact['subExperts']} sub-experts per expert, "
        f"refactored in {artifact['refactorSeconds']} s")  # fmt: skip
    for point in artifact["points"]:
        say(
            f"level {point['levelPercent']:3d} %: own share {point['ownSharePermille'] / 10:5.1f} %"
            f", quality loss {point['lossBasisPoints'] / 100:5.2f} %"
            f" ± {point.get('errorBasisPoints', 0) / 100:.2f}"
        )
    return quality_of(document)


def ask_mode(place: Site, mode: str) -> None:
    """Changes elasticity.mode; what follows is the operator's."""
    place.kube.patch_model(MODEL, {"elasticity": {"mode": mode}})


def set_mode(place: Site, served: Served, mode: str) -> None:
    """Changes elasticity.mode and waits until operator and pod hold the widest bounds of it.

    After an overload this takes minutes in mode Auto: the operator raises the ceiling step by step.
    """
    ask_mode(place, mode)
    floor = served.targets.floor if mode == "Auto" else 100
    wait_for_bounds(served.watched, floor, 100)


def wait_for_bounds(watched: Watched, floor: int, ceiling: int, timeout_s: float = 240) -> None:
    """Until the ConfigMap states the bounds and the pod says that it holds them."""
    path = f"/api/v1/namespaces/{watched.namespace}/configmaps/{watched.name}-control"
    with api_client(watched.api) as api, httpx.Client(trust_env=False) as pod:

        def held() -> bool | None:
            level = json.loads(api.get(path).json()["data"][contract.LEVEL_FILE])
            if (level["floor"], level["ceiling"]) != (floor, ceiling):
                return None
            text = pod.get(watched.url + contract.PATH_METRICS).text
            gauges = (contract.Metric.LEVEL_FLOOR, contract.Metric.LEVEL_CEILING)
            applied = [observe.gauge(text, name) for name in gauges]
            return True if applied == [floor / 100, ceiling / 100] else None

        wait_until(held, timeout_s, f"bounds {floor}-{ceiling} in the pod")


def wait_for_metrics(place: Site) -> None:
    """Until the operator says that it sees the model's series."""

    def seen() -> bool | None:
        found = condition(place.kube.get("prismmodel", MODEL), "MetricsAvailable")
        return True if found.get("status") == "True" else None

    wait_until(seen, 90, "MetricsAvailable", every_s=2)


def measure(place: Site, served: Served) -> tuple[Capacity, Capacity]:
    """Capacity at level 100 and at the floor. Mode Off, so that nothing moves while we measure."""
    set_mode(place, served, "Off")
    prompts = passages(400)
    found = []
    for level in (100, served.targets.floor):
        one = asyncio.run(experiment.capacity(served.target, prompts, level))
        place.story.say(
            f"level {level:3d}: {one.requests_per_s:.2f} requests/s, "
            f"TTFT p50 {one.ttft_p50_ms or 0:.0f} ms with 8 clients"
        )
        found.append(one)
    return found[0], found[1]


def load_step(place: Site, served: Served, mode: str, full: Capacity) -> Run:
    """The load step of the demo, from 0.4 to 1.2 of the capacity at level 100."""
    elastic = mode == "Auto"
    if elastic:
        time.sleep(QUIET_S)
    set_mode(place, served, mode)
    low, high = LOW * full.requests_per_s, HIGH * full.requests_per_s
    step = experiment.Step(low, high, settle_s=10 if elastic else 20)
    run = asyncio.run(
        experiment.load_step(
            "Elastic" if elastic else "elasticity.mode: Off",
            mode,
            step,
            served.targets,
            served.target,
            served.watched,
            passages(400, seed=1),
            place.story.say,
        )
    )
    attainment = run.part("step", served.targets).ttft_attainment or 0.0
    place.story.say(f"during the step {100 * attainment:.1f} % of the requests were in time")
    return run


def record(
    place: Site,
    served: Served,
    capacities: tuple[Capacity, ...],
    runs: tuple[Run, ...],
    quality: dict[int, float],
) -> Record:
    """Everything the report needs, with the operator's own account of its decisions."""
    document = place.kube.get("prismmodel", MODEL)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Record(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=f"{cpu_name()}, {os.cpu_count()} CPUs, {memory:.0f} GiB, {platform.system()}",
        cluster=place.kind,
        targets=served.targets,
        capacities=capacities,
        runs=runs,
        quality=quality,
        steps=dict(place.story.steps),
        decisions=tuple(document["status"].get("decisions", ())),
        figures={
            "from apply to the first token": served.apply_to_first_token_s,
            "of it refactoring": float(document["status"]["artifact"]["refactorSeconds"]),
        },
    )


def cpu_name() -> str:
    """The processor as the kernel names it, where it does."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
