"""Child objects as complete server-side-apply intents: plain dicts, in a fixed order.

Pure: a manifest is a function of the PrismModel, the images and a few facts. What may change
without touching pods (level, targets) lives in the ConfigMap; what the Deployment is made from is
summed up in ``serving_hash``, over *inputs* and not over the rendered text, so that an operator
which renders differently restarts no pod.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from prism import contract

from prism_operator import names
from prism_operator.api import Json, Model, owner_reference, selector
from prism_operator.pods import Context, job_pod, serving_pod

OPERATOR_NAMESPACE_LABEL: Final = "kubernetes.io/metadata.name"


def artifact_hash(model: Model) -> str:
    """Identifies an artifact by what goes into it; names the Job and the artifact's folder."""
    part = model.refactor
    return names.digest(
        {
            "uri": model.source.uri,
            "revision": model.source.revision,
            "subExperts": part.sub_experts or "auto",
            "seed": part.seed,
            "calibration": [part.calibration_uri, part.calibration_tokens],
        }
    )


def job_hash(model: Model) -> str:
    """How the Job runs: a change of it gives a failed Job another try."""
    part = model.refactor
    settings: Json = {
        "resources": part.resources,
        "deadline": part.active_deadline_s,
        "backoff": part.backoff_limit,
        "secret": [model.source.secret_name, model.source.secret_key],
    }
    if part.parallelism > 1:  # and not in the artifact's hash: its bytes are the same for any
        settings["parallelism"] = part.parallelism
    return names.digest(settings)


def serving_hash(model: Model, artifact: str) -> str:
    """What the pods are made from; a change of it rolls them."""
    part = model.serving
    return names.digest(
        {
            "artifact": artifact,
            "name": model.served_name,
            "image": part.image,
            "dtype": part.dtype,
            "resources": part.resources,
            "accelerator": [part.accelerator, part.accelerator_count],
            "drain": part.drain_s,
        }
    )


def claim(model: Model) -> Json:
    """The claim of ``cache.create``; without an owner it outlives the PrismModel."""
    create = model.cache.create or {}
    spec: Json = {
        "accessModes": list(create.get("accessModes", ["ReadWriteOnce"])),
        "resources": {"requests": {"storage": create["size"]}},
    }
    if create.get("storageClassName"):
        spec["storageClassName"] = create["storageClassName"]
    name, owned = model.cache.claim_name, model.cache.delete_with_owner
    return _hashed(_child("v1", "PersistentVolumeClaim", name, model, spec=spec, owned=owned))


def job(model: Model, context: Context) -> Json:
    """The refactor Job. Created once and never re-applied: a Job's template cannot change."""
    wanted, pods = artifact_hash(model), model.refactor.parallelism
    shared: Json = {"completionMode": "Indexed", "completions": pods, "parallelism": pods}
    spec = {
        **(shared if pods > 1 else {}),
        "backoffLimit": model.refactor.backoff_limit,
        "activeDeadlineSeconds": model.refactor.active_deadline_s,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "refactor",
                        "operator": "In",
                        "values": [int(contract.ExitCode.USAGE), int(contract.ExitCode.BAD_INPUT)],
                    },
                },
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": {
            "metadata": {"labels": _labels(model, contract.ROLE_REFACTOR)},
            "spec": job_pod(model, context, wanted),
        },
    }
    return _child(
        "batch/v1",
        "Job",
        names.job(model.name, wanted),
        model,
        spec=spec,
        role=contract.ROLE_REFACTOR,
        annotations={
            contract.ANNOTATION_ARTIFACT: wanted,
            contract.ANNOTATION_HASH: job_hash(model),
        },
    )


