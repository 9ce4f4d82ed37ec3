"""
Worker processes of bulk work, exports and evaluation. They end with the process that started them, however it ends.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any


UNGUARDED = 87  # exit code of a worker that ran the script that started it
GUARD = 'if __name__ == "__main__":'

Work = Callable[[Any, Callable[[Any], None]], None]
"""Function of a worker: takes a job, and a function to which it reports what it has done."""


def stop_in_unguarded_script() -> None:
    """
    End this process if it is a worker that runs the script which started it, instead of only importing it.

    A spawned process imports the main script under the name `__mp_main__`. Whatever that script does outside of
    `if __name__ == "__main__":` it would do again, and workers would start workers.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "__mp_main__" and frame.f_code.co_name == "<module>":
            sys.exit(UNGUARDED)
        frame = frame.f_back


def end_with_parent() -> None:
    """Make this worker process end as soon as the process that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:  # this is no worker
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_workers(
    start: Callable[[int], Work],
    jobs: Iterable[Any],
    on_report: Callable[[Any], None],
    num_processes: int,
    preload: str | None = None,
    hint: str = "use fewer processes",
) -> None:
    """
    Do jobs in worker processes. Each worker takes the next job when it has done one.

    Args:
        start: Called once in each worker with its number, from 0. Returns the function that does the jobs. It is
            pickled.
        jobs: Jobs, which are pickled. None is not a job.
        on_report: Called in this process with what workers report.
        num_processes: Number of workers.
        preload: Module that a server process imports once, before it forks the workers. It must start no threads and
            use no GPU. Default: each worker is a new process that imports for itself.
        hint: What to do if a worker was killed, perhaps for want of memory.

    Raises:
        ChildProcessError: A worker was killed, or ended by itself.
        ValueError, OSError, ImportError: Raised in a worker.
    """
    # not fork: CUDA cannot be forked, and a fork would copy locks that threads of this process hold
    has_server = preload is not None and "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload([preload])
    workers: dict[Connection, Any] = {}
    begun = set()
    queue = iter(jobs)
    try:
        for rank in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, start, rank), daemon=True)
            process.start()
            theirs.close()  # else nobody would notice the end of the other
            workers[ours] = process
        while workers:
            ready: list[Any] = wait(list(workers))
            for connection in ready:
                try:
                    kind, content = connection.recv()
                    begun.add(connection)
                    if kind == "ready":  # for a job
                        content = next(queue, None)
                        connection.send(content)
                except (EOFError, ConnectionError):
                    raise _ended(workers[connection], connection in begun, hint) from None
                if kind == "error":
                    raise content
                if kind == "report":
                    on_report(content)
                elif content is None:
                    workers.pop(connection).join()
                    connection.close()
    finally:
        for connection, process in workers.items():
            process.kill()
            process.join()
            connection.close()


def _serve(connection: Connection, start: Callable[[int], Work], rank: int) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the keyboard is for the parent
    try:
        work = start(rank)
        while True:
            connection.send(("ready", None))
            job = connection.recv()
            if job is None:
                return
            work(job, lambda content: connection.send(("report", content)))
    except (EOFError, ConnectionError):
        return  # the parent is gone
    except (ValueError, OSError, ImportError) as error:
        # as the plain kind of error: one with arguments of its own may not survive pickling
        kind = next(kind for kind in (OSError, ImportError, ValueError) if isinstance(error, kind))
        connection.send(("error", kind(str(error))))


def _ended(process: Any, had_begun: bool, hint: str) -> ChildProcessError:
    """The error for a worker that ended before its jobs were done."""
    process.join(timeout=10)
    exit_code = process.exitcode or 0
    if exit_code == UNGUARDED:
        return ChildProcessError(
            f"The script starts workers outside of `{GUARD}`, and each worker runs the script again. Put the call "
            "below that line, or use num_processes=1."
        )
    how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with {exit_code}"
    if not had_begun and exit_code > 0:
        return ChildProcessError(
            f"A worker process {how} before it began; what it says stands above. If the script that starts it does "
            f"so outside of `{GUARD}`, put the call below that line."
        )
    return ChildProcessError(
        f"A worker process {how}; if the machine has run out of memory, {hint}. What is finished stays valid; run "
        "again to go on."
    )
