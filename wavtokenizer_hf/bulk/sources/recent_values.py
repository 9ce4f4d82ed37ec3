"""A cache of the last values, which the reader threads of a process share."""

import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakValueDictionary


class _Entry:
    """A value that the first thread that needs it reads, once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value: Any = None


class RecentValues:
    """
    Cache of the last two values, and of those that a thread waits for.

    Two, because some threads may still read the end of one recording while others begin the next. So each recording is
    read once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: WeakValueDictionary[Hashable, _Entry] = WeakValueDictionary()
        self._recent: deque[_Entry] = deque(maxlen=2)

    def __reduce__(self) -> tuple[Any, ...]:
        return RecentValues, ()  # another process starts with an empty cache

    def get(self, key: Hashable, read: Callable[[], Any]) -> Any:
        """Return the value of a key. Call `read` if it is not in the cache."""
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
