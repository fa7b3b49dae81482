"""Folds the raw children of one PrismModel into a small frozen ``Observed``.

Pure, and the only place that is tolerant of missing fields, so that nothing after it has to be. It
also turns the machinery's words (OOMKilled, Unschedulable, ImagePullBackOff) into a reason and a
sentence that a person can act on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prism import contract

from prism_operator.api import Json

IMAGE_PROBLEMS: Final = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
)
CONFIG_PROBLEMS: Final = ("CreateContainerConfigError", "CreateContainerError")


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why something does not go on."""

    reason: str
    message: str


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
class JobView:
    """``result`` is the termination message of the newest pod that left one."""

    name: str
    artifact: str
    settings: str
    state: str  # Running, Complete or Failed
    going: bool
    result: Mapping[str, Any] | None
    has_pod: bool
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
            name = f"{kind} {_meta(child).get('name')}"
            (leftover if _is_a_namesakes(child) else foreign).append(name)
        return mine

    pods = list(children.get("Pod", ()))  # owned by ReplicaSets and Jobs, so told by labels
    jobs = tuple(_job(job, pods) for job in own("Job"))
    deployments, configs = own("Deployment"), own("ConfigMap")
    hashed = [
        c for kind in ("Service", "NetworkPolicy", "PersistentVolumeClaim") for c in own(kind)
    ]
    return Observed(
        jobs=jobs,
        deployment=_deployment(deployments[0]) if deployments else None,
        pods=tuple(_pod(pod) for pod in pods if _role(pod) == contract.ROLE_SERVING),
        hashes={(str(c["kind"]), str(_meta(c).get("name"))): _hash(c) for c in hashed},
        control=dict(configs[0].get("data") or {}) if configs else None,
        claims=dict(claims),
        foreign=tuple(foreign),
        leftover=tuple(leftover),
    )


def _is_ours(child: Json, uid: str) -> bool:
    """Owned by us, or without an owner and labelled as ours (a retained claim)."""
    owners = _meta(child).get("ownerReferences") or ()
    if not owners:
        return contract.LABEL_MODEL in _labels(child)
    return any(owner.get("uid") == uid for owner in owners)


def _is_a_namesakes(child: Json) -> bool:
    """Under the name of one of ours and owned by another PrismModel: ours of an earlier life."""
    owners = _meta(child).get("ownerReferences") or ()
    return any(owner.get("kind") == contract.KIND for owner in owners)


def _job(job: Json, pods: Sequence[Json]) -> JobView:
    meta, status = _meta(job), job.get("status") or {}
    name = str(meta.get("name"))
    mine = [pod for pod in pods if _labels(pod).get("batch.kubernetes.io/job-name") == name]
    mine.sort(key=lambda pod: str(_meta(pod).get("creationTimestamp")))
    ended = {
        str(c.get("type")): c
        for c in status.get("conditions") or ()
        if c.get("status") == "True" and c.get("type") in ("Complete", "Failed")
    }
    state = next(iter(ended), "Running")
    limit = _memory_limit(job)
    result = next((r for pod in reversed(mine) if (r := _result(pod)) is not None), None)
    return JobView(
        name=name,
        artifact=_annotation(job, contract.ANNOTATION_ARTIFACT),
        settings=_hash(job),
        state=state,
        going=bool(meta.get("deletionTimestamp")),
        result=result,
        has_pod=bool(mine),
        trouble=_job_trouble(name, ended.get("Failed"), mine, result, limit),
    )


def _job_trouble(
    name: str,
    failed: Mapping[str, Any] | None,
    pods: Sequence[Json],
    result: Mapping[str, Any] | None,
    memory_limit: str,
) -> Trouble | None:
    """The most telling cause: the program's own words, then the pod's, then the Job's."""
    last = pods[-1] if pods else None
    stuck = _pod_trouble(last) if last else None
    if stuck and not failed:
        return stuck
    if last and _ran_out_of_memory(last):
        limit = f"its limit of {memory_limit}" if memory_limit else "the node's"
        return Trouble(
            "OutOfMemory",
            f"Job {name} needed more memory than {limit}: raise "
            f"spec.refactor.resources.limits.memory",
        )
    if result is not None and result.get("result") == "failed":
        reason = str(result.get("reason") or "InternalError")
        return Trouble(reason, str(result.get("message") or "the job gave no message"))
    if not failed:
        return None
    if failed.get("reason") == "DeadlineExceeded":
        return Trouble(
            "DeadlineExceeded",
            f"Job {name} ran longer than spec.refactor.activeDeadlineSeconds; raise it, the next "
            f"try goes on where this one stopped",
        )
    said = _last_words(last) if last else ""
    reason = str(failed.get("reason") or "JobFailed")
    return Trouble(reason, said or str(failed.get("message") or f"Job {name} failed"))


