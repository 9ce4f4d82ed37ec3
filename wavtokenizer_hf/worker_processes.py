"""Worker processes for bulk work, exports and evaluation. They end when the process that started them ends."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any


UNGUARDED_EXIT_CODE = 87  # exit code of a worker that ran its parent's script again
GUARD = 'if __name__ == "__main__":'

Work = Callable[[Any, Callable[[Any], None]], None]
"""Function that does a job in a worker. Its arguments are the job and a function that sends a report."""


def stop_in_unguarded_script() -> None:
    """End this process if it is a worker that is importing its parent's script.

    A spawned process imports the main script under the name `__mp_main__`. That runs all code outside of
    `if __name__ == "__main__":` again, so workers would start workers.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "__mp_main__" and frame.f_code.co_name == "<module>":
            sys.exit(UNGUARDED_EXIT_CODE)
        frame = frame.f_back


def end_with_parent() -> None:
    """Make this worker process end as soon as the process that started it ends."""
    parent = multiprocessing.parent_process()
    if parent is None:  # not a worker
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
    """Run jobs in worker processes. Each worker takes the next job when it has finished one.

    Args:
        start: Picklable function, called once in each worker with the worker's index, from 0. Returns the function
            that does the jobs.
        jobs: Picklable jobs, none of them None.
        on_report: Function called in this process with each report of a worker.
        num_processes: Number of worker processes.
        preload: Module that a fork server imports once, before it forks the workers. It must not start threads or use
            a GPU. Default: each worker is spawned and imports its modules itself.
        hint: Advice in the error message if a worker was killed, perhaps for lack of memory.

    Raises:
        ChildProcessError: A worker was killed, or ended by itself.
        ValueError, OSError, ImportError: A worker raised it.
    """
    # not fork: CUDA does not support it, and a fork would copy locks that threads of this process hold
    has_server = preload is not None and "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload([preload])
    workers: dict[Connection, Any] = {}
    started = set()  # connections that have sent a message
    pending_jobs = iter(jobs)
    try:
        for rank in range(num_processes):
            parent_end, worker_end = context.Pipe()
            process = context.Process(target=_serve, args=(worker_end, start, rank), daemon=True)
            process.start()
            worker_end.close()  # so that recv raises EOFError when the worker ends
            workers[parent_end] = process
        while workers:
            readable: list[Any] = wait(list(workers))
            for connection in readable:
                try:
                    kind, content = connection.recv()
                    started.add(connection)
                    if kind == "ready":  # for a job
                        content = next(pending_jobs, None)
                        connection.send(content)
                except (EOFError, ConnectionError):
                    raise _worker_error(workers[connection], connection in started, hint) from None
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles keyboard interrupts
    try:
        work = start(rank)
        while True:
            connection.send(("ready", None))
            job = connection.recv()
            if job is None:
                return
            work(job, lambda content: connection.send(("report", content)))
    except (EOFError, ConnectionError):
        return  # the parent has ended
    except (ValueError, OSError, ImportError) as error:
        # send the base class, since a subclass with other arguments may not survive pickling
        base_class = next(kind for kind in (OSError, ImportError, ValueError) if isinstance(error, kind))
        connection.send(("error", base_class(str(error))))


def _worker_error(process: Any, had_started: bool, hint: str) -> ChildProcessError:
    """Return the error for a worker that ended before its jobs were done."""
    process.join(timeout=10)
    exit_code = process.exitcode or 0
    if exit_code == UNGUARDED_EXIT_CODE:
        return ChildProcessError(
            f"The script starts workers outside of `{GUARD}`, and each worker runs the script again. Put the call "
            "below that line, or use num_processes=1."
        )
    outcome = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
    if not had_started and exit_code > 0:
        return ChildProcessError(
            f"A worker process {outcome} before it started; see its output above. If the script starts workers "
            f"outside of `{GUARD}`, put the call below that line."
        )
    return ChildProcessError(
        f"A worker process {outcome}; if the machine has run out of memory, {hint}. Finished files stay valid; run "
        "again to go on."
    )
