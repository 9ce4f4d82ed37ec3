"""One part after another: what each worker process does, whichever engine drives it."""

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import encoding
from .options import TokenizeOptions
from .output import Output
from .records import NO_FILE, Failure, Stamp, Summary, Tokens
from .sources import Item, Source


@dataclass
class Job:
    """
    What a worker has to know. It travels to other processes and machines.

    Args:
        source: Clips, without their list.
        output: Output folder, which every worker must see under this name.
        model: Name or folder of the model.
        options: Options of the run, whose `revision` is the commit of a model on the Hub.
        num_readers: Threads that read, decode and resample ahead of the model.
        num_threads: Threads of torch in a worker; None leaves them alone.
    """

    source: Source
    output: Output
    model: str
    options: TokenizeOptions
    num_readers: int
    num_threads: int | None


class Worker:
    """Holds the model of one process, and makes parts."""

    def __init__(self, job: Job, rank: int = 0):
        if job.num_threads is not None:
            # as many as there are cores in each of several processes make them up to 30 times as slow
            torch.set_num_threads(job.num_threads)
        self.job = job
        options = job.options
        device = options.device or encoding.default_device(rank)
        self.encoder, self.feature_extractor = encoding.load_encoder(
            job.model, options.revision, device, options.peak_dbfs
        )
        settings = job.output.settings
        here = self.encoder.codebook_fingerprint, encoding.weights_fingerprint(self.encoder.encoder)
        if here != (settings.codebook_fingerprint, settings.encoder_fingerprint):
            raise ValueError(
                f"The model {job.model!r} has the codebook {here[0]} and the encoder {here[1]} here, and the codebook "
                f"{settings.codebook_fingerprint} and the encoder {settings.encoder_fingerprint} where the work "
                "began. It changed meanwhile; begin anew."
            )

    def make_part(self, items: Sequence[Item], report: Callable[[Summary], None] = lambda summary: None) -> None:
        """
        Encodes these clips and writes their part; tells `report` of each window of them when it is encoded.

        Raises:
            ValueError: a clip failed, if that is to end the work.
            OSError: the part cannot be written.
        """
        job = self.job
        results: list[Tokens | Failure] = []
        extra_columns: list[dict[str, Any]] = [{} for _ in items]
        stamps: list[Stamp] = [NO_FILE for _ in items]

        def read(number: int) -> Any:
            stamps[number] = job.source.stamp(
                items[number].locator
            )  # before it is read: a change meanwhile shows later
            extra_columns[number] = job.source.extra_columns(items[number].locator)
            return job.source.read(items[number].locator)

        reads = [partial(read, number) for number in range(len(items))]
        windows = encoding.tokenize_clips(
            self.encoder,
            self.feature_extractor,
            reads,
            job.options.batch_seconds,
            job.num_readers,
            job.options.channel,
            job.options.max_clip_seconds,
        )
        with closing(windows):  # ends its threads, whatever ends this
            for window in windows:
                summary = Summary()
                for item, result in zip(items[len(results) :], window, strict=False):
                    if isinstance(result, Failure):
                        if job.options.on_error == "fail":
                            raise ValueError(f"{item.id}: {result.reason}")
                        summary.num_failures += 1
                    else:
                        summary += Summary(
                            1, 0, result.num_samples, len(result.audio_codes), int(bool(result.warnings))
                        )
                results += window
                report(summary)
        job.output.write_part([item.id for item in items], results, extra_columns, stamps)


def num_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
