"""Errors and warnings about audio, each with a machine-readable kind."""

import math
from typing import Any


MAX_CLIP_SECONDS = 6 * 3600.0
"""Maximum length of a clip in seconds, in bulk work, training and evaluation, which hold whole clips in memory."""

FAILURE_KINDS = {
    "unreadable": "not audio, damaged, or in a format that no installed decoder reads",
    "truncated": "ends earlier than its header says: it was cut off, or decoding stops at damaged data",
    "empty": "holds no samples",
    "not-finite": "holds NaN, infinite or absurdly large samples, or produces them inside the model",
    "sampling-rate": "has a sampling rate outside of 1 kHz to 768 kHz, or none",
    "too-long": "is longer than the limit (--max-clip-seconds)",
    "no-channel": "lacks the requested channel (--channel)",
    "not-found": "the file does not exist",
    "no-access": "there is no permission to read the file, or reading it failed",
    "no-audio": "the row of a table or dataset holds no audio",
    "memory": "needs more memory than is available",
    "error": "any other exception while the clip was read or encoded",
}
"""Kinds of failures, and their meaning."""

WARNING_KINDS = {
    "silent": "every sample is zero",
    "cancelled": "the mean of the channels is 30 dB or more below them, as with opposite phase (choose a channel "
    "with --channel)",
    "out-of-range": "samples lie beyond ±8, so they are probably integers; full scale is 1",
}
"""Kinds of warnings about a clip, and their meaning."""


class AudioError(ValueError):
    """Raised for audio that cannot be used. `kind` is one of `FAILURE_KINDS`."""

    def __init__(self, message: str, kind: str = "unreadable"):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.kind)


class TruncatedAudioError(AudioError):
    """Raised for audio that ends early. Block readers yield all complete samples first."""

    def __init__(self, message: str, kind: str = "truncated"):
        super().__init__(message, kind)


def failure_kind(error: BaseException) -> str:
    """Return the kind, one of `FAILURE_KINDS`, of an exception from reading or encoding a clip."""
    if isinstance(error, AudioError):
        return error.kind
    if isinstance(error, FileNotFoundError):
        return "not-found"
    if isinstance(error, OSError):
        return "no-access"
    return "memory" if isinstance(error, MemoryError) else "error"


def check_channel(channel: str | int) -> int | None:
    """Return the index of a `channel` argument, None for the mean. Raises ValueError for other values."""
    names = {"mean": None, "left": 0, "right": 1}
    if isinstance(channel, str) and channel in names:
        return names[channel]
    if isinstance(channel, str) and channel.isdecimal() and len(channel) < 6:
        return int(channel)
    if isinstance(channel, int) and not isinstance(channel, bool) and channel >= 0:
        return channel
    raise ValueError(f"Got the channel {channel!r}, expected mean, left, right or a number from 0.")


def check_peak(peak_dbfs: float | str) -> None:
    """Raise ValueError unless the value is a peak level in dBFS, at most 0, or `"none"` or `"model"`."""
    is_level = isinstance(peak_dbfs, (int, float)) and -math.inf < peak_dbfs <= 0
    if not is_level and peak_dbfs not in ("none", "model"):
        raise ValueError(f"Got peak_dbfs={peak_dbfs!r}, expected a level of at most 0 dBFS, 'none' or 'model'.")
