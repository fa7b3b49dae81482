"""The PrismModel as the operator reads it: frozen data, parsed once, never re-checked.

Pure. The API server has applied schema, defaults and rules already; what is checked again here is
only what would make later code crash (a wrong type, a missing part), because a CRD of another
version may be installed. All problems come at once. Units are in the names; levels are integers in
percent.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from prism import contract

from prism_operator import names

Json = dict[str, Any]  # Any: the API server's own documents
NO_TARGET: Final = None
METRICS: Final = ("perplexity", "kl", "topOneDisagreement")  # of the quality gate


class SpecError(ValueError):
    """The spec cannot be used; the message lists every problem with its path."""


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a claim: ``pvc://claim/path``; ``path`` without a leading slash."""

    claim: str
    path: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where the checkpoint comes from; ``location`` is set for pvc:// only."""

    uri: str
    revision: str
    secret_name: str
    secret_key: str

    @property
    def location(self) -> Location | None:
        return parse_location(self.uri)


@dataclass(frozen=True, slots=True)
class Cache:
    """Where artifacts are kept: a claim that exists, or ``create`` holds how to make one."""

    claim_name: str
    sub_path: str
    create: Json | None
    delete_with_owner: bool


@dataclass(frozen=True, slots=True)
class QualityGate:
    """A level passes when its ``metric`` is at most this much above that of level 100."""

    metric: str
    max_increase_percent: float


@dataclass(frozen=True, slots=True)
class Refactor:
    """Inputs of the refactor Job; None leaves the choice of a number to the job."""

    sub_experts: int | None
    seed: int
    calibration_uri: str
    calibration_tokens: int | None
    gate: QualityGate | None
    parallelism: int
    resources: Json
    active_deadline_s: int
    backoff_limit: int


@dataclass(frozen=True, slots=True)
class Serving:
    """Inputs of the pods that answer."""

    replicas: int
    image: str
    dtype: str
    resources: Json
    accelerator: str
    accelerator_count: int
    drain_s: int


@dataclass(frozen=True, slots=True)
class Objective:
    """Met when at least ``percentile`` percent of events are within ``target_ms``."""

    target_ms: int
    percentile: int


@dataclass(frozen=True, slots=True)
class Behavior:
    window_s: int
    max_step: int


@dataclass(frozen=True, slots=True)
class Elasticity:
    mode: str
    min_level: int
    max_level: int
    preferred_level: int
    level: int
    step: int
    up: Behavior
    down: Behavior


@dataclass(frozen=True, slots=True)
class Model:
    """One PrismModel: identity and spec."""

    name: str
    namespace: str
    uid: str
    generation: int
    served_name: str
    source: Source
    cache: Cache
    refactor: Refactor
    serving: Serving
    ttft: Objective | None
    itl: Objective | None
    slo_window_s: int
    elasticity: Elasticity
    autoscaling: bool
    min_replicas: int
    max_replicas: int
    stale_after_s: int
    on_metrics_loss: str
    paused: bool

    @property
    def key(self) -> str:
        """``namespace/name``: the value of the pods' constant metric label."""
        return f"{self.namespace}/{self.name}"


def parse_location(uri: str) -> Location | None:
    """``pvc://claim/path`` taken apart; None for any other scheme."""
    match = re.fullmatch(r"pvc://([^/]+)(?:/(.*))?", uri)
    if not match:
        return None
    path = "/".join(part for part in (match[2] or "").split("/") if part and part != ".")
    return Location(match[1], path)


