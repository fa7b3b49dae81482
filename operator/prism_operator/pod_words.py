"""What the pods of one PrismModel tell of themselves, as the API server lists them.

Pure. Knows the machinery's words (OOMKilled, Unschedulable, ImagePullBackOff), the refactor
program's own last words; must not know what is decided from them. Tolerant of missing fields.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

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


def pod_trouble(pod: Json) -> Trouble | None:
    """Why a pod has not started, where it is a person's turn."""
    name = meta(pod).get("name")
    for condition in (pod.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return Trouble(
                str(condition.get("reason") or "Unschedulable"),
                f"no node takes pod {name}: {condition.get('message') or 'no reason given'}",
            )
    for container in containers(pod):
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


def result(pod: Json) -> Mapping[str, Any] | None:
    """The JSON the refactor program left behind, if this pod's text is that."""
    text = last_words(pod)
    if not text.startswith("{"):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "result" in value else None


def last_words(pod: Json) -> str:
    for container in containers(pod):
        state = (container.get("state") or {}).get("terminated") or {}
        if text := str(state.get("message") or "").strip():
            return text[-900:] if not text.startswith("{") else text
    return ""


def ran_out_of_memory(pod: Json) -> bool:
    for container in containers(pod):
        for key in ("state", "lastState"):
            ended = (container.get(key) or {}).get("terminated") or {}
            if ended.get("reason") == "OOMKilled":
                return True
    return False


def containers(pod: Json) -> list[Json]:
    status = pod.get("status") or {}
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def meta(child: Json) -> Json:
    found: Json = child.get("metadata") or {}
    return found


def labels(child: Json) -> Json:
    found: Json = meta(child).get("labels") or {}
    return found


def ended_at(pod: Json) -> str:
    """When the last of its containers ended, as the API server writes times; empty if none did."""
    states = ((one.get("state") or {}).get("terminated") or {} for one in containers(pod))
    return max((str(state.get("finishedAt") or "") for state in states), default="")
