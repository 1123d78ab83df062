"""What was prepared for calls, kept for the next call of the same kind."""

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

from moeyard.cuda.runtime.planning import current_plan

_MOST = 4096


class Ready:
    """Prepared launches of one operator by all that they depend on; a full cache forgets its oldest for a new one.

    `get(key)` is the lookup of a dict, all that a call pays once it is prepared. A launch that is in use keeps itself.
    """

    def __init__(self, most: int = _MOST) -> None:
        """Holds at most so many entries."""
        self._entries: dict[Hashable, Any] = {}
        self._most = most
        self._lock = Lock()
        self.get: Callable[[Hashable], Any] = self._entries.get

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forgets all."""
        with self._lock:
            self._entries.clear()

    def add(self, key: Hashable, made: Any) -> Any:
        """What is kept under `key`: `made`, or what another thread has added meanwhile. Plans leave nothing here."""
        if current_plan() is not None:
            return made
        with self._lock:
            if key not in self._entries:
                while len(self._entries) >= self._most:
                    del self._entries[next(iter(self._entries))]
                self._entries[key] = made
            return self._entries[key]
