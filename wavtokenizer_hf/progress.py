"""Show the progress of long-running work, with the remaining time, on standard error."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, ClassVar, TextIO


DELAY_SECONDS = 2  # shorter work shows nothing
LINE_SECONDS = 30  # interval between lines if standard error is not a terminal


class Progress:
    """Show progress as a bar on a terminal, else as a line every 30 seconds. Work under two seconds shows nothing.

    A thread updates the display, so the elapsed time also advances during a single long step. If several are open,
    each has a bar on a terminal, and only the outermost one prints lines.

    ```python
    with Progress(len(files), "files") as progress:
        for file in files:
            work(file)
            progress.update()
    ```

    Args:
        total: Total amount of work, in units.
        unit: Plural name of the unit.
        initial: Amount of work that an earlier run has done.
        shown: Whether to show anything.
    """

    _open: ClassVar[list["Progress"]] = []

    def __init__(self, total: float, unit: str, initial: float = 0, shown: bool = True):
        self.total, self.unit, self.initial, self.done = total, unit, initial, initial
        self.metrics: dict[str, str] = {}
        self._bar: Any = None  # tqdm has no type annotations
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._started = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        if not shown:
            return
        if self._on_terminal:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=initial,
                unit=unit,
                delay=DELAY_SECONDS,
                leave=False,
                bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}, {remaining} left{postfix}]",
            )
        self._open.append(self)
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, amount: float = 1) -> None:
        """Add an amount of finished work."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(amount)

    def show_metrics(self, metrics: dict[str, str]) -> None:
        """Show metrics beside the progress, such as losses, name -> formatted value."""
        self.metrics = metrics
        if self._bar is not None:
            self._bar.set_postfix(metrics, refresh=False)

    def close(self) -> None:
        """Stop the updates and remove the bar."""
        if self._thread is None:
            return
        self._closed.set()
        self._thread.join()
        self._thread = None
        self._open.remove(self)
        if self._bar is not None:
            self._bar.close()

    def line(self, seconds: float) -> str:
        """Return the progress as a line of text, after `seconds` of work."""
        done_in_this_run = self.done - self.initial
        time_left = "unknown time"
        if done_in_this_run > 0:
            time_left = str(timedelta(seconds=round(max(0, self.total - self.done) * seconds / done_in_this_run)))
        metrics = "".join(f", {name} {value}" for name, value in self.metrics.items())
        return f"{self.done:,.0f} of {self.total:,.0f} {self.unit}, about {time_left} left{metrics}"

    def _show(self) -> None:
        while not self._closed.wait(DELAY_SECONDS if self._on_terminal else LINE_SECONDS):
            if self._bar is not None:
                self._bar.refresh()
            elif self._open[0] is self:
                print(self.line(time.monotonic() - self._started), file=sys.stderr, flush=True)


@contextmanager
def shown_progress(unit: str) -> Iterator[Callable[[float, float], None]]:
    """Yield a function `show(done, total)` that shows progress. Call it once before any work, and after each step."""
    with ExitStack() as stack:
        progress = None

        def show(done: float, total: float) -> None:
            nonlocal progress
            if progress is None:  # at the first call, `done` is the work of an earlier run
                progress = stack.enter_context(Progress(total, unit, done))
            progress.update(done - progress.done)

        yield show


def write(text: str, file: TextIO | None = None) -> None:
    """Print a line above the progress bars.

    Args:
        text: Line to print.
        file: Stream to print to. Default: standard output.
    """
    if any(progress._bar is not None for progress in Progress._open):
        from tqdm import tqdm

        tqdm.write(text, file=file or sys.stdout)
    else:
        print(text, file=file or sys.stdout)
