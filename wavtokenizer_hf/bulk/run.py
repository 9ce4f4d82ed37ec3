"""A corpus in, Parquet of tokens out, resumable."""

import glob
import hashlib
import math
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..extras import require
from ..loading import target_peak
from ..worker_processes import stop_in_unguarded_script
from . import encoding, hub, processes, ray_engine
from .card import source_metadata
from .options import TokenizeOptions
from .output import Output
from .progress import ClipProgress
from .records import NO_FILE, Result, Settings, Summary
from .sources import Source, open_source
from .work import Job, num_cores


SUMMARY_SECONDS = 600  # between two versions of manifest.json and failures.jsonl while a run goes on


def tokenize(
    source: str | os.PathLike | Any,
    model: str,
    output: str | os.PathLike,
    options: TokenizeOptions | None = None,
    *,
    progress: bool = False,
) -> Result:
    """
    Encode every clip of a source to a folder of Parquet files. Runs are resumable: run the same call again.

    The rows do not depend on the number of processes, on the batches, on the engine, or on interruptions. Nothing is
    lost or encoded twice. Clips that were added to the source since the last run are encoded too.

    Args:
        source: Folder of audio files, tar shards or Parquet; glob of such files; list (.txt, .csv, .jsonl) of paths;
            folder of Lhotse Shar or of `save_to_disk`; name of a dataset on the Hub; or a `datasets.Dataset`.
        model: `bundled`, the name of a published checkpoint, a folder, or OWNER/NAME on the Hub. Its
            preprocessor_config.json may ask for a peak level, as Apertus 1.5 does.
        output: Folder for the Parquet files (created if missing), or that of an earlier run with the same source and
            model.
        options: `TokenizeOptions`, such as `TokenizeOptions(num_processes=4, batch_seconds=60)`. Default: all
            defaults.
        progress: Show progress on standard error.

    Returns:
        `Result`: totals of the folder, failures, and what this run did.

    Raises:
        ValueError: Bad arguments, no clips, a model that cannot be loaded, a folder with other settings, or a clip
            that failed with `on_error="fail"`.
        OSError: Something cannot be read or written. ChildProcessError, a kind of OSError: a worker was killed.
        ImportError: A package of the extra `bulk` (or `ray`) is missing.
    """
    stop_in_unguarded_script()
    started = time.monotonic()
    options = options or TokenizeOptions()
    for package in ("soundfile", "soxr", "pyarrow"):  # or every clip would fail
        require(package, "bulk")
    is_path = isinstance(source, (str, os.PathLike))
    if not os.fspath(output):
        raise ValueError("Got an empty output, which would be the current folder. Name a folder.")
    if is_path and Path(output).resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(
            f"The output {output} lies in the source {source}, whose Parquet it would become. Name another."
        )
    encoder, feature_extractor = encoding.load_encoder(model, options.revision, "cpu", options.peak_dbfs)
    commit = getattr(encoder.config, "_commit_hash", None)
    clips = open_source(
        source, options.column, options.dataset_config, options.split, options.dataset_revision, options.tar_names
    )
    selection = clips.selection
    settings = Settings(
        source=_name(source) if is_path else f"datasets.Dataset {getattr(source, '_fingerprint', None)}",
        column=selection.get("column"),
        dataset_config=selection.get("config"),
        dataset_revision=selection.get("revision"),
        split=selection.get("split"),
        model=os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else str(model),
        revision=commit,
        codebook_fingerprint=encoder.codebook_fingerprint,
        encoder_fingerprint=encoding.weights_fingerprint(encoder.encoder),
        codebook_size=encoder.config.codebook_size,
        hop_length=encoder.config.hop_length,
        sampling_rate=encoder.config.sampling_rate,
        target_peak_dB_FS=target_peak(feature_extractor),
        columns={field.name: str(field.type) for field in clips.schema},
        channel=str(options.channel),
        tar_names=options.tar_names,
    )
    del encoder
    with Output(output, settings, clips.schema, options.shard).open() as folder:
        folder.source_metadata = source_metadata(source, options.dataset_revision)
        folder.card_metadata = options.card_metadata()
        if options.push_to_hub is not None:
            hub.prepare(options.push_to_hub)
        changed, without_source = _compare_with_files(clips, folder, options.shard)
        if options.refresh and changed:
            folder.drop(set(changed))
        done, failures, _ = folder.finished()
        if not options.retry_failed:
            done |= failures.keys()
        items = [item for item in clips.items if in_shard(item.id, options.shard)]
        to_do = [item for item in items if item.id not in done]
        num_processes = options.num_processes or (2 if options.engine == "ray" else _default_processes(options.device))
        part_size = options.part_size or min(2000, max(50, math.ceil(len(to_do) / (4 * num_processes))))
        parts = [to_do[start : start + part_size] for start in range(0, len(to_do), part_size)]
        num_processes = max(1, min(num_processes, len(parts)))
        cores = max(1, num_cores() // num_processes)
        job = Job(
            source=clips.without_items(),
            output=folder,
            model=str(model),
            options=replace(options, revision=commit or options.revision),
            num_readers=options.num_readers or cores,
            num_threads=cores if num_processes > 1 or options.engine == "ray" else None,
        )
        watch = ClipProgress(len(to_do), settings.sampling_rate, progress)
        report = _Summaries(folder, watch)
        try:
            if options.engine == "ray":
                ray_engine.run(job, parts, report, num_processes, options.ray_address)
            else:
                processes.run(job, parts, report, num_processes)
        except BaseException:
            watch.close()
            _try_to_summarize(folder)
            raise
        watch.close()
        total, failures = folder.summarize(item.id for item in clips.items)
        rows, _, _ = folder.finished()
        silent = [item.id for item in items if item.id not in rows and item.id not in failures]
        if options.push_to_hub is not None:
            hub.push(folder.folder, options.push_to_hub)
    seconds = time.monotonic() - started
    return Result(
        total=total,
        failures=failures,
        done_now=watch.total,
        seconds=seconds,
        sampling_rate=settings.sampling_rate,
        passed_over=list(clips.passed_over),
        silent=silent,
        changed=changed,
        without_source=without_source,
    )


def _compare_with_files(clips: Source, folder: Output, shard: tuple[int, int]) -> tuple[list[str], list[str]]:
    """
    Ids of clips of this shard whose files have changed since they were read, and ids that have no source any more.
    """
    locators = {item.id: item.locator for item in clips.items}
    changed, without_source = [], []
    for id, before in folder.stamps().items():
        now = clips.stamp(locators[id]) if id in locators else NO_FILE
        if id not in locators or (now == NO_FILE and before != NO_FILE):
            without_source.append(id)
        elif now != before and in_shard(id, shard):
            changed.append(id)
    return changed, without_source


def _name(source: str | os.PathLike) -> str:
    """
    Of a source by path: the last part, for people, and a hash of the whole, which is nobody's business where it is
    published.
    """
    if not os.path.exists(source) and not glob.has_magic(os.fspath(source)):
        return os.fspath(source)  # on the Hub
    path = os.path.abspath(source)
    return f"{os.path.basename(path) or path} (path {hashlib.sha256(path.encode()).hexdigest()[:8]})"


def in_shard(id: str, shard: tuple[int, int]) -> bool:
    """Whether a clip belongs to the shard: by its id, so that clips that are added move no other one."""
    index, number = shard
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") % number == index


class _Summaries:
    """Passes reports on, and renews manifest.json and failures.jsonl now and then."""

    def __init__(self, folder: Output, watch: ClipProgress):
        self.folder, self.watch, self.last = folder, watch, time.monotonic()

    def __call__(self, summary: Summary) -> None:
        self.watch(summary)
        if time.monotonic() - self.last >= SUMMARY_SECONDS:
            self.folder.summarize()
            self.last = time.monotonic()


def _try_to_summarize(folder: Output) -> None:
    """After an error, which is what the user should hear of, and not of what it led to."""
    with suppress(OSError, ValueError):
        folder.summarize()


def _default_processes(device: str | None) -> int:
    if device is None and torch.cuda.is_available():
        return torch.cuda.device_count()
    # two threads in one process are as fast as two processes (benchmarks/README.md), with one model in memory
    return max(1, num_cores() // 2) if device in (None, "cpu") else 1
