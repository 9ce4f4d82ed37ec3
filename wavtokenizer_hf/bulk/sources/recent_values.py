"""A cache of the last values that readers of one process share."""

import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakValueDictionary


class _Entry:
    """A value that is read once, by the first thread that needs it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value: Any = None


class RecentValues:
    """
    Values by key: the last two, and those that a thread waits for.

    Readers at the end of one recording and at the beginning of the next share both, so each is read once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: WeakValueDictionary[Hashable, _Entry] = WeakValueDictionary()
        self._recent: deque[_Entry] = deque(maxlen=2)

    def __reduce__(self) -> tuple[Any, ...]:
        return RecentValues, ()  # another process reads for itself

    def get(self, key: Hashable, read: Callable[[], Any]) -> Any:
        """The value of `key`, by calling `read` if it is not there."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = _Entry()
            if entry not in self._recent:
                self._recent.append(entry)
        with entry.lock:
            if entry.value is None:
                entry.value = read()
            return entry.value
