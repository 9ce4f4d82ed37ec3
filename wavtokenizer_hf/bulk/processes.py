"""Engine for one machine: encode in this process, or in several that write one Parquet file after another."""

import threading
from collections.abc import Callable, Sequence
from functools import partial

from transformers.utils import logging

from ..worker_processes import Work, run_workers
from .records import Summary
from .sources import Item
from .work import Job, Worker


def run(
    job: Job, items_by_file: Sequence[Sequence[Item]], on_report: Callable[[Summary], None], num_processes: int
) -> None:
    """
    Encode clips in this process, or in several processes with a model each.

    Args:
        job: Job of the workers.
        items_by_file: Clips of each Parquet file.
        on_report: Called with the counts of the clips that were just encoded.
        num_processes: Number of processes. 1: this process.

    Raises:
        ChildProcessError: A worker was killed.
        ValueError, OSError, ImportError: Raised in a worker.
    """
    if num_processes == 1:
        worker = Worker(job)
        for items in items_by_file:
            worker.encode_to_file(items, on_report)
        return
    hint = "use fewer processes or fewer seconds in a batch"
    run_workers(partial(_start, job), items_by_file, on_report, num_processes, hint=hint)


def _start(job: Job, rank: int) -> Work:
    from tqdm import tqdm

    # tqdm's default lock is shared between processes; Python reports it as leaked when a worker is killed
    tqdm.set_lock(threading.RLock())
    logging.disable_progress_bar()  # else each worker shows "Loading weights"
    return Worker(job, rank).encode_to_file
