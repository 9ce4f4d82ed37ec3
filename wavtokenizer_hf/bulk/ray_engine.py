"""Engine for clusters: workers are actors of Ray Data, and each gets the clips of one Parquet file at a time."""

import logging
import pickle
from collections.abc import Callable, Sequence

from ..extras import require
from .records import Summary
from .sources import Item
from .work import Job, Worker


MAX_RESTARTS = 3
"""
Restarts of an actor, whose machine may fail. By default, Ray would retry a clip that crashes its actor for ever.
"""


def run(
    job: Job,
    items_by_file: Sequence[Sequence[Item]],
    on_report: Callable[[Summary], None],
    num_workers: int,
    address: str | None,
) -> None:
    """
    Encode clips in Ray actors, with one GPU each if the cluster has GPUs.

    Args:
        job: Job of the workers.
        items_by_file: Clips of each Parquet file.
        on_report: Called with the counts of each Parquet file when it is written.
        num_workers: Number of actors.
        address: Address of a cluster, or `"auto"` for the cluster of this machine. None: start Ray on this machine for
            this run.

    Raises:
        ValueError, OSError: Raised in an actor. OSError also if an actor crashed too often, or Ray cannot be reached.
        ImportError: Ray, or a package that an actor needs, is not installed.
    """
    if not items_by_file:
        return
    ray = require("ray.data", "ray") and require("ray", "ray")
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # else it logs each step of its plan
    starts_ray = not ray.is_initialized()
    if starts_ray:
        local_options = (
            {"num_cpus": num_workers * job.num_readers, "include_dashboard": False} if address is None else {}
        )
        try:
            # without "local", Ray would look for a cluster in the environment
            ray.init(address=address or "local", log_to_driver=False, logging_level="warning", **local_options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise OSError(f"Cannot reach a Ray cluster at {address!r}: {error}") from error
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        on_gpu = (job.options.device or "cuda").startswith("cuda") and ray.cluster_resources().get("GPU", 0) > 0
        # one block per Parquet file, so that Ray assigns and retries whole files
        dataset = ray.data.from_items(
            [{"items": pickle.dumps(list(items))} for items in items_by_file], override_num_blocks=len(items_by_file)
        )
        results = dataset.map(
            _Actor,
            fn_constructor_args=(job,),
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            num_cpus=job.num_readers,
            num_gpus=1 if on_gpu else 0,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )
        for row in results.iter_rows():
            if row["error"]:
                raise {"ValueError": ValueError, "ImportError": ImportError}.get(row["kind"], OSError)(row["error"])
            on_report(Summary(**row["summary"]))
    except ray.exceptions.RayError as error:
        raise OSError(
            f"Ray has stopped the work: {' '.join(str(error).split())} Finished files stay valid; run again to go on."
        ) from error
    finally:
        if starts_ray:
            ray.shutdown()


class _Actor:
    """
    A worker in a Ray process.

    Errors that the user can fix are returned as rows. If they were raised, Ray would wrap them and try again.
    """

    def __init__(self, job: Job):
        self._job = job
        self._worker: Worker | None = None

    def __call__(self, row: dict) -> dict:
        total = Summary()

        def add(summary: Summary) -> None:
            nonlocal total
            total += summary

        try:
            # rank 0 in every actor: an actor sees only its own GPU
            self._worker = self._worker or Worker(self._job)
            self._worker.encode_to_file(pickle.loads(row["items"]), add)
        except (ValueError, OSError, ImportError) as error:
            kind = next(kind for kind in (OSError, ImportError, ValueError) if isinstance(error, kind))
            return {"error": str(error), "kind": kind.__name__, "summary": vars(total)}
        return {"error": "", "kind": "", "summary": vars(total)}
