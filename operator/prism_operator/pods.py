"""Pod specs of the refactor Job and of serving: containers, volumes, probes, security contexts.

Pure. Every container is restricted (not root, read-only root, no capabilities, default seccomp) and
gets no service account token: neither talks to the API server. The gateway is a native sidecar (an
init container that restarts), so it starts before the engine and stops after it.
"""

import re
from dataclasses import dataclass
from typing import Final

from prism import contract

from prism_operator import names
from prism_operator.api import Json, Model, parse_location

USER: Final = 65532
SOURCE_WAIT_S: Final = 60  # a Job that fills the claim may have been applied in the same breath
LEAVE_ENDPOINTS_S: Final = 5  # the Service must know that a pod goes before it refuses requests
KILL_AFTER_DRAIN_S: Final = 20  # time to leave, after the drain


@dataclass(frozen=True, slots=True)
class Context:
    """What manifests need of the operator's settings."""

    refactor_image: str
    serving_image: str
    namespace: str
    admin_key: bytes
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()


def job_pod(model: Model, context: Context, artifact: str) -> Json:
    """Pod spec of the refactor Job."""
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 60,
        **_basics(context),
        "containers": [_job_container(model, context, artifact)],
        "volumes": [{"name": "tmp", "emptyDir": {}}, *_claim_volumes(model)],
    }


def serving_pod(model: Model, context: Context, artifact: str) -> Json:
    """Pod spec of the Deployment; ``artifact`` is the hash of the one to serve."""
    part = model.serving
    pod: Json = {
        **_basics(context),
        "terminationGracePeriodSeconds": LEAVE_ENDPOINTS_S + part.drain_s + KILL_AFTER_DRAIN_S,
        "initContainers": [_gateway(model, context, artifact)],
        "containers": [_engine(model, context, artifact)],
        "volumes": _serving_volumes(model),
    }
    if part.accelerator:
        pod["tolerations"] = [
            {"key": part.accelerator, "operator": "Exists", "effect": "NoSchedule"}
        ]
    return pod


def _job_container(model: Model, context: Context, artifact: str) -> Json:
    part, cache = model.refactor, model.cache
    out = f"{contract.CACHE_DIR}/{names.artifact_path(cache.sub_path, artifact)}"
    args = ["refactor", _job_source(model), "--out", out]
    args += ["--sub-experts", str(part.sub_experts or "auto"), "--seed", str(part.seed)]
    if text := parse_location(part.calibration_uri):
        args += ["--calibration", f"{contract.CALIBRATION_DIR}/{text.path}"]
    if part.calibration_tokens:
        args += ["--tokens", str(part.calibration_tokens)]
    if part.parallelism > 1:  # Kubernetes puts each pod's own index in the place of the name
        args += ["--shard", f"$({contract.ENV_JOB_INDEX})/{part.parallelism}"]
    args += ["--servable", "--source-uri", model.source.uri]
    args += ["--termination-message", contract.TERMINATION_MESSAGE_PATH]
    args += ["--metrics-port", str(contract.JOB_METRICS_PORT)]
    hub = "/".join(p for p in (contract.CACHE_DIR, cache.sub_path.strip("/"), "hub") if p)
    env: list[Json] = [*_home(), {"name": "HF_HOME", "value": hub}]
    if model.source.location:
        args += ["--source-wait", str(SOURCE_WAIT_S)]
    if model.source.secret_name:
        key = {"name": model.source.secret_name, "key": model.source.secret_key}
        env.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": key}})
    container = {
        "name": "refactor",
        "image": context.refactor_image,
        "imagePullPolicy": context.pull_policy,
        "command": ["prism"],
        "args": args,
        "env": env,
        "ports": [{"name": "job-metrics", "containerPort": contract.JOB_METRICS_PORT}],
        "securityContext": _container_security(),
        "terminationMessagePath": contract.TERMINATION_MESSAGE_PATH,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, *_claim_mounts(model)],
    }
    return _with_resources(container, part.resources)


def _job_source(model: Model) -> str:
    if place := model.source.location:
        return f"{contract.SOURCE_DIR}/{place.path}".rstrip("/")
    return model.source.uri + (f"@{model.source.revision}" if model.source.revision else "")


def _claims(model: Model) -> dict[str, str]:
    """Claim name -> volume name. A claim that serves two ends is one volume."""
    claims = {model.cache.claim_name: "cache"}
    for uri, volume in ((model.source.uri, "source"), (model.refactor.calibration_uri, "text")):
        if place := parse_location(uri):
            claims.setdefault(place.claim, volume)
    return claims


def _claim_volumes(model: Model) -> list[Json]:
    return [
        {"name": volume, "persistentVolumeClaim": {"claimName": name}}
        for name, volume in _claims(model).items()
    ]


