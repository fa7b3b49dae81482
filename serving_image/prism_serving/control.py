"""The level bounds and latency targets, and the files the operator writes them to.

Knows: their validation, which of two bounds wins, how the mounted files are read. Must not know:
HTTP, sockets, how a level is chosen inside the bounds.

One decision worth arguing about: the higher `seq` wins wherever it came from (file or PUT), so a
slow ConfigMap refresh can never undo a push that was faster.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from prism import contract


class ControlError(ValueError):
    """A control object or file that cannot be used; the message names each field at fault."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """floor <= ceiling, in percent; the engine picks inside."""

    seq: int = 0
    floor: int = contract.MAX_LEVEL
    ceiling: int = contract.MAX_LEVEL

    def as_json(self) -> dict[str, int]:
        """The object of level.json and of PUT /admin/level."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets in milliseconds; None: no target, nothing is counted or held. `lowest_level`: what a
    request may ask for at least; the quality gate bars what lies below, whoever asks."""

    ttft_ms: int | None = None
    itl_ms: int | None = None
    lowest_level: int = contract.MIN_LEVEL

    @property
    def ttft_s(self) -> float | None:
        """TTFT target in seconds."""
        return None if self.ttft_ms is None else self.ttft_ms / 1000

    @property
    def itl_s(self) -> float | None:
        """ITL target in seconds."""
        return None if self.itl_ms is None else self.itl_ms / 1000


def parse_bounds(data: object) -> Bounds:
    """Validate a decoded level object. Raises ControlError with all problems at once."""
    if not isinstance(data, dict):
        raise ControlError(f"expected an object with seq, floor and ceiling, got {data!r}")
    problems = [f"unknown field {k!r}" for k in data if k not in ("seq", "floor", "ceiling")]
    for key in ("seq", "floor", "ceiling"):
        if type(data.get(key)) is not int:
            problems.append(f"{key} must be an integer, got {data.get(key)!r}")
    if problems:
        raise ControlError("; ".join(problems))
    seq, floor, ceiling = data["seq"], data["floor"], data["ceiling"]
    if not 0 <= seq < 2**63:
        problems.append(f"seq must be >= 0, got {seq}")
    for key, value in (("floor", floor), ("ceiling", ceiling)):
        if not contract.MIN_LEVEL <= value <= contract.MAX_LEVEL:
            problems.append(
                f"{key} must be between {contract.MIN_LEVEL} and {contract.MAX_LEVEL}, got {value}"
            )
    if floor > ceiling:
        problems.append(f"floor {floor} is above ceiling {ceiling}")
    if problems:
        raise ControlError("; ".join(problems))
    return Bounds(seq, floor, ceiling)


def parse_slo(data: object) -> Slo:
    """Validate a decoded slo object. Raises ControlError with all problems at once."""
    if not isinstance(data, dict):
        raise ControlError(f"expected an object with ttft_ms and itl_ms, got {data!r}")
    known = ("ttft_ms", "itl_ms", "lowest_level")
    problems = [f"unknown field {k!r}" for k in data if k not in known]
    for key in ("ttft_ms", "itl_ms"):
        value = data.get(key)
        if value is not None and (type(value) is not int or value <= 0):
            problems.append(f"{key} must be a positive integer or null, got {value!r}")
    lowest = data.get("lowest_level", contract.MIN_LEVEL)
    if type(lowest) is not int or not contract.MIN_LEVEL <= lowest <= contract.MAX_LEVEL:
        problems.append(
            f"lowest_level must be between {contract.MIN_LEVEL} and {contract.MAX_LEVEL}, "
            f"got {lowest!r}"
        )
    if problems:
        raise ControlError("; ".join(problems))
    return Slo(data.get("ttft_ms"), data.get("itl_ms"), lowest)


def wins(new: Bounds, current: Bounds) -> bool:
    """Whether `new` replaces `current`: only a higher seq does."""
    return new.seq > current.seq


def _read(path: Path) -> object | None:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        parsed: object = json.loads(text)
    except ValueError as error:
        raise ControlError(f"{path}: not JSON: {error}") from error
    return parsed


def read_bounds(directory: Path) -> Bounds | None:
    """level.json of a control directory; None where there is no file. Raises ControlError."""
    path = directory / contract.LEVEL_FILE
    data = _read(path)
    try:
        return None if data is None else parse_bounds(data)
    except ControlError as error:
        raise ControlError(f"{path}: {error}") from error


def read_slo(directory: Path) -> Slo | None:
    """slo.json of a control directory; None where there is no file. Raises ControlError."""
    path = directory / contract.SLO_FILE
    data = _read(path)
    try:
        return None if data is None else parse_slo(data)
    except ControlError as error:
        raise ControlError(f"{path}: {error}") from error
