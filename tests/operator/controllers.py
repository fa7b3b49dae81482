"""What the cluster's own controllers would do, one call at a time, on the fake cluster."""

import json
from typing import Any

from prism import contract

from .cluster import FakeCluster

Json = dict[str, Any]
RESULT = {
    "result": "ok",
    "digest": "sha256:abc",
    "revision": "main",
    "sub_experts": 8,
    "architecture": "OlmoeForCausalLM",
    "seconds": 61.2,
    "points": [
        {"level": 100, "own_share": 1.0, "loss": 0.0, "se": 0.0, "kl": 0.0, "top1": 1.0},
        {"level": 75, "own_share": 0.75, "loss": 0.2, "se": 0.02, "kl": 0.003, "top1": 0.96},
        {"level": 50, "own_share": 0.5, "loss": 1.0, "se": 0.05, "kl": 0.012, "top1": 0.93},
        {"level": 25, "own_share": 0.25, "loss": 5.0, "se": 0.1, "kl": 0.06, "top1": 0.85},
    ],
}


def job_pod(
    cluster: FakeCluster, job: Json, status: Json, suffix: str = "x", index: int | None = None
) -> None:
    """A pod of the Job in this state; with an index where the Job is an Indexed one."""
    name = f"{job['metadata']['name']}-{suffix}"
    labels = {
        **job["spec"]["template"]["metadata"]["labels"],
        "batch.kubernetes.io/job-name": job["metadata"]["name"],
    }
    if index is not None:
        labels["batch.kubernetes.io/job-completion-index"] = str(index)
    meta = {
        "name": name,
        "namespace": job["metadata"]["namespace"],
        "labels": labels,
        "ownerReferences": [{"uid": job["metadata"]["uid"], "kind": "Job", "name": name}],
    }
    cluster.put_new("pods", {"metadata": meta, "spec": {}, "status": status})


def ended(message: str, exit_code: int = 0, reason: str = "Completed") -> Json:
    state = {"terminated": {"message": message, "exitCode": exit_code, "reason": reason}}
    return {"phase": "Failed", "containerStatuses": [{"name": "refactor", "state": state}]}


def finish_jobs(cluster: FakeCluster, result: Json | None = None) -> int:
    """Let all running Jobs succeed; returns how many did."""
    done = 0
    for job in cluster.list("jobs"):
        if (job.get("status") or {}).get("conditions"):
            continue
        job_pod(cluster, job, ended(json.dumps(result or RESULT)))
        set_job(cluster, job, "Complete")
        done += 1
    return done


def fail_jobs(cluster: FakeCluster, message: str, exit_code: int = 3, why: str = "Error") -> None:
    for job in cluster.list("jobs"):
        job_pod(cluster, job, ended(message, exit_code, why))
        set_job(cluster, job, "Failed", "PodFailurePolicy")


def set_job(cluster: FakeCluster, job: Json, condition: str, reason: str = "") -> None:
    row = {"type": condition, "status": "True", "reason": reason, "message": "from the Job"}

    def change(body: Json) -> None:
        body["status"] = {"conditions": [row]}

    cluster.edit("jobs", job["metadata"]["namespace"], job["metadata"]["name"], change)


def run_deployments(
    cluster: FakeCluster, address: tuple[str, int, int] = ("127.0.0.1", 1, 1), ready: bool = True
) -> bool:
    """Pods as wanted, at ``address`` (ip, api port, admin port); True if anything changed."""
    changed = False
    for deployment in cluster.list("deployments"):
        meta, spec = deployment["metadata"], deployment["spec"]
        pods = cluster.list("pods", meta["namespace"], selector(deployment))
        artifact = spec["template"]["metadata"]["annotations"][contract.ANNOTATION_ARTIFACT]
        wanted = {f"{meta['name']}-{meta['annotations'][contract.ANNOTATION_HASH]}-{i}"
                  for i in range(spec["replicas"])}  # fmt: skip
        for pod in pods:
            if pod["metadata"]["name"] not in wanted:
                cluster.remove("pods", meta["namespace"], pod["metadata"]["name"])
                changed = True
        for name in sorted(wanted - {pod["metadata"]["name"] for pod in pods}):
            cluster.put_new("pods", serving_pod(deployment, name, artifact, address, ready))
            changed = True
        count = len(wanted)
        status = {
            "observedGeneration": meta["generation"],
            "replicas": count,
            "updatedReplicas": count,
            "readyReplicas": count if ready else 0,
        }
        if deployment.get("status") != status:
            _set_status(cluster, deployment, status)
            changed = True
    return changed


def serving_pod(
    deployment: Json, name: str, artifact: str, address: tuple[str, int, int], ready: bool
) -> Json:
    template = deployment["spec"]["template"]
    ip, api, admin = address
    ports = [{"name": "http", "containerPort": api}, {"name": "admin", "containerPort": admin}]
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {
        "metadata": {
            "name": name,
            "namespace": deployment["metadata"]["namespace"],
            "labels": template["metadata"]["labels"],
            "annotations": {contract.ANNOTATION_ARTIFACT: artifact},
            "ownerReferences": [
                {"uid": deployment["metadata"]["uid"], "kind": "ReplicaSet", "name": "r"}
            ],
        },
        "spec": {"initContainers": [{"name": "gateway", "ports": ports}], "containers": []},
        "status": {"podIP": ip, "phase": "Running", "conditions": conditions},
    }


def selector(deployment: Json) -> str:
    labels = deployment["spec"]["selector"]["matchLabels"]
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _set_status(cluster: FakeCluster, deployment: Json, status: Json) -> None:
    def change(body: Json) -> None:
        body["status"] = status

    meta = deployment["metadata"]
    cluster.edit("deployments", meta["namespace"], meta["name"], change)
