"""A Kubernetes API in memory: the semantics our operator leans on, and a record of every write.

Not a mock: it stores objects and answers as an API server does (resourceVersion, generation, status
isolation, server-side apply by field manager, finalizers, owner references, 404, 409, 422). What
controllers would do is done by ``controllers.py`` when a test says so.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prism_operator.kube import PATHS, Conflict, Refused, Unavailable

Json = dict[str, Any]
Key = tuple[str, str, str]  # plural, namespace, name

KINDS = {plural: (prefix, kind) for kind, (prefix, plural) in PATHS.items()}


@dataclass(frozen=True)
class Write:
    """One write as the API server saw it."""

    verb: str
    plural: str
    name: str
    manager: str = ""
    sub: str = ""
    body: Any = None


@dataclass
class FakeCluster:
    """``fault`` may raise before a write takes place."""

    objects: dict[Key, Json] = field(default_factory=dict)
    writes: list[Write] = field(default_factory=list)
    listeners: list[Callable[[str, str, Json], None]] = field(default_factory=list)
    fault: Callable[[Write], None] | None = None
    applied: dict[tuple[Key, str, str], Json] = field(default_factory=dict)
    _numbers: Any = field(default_factory=lambda: itertools.count(1))

    # -- reading

    def get(self, plural: str, namespace: str, name: str) -> Json | None:
        found = self.objects.get((plural, namespace, name))
        return copy.deepcopy(found) if found else None

    def list(self, plural: str, namespace: str = "", selector: str = "") -> list[Json]:
        return [
            copy.deepcopy(one)
            for (kind, where, _), one in sorted(self.objects.items(), key=lambda item: item[0])
            if kind == plural and namespace in ("", where) and matches(one, selector)
        ]

    @property
    def version(self) -> str:
        return str(
            max((int(o["metadata"]["resourceVersion"]) for o in self.objects.values()), default=1)
        )

    # -- writing

    def create(self, plural: str, body: Json, manager: str = "") -> Json:
        body = copy.deepcopy(body)
        meta = body["metadata"]
        if "name" not in meta:
            meta["name"] = f"{meta['generateName']}{next(self._numbers):x}"
        self._record(Write("create", plural, meta["name"], manager, body=body))
        if (plural, meta["namespace"], meta["name"]) in self.objects:
            raise Conflict(f"{plural} {meta['name']} already exists")
        return self.put_new(plural, body)

    def put_new(self, plural: str, body: Json) -> Json:
        """As ``create``, but by a controller: not recorded."""
        body = copy.deepcopy(body)
        meta = body["metadata"]
        key = (plural, meta["namespace"], meta["name"])
        number = next(self._numbers)
        meta.setdefault("uid", f"uid-{plural}-{meta['name']}-{number}")
        meta.setdefault("creationTimestamp", f"2026-01-01T00:00:{number % 60:02d}Z")
        meta["generation"] = 1
        if plural == "deployments":
            body["spec"].setdefault("replicas", 1)
        self._store(key, body, "ADDED")
        return copy.deepcopy(body)

    def apply(self, plural: str, body: Json, manager: str, sub: str = "") -> Json:
        meta = body["metadata"]
        key = (plural, meta["namespace"], meta["name"])
        self._record(Write("apply", plural, meta["name"], manager, sub, copy.deepcopy(body)))
        current = self.objects.get(key)
        if current is None:
            if sub:
                raise Refused(f"404 {plural} {meta['name']} not found")
            if plural == "deployments" and "template" not in body.get("spec", {}):
                raise Refused("422 spec.template: Required value")
            self.applied[key, manager, sub] = copy.deepcopy(body)
            return self.put_new(plural, body)
        before = self.applied.get((key, manager, sub), {})
        others = [
            a for (k, m, s), a in self.applied.items() if k == key and (m, s) != (manager, sub)
        ]
        new = copy.deepcopy(current)
        for part in ("spec", "data", "status", "metadata"):
            if (sub == "status") != (part == "status") and part != "metadata":
                continue
            if part == "metadata" and sub:
                continue
            _merge(new, body, before, others, part)
        self.applied[key, manager, sub] = copy.deepcopy(body)
        return self._update(key, current, new)

    def patch(self, plural: str, namespace: str, name: str, change: Any, sub: str = "") -> Json:
        """Merge patch (dict) or JSON patch (list), as Kopf sends them."""
        key = (plural, namespace, name)
        self._record(Write("patch", plural, name, "", sub, copy.deepcopy(change)))
        current = self.objects.get(key)
        if current is None:
            raise Refused(f"404 {plural} {name} not found")
        new = copy.deepcopy(current)
        if isinstance(change, list):
            for step in change:
                _json_patch(new, step)
        else:
            _merge_patch(new, change)
        return self._update(key, current, new)

    def delete(self, plural: str, namespace: str, name: str) -> None:
        self._record(Write("delete", plural, name))
        self.remove(plural, namespace, name)

    def remove(self, plural: str, namespace: str, name: str) -> None:
        """As ``delete``, but by a controller or a person: not recorded."""
        key = (plural, namespace, name)
        current = self.objects.get(key)
        if current is None:
            return
        if current["metadata"].get("finalizers"):
            new = copy.deepcopy(current)
            new["metadata"]["deletionTimestamp"] = "2026-01-01T00:01:00Z"
            new["metadata"]["generation"] += 1
            self._store(key, new, "MODIFIED")
            return
        self._drop(key)

    def edit(self, plural: str, namespace: str, name: str, change: Callable[[Json], None]) -> Json:
        """What a person or a controller does to an object."""
        key = (plural, namespace, name)
        current = self.objects[key]
        new = copy.deepcopy(current)
        change(new)
        return self._update(key, current, new)

    # -- inside

    def _record(self, write: Write) -> None:
        if self.fault:
            self.fault(write)
        self.writes.append(write)

    def _update(self, key: Key, current: Json, new: Json) -> Json:
        if new == current:
            return copy.deepcopy(new)
        if new.get("spec") != current.get("spec"):
            new["metadata"]["generation"] = current["metadata"].get("generation", 1) + 1
        if new["metadata"].get("deletionTimestamp") and not new["metadata"].get("finalizers"):
            self._drop(key)
            return copy.deepcopy(new)
        self._store(key, new, "MODIFIED")
        return copy.deepcopy(new)

    def _store(self, key: Key, body: Json, event: str) -> None:
        prefix, kind = KINDS[key[0]]
        body.setdefault("kind", kind)
        body.setdefault("apiVersion", prefix.removeprefix("/apis/").removeprefix("/api/"))
        body["metadata"]["resourceVersion"] = str(next(self._numbers))
        self.objects[key] = body
        self._tell(event, key[0], body)

    def _drop(self, key: Key) -> None:
        gone = self.objects.pop(key)
        for stale in [one for one in self.applied if one[0] == key]:
            del self.applied[stale]
        gone["metadata"]["resourceVersion"] = str(next(self._numbers))
        self._tell("DELETED", key[0], gone)
        uid = gone["metadata"]["uid"]
        for plural, namespace, name in list(self.objects):
            child = self.objects.get((plural, namespace, name))
            owners = (child or {}).get("metadata", {}).get("ownerReferences", ())
            if any(owner["uid"] == uid for owner in owners):
                self.remove(plural, namespace, name)

    def _tell(self, event: str, plural: str, body: Json) -> None:
        for listener in list(self.listeners):
            listener(event, plural, copy.deepcopy(body))


def matches(body: Json, selector: str) -> bool:
    labels = body["metadata"].get("labels") or {}
    for term in filter(None, selector.split(",")):
        name, _, value = term.partition("=")
        if name not in labels or (value and labels[name] != value):
            return False
    return True


def _merge(target: Json, body: Json, before: Json, others: list[Json], part: str) -> None:
    """Server-side apply of one top-level part: dicts merge, lists and scalars are replaced."""
    new, old = body.get(part), before.get(part)
    if part == "metadata":
        keys = ("labels", "annotations", "ownerReferences")
        new = {k: v for k, v in (new or {}).items() if k in keys}
        old = {k: v for k, v in (old or {}).items() if k in keys}
    here = target.setdefault(part, {})
    _remove(here, old or {}, new or {}, [other.get(part) or {} for other in others])
    _set(here, new or {})
    if not here:
        del target[part]


def _remove(here: Json, old: Json, new: Json, others: list[Json]) -> None:
    for key, value in old.items():
        if key not in here:
            continue
        if isinstance(value, dict) and isinstance(here[key], dict):
            deeper = [o[key] for o in others if isinstance(o.get(key), dict)]
            _remove(
                here[key], value, new.get(key) if isinstance(new.get(key), dict) else {}, deeper
            )  # type: ignore[arg-type]
            if not here[key] and key not in new:
                del here[key]
        elif key not in new and not any(key in other for other in others):
            del here[key]


def _set(here: Json, new: Json) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(here.get(key), dict):
            _set(here[key], value)
        else:
            here[key] = copy.deepcopy(value)


def _merge_patch(target: Json, change: Json) -> None:
    for key, value in change.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            _merge_patch(target.setdefault(key, {}), value)
        else:
            target[key] = value


def _json_patch(target: Json, step: Json) -> None:
    *path, last = [p.replace("~1", "/").replace("~0", "~") for p in step["path"].split("/")[1:]]
    here: Any = target
    for part in path:
        here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
    if step["op"] == "test":
        found = here[int(last)] if isinstance(here, list) else here.get(last)
        if found != step["value"]:
            raise Refused(f"422 test failed at {step['path']}: {json.dumps(found)}")
    elif step["op"] == "remove":
        del here[int(last) if isinstance(here, list) else last]
    elif isinstance(here, list):
        here.insert(len(here) if last == "-" else int(last), step["value"])
    else:
        here[last] = step["value"]


@dataclass
class FakeGateway:
    """prism_operator.kube.Gateway straight onto the fake cluster, without HTTP."""

    cluster: FakeCluster

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        return self.cluster.get(PATHS[kind][1], namespace, name)

    async def select(self, kind: str, namespace: str, selector: str) -> list[Json]:
        found = self.cluster.list(PATHS[kind][1], namespace, selector)
        for one in found:  # as in a real list, whose items carry neither
            one.pop("kind", None)
            one.pop("apiVersion", None)
        return found

    async def create(self, manifest: Json) -> Json:
        return self.cluster.create(PATHS[manifest["kind"]][1], manifest)

    async def apply(self, manifest: Json, manager: str) -> Json:
        return self.cluster.apply(PATHS[manifest["kind"]][1], manifest, manager)

    async def apply_status(self, manifest: Json, manager: str) -> Json:
        return self.cluster.apply(PATHS[manifest["kind"]][1], manifest, manager, "status")

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        self.cluster.delete(PATHS[kind][1], namespace, name)


__all__ = ["FakeCluster", "FakeGateway", "Unavailable", "Write", "matches"]
