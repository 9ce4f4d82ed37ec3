"""The engine for one machine: this process alone, or several that take one Parquet file after another."""

import threading
from collections.abc import Callable, Sequence
from functools import partial

from transformers.utils import logging

from ..worker_processes import Work, run_workers
from .records import Summary
from .sources import Item
from .work import Job, Worker


def run(job: Job, parts: Sequence[Sequence[Item]], on_report: Callable[[Summary], None], num_processes: int) -> None:
    """
    Encode the clips of each Parquet file, in this process or in several, each with a model.

    Raises:
        ChildProcessError: A worker was killed.
        ValueError, OSError, ImportError: Raised in a worker.
    """
    if num_processes == 1:
        worker = Worker(job)
        for items in parts:
            worker.make_part(items, on_report)
        return
    hint = "use fewer processes or fewer seconds in a batch"
    run_workers(partial(_start, job), parts, on_report, num_processes, hint=hint)


def _start(job: Job, rank: int) -> Work:
    from tqdm import tqdm

    # tqdm's own is one between processes, which Python calls leaked when this one is killed
    tqdm.set_lock(threading.RLock())
    logging.disable_progress_bar()  # "Loading weights", once for each worker
    return Worker(job, rank).make_part
