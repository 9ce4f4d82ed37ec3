"""`tokenize`: encode a corpus to Parquet files. Runs are resumable."""

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
from .output import OutputFolder
from .progress import ClipProgress
from .records import NO_FILE, Result, Settings, Summary
from .sources import Source, open_source
from .work import Job, num_cores


SUMMARY_SECONDS = 600  # between two updates of manifest.json and failures.jsonl during a run


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

    The rows do not depend on the number of processes, the batches, the engine, or interruptions. No clip is lost or
    encoded twice. A later run also encodes the clips that were added to the source.

    Args:
        source: Folder of audio files, tar shards or Parquet files; glob of such files; list (.txt, .csv, .jsonl) of
            paths or segments; folder of Lhotse Shar or of `save_to_disk`; name of a dataset on the Hub; or a
            `datasets.Dataset`.
        model: `bundled`, the name of a published checkpoint, a folder, or OWNER/NAME on the Hub. Its
            preprocessor_config.json may ask for a peak level, as Apertus 1.5 does.
        output: Folder for the Parquet files (created if missing), or the folder of an earlier run with the same source
            and model.
        options: `TokenizeOptions`, such as `TokenizeOptions(num_processes=4, batch_seconds=60)`. Default: all
            defaults.
        progress: Show progress on standard error.

    Returns:
        `Result`: totals of the folder, failures, and what this run did.

    Raises:
        ValueError: Bad arguments, no clips, a model that cannot be loaded, a folder with other settings, or a clip
            that failed with `on_error="fail"`.
        OSError: A file or folder cannot be read or written, or the Hub or Ray cannot be reached. If a worker was
            killed: ChildProcessError, a kind of OSError.
        ImportError: A package of the extra `bulk` (or `ray`) is missing.
    """
    stop_in_unguarded_script()
    started = time.monotonic()
    options = options or TokenizeOptions()
    for package in ("soundfile", "soxr", "pyarrow"):  # else each clip would fail, one by one
        require(package, "bulk")
    is_path = isinstance(source, (str, os.PathLike))
    if not os.fspath(output):
        raise ValueError("Got an empty output, which would be the current folder. Name a folder.")
    if is_path and Path(output).resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(
            f"The output {output} lies in the source {source}, so a later run would read its Parquet files as input. "
            "Name another folder."
        )
    encoder, feature_extractor = encoding.load_encoder(model, options.revision, "cpu", options.peak_dbfs)
    commit = getattr(encoder.config, "_commit_hash", None)
    clips = open_source(
        source, options.column, options.dataset_config, options.split, options.dataset_revision, options.tar_names
    )
    selection = clips.selection
    settings = Settings(
        source=_source_name(source) if is_path else f"datasets.Dataset {getattr(source, '_fingerprint', None)}",
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
    with OutputFolder(output, settings, clips.schema, options.shard).open() as folder:
        folder.source_metadata = source_metadata(source, options.dataset_revision)
        folder.card_metadata = options.card_metadata()
        if options.push_to_hub is not None:
            hub.create_repo(options.push_to_hub)
        changed, without_source = _find_changed_clips(clips, folder, options.shard)
        if options.refresh and changed:
            folder.remove_clips(set(changed))
        done, failures, _ = folder.finished_clips()
        if not options.retry_failed:
            done |= failures.keys()
        shard_items = [item for item in clips.items if in_shard(item.id, options.shard)]
        to_do = [item for item in shard_items if item.id not in done]
        num_processes = options.num_processes or (
            2 if options.engine == "ray" else _default_num_processes(options.device)
        )
        part_size = options.part_size or min(2000, max(50, math.ceil(len(to_do) / (4 * num_processes))))
        items_by_file = [to_do[start : start + part_size] for start in range(0, len(to_do), part_size)]
        num_processes = max(1, min(num_processes, len(items_by_file)))
        cores = max(1, num_cores() // num_processes)
        job = Job(
            source=clips.without_items(),
            output=folder,
            model=str(model),
            options=replace(options, revision=commit or options.revision),
            num_readers=options.num_readers or cores,
            num_threads=cores if num_processes > 1 or options.engine == "ray" else None,
        )
        clip_progress = ClipProgress(len(to_do), settings.sampling_rate, progress)
        on_report = _Reporter(folder, clip_progress)
        try:
            if options.engine == "ray":
                ray_engine.run(job, items_by_file, on_report, num_processes, options.ray_address)
            else:
                processes.run(job, items_by_file, on_report, num_processes)
        except BaseException:
            clip_progress.close()
            _try_to_summarize(folder)
            raise
        clip_progress.close()
        total, failures = folder.summarize(item.id for item in clips.items)
        done, _, _ = folder.finished_clips()
        silent = [item.id for item in shard_items if item.id not in done and item.id not in failures]
        if options.push_to_hub is not None:
            hub.upload(folder.folder, options.push_to_hub)
    seconds = time.monotonic() - started
    return Result(
        total=total,
        failures=failures,
        done_now=clip_progress.total,
        seconds=seconds,
        sampling_rate=settings.sampling_rate,
        passed_over=list(clips.passed_over),
        silent=silent,
        changed=changed,
        without_source=without_source,
    )


def _find_changed_clips(clips: Source, folder: OutputFolder, shard: tuple[int, int]) -> tuple[list[str], list[str]]:
    """
    Compare the clips of the output folder with the source.

    Returns:
        Ids of this shard's clips whose files have changed since they were read, and ids of clips, of any shard, that
        the source does not hold any more or whose file is missing.
    """
    locators = {item.id: item.locator for item in clips.items}
    changed, without_source = [], []
    for id, stamp in folder.stamps().items():
        current_stamp = clips.stamp(locators[id]) if id in locators else NO_FILE
        if id not in locators or (current_stamp == NO_FILE and stamp != NO_FILE):
            without_source.append(id)
        elif current_stamp != stamp and in_shard(id, shard):
            changed.append(id)
    return changed, without_source


def _source_name(source: str | os.PathLike) -> str:
    """
    Return a name for a source by path or on the Hub.

    A local source is identified by a hash of its path. Only the last part of the path is written out, because the
    name is published with the dataset.
    """
    if not os.path.exists(source) and not glob.has_magic(os.fspath(source)):
        return os.fspath(source)  # on the Hub
    path = os.path.abspath(source)
    return f"{os.path.basename(path) or path} (path {hashlib.sha256(path.encode()).hexdigest()[:8]})"


def in_shard(id: str, shard: tuple[int, int]) -> bool:
    """Return whether a clip belongs to a shard of the run. A clip that is added moves no other clip."""
    index, number = shard
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") % number == index


class _Reporter:
    """Show the counts that workers report, and update manifest.json and failures.jsonl every SUMMARY_SECONDS."""

    def __init__(self, folder: OutputFolder, clip_progress: ClipProgress):
        self.folder, self.clip_progress, self.last_update = folder, clip_progress, time.monotonic()

    def __call__(self, summary: Summary) -> None:
        self.clip_progress(summary)
        if time.monotonic() - self.last_update >= SUMMARY_SECONDS:
            self.folder.summarize()
            self.last_update = time.monotonic()


def _try_to_summarize(folder: OutputFolder) -> None:
    """Update the summary files after an error. A second error must not hide the first."""
    with suppress(OSError, ValueError):
        folder.summarize()


def _default_num_processes(device: str | None) -> int:
    if device is None and torch.cuda.is_available():
        return torch.cuda.device_count()
    # two threads in one process are as fast as two processes (benchmarks/README.md), and hold one model in memory
    return max(1, num_cores() // 2) if device in (None, "cpu") else 1
