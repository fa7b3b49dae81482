"""Follow the control directory: level.json and slo.json as the operator changes them.

Knows: that a mounted ConfigMap changes by a new `..data` link, and files of `prism serve` by mtime.
Must not know: who else changes bounds (the higher seq wins there).

One decision worth arguing about: polling every 2 s, not inotify. The kubelet refreshes the mount
within a minute anyway, and the fast path is PUT /admin/level.
"""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prism import contract

from prism_serving import logs
from prism_serving.control import ControlError, read_bounds, read_slo
from prism_serving.gateway.client import EngineClient

_log = logging.getLogger(__name__)
POLL_S: Final = 2.0


def stamp(directory: Path) -> tuple[tuple[int, int], ...]:
    """Changes when a file was replaced: (mtime, inode) of what is there."""
    out = []
    for name in ("..data", contract.LEVEL_FILE, contract.SLO_FILE):
        try:
            status = (directory / name).stat()
        except OSError:
            out.append((0, 0))
        else:
            out.append((status.st_mtime_ns, status.st_ino))
    return tuple(out)


@dataclass(slots=True)
class ControlWatch:
    """Hands what the files say to the client."""

    directory: Path
    client: EngineClient
    _seen: tuple[tuple[int, int], ...] = ()

    def check(self) -> None:
        """Read the files when they changed. A file that cannot be used is logged and ignored."""
        now = stamp(self.directory)
        if now == self._seen:
            return
        self._seen = now
        try:
            bounds, slo = read_bounds(self.directory), read_slo(self.directory)
        except ControlError as error:
            _log.error(logs.fields("control file ignored", reason=error))
            return
        if bounds is not None and self.client.set_bounds(bounds):
            _log.info(logs.fields("level bounds", source="file", **bounds.as_json()))
        if slo is not None and slo != self.client.slo:
            self.client.set_slo(slo)
            _log.info(logs.fields("targets", ttft_ms=slo.ttft_ms, itl_ms=slo.itl_ms))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.check()
            await asyncio.sleep(POLL_S)
