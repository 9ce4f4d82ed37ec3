"""The engine for clusters: the same workers as actors of Ray Data, which hands them one part at a time."""

import logging
import pickle
from collections.abc import Callable, Sequence

from ..extras import require
from .records import Summary
from .sources import Item
from .work import Job, Worker


RESTARTS = 3  # of an actor, whose machine may go away; by default Ray would try a clip that kills its actor for ever


def run(
    job: Job,
    parts: Sequence[Sequence[Item]],
    report: Callable[[Summary], None],
    num_workers: int,
    address: str | None,
) -> None:
    """
    Makes the parts in `num_workers` actors, with one GPU each where there are GPUs. Reports arrive part by part.

    Args:
        address: of a cluster, or `"auto"` for the one that this machine belongs to; None starts Ray here for this run.

    Raises:
        ValueError, OSError: what was raised in an actor; OSError too if one was killed again and again.
        ImportError: Ray is not installed.
    """
    if not parts:
        return
    ray = require("ray.data", "ray") and require("ray", "ray")
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it reports each step of a plan that has one
    own = not ray.is_initialized()
    if own:
        started_here = (
            {"num_cpus": num_workers * job.num_readers, "include_dashboard": False} if address is None else {}
        )
        try:
            # without "local" it would look for a cluster in the environment
            ray.init(address=address or "local", log_to_driver=False, logging_level="warning", **started_here)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise OSError(f"Cannot reach a Ray cluster at {address!r}: {error}") from error
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        on_gpu = (job.options.device or "cuda").startswith("cuda") and ray.cluster_resources().get("GPU", 0) > 0
        # a part of the work is one block, so that a part is what an actor is given, and what is done again if it dies
        dataset = ray.data.from_items(
            [{"items": pickle.dumps(list(items))} for items in parts], override_num_blocks=len(parts)
        )
        made = dataset.map(
            _Actor,
            fn_constructor_args=(job,),
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            num_cpus=job.num_readers,
            num_gpus=1 if on_gpu else 0,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
        for row in made.iter_rows():
            if row["error"]:
                raise {"ValueError": ValueError, "ImportError": ImportError}.get(row["kind"], OSError)(row["error"])
            report(Summary(**row["summary"]))
    except ray.exceptions.RayError as error:
        raise OSError(
            f"Ray has stopped the work: {' '.join(str(error).split())} What is finished stays valid; run again to go "
            "on."
        ) from error
    finally:
        if own:
            ray.shutdown()


class _Actor:
    """A worker in a process of Ray's. Errors that are the user's to mend come back as rows: Ray would wrap them, and
    try again."""

    def __init__(self, job: Job):
        self._job = job
        self._worker: Worker | None = None

    def __call__(self, row: dict) -> dict:
        total = Summary()

        def add(summary: Summary) -> None:
            nonlocal total
            total += summary

        try:
            self._worker = self._worker or Worker(self._job)  # Ray shows each actor its own GPU as the first
            self._worker.make_part(pickle.loads(row["items"]), add)
        except (ValueError, OSError, ImportError) as error:
            kind = next(kind for kind in (OSError, ImportError, ValueError) if isinstance(error, kind))
            return {"error": str(error), "kind": kind.__name__, "summary": vars(total)}
        return {"error": "", "kind": "", "summary": vars(total)}
