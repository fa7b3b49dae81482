"""The one gateway to the API server: plain dicts in, plain dicts out.

It knows HTTP, authentication, timeouts and which errors mean what; it knows nothing of PrismModels
and decides nothing. It uses ``kubernetes.aio`` for configuration and transport only: the generated
models cost memory and raise on shapes they do not know, and server-side apply needs none of them.

The verbs the operator needs (the chart's roles grant these and no more):

- ``moeprism.io`` prismmodels: get list watch patch; prismmodels/status: patch;
  prismmodels/finalizers: update
- ``batch`` jobs: get list watch create delete
- ``apps`` deployments: get list watch create patch
- core services, configmaps, persistentvolumeclaims: get list create patch
- ``networking.k8s.io`` networkpolicies: get list create patch
- core pods: get list watch
- core events: create

No Secrets, no namespaces, no CustomResourceDefinitions: Kopf's scanning is switched off.
"""

import asyncio
import json
import os
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
from kubernetes.aio import client, config

REQUEST_TIMEOUT_S = 20.0
MAX_PARALLEL = 16

# kind -> (path prefix, plural): the kinds of our children and of our object.
PATHS = {
    "PrismModel": ("/apis/moeprism.io/v1alpha1", "prismmodels"),
    "Job": ("/apis/batch/v1", "jobs"),
    "Deployment": ("/apis/apps/v1", "deployments"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Service": ("/api/v1", "services"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "Pod": ("/api/v1", "pods"),
    "Event": ("/api/v1", "events"),
}

Json = dict[str, Any]  # Any: the API server's own documents


class KubeError(Exception):
    """The API server did not do what was asked."""


class Unavailable(KubeError):
    """Timeout, network, 429 or 5xx: try again later."""


class Refused(KubeError):
    """400, 403 or 422: asking again will not help until a person changes something."""


class Conflict(KubeError):
    """409: the object exists, or has changed meanwhile."""


class Gateway(Protocol):
    """What the reconciler needs of the API server."""

    async def get(self, kind: str, namespace: str, name: str) -> Json | None: ...
    async def select(self, kind: str, namespace: str, selector: str) -> list[Json]: ...
    async def create(self, manifest: Json) -> Json: ...
    async def apply(self, manifest: Json, manager: str) -> Json: ...
    async def apply_status(self, manifest: Json, manager: str) -> Json: ...
    async def delete(self, kind: str, namespace: str, name: str) -> None: ...


@dataclass(slots=True)
class Kube:
    """Gateway over one ApiClient; ``requests`` counts by verb and code for the metrics."""

    api: Any  # Any: kubernetes.aio carries no usable types
    limit: asyncio.Semaphore
    requests: dict[tuple[str, int], int]

    @classmethod
    async def connect(cls) -> "Kube":
        """In a pod the service account, else the kubeconfig (KUBECONFIG or ~/.kube/config)."""
        configuration = client.Configuration()
        if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
            config.load_incluster_config(client_configuration=configuration)
        else:
            # NB: the library reads KUBECONFIG at import time; here it is read when it is needed.
            file = os.environ.get("KUBECONFIG") or None
            await config.load_kube_config(file, client_configuration=configuration)
        return cls(client.ApiClient(configuration), asyncio.Semaphore(MAX_PARALLEL), {})

    async def close(self) -> None:
        await self.api.close()

    async def serves(self, kind: str) -> bool:
        """Whether the API server knows the kind."""
        prefix, plural = PATHS[kind]
        try:
            found = await self._call("GET", prefix, absent_ok=True)
        except Unavailable:
            return False
        return any(one.get("name") == plural for one in (found or {}).get("resources", ()))

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        """The object, or None where there is none."""
        return await self._call("GET", _path(kind, namespace, name), absent_ok=True)

    async def select(self, kind: str, namespace: str, selector: str) -> list[Json]:
        """Objects that carry the labels."""
        found = await self._call("GET", _path(kind, namespace), query=[("labelSelector", selector)])
        return list((found or {}).get("items", ()))

    async def create(self, manifest: Json) -> Json:
        """POST; raises Conflict where the name is taken."""
        path = _path(manifest["kind"], manifest["metadata"]["namespace"])
        return await self._call("POST", path, body=manifest) or {}

    async def apply(self, manifest: Json, manager: str) -> Json:
        """Server-side apply of a complete intent, taking over fields that others hold."""
        meta = manifest["metadata"]
        path = _path(manifest["kind"], meta["namespace"], meta["name"])
        return await self._apply(path, manifest, manager)

    async def apply_status(self, manifest: Json, manager: str) -> Json:
        """Server-side apply on the status subresource."""
        meta = manifest["metadata"]
        path = _path(manifest["kind"], meta["namespace"], meta["name"]) + "/status"
        return await self._apply(path, manifest, manager)

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        """Delete with its dependents in the background; an absent object is fine."""
        path = _path(kind, namespace, name)
        query = [("propagationPolicy", "Background")]
        await self._call("DELETE", path, query=query, absent_ok=True)

    async def _apply(self, path: str, manifest: Json, manager: str) -> Json:
        query = [("fieldManager", manager), ("force", "true")]
        kind = "application/apply-patch+yaml"
        return await self._call("PATCH", path, query=query, body=manifest, content_type=kind) or {}

    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: list[tuple[str, str]] | None = None,
        body: Json | None = None,
        content_type: str = "application/json",
        absent_ok: bool = False,
    ) -> Json | None:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        async with self.limit:
            try:
                _, url, sent, payload, _ = await self.api.param_serialize(
                    method,
                    path,
                    query_params=query or [],
                    header_params=headers,
                    body=body,
                    auth_settings=["BearerToken"],
                )
                answer = await self.api.rest_client.request(
                    method, url, headers=sent, body=payload, _request_timeout=REQUEST_TIMEOUT_S
                )
                data = await answer.read()
                code = int(answer.status)
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                self._count(method, 0)
                raise Unavailable(f"{method} {path}: {type(error).__name__} {error}") from error
        self._count(method, code)
        if code == 404 and absent_ok:
            return None
        if code >= 400:
            raise _error(code, f"{method} {path}", data)
        result: Json = json.loads(data)
        return result

    def _count(self, method: str, code: int) -> None:
        self.requests[method, code] = self.requests.get((method, code), 0) + 1


def _path(kind: str, namespace: str, name: str = "") -> str:
    prefix, plural = PATHS[kind]
    return f"{prefix}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")


def _error(code: int, what: str, data: bytes) -> KubeError:
    try:
        message = str(json.loads(data)["message"])
    except (ValueError, KeyError, TypeError):
        message = data[:300].decode("utf-8", "replace")
    text = f"{what}: {code} {message}"
    if code == 409:
        return Conflict(text)
    if code == 429 or code >= 500 or code == 401:  # 401: the token was rotated; it is read anew
        return Unavailable(text)
    return Refused(text)
