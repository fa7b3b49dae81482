"""Find stop strings in text that arrives in pieces.

Knows: strings. Must not know: tokens, streams, HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class StopFinder:
    """Holds back only what may still become a stop string. After `found` nothing more comes."""

    stops: Sequence[str]
    found: bool = False
    _held: str = ""

    def feed(self, text: str) -> str:
        """Text that is safe to send now; the stop string itself is never sent."""
        if self.found:
            return ""
        pending = self._held + text
        # The stop that is complete first wins, however the text was cut into pieces.
        found = [(at + len(s), at) for s in self.stops if (at := pending.find(s)) >= 0]
        if found:
            self.found, self._held = True, ""
            return pending[: min(found)[1]]
        keep = max((_overlap(pending, s) for s in self.stops), default=0)
        cut = len(pending) - keep
        self._held = pending[cut:]
        return pending[:cut]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
