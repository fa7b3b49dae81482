"""Wakes the loop of one PrismModel: a key, an event, the newest generation seen.

It knows nothing of what woke it; an event only says "look again". Setting it twice is setting it
once, so a burst of pod events costs one pass.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Key = tuple[str, str]  # namespace, name


@dataclass(slots=True)
class _Waker:
    event: asyncio.Event = field(default_factory=asyncio.Event)
    mark: object = None


@dataclass(slots=True)
class Wakes:
    """Events by key; one exists only while its loop is subscribed."""

    _wakers: dict[Key, _Waker] = field(default_factory=dict)

    @contextmanager
    def subscribe(self, key: Key) -> Iterator[asyncio.Event]:
        waker = self._wakers[key] = _Waker()
        try:
            yield waker.event
        finally:
            if self._wakers.get(key) is waker:  # a namesake made again may have its own by now
                del self._wakers[key]

    def now(self, key: Key) -> None:
        """Something of it changed."""
        if waker := self._wakers.get(key):
            waker.event.set()

    def changed(self, key: Key, mark: object) -> None:
        """The object itself was seen; wakes only for a new mark, so not for our own status."""
        if (waker := self._wakers.get(key)) and waker.mark != mark:
            waker.mark = mark
            waker.event.set()

    def __contains__(self, key: Key) -> bool:
        return key in self._wakers
