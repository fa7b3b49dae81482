"""What the cluster showed during a run: one sample a second, and phases as they pass.

It reads what a user can read: the PrismModel, its Deployment and pods, the control ConfigMap that
holds the bounds, and the gauge with which the pod says which bounds it holds.
"""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
from prism import contract

from hack.demo.kube import Json, TookTooLong, api_client, async_api_client, models_path


class ModelFailed(RuntimeError):
    """The PrismModel's phase is Failed; the message holds its conditions."""


TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"
SAMPLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the model; ``at`` in seconds since the run began, levels in percent."""

    at: float
    ceiling: int  # what the operator decided
    floor: int
    applied: int | None  # what the pod holds
    replicas: int
    ready: int
    pods: tuple[str, ...]  # UIDs


@dataclass(frozen=True, slots=True)
class Phase:
    """A change of the row that ``kubectl get prismmodels`` prints."""

    at: float
    phase: str
    row: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Watched:
    """Whom to watch: through the API's socket, and at the model's own URL."""

    api: Path
    url: str
    namespace: str
    name: str


def model(client: httpx.Client, namespace: str, name: str) -> Json:
    answer = client.get(models_path(namespace, name))
    answer.raise_for_status()
    result: Json = answer.json()
    return result


def condition(document: Json, kind: str) -> Json:
    """The condition of this type, or an empty one."""
    conditions = document.get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind), {})


def follow_phases(
    api: Path,
    namespace: str,
    name: str,
    done: Callable[[Json], bool],
    tell: Callable[[str], None],
    timeout_s: float,
) -> list[Phase]:
    """Prints the row whenever it changes, until ``done`` holds for the object.

    Raises ModelFailed or TookTooLong, with the conditions that say why.
    """
    seen: list[Phase] = []
    begin = time.monotonic()
    with api_client(api) as client:
        while True:
            document = model(client, namespace, name)
            row = _row(client, namespace, name)
            if not seen or row != seen[-1].row:
                if not seen:
                    tell(_columns(_names(client, namespace, name)))
                tell(_columns(row))
                phase = document.get("status", {}).get("phase", "")
                seen.append(Phase(time.monotonic() - begin, phase, row))
            if done(document):
                return seen
            if seen[-1].phase == "Failed":
                raise ModelFailed(f"{name} failed: {_reasons(document)}")
            if time.monotonic() - begin > timeout_s:
                raise TookTooLong(
                    f"{name} is not there after {timeout_s:.0f} s: {_reasons(document)}"
                )
            time.sleep(0.5)


def _reasons(document: Json) -> str:
    """The conditions that say what is wrong."""
    found = document.get("status", {}).get("conditions", [])
    wrong = (c for c in found if c["status"] != "True" and c["type"] != "Degraded")
    return "; ".join(f"{c['type']} {c['reason']}: {c['message']}" for c in wrong) or "no condition"


def _table(client: httpx.Client, namespace: str, name: str) -> Json:
    answer = client.get(models_path(namespace, name), headers={"Accept": TABLE})
    answer.raise_for_status()
    table: Json = answer.json()
    return table


def _row(client: httpx.Client, namespace: str, name: str) -> tuple[str, ...]:
    """The printed cells without the age, which always changes."""
    table = _table(client, namespace, name)
    shown = [not c["priority"] and c["name"].upper() != "AGE" for c in table["columnDefinitions"]]
    cells = table["rows"][0]["cells"]
    return tuple(
        "" if cell is None else str(cell) for cell, show in zip(cells, shown, strict=True) if show
    )


def _names(client: httpx.Client, namespace: str, name: str) -> tuple[str, ...]:
    columns = _table(client, namespace, name)["columnDefinitions"]
    return tuple(
        c["name"].upper() for c in columns if not c["priority"] and c["name"].upper() != "AGE"
    )


def _columns(cells: tuple[str, ...]) -> str:
    widths = (12, 12, 13, 12, 10, 10, 10, 9, 8)
    return " ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=False)).rstrip()


async def sample(watched: Watched, now: Callable[[], float], samples: list[Sample]) -> None:
    """Appends a sample each second until cancelled; a failed look is left out, not invented."""
    async with async_api_client(watched.api) as api, httpx.AsyncClient(trust_env=False) as pod:
        while True:
            begin = now()
            found = await _look(watched, api, pod, begin)
            if found is not None:
                samples.append(found)
            await asyncio.sleep(max(SAMPLE_S - (now() - begin), 0.1))


async def _look(
    watched: Watched, api: httpx.AsyncClient, pod: httpx.AsyncClient, at: float
) -> Sample | None:
    core, apps = f"/api/v1/namespaces/{watched.namespace}", "/apis/apps/v1/namespaces"
    selector = (
        f"{contract.LABEL_MODEL}={watched.name},{contract.LABEL_ROLE}={contract.ROLE_SERVING}"
    )
    try:
        control, deployment, pods = await asyncio.gather(
            api.get(f"{core}/configmaps/{watched.name}-control"),
            api.get(f"{apps}/{watched.namespace}/deployments/{watched.name}"),
            api.get(f"{core}/pods", params={"labelSelector": selector}),
        )
        for answer in (control, deployment, pods):
            answer.raise_for_status()
    except httpx.HTTPError:
        return None
    level = json.loads(control.json()["data"][contract.LEVEL_FILE])
    state = deployment.json()
    return Sample(
        at,
        ceiling=level["ceiling"],
        floor=level["floor"],
        applied=await _applied(watched.url, pod),
        replicas=state["spec"]["replicas"],
        ready=state["status"].get("readyReplicas", 0),
        pods=tuple(sorted(p["metadata"]["uid"] for p in pods.json()["items"])),
    )


async def _applied(url: str, pod: httpx.AsyncClient) -> int | None:
    try:
        answer = await pod.get(url + contract.PATH_METRICS, timeout=5)
    except httpx.HTTPError:
        return None
    value = gauge(answer.text, contract.Metric.LEVEL_CEILING)
    return None if value is None else round(100 * value)


def gauge(text: str, name: str) -> float | None:
    """First sample of a series in Prometheus' text format."""
    for line in text.splitlines():
        if line.startswith((f"{name}{{", f"{name} ")):
            return float(line.rsplit(" ", 1)[1])
    return None


def total(text: str, name: str) -> float:
    """Sum of all series of this name; 0 where there is none, as of a counter that never moved."""
    lines = (line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} ")))
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
