"""Show the progress of a run: clips, hours of audio, hours per hour, failures, time left."""

import time

from ..progress import Progress
from .records import Summary


class ClipProgress:
    """
    Add up the counts that workers report, and show them.

    Args:
        num_clips: Number of clips of this run.
        sampling_rate: Sampling rate of the samples that are counted, in Hz.
        shown: Whether to show the progress.
    """

    def __init__(self, num_clips: int, sampling_rate: int, shown: bool = True):
        self.sampling_rate, self.total = sampling_rate, Summary()
        self.started = time.monotonic()
        self.progress = Progress(num_clips, "clips", shown=shown)

    def __call__(self, summary: Summary) -> None:
        """Add the counts of the clips that were encoded since the last call."""
        self.total += summary
        seconds = self.total.num_samples / self.sampling_rate
        speed = seconds / max(time.monotonic() - self.started, 1e-9)
        self.progress.show_metrics(
            {
                "hours of audio": f"{seconds / 3600:,.2f}",
                "hours per hour": f"{speed:,.1f}",
                "failed": f"{self.total.num_failures:,}",
            }
        )
        self.progress.update(summary.num_clips + summary.num_failures)

    def close(self) -> None:
        self.progress.close()
