"""Folds the raw children of one PrismModel into a small frozen ``Observed``.

Pure; with ``pod_words`` and ``refactor_jobs`` the only place that is tolerant of missing fields, so
that nothing after it has to be. Trouble comes as a reason and a sentence that a person can act on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prism import contract

from prism_operator import pod_words as words
from prism_operator import refactor_jobs
from prism_operator.api import Json
from prism_operator.pod_words import Trouble
from prism_operator.refactor_jobs import JobView


@dataclass(frozen=True, slots=True)
class PodView:
    name: str
    ip: str
    ready: bool
    going: bool
    artifact: str
    api_port: int
    admin_port: int
    trouble: Trouble | None


@dataclass(frozen=True, slots=True)
class DeploymentView:
    spec_hash: str
    artifact: str
    image: str
    token_sha256: str  # of the admin token that the pods take
    replicas: int
    up_to_date: bool
    trouble: Trouble | None


@dataclass(frozen=True, slots=True)
class Observed:
    """``foreign`` names children whose name is taken by somebody else's object.

    ``leftover`` names those of a deleted namesake, which the garbage collector is about to take.
    """

    jobs: tuple[JobView, ...] = ()
    deployment: DeploymentView | None = None
    pods: tuple[PodView, ...] = ()
    hashes: Mapping[tuple[str, str], str] | None = None  # (kind, name) -> hash annotation
    control: Mapping[str, str] | None = None  # data of the ConfigMap
    claims: Mapping[str, str] | None = None  # claim -> phase; Missing where there is none
    foreign: tuple[str, ...] = ()
    leftover: tuple[str, ...] = ()

    @property
    def ready_pods(self) -> tuple[PodView, ...]:
        return tuple(pod for pod in self.pods if pod.ready and not pod.going)


def observe(
    uid: str, children: Mapping[str, Sequence[Json]], claims: Mapping[str, str]
) -> Observed:
    """``children`` by kind, as the API server lists them; ``claims`` as in ``Observed``."""
    foreign: list[str] = []
    leftover: list[str] = []

    def own(kind: str) -> list[Json]:
        mine: list[Json] = []
        others: list[Json] = []
        for child in children.get(kind, ()):
            (mine if _is_ours(child, uid) else others).append(child)
        for child in others:
            name = f"{kind} {words.meta(child).get('name')}"
            (leftover if _is_a_namesakes(child) else foreign).append(name)
        return mine

    pods = list(children.get("Pod", ()))  # owned by ReplicaSets and Jobs, so told by labels
    jobs = tuple(refactor_jobs.view(job, pods) for job in own("Job"))
    deployments, configs = own("Deployment"), own("ConfigMap")
    hashed = [
        c for kind in ("Service", "NetworkPolicy", "PersistentVolumeClaim") for c in own(kind)
    ]
    return Observed(
        jobs=jobs,
        deployment=_deployment(deployments[0]) if deployments else None,
        pods=tuple(_pod(pod) for pod in pods if _role(pod) == contract.ROLE_SERVING),
        hashes={(str(c["kind"]), str(words.meta(c).get("name"))): _hash(c) for c in hashed},
        control=dict(configs[0].get("data") or {}) if configs else None,
        claims=dict(claims),
        foreign=tuple(foreign),
        leftover=tuple(leftover),
    )


def _is_ours(child: Json, uid: str) -> bool:
    """Owned by us, or without an owner and labelled as ours (a retained claim)."""
    owners = words.meta(child).get("ownerReferences") or ()
    if not owners:
        return contract.LABEL_MODEL in words.labels(child)
    return any(owner.get("uid") == uid for owner in owners)


def _is_a_namesakes(child: Json) -> bool:
    """Under the name of one of ours and owned by another PrismModel: ours of an earlier life."""
    owners = words.meta(child).get("ownerReferences") or ()
    return any(owner.get("kind") == contract.KIND for owner in owners)


def _deployment(deployment: Json) -> DeploymentView:
    meta, spec = words.meta(deployment), deployment.get("spec") or {}
    status = deployment.get("status") or {}
    pod = (spec.get("template") or {}).get("spec") or {}
    replicas = int(spec.get("replicas", 1))
    seen = int(status.get("observedGeneration") or 0) >= int(meta.get("generation") or 0)
    updated = int(status.get("updatedReplicas") or 0)
    failing = next(
        (
            c
            for c in status.get("conditions") or ()
            if c.get("type") == "ReplicaFailure" and c.get("status") == "True"
        ),
        None,
    )
    return DeploymentView(
        spec_hash=_hash(deployment),
        artifact=_annotation(deployment, contract.ANNOTATION_ARTIFACT),
        image=str(next((c.get("image") for c in pod.get("containers") or ()), "")),
        token_sha256=_environment(pod).get(contract.ENV_ADMIN_TOKEN_SHA256, ""),
        replicas=replicas,
        up_to_date=seen and updated >= replicas and int(status.get("replicas") or 0) <= updated,
        trouble=Trouble("PodsRefused", str(failing.get("message"))) if failing else None,
    )


def _environment(pod: Json) -> dict[str, str]:
    """Plain values over all containers of a pod spec."""
    return {
        str(one.get("name")): str(one.get("value") or "")
        for key in ("initContainers", "containers")
        for container in pod.get(key) or ()
        for one in container.get("env") or ()
    }


def _pod(pod: Json) -> PodView:
    meta, status = words.meta(pod), pod.get("status") or {}
    ready = any(
        c.get("type") == "Ready" and c.get("status") == "True"
        for c in status.get("conditions") or ()
    )
    ports = {
        str(port.get("name")): int(port.get("containerPort") or 0)
        for key in ("initContainers", "containers")
        for container in (pod.get("spec") or {}).get(key) or ()
        for port in container.get("ports") or ()
    }
    return PodView(
        name=str(meta.get("name")),
        ip=str(status.get("podIP") or ""),
        ready=ready and bool(status.get("podIP")),
        going=bool(meta.get("deletionTimestamp")),
        artifact=_annotation(pod, contract.ANNOTATION_ARTIFACT),
        api_port=ports.get("http", contract.API_PORT),
        admin_port=ports.get("admin", contract.ADMIN_PORT),
        trouble=None if ready else _serving_trouble(pod),
    )


def _serving_trouble(pod: Json) -> Trouble | None:
    if stuck := words.pod_trouble(pod):
        return stuck
    if words.ran_out_of_memory(pod):
        return Trouble(
            "OutOfMemory",
            f"Pod {words.meta(pod).get('name')} needs more memory than its limit: raise "
            f"spec.serving.resources.limits.memory",
        )
    for container in words.containers(pod):
        restarts = int(container.get("restartCount") or 0)
        last = (container.get("lastState") or {}).get("terminated")
        if restarts >= 2 and last:
            what = f"{container.get('name')} of pod {words.meta(pod).get('name')}"
            text = str(last.get("message") or "").strip() or f"exit code {last.get('exitCode')}"
            return Trouble("CrashLoop", f"{what} ended {restarts} times: {text[-600:]}")
    return None


def _role(child: Json) -> str:
    return str(words.labels(child).get(contract.LABEL_ROLE) or "")


def _annotation(child: Json, key: str) -> str:
    return str((words.meta(child).get("annotations") or {}).get(key) or "")


def _hash(child: Json) -> str:
    return _annotation(child, contract.ANNOTATION_HASH)