def _deployment(deployment: Json) -> DeploymentView:
    meta, spec = _meta(deployment), deployment.get("spec") or {}
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
    meta, status = _meta(pod), pod.get("status") or {}
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
    if stuck := _pod_trouble(pod):
        return stuck
    if _ran_out_of_memory(pod):
        return Trouble(
            "OutOfMemory",
            f"Pod {_meta(pod).get('name')} needs more memory than its limit: raise "
            f"spec.serving.resources.limits.memory",
        )
    for container in _containers(pod):
        restarts = int(container.get("restartCount") or 0)
        last = (container.get("lastState") or {}).get("terminated")
        if restarts >= 2 and last:
            what = f"{container.get('name')} of pod {_meta(pod).get('name')}"
            text = str(last.get("message") or "").strip() or f"exit code {last.get('exitCode')}"
            return Trouble("CrashLoop", f"{what} ended {restarts} times: {text[-600:]}")
    return None


def _pod_trouble(pod: Json) -> Trouble | None:
    """Why a pod has not started, where it is a person's turn."""
    name = _meta(pod).get("name")
    for condition in (pod.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return Trouble(
                str(condition.get("reason") or "Unschedulable"),
                f"no node takes pod {name}: {condition.get('message') or 'no reason given'}",
            )
    for container in _containers(pod):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason = str(waiting.get("reason") or "")
        if reason in IMAGE_PROBLEMS:
            return Trouble(
                "ImagePullFailed",
                f"image {container.get('image')} cannot be pulled ({reason}): check the name, the "
                f"registry and imagePullSecrets. {waiting.get('message') or ''}".strip(),
            )
        if reason in CONFIG_PROBLEMS:
            return Trouble(
                "PodNotStartable", f"pod {name} cannot start: {waiting.get('message') or reason}"
            )
    return None


def _result(pod: Json) -> Mapping[str, Any] | None:
    """The JSON the refactor program left behind, if this pod's text is that."""
    text = _last_words(pod)
    if not text.startswith("{"):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "result" in value else None


def _last_words(pod: Json) -> str:
    for container in _containers(pod):
        state = (container.get("state") or {}).get("terminated") or {}
        if text := str(state.get("message") or "").strip():
            return text[-900:] if not text.startswith("{") else text
    return ""


def _ran_out_of_memory(pod: Json) -> bool:
    for container in _containers(pod):
        for key in ("state", "lastState"):
            ended = (container.get(key) or {}).get("terminated") or {}
            if ended.get("reason") == "OOMKilled":
                return True
    return False


def _memory_limit(job: Json) -> str:
    pod = ((job.get("spec") or {}).get("template") or {}).get("spec") or {}
    for container in pod.get("containers") or ():
        limits = (container.get("resources") or {}).get("limits") or {}
        if limits.get("memory"):
            return str(limits["memory"])
    return ""


def _containers(pod: Json) -> list[Json]:
    status = pod.get("status") or {}
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _meta(child: Json) -> Json:
    meta: Json = child.get("metadata") or {}
    return meta


def _labels(child: Json) -> Json:
    labels: Json = _meta(child).get("labels") or {}
    return labels


def _role(child: Json) -> str:
    return str(_labels(child).get(contract.LABEL_ROLE) or "")


def _annotation(child: Json, key: str) -> str:
    return str((_meta(child).get("annotations") or {}).get(key) or "")


def _hash(child: Json) -> str:
    return _annotation(child, contract.ANNOTATION_HASH)
