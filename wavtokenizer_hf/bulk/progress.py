"""How far a run is: clips, hours of sound, hours per hour, failures, time left."""

import sys
import time
from datetime import timedelta

from .records import Summary


class Progress:
    """
    Shows a line on a terminal, or writes one to a log now and then.

    Args:
        num_clips: to do in this run.
        sampling_rate: Hz of the samples that are counted.
        shown: nothing is written if not.
    """

    def __init__(self, num_clips: int, sampling_rate: int, shown: bool = True):
        self.num_clips, self.sampling_rate, self.shown = num_clips, sampling_rate, shown
        self.total = Summary()
        self.started = self.last = time.monotonic()
        self.on_terminal = sys.stderr.isatty()

    def __call__(self, summary: Summary) -> None:
        """Takes in what was done since the last call."""
        self.total += summary
        now = time.monotonic()
        if self.shown and now - self.last >= (0.5 if self.on_terminal else 30):
            self.last = now
            start, end = ("\r", "\x1b[K") if self.on_terminal else ("", "\n")
            print(f"{start}{self.line(now - self.started)}", end=end, file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """The line after so many seconds of work."""
        done = self.total.num_clips + self.total.num_failures
        hours = self.total.num_samples / self.sampling_rate / 3600
        left = timedelta(seconds=round((self.num_clips - done) * seconds / done)) if done else "unknown time"
        return (
            f"{done:,} of {self.num_clips:,} clips, {hours:,.2f} hours of sound, {hours * 3600 / seconds:,.1f} hours per hour, "
            f"{self.total.num_failures:,} failed, about {left} left"
        )

    def close(self) -> None:
        if self.shown and self.on_terminal:
            print(f"\r{self.line(time.monotonic() - self.started)}\x1b[K", file=sys.stderr)