def owner_reference(model: Model) -> Json:
    """Makes the garbage collector delete a child with its PrismModel."""
    return {
        "apiVersion": contract.API_VERSION,
        "kind": contract.KIND,
        "name": model.name,
        "uid": model.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def selector(name: str) -> dict[str, str]:
    """Labels that pick the serving pods; immutable in a Deployment, so never add to them."""
    return {contract.LABEL_MODEL: name, contract.LABEL_ROLE: contract.ROLE_SERVING}


@dataclass(slots=True)
class _Reader:
    """One object of the document, its path, and the list all problems go to."""

    data: Mapping[str, Any]
    path: str
    problems: list[str] = field(default_factory=list)

    def sub(self, key: str) -> "_Reader":
        return _Reader(self._get(key, dict, {}), f"{self.path}.{key}", self.problems)

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def text(self, key: str, default: str | None = "") -> str:
        return str(self._get(key, str, default))

    def number(self, key: str, default: int | None = None) -> int:
        return int(self._get(key, int, default) or 0)

    def decimal(self, key: str) -> float:
        value = self.data.get(key)
        return float(self.number(key) if not isinstance(value, float) else value)

    def number_or(self, word: str, key: str, default: int) -> int | None:
        """None where the word stands in the place of a number."""
        return None if self.data.get(key) == word else self.number(key, default)

    def flag(self, key: str) -> bool:
        return bool(self._get(key, bool, False))

    def choice(self, key: str, *choices: str) -> str:
        value = self.text(key, choices[0])
        if value not in choices:
            self.problems.append(f"{self.path}.{key}: {value!r} is not one of {', '.join(choices)}")
        return value

    def _get(self, key: str, kind: type, default: Any) -> Any:
        value = self.data.get(key)
        if value is None:
            if default is None:
                self.problems.append(f"{self.path}.{key}: missing")
                return kind()
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.problems.append(f"{self.path}.{key}: {value!r} is not of type {kind.__name__}")
            return kind()
        return value


def parse(body: Mapping[str, Any]) -> Model:
    """Read a PrismModel; raises SpecError with all problems."""
    problems: list[str] = []
    meta = _Reader(body.get("metadata") or {}, "metadata", problems)
    spec = _Reader(body.get("spec") or {}, "spec", problems)
    name = meta.text("name", None)
    slo, scale, metrics = spec.sub("slo"), spec.sub("autoscaling"), spec.sub("metrics")
    model = Model(
        name=name,
        namespace=meta.text("namespace", None),
        uid=meta.text("uid", None),
        generation=meta.number("generation", 1),
        served_name=spec.sub("model").text("name") or name,
        source=_source(spec.sub("model")),
        cache=_cache(spec.sub("cache"), name),
        refactor=_refactor(spec.sub("refactor")),
        serving=_serving(spec.sub("serving")),
        ttft=_objective(slo, "ttft"),
        itl=_objective(slo, "itl"),
        slo_window_s=slo.number("windowSeconds", 300),
        elasticity=_elasticity(spec.sub("elasticity")),
        autoscaling=scale.choice("mode", "Off", "Auto") == "Auto",
        min_replicas=scale.number("minReplicas", 1),
        max_replicas=scale.number("maxReplicas", 1),
        stale_after_s=metrics.number("staleAfterSeconds", 60),
        on_metrics_loss=metrics.choice("onMetricsLoss", "Hold", "MinLevel", "MaxLevel"),
        paused=spec.flag("paused"),
    )
    if problems:
        raise SpecError("; ".join(problems))
    return model


def _source(model: _Reader) -> Source:
    uri = model.text("uri", None)
    if not uri.startswith(("hf://", "pvc://")):
        model.problems.append(f"{model.path}.uri: {uri!r} begins with neither pvc:// nor hf://")
    secret = model.sub("credentials").sub("secretRef")
    return Source(uri, model.text("revision"), secret.text("name"), secret.text("key", "token"))


def _cache(cache: _Reader, name: str) -> Cache:
    pvc = cache.sub("pvc")
    if cache.has("pvc") == cache.has("create"):
        cache.problems.append(f"{cache.path}: exactly one of pvc and create is needed")
    create = dict(cache.sub("create").data) if cache.has("create") else None
    return Cache(
        claim_name=names.cache(name) if create else pvc.text("claimName", "" if create else None),
        sub_path=pvc.text("subPath"),
        create=create,
        delete_with_owner=cache.choice("reclaimPolicy", "Retain", "Delete") == "Delete",
    )


def _refactor(part: _Reader) -> Refactor:
    calibration = part.sub("calibration")
    return Refactor(
        sub_experts=part.number_or("auto", "subExperts", contract.DEFAULT_SUB_EXPERTS),
        seed=part.number("seed", 0),
        calibration_uri=calibration.text("uri"),
        calibration_tokens=calibration.number("tokens") if calibration.has("tokens") else None,
        gate=_gate(part.sub("qualityGate")) if part.has("qualityGate") else None,
        parallelism=part.number("parallelism", 1),
        resources=dict(part.sub("resources").data),
        active_deadline_s=part.number("activeDeadlineSeconds", 21600),
        backoff_limit=part.number("backoffLimit", 6),
    )


def _gate(part: _Reader) -> QualityGate:
    return QualityGate(part.choice("metric", *METRICS), part.decimal("maxIncreasePercent"))


def _serving(part: _Reader) -> Serving:
    accelerator = part.sub("accelerator")
    return Serving(
        replicas=part.number("replicas", 1),
        image=part.text("image"),
        dtype=part.choice("dtype", "bfloat16", "float32"),
        resources=dict(part.sub("resources").data),
        accelerator=accelerator.text("resourceName"),
        accelerator_count=accelerator.number("count", 1),
        drain_s=part.number("drainSeconds", 60),
    )


def _objective(slo: _Reader, key: str) -> Objective | None:
    if not slo.has(key):
        return NO_TARGET
    part = slo.sub(key)
    return Objective(part.number("targetMilliseconds"), part.number("percentile", 95))


def _elasticity(part: _Reader) -> Elasticity:
    mode = part.choice("mode", "Auto", "Manual", "Off")
    top = part.number("maxLevelPercent", contract.MAX_LEVEL)
    up, down = part.sub("behavior").sub("up"), part.sub("behavior").sub("down")
    return Elasticity(
        mode=mode,
        min_level=part.number("minLevelPercent", 50),
        max_level=top,
        preferred_level=part.number("preferredLevelPercent", top),
        level=part.number("levelPercent", None if mode == "Manual" else top),
        step=part.number("stepPercent", 5),
        up=Behavior(up.number("stabilizationWindowSeconds", 30), up.number("maxStepPercent", 20)),
        down=Behavior(
            down.number("stabilizationWindowSeconds", 15), down.number("maxStepPercent", 100)
        ),
    )