def deployment(model: Model, context: Context, artifact: str) -> Json:
    """All of the Deployment but its replicas, which belong to the other field manager."""
    part = model.serving
    # Devices are rarely free to surge onto; without them a new pod comes before the old one goes.
    surge, missing = (0, 1) if part.accelerator else (1, 0)
    spec = {
        "revisionHistoryLimit": 2,
        "progressDeadlineSeconds": 1800,
        "selector": {"matchLabels": selector(model.name)},
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": surge, "maxUnavailable": missing},
        },
        "template": {
            "metadata": {
                "labels": _labels(model, contract.ROLE_SERVING),
                "annotations": {contract.ANNOTATION_ARTIFACT: artifact},
            },
            "spec": serving_pod(model, context, artifact),
        },
    }
    return _child(
        "apps/v1",
        "Deployment",
        model.name,
        model,
        spec=spec,
        annotations={
            contract.ANNOTATION_ARTIFACT: artifact,
            contract.ANNOTATION_HASH: serving_hash(model, artifact),
        },
    )


def replicas(model: Model, count: int) -> Json:
    """The scaler's whole intent on the Deployment."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": model.name, "namespace": model.namespace},
        "spec": {"replicas": count},
    }


def service(model: Model) -> Json:
    """Port 80 in front of the gateways."""
    spec = {
        "selector": selector(model.name),
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": "http"}],
    }
    return _hashed(_child("v1", "Service", model.name, model, spec=spec))


def network_policy(model: Model, context: Context) -> Json:
    """The API is open to the cluster; the admin port to the operator alone."""
    operator = {
        "namespaceSelector": {"matchLabels": {OPERATOR_NAMESPACE_LABEL: context.namespace}},
        "podSelector": {"matchLabels": dict(contract.OPERATOR_POD_LABELS)},
    }
    spec = {
        "podSelector": {"matchLabels": selector(model.name)},
        "policyTypes": ["Ingress"],
        "ingress": [
            {"ports": [{"protocol": "TCP", "port": contract.API_PORT}]},
            {"from": [operator], "ports": [{"protocol": "TCP", "port": contract.ADMIN_PORT}]},
        ],
    }
    return _hashed(_child("networking.k8s.io/v1", "NetworkPolicy", model.name, model, spec=spec))


def control(
    model: Model, level: Mapping[str, int], memory: Mapping[str, Any], lowest: int | None = None
) -> Json:
    """The ConfigMap that tells a starting pod its bounds, and the next operator what this knew.

    ``lowest``: the lowest level that the quality gate lets a request ask for; None: no gate.
    """
    data = {
        contract.LEVEL_FILE: _compact(level),
        contract.SLO_FILE: _compact(slo_targets(model, lowest)),
        contract.MEMORY_FILE: _compact(memory),
    }
    manifest = _child("v1", "ConfigMap", names.control(model.name), model)
    return {**manifest, "data": data}


def slo_targets(model: Model, lowest: int | None) -> dict[str, int | None]:
    """What the gateway counts events against, and the lowest level it lets in."""
    targets = {
        "ttft_ms": model.ttft.target_ms if model.ttft else None,
        "itl_ms": model.itl.target_ms if model.itl else None,
    }
    return targets if lowest is None else {**targets, "lowest_level": lowest}


def _labels(model: Model, role: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "prismmodel",
        "app.kubernetes.io/instance": model.name,
        "app.kubernetes.io/managed-by": contract.MANAGED_BY,
        "app.kubernetes.io/part-of": "prism",
        contract.LABEL_MODEL: model.name,
        contract.LABEL_ROLE: role,
    }


def _child(
    api_version: str,
    kind: str,
    name: str,
    model: Model,
    *,
    spec: Json | None = None,
    role: str = contract.ROLE_SERVING,
    annotations: Mapping[str, str] | None = None,
    owned: bool = True,
) -> Json:
    meta: Json = {"name": name, "namespace": model.namespace, "labels": _labels(model, role)}
    if annotations:
        meta["annotations"] = dict(annotations)
    if owned:
        meta["ownerReferences"] = [owner_reference(model)]
    child: Json = {"apiVersion": api_version, "kind": kind, "metadata": meta}
    return {**child, "spec": spec} if spec is not None else child


def _hashed(manifest: Json) -> Json:
    """With a hash of its own text, so that an unchanged one is not applied again."""
    meta = {
        **manifest["metadata"],
        "annotations": {contract.ANNOTATION_HASH: names.digest(manifest)},
    }
    return {**manifest, "metadata": meta}


def _compact(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
