"""What prism.json says: the schema of an artifact's manifest, to and from JSON.

Knows names and types; knows no file and no tensor, so it needs the standard library alone. Which
values are possible is said in manifest_rules. Decision: JSON is read by one small recursive parser
over the dataclass fields, which collects every problem with its path before it raises; a manifest
is written once and read by other versions of us, so "what is wrong, where, all of it" is worth more
than a library. Unknown fields are refused: an artifact of a newer schema must carry a newer
schema_version.
"""

import dataclasses
import json
import sys
import types
import typing
from dataclasses import dataclass
from typing import Any

from prism import manifest_rules

SCHEMA_VERSION = 2
_HUGE = sys.float_info.max


class ArtifactError(ValueError):
    """An artifact that cannot be used; the message gives path, value and what to do."""


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """What one level gave on held-out text. Shares are 0–1; `_se` are standard errors."""

    level: int
    own_share: float
    active_share: float
    perplexity: float
    quality_loss_percent: float
    quality_loss_se: float
    kl: float
    kl_se: float
    top1_agreement: float
    top1_se: float


@dataclass(frozen=True, slots=True)
class Knot:
    """A calibrated level below 100: one log θ per layer; its means and scalars are tensors."""

    level: int
    log_theta: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights came from; `files` maps each source file's name to its sha256 (hex)."""

    uri: str
    revision: str | None
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The text that thresholds, means and scalars were fitted on."""

    name: str
    digest: str
    tokens: int
    # sentences for a person: short, or far from the default text (since version 2)
    warnings: tuple[str, ...] = dataclasses.field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Manifest:
    """prism.json. `layers` are the module names of the experts modules, in model order."""

    schema_version: int
    source: Source
    architecture: str
    model_type: str
    sub_experts: int
    num_experts: int
    experts_per_token: int
    layers: tuple[str, ...]
    seed: int
    calibration: Calibration
    knots: tuple[Knot, ...]  # from high to low level, all < 100, few
    operating_points: tuple[OperatingPoint, ...]  # from high to low level
    # level -> lists of one length: by "batch" what a decode batch reads and computes, counted on
    # calibration text; by "measured_batch" the same and what it loses, riding along, on held-out
    # text (manifest_rules has the names). The report draws them, and they are there for a cost
    # model of an engine; what this release serves does not read them
    batch_curves: dict[str, dict[str, list[float]]]
    methods: dict[str, str]
    # "{layer}.{expert}", the tensors file's name or REST_DIGEST -> sha256 (hex)
    block_digests: dict[str, str]
    # layer -> names of an expert's tensors in the files, "{}" for its number (since version 2)
    block_tensors: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels with a measured operating point, from high to low."""
        return tuple(point.level for point in self.operating_points)

    def to_json(self) -> str:
        """Deterministic JSON: the same manifest gives the same bytes, hence the same digest."""
        return (
            json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n"
        )

    @classmethod
    def from_json(cls, text: str, path: str = "prism.json") -> "Manifest":
        """Parse and check; raises ArtifactError naming every problem. `path` is for messages."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{path}: not valid JSON ({error}); refactor again") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{path}: schema_version is {version!r}, this Prism reads {SCHEMA_VERSION}; "
                "refactor again or use the Prism that wrote it"
            )
        problems: list[str] = []
        manifest: Manifest = _parse(cls, raw, "$", problems)
        if not problems:
            problems = manifest_rules.problems(manifest)
        if problems:
            raise ArtifactError("\n".join(f"{path}: {problem}" for problem in problems))
        return manifest


def _parse(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """The value as `kind`; where it does not fit, a problem is noted and the value passed on."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # only `X | None` occurs
        return None if value is None else _parse(args[0], value, where, problems)
    if dataclasses.is_dataclass(kind):
        return _parse_fields(kind, value, where, problems)
    if origin in (tuple, list) and isinstance(value, list):
        return origin(_parse(args[0], v, f"{where}[{i}]", problems) for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _parse(args[1], v, f"{where}.{k}", problems) for k, v in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not -_HUGE < value < _HUGE:  # neither NaN, infinite nor a JSON integer beyond floats
            problems.append(f"{where}: {value!r:.80} is not a finite number")
            return value
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    problems.append(f"{where}: expected {getattr(kind, '__name__', kind)}, found {value!r:.80}")
    return value


def _parse_fields(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{where}: expected an object, found {value!r:.80}")
        return value
    hints = typing.get_type_hints(kind)
    optional = {
        field.name
        for field in dataclasses.fields(kind)
        if field.default_factory is not dataclasses.MISSING
    }
    missing = [name for name in hints if name not in value and name not in optional]
    problems += [f"{where}.{name}: missing" for name in missing]
    problems += [f"{where}.{name}: unknown field" for name in value if name not in hints]
    if missing:
        return value
    fields = {
        name: _parse(hint, value[name], f"{where}.{name}", problems)
        for name, hint in hints.items()
        if name in value
    }
    return kind(**fields)
