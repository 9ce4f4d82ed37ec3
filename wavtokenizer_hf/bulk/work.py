"""Encode clips and write Parquet files, in one worker of any engine."""

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import encoding
from .options import TokenizeOptions
from .output import OutputFolder
from .records import NO_FILE, Failure, Stamp, Summary, Tokens
from .sources import Item, Source


@dataclass
class Job:
    """
    The job of all workers of a run. It is pickled for other processes and machines.

    Args:
        source: Source of the clips, without its list of clips.
        output: Output folder. Every worker must see it under the same path.
        model: Name or folder of the model.
        options: Options of the run. For a model on the Hub, `revision` is the commit.
        num_readers: Threads per worker that read, decode and resample ahead of the model.
        num_threads: Torch threads per worker. None: torch's default.
    """

    source: Source
    output: OutputFolder
    model: str
    options: TokenizeOptions
    num_readers: int
    num_threads: int | None


class Worker:
    """
    The model of one process, which encodes clips to Parquet files.

    Args:
        job: Job of all workers.
        rank: Index of this worker, which chooses its GPU.

    Raises:
        ValueError: The model is not the one that the run began with, or cannot be loaded.
    """

    def __init__(self, job: Job, rank: int = 0):
        if job.num_threads is not None:
            # with one thread per core in each process, several processes are up to 30 times slower
            torch.set_num_threads(job.num_threads)
        self.job = job
        options = job.options
        device = options.device or encoding.default_device(rank)
        self.encoder, self.feature_extractor = encoding.load_encoder(
            job.model, options.revision, device, options.peak_dbfs
        )
        settings = job.output.settings
        codebook, encoder = self.encoder.codebook_fingerprint, encoding.weights_fingerprint(self.encoder.encoder)
        if (codebook, encoder) != (settings.codebook_fingerprint, settings.encoder_fingerprint):
            raise ValueError(
                f"The model {job.model!r} has the codebook {codebook} and the encoder {encoder} in this worker, but "
                f"the run began with the codebook {settings.codebook_fingerprint} and the encoder "
                f"{settings.encoder_fingerprint}. The model has changed. Run again with a new output folder."
            )

    def encode_to_file(
        self, items: Sequence[Item], on_report: Callable[[Summary], None] = lambda summary: None
    ) -> None:
        """
        Encode clips and write their Parquet file.

        Args:
            items: Clips of the file.
            on_report: Called with the counts of each window of clips when it is encoded.

        Raises:
            ValueError: A clip failed, with `on_error="fail"`.
            OSError: The file cannot be written.
        """
        job = self.job
        results: list[Tokens | Failure] = []
        extra_columns: list[dict[str, Any]] = [{} for _ in items]
        stamps: list[Stamp] = [NO_FILE for _ in items]

        def read(index: int) -> Any:
            locator = items[index].locator
            stamps[index] = job.source.stamp(locator)  # before reading, so that a later run sees a change meanwhile
            extra_columns[index] = job.source.extra_columns(locator)
            return job.source.read(locator)

        readers = [partial(read, index) for index in range(len(items))]
        windows = encoding.tokenize_clips(
            self.encoder,
            self.feature_extractor,
            readers,
            job.options.batch_seconds,
            job.num_readers,
            job.options.channel,
            job.options.max_clip_seconds,
        )
        with closing(windows):  # stops the reader threads after an error too
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
                on_report(summary)
        job.output.write_file([item.id for item in items], results, extra_columns, stamps)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
