"""The engine for one machine: this process alone, or several that are given one part at a time."""

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from transformers.utils import logging

from .records import Summary
from .sources import Item
from .work import Job, Worker


UNGUARDED = 87  # exit code of a worker that ran the script that started it
GUARD = 'if __name__ == "__main__":'


def stop_in_unguarded_script() -> None:
    """
    Ends this process if it is a worker that runs the script which started it, instead of only importing it.

    A spawned process imports the main script under the name `__mp_main__`. Whatever that script does outside of
    `if __name__ == "__main__":` it would do again, and workers would start workers.
    """
    if multiprocessing.parent_process() is None:
        return
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "__mp_main__" and frame.f_code.co_name == "<module>":
            sys.exit(UNGUARDED)
        frame = frame.f_back


def run_here(job: Job, parts: Iterable[Sequence[Item]], report: Callable[[Summary], None]) -> None:
    """Makes the parts one after another in this process."""
    worker = Worker(job)
    for items in parts:
        worker.make_part(items, report)


def run_in_processes(
    job: Job, parts: Iterable[Sequence[Item]], report: Callable[[Summary], None], num_processes: int
) -> None:
    """
    Makes the parts in `num_processes` processes, each with a model of its own. They end with this one, however it ends.

    Raises:
        ChildProcessError: one was killed.
        ValueError, OSError, ImportError: what was raised in one of them.
    """
    context = multiprocessing.get_context("spawn")  # CUDA cannot be forked, nor can the threads of torch
    workers: dict[Connection, Any] = {}
    begun = set()
    queue = iter(parts)
    try:
        for rank in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job, rank), daemon=True)
            process.start()
            theirs.close()  # else nobody would notice the end of the other
            workers[ours] = process
        while workers:
            for connection in wait(list(workers)):
                try:
                    kind, content = connection.recv()
                    begun.add(connection)
                    if kind == "ready":  # for a part
                        content = next(queue, None)
                        connection.send(content)
                except (EOFError, ConnectionError):
                    raise _killed(workers[connection], connection in begun) from None
                if kind == "error":
                    raise content
                if kind == "report":
                    report(content)
                elif content is None:
                    workers.pop(connection).join()
                    connection.close()
    finally:
        for connection, process in workers.items():
            process.kill()
            process.join()
            connection.close()


def _serve(connection: Connection, job: Job, rank: int) -> None:
    from tqdm import tqdm

    # tqdm's own is one between processes, which Python calls leaked when this one is killed
    tqdm.set_lock(threading.RLock())
    logging.disable_progress_bar()  # "Loading weights", once for each worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the keyboard is for the process that drives
    try:
        worker = Worker(job, rank)
        while True:
            connection.send(("ready", None))
            items = connection.recv()
            if items is None:
                return
            worker.make_part(items, lambda summary: connection.send(("report", summary)))
    except (EOFError, ConnectionError):
        return  # the process that drives is gone
    except (ValueError, OSError, ImportError) as error:
        # as the plain kind of error: one with arguments of its own may not survive the way
        kind = next(kind for kind in (OSError, ImportError, ValueError) if isinstance(error, kind))
        connection.send(("error", kind(str(error))))


def _killed(process, had_begun: bool) -> ChildProcessError:
    process.join(timeout=10)
    exit_code = process.exitcode or 0
    if exit_code == UNGUARDED:
        return ChildProcessError(
            f"The script starts workers outside of `{GUARD}`, and each worker runs the script again. Put the call of tokenize "
            "below that line, or use num_processes=1."
        )
    how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with {exit_code}"
    if not had_begun and exit_code > 0:
        return ChildProcessError(
            f"A worker process {how} before it began; what it says stands above. If the script that starts it does so outside of "
            f"`{GUARD}`, put the call below that line."
        )
    return ChildProcessError(
        f"A worker process {how}; if the machine has run out of memory, use fewer processes or fewer seconds in a batch. What "
        "is finished stays valid; run again to go on."
    )
