"""The imperative shell: snapshot, observe, plan, execute, write status; nobody else orders I/O.

It decides nothing; ``plan`` and ``status`` do. What it keeps per object is a cache that a restart
may lose: the children as last listed, the law's memory (also in the ConfigMap), and the status as
last written, since Kopf's copy of the object lags behind our own write.

Children are listed anew when something woke the loop, after a write, and every ``RESYNC_S``; the
ticks between cost the API server nothing.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from prism import contract

from prism_operator import api, manifests, names, plan, status
from prism_operator.api import Json, Model
from prism_operator.kube import Conflict, Gateway, KubeError, Refused
from prism_operator.meters import Meters
from prism_operator.observe import Observed, observe
from prism_operator.plan import Action, Apply, Create, Delete, Measured, Plan, Push
from prism_operator.pod_words import Trouble
from prism_operator.pods import Context
from prism_operator.scaler.state import Change, Memory, memory_from_json
from prism_operator.telemetry import Telemetry

RESYNC_S: Final = 300.0
AGAIN_S: Final = 0.2  # after a write: look at its result soon
REFUSED_S: Final = 30.0  # the API server said no: the same is not asked again before
LISTED: Final = ("Job", "Deployment", "Service", "ConfigMap", "NetworkPolicy", "Pod")

log = logging.getLogger("prism.reconcile")


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What the API server said no to, when, and why."""

    action: Action
    at: float
    why: str


@dataclass(slots=True)
class _Kept:
    """What one object's loop remembers between passes; ``untold`` is decided but in no status."""

    status: Json
    seen: Observed | None = None
    seen_at: float = 0.0
    memory: Memory | None = None
    written_at: float = 0.0
    refusals: tuple[_Refusal, ...] = ()
    untold: tuple[Change, ...] = ()