def _claim_mounts(model: Model) -> list[Json]:
    """The whole cache claim is mounted: a subPath would be made by the kubelet, owned by root."""
    claims = _claims(model)
    mounts: list[Json] = [{"name": "cache", "mountPath": contract.CACHE_DIR}]
    for uri, path in (
        (model.source.uri, contract.SOURCE_DIR),
        (model.refactor.calibration_uri, contract.CALIBRATION_DIR),
    ):
        if place := parse_location(uri):
            mounts.append({"name": claims[place.claim], "mountPath": path, "readOnly": True})
    return mounts


def _gateway(model: Model, context: Context, artifact: str) -> Json:
    """Front door. A native sidecar: it starts first and stops last."""
    probe = {"port": "http", "scheme": "HTTP"}
    token = names.admin_token_sha256(context.admin_key, model.uid)
    return {
        "name": "gateway",
        "image": model.serving.image or context.serving_image,
        "imagePullPolicy": context.pull_policy,
        "restartPolicy": "Always",
        "command": ["python", "-m", "prism_serving.gateway"],
        "args": [
            *_common_args(model),
            "--model-name",
            model.served_name,
            "--prism-model",
            model.key,
        ],
        "env": [*_home(), {"name": contract.ENV_ADMIN_TOKEN_SHA256, "value": token}],
        "ports": [
            {"name": "http", "containerPort": contract.API_PORT},
            {"name": "admin", "containerPort": contract.ADMIN_PORT},
        ],
        "startupProbe": {
            "httpGet": {"path": contract.PATH_HEALTH, **probe},
            "periodSeconds": 1,
            "failureThreshold": 180,
        },
        "readinessProbe": {
            "httpGet": {"path": contract.PATH_READY, **probe},
            "periodSeconds": 2,
            "timeoutSeconds": 2,
            "failureThreshold": 2,
        },
        "livenessProbe": {
            "httpGet": {"path": contract.PATH_HEALTH, **probe},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        },
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
        "securityContext": _container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _serving_mounts(model, artifact),
    }


def _engine(model: Model, context: Context, artifact: str) -> Json:
    part = model.serving
    args = [*_common_args(model), "--dtype", part.dtype]
    if threads := _whole_cpus(part.resources):
        args += ["--threads", str(threads)]
    container = {
        "name": "engine",
        "image": part.image or context.serving_image,
        "imagePullPolicy": context.pull_policy,
        "command": ["python", "-m", "prism_serving.engine"],
        "args": args,
        "env": _home(),
        "lifecycle": {"preStop": {"sleep": {"seconds": LEAVE_ENDPOINTS_S}}},
        "securityContext": _container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _serving_mounts(model, artifact),
    }
    resources = {key: dict(value) for key, value in part.resources.items()}
    if part.accelerator:
        resources.setdefault("limits", {})[part.accelerator] = part.accelerator_count
    return _with_resources(container, resources)


def _common_args(model: Model) -> list[str]:
    return [
        "--artifact",
        contract.ARTIFACT_DIR,
        "--socket",
        contract.SOCKET_PATH,
        "--control-dir",
        contract.CONTROL_DIR,
        "--drain-seconds",
        str(model.serving.drain_s),
    ]


def _whole_cpus(resources: Json) -> int:
    """Threads for a CPU limit: more than the quota only get throttled.

    0 for none, and for one in another notation: the engine counts for itself, and what is no
    quantity at all the API server refuses with its own words.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)(m?)", str(resources.get("limits", {}).get("cpu", "")))
    if not found:
        return 0
    return max(1, int(float(found[1]) / (1000 if found[2] else 1)))


def _serving_volumes(model: Model) -> list[Json]:
    files = (contract.LEVEL_FILE, contract.SLO_FILE)  # and not the scaler's memory
    items = [{"key": file, "path": file} for file in files]
    return [
        {"name": "tmp", "emptyDir": {}},
        {"name": "run", "emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}},
        {"name": "control", "configMap": {"name": names.control(model.name), "items": items}},
        {"name": "artifact", "persistentVolumeClaim": {"claimName": model.cache.claim_name}},
    ]


def _serving_mounts(model: Model, artifact: str) -> list[Json]:
    path = names.artifact_path(model.cache.sub_path, artifact)
    return [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "run", "mountPath": contract.SOCKET_PATH.rsplit("/", 1)[0]},
        # A directory and never a subPath: a mounted file would not follow the ConfigMap.
        {"name": "control", "mountPath": contract.CONTROL_DIR, "readOnly": True},
        {
            "name": "artifact",
            "mountPath": contract.ARTIFACT_DIR,
            "subPath": path,
            "readOnly": True,
        },
    ]


def _basics(context: Context) -> Json:
    basics: Json = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if context.pull_secrets:
        basics["imagePullSecrets"] = [{"name": name} for name in context.pull_secrets]
    return basics


def _container_security() -> Json:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _home() -> list[Json]:
    return [
        {"name": "HOME", "value": "/tmp"},
        {"name": "PRISM_CACHE", "value": "/tmp/prism"},
        {"name": "PYTHONUNBUFFERED", "value": "1"},
    ]


def _with_resources(container: Json, resources: Json) -> Json:
    return {**container, "resources": resources} if resources else container
