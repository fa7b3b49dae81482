"""What a refactor Job and its pods tell: how far it is, its result, what went wrong.

Pure. A Job may be shared by several pods, one for each index; a pod without an index counts as
index 0. Decided here: the result is what the pod of index 0 said and nothing else, since the others
only do parts; but any pod can be the one that stops the whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prism import contract

from prism_operator import pod_words as words
from prism_operator.api import Json
from prism_operator.pod_words import Trouble

NAME_LABEL: Final = "batch.kubernetes.io/job-name"
INDEX: Final = "batch.kubernetes.io/job-completion-index"  # label and annotation of a pod
STOPPED_WITH_THE_OTHERS: Final = "Interrupted"  # the cause is then another pod's to tell


@dataclass(frozen=True, slots=True)
class JobView:
    """``result`` is the newest termination message of index 0; ``has_pod``: it has one at all."""

    name: str
    artifact: str
    settings: str
    state: str  # Running, Complete or Failed
    going: bool
    result: Mapping[str, Any] | None
    has_pod: bool
    trouble: Trouble | None


def view(job: Json, pods: Sequence[Json]) -> JobView:
    """``pods`` are all pods of the PrismModel."""
    meta, status = words.meta(job), job.get("status") or {}
    name = str(meta.get("name"))
    annotations = meta.get("annotations") or {}
    parts = _by_index([pod for pod in pods if words.labels(pod).get(NAME_LABEL) == name])
    ended = {
        str(c.get("type")): c
        for c in status.get("conditions") or ()
        if c.get("status") == "True" and c.get("type") in ("Complete", "Failed")
    }
    said = _newest_message(parts.get(0, ()))
    return JobView(
        name=name,
        artifact=str(annotations.get(contract.ANNOTATION_ARTIFACT) or ""),
        settings=str(annotations.get(contract.ANNOTATION_HASH) or ""),
        state=next(iter(ended), "Running"),
        going=bool(meta.get("deletionTimestamp")),
        result=said[1] if said else None,
        has_pod=0 in parts,
        trouble=_trouble(name, ended.get("Failed"), parts, _memory_limit(job)),
    )


def _by_index(pods: Sequence[Json]) -> dict[int, list[Json]]:
    """Pods of each index, the oldest try first."""
    parts: dict[int, list[Json]] = {}
    for pod in sorted(pods, key=lambda pod: str(words.meta(pod).get("creationTimestamp"))):
        parts.setdefault(_index(pod), []).append(pod)
    return parts


def _index(pod: Json) -> int:
    annotations = words.meta(pod).get("annotations") or {}
    text = str(words.labels(pod).get(INDEX) or annotations.get(INDEX) or "")
    return int(text) if text.isascii() and text.isdigit() else 0


def _newest_message(pods: Sequence[Json]) -> tuple[str, Mapping[str, Any]] | None:
    """(when, what) the newest of these pods that left a message said."""
    for pod in reversed(pods):
        if (message := words.result(pod)) is not None:
            return words.ended_at(pod), message
    return None


def _trouble(
    name: str,
    failed: Mapping[str, Any] | None,
    parts: Mapping[int, Sequence[Json]],
    memory_limit: str,
) -> Trouble | None:
    """The most telling cause: the program's own words, then the pod's, then the Job's."""
    last = [pods[-1] for _, pods in sorted(parts.items())]
    stuck = next((found for pod in last if (found := words.pod_trouble(pod))), None)
    if stuck and not failed:
        return stuck
    if any(words.ran_out_of_memory(pod) for pod in last):
        limit = f"its limit of {memory_limit}" if memory_limit else "the node's"
        return Trouble(
            "OutOfMemory",
            f"Job {name} needed more memory than {limit}: raise "
            f"spec.refactor.resources.limits.memory",
        )
    if (failure := _first_failure(parts)) is not None:
        reason = str(failure.get("reason") or "InternalError")
        return Trouble(reason, str(failure.get("message") or "the job gave no message"))
    if not failed:
        return None
    if failed.get("reason") == "DeadlineExceeded":
        return Trouble(
            "DeadlineExceeded",
            f"Job {name} ran longer than spec.refactor.activeDeadlineSeconds; raise it, the next "
            f"try goes on where this one stopped",
        )
    silent = [pod for pod in last if words.result(pod) is None]
    said = next((text for pod in silent if (text := words.last_words(pod))), "")
    reason = str(failed.get("reason") or "JobFailed")
    return Trouble(reason, said or str(failed.get("message") or f"Job {name} failed"))


def _first_failure(parts: Mapping[int, Sequence[Json]]) -> Mapping[str, Any] | None:
    """What stopped the Job: when one index fails, Kubernetes stops the others' pods after it."""
    said = [found for pods in parts.values() if (found := _newest_message(pods)) is not None]
    failures = [(when, one) for when, one in said if one.get("result") == "failed"]
    if not failures:
        return None

    def order(failure: tuple[str, Mapping[str, Any]]) -> tuple[bool, str]:
        when, message = failure
        return message.get("reason") == STOPPED_WITH_THE_OTHERS, when

    return min(failures, key=order)[1]


def _memory_limit(job: Json) -> str:
    pod = ((job.get("spec") or {}).get("template") or {}).get("spec") or {}
    for container in pod.get("containers") or ():
        limits = (container.get("resources") or {}).get("limits") or {}
        if limits.get("memory"):
            return str(limits["memory"])
    return ""