@dataclass(slots=True)
class Reconciler:
    """``step`` is one pass for one object; passes of one object never overlap."""

    kube: Gateway
    telemetry: Telemetry
    context: Context
    meters: Meters = field(default_factory=Meters)
    tick_s: float = 5.0
    clock: Callable[[], float] = time.time
    _kept: dict[str, _Kept] = field(default_factory=dict)

    async def step(self, body: Mapping[str, Any], *, woken: bool = True) -> float:
        """One pass; returns in how many seconds to come again. Raises KubeError."""
        with self.meters.seconds.time():
            return await self._step(dict(body), woken)

    def forget(self, namespace: str, name: str, uid: str) -> None:
        """The object is gone or its loop has ended."""
        self._kept.pop(uid, None)
        self.telemetry.forget(f"{namespace}/{name}")
        self.meters.forget(namespace, name)

    async def _step(self, body: Json, woken: bool) -> float:
        now = self.clock()
        uid = str(body["metadata"]["uid"])
        kept = self._kept.setdefault(uid, _Kept(dict(body.get("status") or {})))
        try:
            model = api.parse(body)
        except api.SpecError as error:
            return await self._report_unreadable(body, kept, error, now)
        if woken or kept.seen is None or now - kept.seen_at > RESYNC_S:
            kept.seen, kept.seen_at = await self._observe(model), now
        seen = kept.seen
        memory = kept.memory or _remembered(seen, kept.status)
        measured = await self._measure(model, seen, memory)
        made = plan.make(model, seen, kept.status, measured, memory, self.context, now, self.tick_s)
        wrote, measured = await self._execute(model, made.actions, seen, measured, kept, now)
        if kept.refusals:
            text = "; ".join(refusal.why for refusal in kept.refusals)
            made = replace(made, refused=Trouble("RefusedByAPIServer", text))
        kept.memory = made.memory or memory
        if wrote or made.blind or any(refusal.at == now for refusal in kept.refusals):
            kept.seen = None
        self.meters.plan(model.namespace, model.name, made, measured, now)
        await self._report(model, seen, made, measured, kept, now)
        if wrote:
            return AGAIN_S
        return REFUSED_S if kept.refusals and made.decision is None else made.requeue_s

    async def _observe(self, model: Model) -> Observed:
        labels = f"{contract.LABEL_MODEL}={model.name}"
        lists = [self.kube.select(kind, model.namespace, labels) for kind in LISTED]
        wanted = {model.cache.claim_name} | {
            place.claim
            for uri in (model.source.uri, model.refactor.calibration_uri)
            if (place := api.parse_location(uri))
        }
        named = sorted(wanted)
        gets = [self.kube.get("PersistentVolumeClaim", model.namespace, name) for name in named]
        found, claims = await asyncio.gather(asyncio.gather(*lists), asyncio.gather(*gets))
        children: dict[str, list[Json]] = {
            kind: [{"kind": kind, **child} for child in group]
            for kind, group in zip(LISTED, found, strict=True)
        }
        children.update(await self._unlabelled(model, children))
        phases = {
            name: str((claim.get("status") or {}).get("phase", "Pending")) if claim else "Missing"
            for name, claim in zip(named, claims, strict=True)
        }
        if model.cache.create is not None:
            phases.pop(model.cache.claim_name)  # ours to make, so never "missing"
            mine = next((c for c in claims if c and _name(c) == model.cache.claim_name), None)
            claim = [{"kind": "PersistentVolumeClaim", **mine}] if mine else []
            children["PersistentVolumeClaim"] = claim
        return observe(model.uid, children, phases)

    async def _unlabelled(
        self, model: Model, children: Mapping[str, list[Json]]
    ) -> dict[str, list[Json]]:
        """Objects of somebody else under the names we would apply to: found before we take them."""
        expected = {
            "Deployment": model.name,
            "Service": model.name,
            "NetworkPolicy": model.name,
            "ConfigMap": names.control(model.name),
            "Job": names.job(model.name, manifests.artifact_hash(model)),
        }
        absent = [
            kind
            for kind, name in expected.items()
            if all(_name(child) != name for child in children[kind])
        ]
        found = await asyncio.gather(
            *(self.kube.get(kind, model.namespace, expected[kind]) for kind in absent)
        )
        return {
            kind: [*children[kind], {"kind": kind, **one}]
            for kind, one in zip(absent, found, strict=True)
            if one is not None
        }

    async def _measure(self, model: Model, seen: Observed, memory: Memory) -> Measured:
        if not seen.ready_pods or model.paused:
            return Measured()
        return await self.telemetry.measure(model, seen.ready_pods, memory.seq, self._token(model))

    async def _execute(
        self,
        model: Model,
        actions: tuple[Action, ...],
        seen: Observed,
        measured: Measured,
        kept: _Kept,
        now: float,
    ) -> tuple[bool, Measured]:
        """In order; an error ends the pass, and the next one goes on from what is there.

        A refusal ends its own action alone: a Job over its quota must not keep the level from the
        pods that serve.
        """
        wrote, recent = False, [one for one in kept.refusals if now - one.at < REFUSED_S]
        kept.refusals = ()
        for action in actions:
            if isinstance(action, Push):
                token = self._token(model)
                took = await self.telemetry.push(seen.ready_pods, action.level, token)
                measured = replace(measured, applied=took)
                continue
            refusal = next((one for one in recent if one.action == action), None)
            if refusal is None:
                try:
                    await self._write(model, action)
                    wrote = True
                except Refused as error:
                    refusal = _Refusal(action, now, str(error))
            if refusal is not None:
                kept.refusals += (refusal,)
        return wrote, measured

    async def _write(self, model: Model, action: Apply | Create | Delete) -> None:
        kind = action.kind if isinstance(action, Delete) else str(action.manifest["kind"])
        self._count(model.namespace, model.name, kind)
        if isinstance(action, Delete):
            await self.kube.delete(kind, model.namespace, action.name)
        elif isinstance(action, Create):
            try:
                await self.kube.create(action.manifest)
            except Conflict:
                log.info("%s %s exists already", kind, _name(action.manifest))
        else:
            await self.kube.apply(action.manifest, action.manager)
        log.info("%s: %s %s", model.key, type(action).__name__.lower(), kind)

    async def _report(
        self, model: Model, seen: Observed, made: Plan, measured: Measured, kept: _Kept, now: float
    ) -> None:
        if made.decision:
            kept.untold = made.decision.changes + kept.untold
            made = replace(made, decision=replace(made.decision, changes=kept.untold))
        new = status.build(model, seen, made, measured, kept.status, now)
        self.meters.status(model.namespace, model.name, new)
        if not status.must_write(kept.status, new, now - kept.written_at):
            return
        told = status.notices(made, kept.status, new)
        await self._write_status(model.namespace, model.name, new)
        kept.status, kept.written_at, kept.untold = new, now, ()
        for notice in told:
            log.info("%s: %s: %s", model.key, notice.reason, notice.message)
            await self._event(model, notice, now)

    async def _report_unreadable(
        self, body: Json, kept: _Kept, error: api.SpecError, now: float
    ) -> float:
        """A spec this version cannot read (a CRD of another version): say so and wait."""
        meta = body["metadata"]
        text, stamp = str(error)[:1024], status.iso(now)
        condition = {
            "type": "Accepted",
            "status": "False",
            "reason": "InvalidSpec",
            "message": text,
            "observedGeneration": int(meta.get("generation", 1)),
            "lastTransitionTime": stamp,
        }
        old: Json = next(iter(kept.status.get("conditions") or ()), {})
        if old.get("reason") != "InvalidSpec" or old.get("message") != text:
            ready = {**condition, "type": "Ready"}
            new = {"phase": "Failed", "conditions": [condition, ready]}
            await self._write_status(meta["namespace"], meta["name"], new)
            kept.status, kept.written_at = new, now
        return RESYNC_S

    async def _write_status(self, namespace: str, name: str, new: Json) -> None:
        manifest = {
            "apiVersion": contract.API_VERSION,
            "kind": contract.KIND,
            "metadata": {"namespace": namespace, "name": name},
            "status": new,
        }
        self._count(namespace, name, "status")
        await self.kube.apply_status(manifest, contract.FIELD_MANAGER)

    async def _event(self, model: Model, notice: status.Notice, now: float) -> None:
        """Events are for people: one that cannot be written is logged, and nothing else stops."""
        stamp = status.iso(now)
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"namespace": model.namespace, "generateName": f"{model.name}."},
            "type": "Warning" if notice.warning else "Normal",
            "reason": notice.reason[:128],
            "message": notice.message[:1000],
            "involvedObject": {
                "apiVersion": contract.API_VERSION,
                "kind": contract.KIND,
                "namespace": model.namespace,
                "name": model.name,
                "uid": model.uid,
            },
            "source": {"component": contract.MANAGED_BY},
            "reportingComponent": contract.MANAGED_BY,
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
        }
        self._count(model.namespace, model.name, "Event")
        try:
            await self.kube.create(event)
        except KubeError as error:
            log.warning("%s: event %s not written: %s", model.key, notice.reason, error)

    def _count(self, namespace: str, name: str, kind: str) -> None:
        """Before a write is sent: a refused or lost one loads the API server as well."""
        self.meters.writes.labels(namespace, name, kind).inc()

    def _token(self, model: Model) -> str:
        return names.admin_token(self.context.admin_key, model.uid)


def _remembered(seen: Observed, old: Mapping[str, Any]) -> Memory:
    """What the process before this one knew; without its ConfigMap, at least the last number."""
    data = seen.control or {}
    try:
        memory = memory_from_json(json.loads(data[contract.MEMORY_FILE]))
        level = json.loads(data[contract.LEVEL_FILE])
        return replace(
            memory,
            seq=max(memory.seq, int(level["seq"])),
            floor=int(level["floor"]),
            ceiling=int(level["ceiling"]),
        )
    except (KeyError, TypeError, ValueError):
        return Memory(seq=int((old.get("level") or {}).get("seq", 0)))


def _name(manifest: Mapping[str, Any]) -> str:
    return str(manifest["metadata"]["name"])
