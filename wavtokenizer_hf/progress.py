"""Progress of long work, with the time left, on standard error."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, ClassVar, TextIO


DELAY_SECONDS = 2  # shorter work shows nothing
LINE_SECONDS = 30  # between two lines where standard error is no terminal


class Progress:
    """
    Show how far work is: a bar on a terminal, else a line every 30 seconds. Work under two seconds shows nothing.

    A thread keeps it up to date, so that a single long step shows its elapsed time too. Of several that are open at
    once, all have a bar on a terminal, and only the outermost writes lines.

    ```python
    with Progress(len(files), "files") as progress:
        for file in files:
            work(file)
            progress.update()
    ```

    Args:
        total: Amount of work, in units.
        unit: Name of the units, in the plural.
        initial: What was done before, as in a resumed run.
        shown: Show nothing if False.
    """

    _open: ClassVar[list["Progress"]] = []

    def __init__(self, total: float, unit: str, initial: float = 0, shown: bool = True):
        self.total, self.unit, self.initial, self.done = total, unit, initial, initial
        self.figures: dict[str, str] = {}
        self._bar: Any = None  # tqdm, which has no types
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
        """Count work that was done since the last call."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(amount)

    def show_figures(self, figures: dict[str, str]) -> None:
        """Show names and values beside the progress, such as losses."""
        self.figures = figures
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)

    def close(self) -> None:
        """Stop, and remove the bar."""
        if self._thread is None:
            return
        self._closed.set()
        self._thread.join()
        self._thread = None
        self._open.remove(self)
        if self._bar is not None:
            self._bar.close()

    def line(self, seconds: float) -> str:
        """The line after so many seconds of work."""
        new = self.done - self.initial
        left = "unknown time"
        if new > 0:
            left = str(timedelta(seconds=round(max(0, self.total - self.done) * seconds / new)))
        figures = "".join(f", {name} {value}" for name, value in self.figures.items())
        return f"{self.done:,.0f} of {self.total:,.0f} {self.unit}, about {left} left{figures}"

    def _show(self) -> None:
        while not self._closed.wait(DELAY_SECONDS if self._on_terminal else LINE_SECONDS):
            if self._bar is not None:
                self._bar.refresh()
            elif self._open[0] is self:
                print(self.line(time.monotonic() - self._started), file=sys.stderr, flush=True)


@contextmanager
def shown_progress(unit: str) -> Iterator[Callable[[float, float], None]]:
    """Yield a function that shows progress; it takes the amount that is done and the total, first before any work."""
    with ExitStack() as stack:
        progress = None

        def show(done: float, total: float) -> None:
            nonlocal progress
            if progress is None:  # the first call says what an earlier run did
                progress = stack.enter_context(Progress(total, unit, done))
            progress.update(done - progress.done)

        yield show


def write(text: str, file: TextIO | None = None) -> None:
    """Print a line above the bars that are shown. `file`: default standard output."""
    if any(progress._bar is not None for progress in Progress._open):
        from tqdm import tqdm

        tqdm.write(text, file=file or sys.stdout)
    else:
        print(text, file=file or sys.stdout)
