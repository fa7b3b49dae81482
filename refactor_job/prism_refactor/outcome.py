"""The last word of a refactoring: at most 4 KiB of JSON that the operator reads from the ended pod.

Knows the shape of that message. The decision worth arguing about: it carries the operating points,
so the operator can gate on quality, in any of the three metrics, without ever mounting the volume.
"""

import json
import logging
from pathlib import Path
from typing import Final

from prism.artifact import Artifact
from prism.contract import TERMINATION_MESSAGE_BYTES

from prism_refactor.errors import RefactorError

_log = logging.getLogger(__name__)
_WARNING_CHARACTERS: Final = 400  # of each; there are two at most


def success(artifact: Artifact, seconds: float) -> dict[str, object]:
    """The message of a finished refactoring."""
    manifest = artifact.manifest
    return {
        "result": "ok",
        "digest": artifact.digest,
        "revision": manifest.source.revision,
        "sub_experts": manifest.sub_experts,
        "architecture": manifest.architecture,
        "seconds": round(seconds, 1),
        "warnings": [warning[:_WARNING_CHARACTERS] for warning in manifest.calibration.warnings],
        "points": [
            {
                "level": point.level,
                "own_share": round(point.own_share, 4),
                "loss": round(point.quality_loss_percent, 3),
                "se": round(point.quality_loss_se, 3),
                "kl": round(point.kl, 5),
                "top1": round(point.top1_agreement, 4),
            }
            for point in manifest.operating_points
        ],
    }


def part(shard: tuple[int, int], seconds: float) -> dict[str, object]:
    """The message of a shard that has cut its layers and leaves the rest to the first one."""
    return {"result": "part", "shard": list(shard), "seconds": round(seconds, 1)}


def failure(error: RefactorError) -> dict[str, object]:
    """The message of a refactoring that stopped."""
    return {"result": "failed", "reason": str(error.reason), "message": error.message[:1500]}


def write(message: dict[str, object], path: Path | None) -> None:
    """Write the message where Kubernetes looks for it; a failure to do so is only logged."""
    if path is None:
        return
    data = json.dumps(message, ensure_ascii=False).encode()
    assert len(data) <= TERMINATION_MESSAGE_BYTES, f"termination message of {len(data)} bytes"
    try:
        path.write_bytes(data)
    except OSError as error:
        _log.warning("cannot write the termination message to %s: %s", path, error)
