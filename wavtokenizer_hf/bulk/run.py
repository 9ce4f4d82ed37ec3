"""A corpus in, Parquet of tokens out, resumable."""

import glob
import hashlib
import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..audio import check_channel
from ..extras import require
from ..loading import target_peak
from . import encoding, hub, processes, ray_engine
from .output import NO_FILE, Output, Settings, Summary
from .progress import Progress
from .sources import Source, open_source
from .work import Job, num_cores


SUMMARY_SECONDS = 600  # between two versions of manifest.json and failures.jsonl while a run goes on
ENGINES = ("processes", "ray")


@dataclass
class Result:
    """What lies in the folder after a run.

    Args:
        total: of all clips in the folder, of all shards and runs.
        failures: clip -> its failure (`reason` and `kind`), likewise.
        done_now: what this run did.
        seconds: that this run took.
        sampling_rate: Hz of the samples that are counted.
        passed_over: files, and members of shards, that are no clips.
        changed: clips of this run's shard whose file has another size or time than when it was read; done again with `refresh`.
        without_source: clips with a row or a failure that the source does not hold any more, or whose file is gone.
        silent: clips of this run's shard that have neither a row nor a failure: none, or there is a fault in this package.
    """

    total: Summary
    failures: dict[str, encoding.Failure]
    done_now: Summary
    seconds: float
    sampling_rate: int
    passed_over: list[str]
    silent: list[str]
    changed: list[str]
    without_source: list[str]


def tokenize(
    source: str | os.PathLike | Any,
    model: str,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    column: str | None = None,
    dataset_config: str | None = None,
    split: str | None = None,
    dataset_revision: str | None = None,
    device: str | None = None,
    engine: str = "processes",
    ray_address: str | None = None,
    num_processes: int | None = None,
    num_readers: int | None = None,
    batch_seconds: float = 120,
    part_size: int | None = None,
    shard: tuple[int, int] = (0, 1),
    on_error: str = "record",
    retry_failed: bool = False,
    refresh: bool = False,
    push_to_hub: str | None = None,
    progress: bool = False,
    channel: str | int = "mean",
    max_clip_seconds: float = encoding.MAX_CLIP_SECONDS,
    tar_names: str = "ending",
    peak_dbfs: float | str = "model",
) -> Result:
    """
    Encode every clip of a source to a folder of Parquet files. Runs are resumable: run the same call again.

    The rows do not depend on the number of processes, on the batches, on the engine, or on interruptions. Nothing is lost or
    encoded twice. Clips that were added to the source since the last run are encoded too.

    Args:
        source: Folder of audio files, tar shards or Parquet; glob of such files; list (.txt, .csv, .jsonl) of paths; folder of
            Lhotse Shar or of `save_to_disk`; name of a dataset on the Hub; or a `datasets.Dataset`.
        model: `bundled`, the name of a published checkpoint, a folder, or OWNER/NAME on the Hub. Its preprocessor_config.json
            may ask for a peak level, as Apertus 1.5 does.
        output: Folder for the Parquet files (created if missing), or that of an earlier run with the same source and model.
        revision: Branch, tag or commit of the model on the Hub.
        column: Column of the audio, or of the paths in a list. Defaults to `audio`, and in lists also `path` or `file_name`.
        dataset_config: Configuration of a dataset on the Hub.
        split: Split of a dataset. Defaults to `train`.
        dataset_revision: Branch, tag or commit of a dataset on the Hub.
        device: Device of the models. Defaults to one GPU per process, or the CPU.
        engine: `"processes"` on this machine, or `"ray"`.
        ray_address: Address of a Ray cluster. All its machines must see source and output under the same paths. By default Ray
            starts on this machine.
        num_processes: Number of worker processes, each with a model. Default: one per GPU; on a CPU, one per two cores; 2 with
            Ray. Workers are spawned, so a script with several needs `if __name__ == "__main__":`.
        num_readers: Threads per process that read, decode and resample ahead of the model. Defaults to its share of the cores.
        batch_seconds: Seconds of audio per batch, padding included. Memory grows with it.
        part_size: Clips per Parquet file. A crash costs at most one file per process. Default: 2000, or fewer if there would
            be less than four files per process.
        shard: `(i, n)`: encode only shard i of n, from 0. All shards may write to one folder at the same time.
        on_error: `"record"` lists a clip that fails and continues, `"fail"` stops at the first one.
        retry_failed: Try clips again that failed in an earlier run.
        refresh: Encode clips again whose file has another size or time than when it was read.
        push_to_hub: Name of a dataset on the Hub, to which the folder is uploaded at the end.
        progress: Show progress on standard error.
        channel: Channel of clips that have several: `"mean"`, `"left"`, `"right"` or a number from 0.
        max_clip_seconds: A longer clip fails, before it is read if its header gives its length.
        tar_names: Where names in tar shards are split: `"ending"`, before the known ending of an audio file, or `"webdataset"`,
            at the first dot.
        peak_dbfs: Peak level that each clip is scaled to, in dBFS, at most 0; `"none"`: no scaling. Defaults to what the
            model's preprocessor_config.json says.

    Returns:
        `Result`: totals of the folder, failures, and what this run did.

    Raises:
        ValueError: Bad arguments, no clips, a model that cannot be loaded, a folder with other settings, or a clip that failed
            with `on_error="fail"`.
        OSError: Something cannot be read or written. ChildProcessError, a kind of OSError: a worker was killed.
        ImportError: A package of the extra `bulk` (or `ray`) is missing.
    """
    processes.stop_in_unguarded_script()
    started = time.monotonic()
    _check(engine, ray_address, num_processes, num_readers, batch_seconds, part_size, shard, on_error)
    check_channel(channel)
    encoding.check_max_clip_seconds(max_clip_seconds)
    require("soundfile", "bulk"), require("soxr", "bulk"), require("pyarrow", "bulk")  # or every clip would fail
    is_path = isinstance(source, (str, os.PathLike))
    if not os.fspath(output):
        raise ValueError("Got an empty output, which would be the current folder. Name a folder.")
    if is_path and Path(output).resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(
            f"The output {output} lies in the source {source}, whose Parquet it would become. Name another."
        )
    encoder, feature_extractor = encoding.load_encoder(model, revision, "cpu", peak_dbfs)
    commit = getattr(encoder.config, "_commit_hash", None)
    clips = open_source(source, column, dataset_config, split, dataset_revision, tar_names)
    selection = clips.selection
    settings = Settings(
        source=_name(source) if is_path else f"datasets.Dataset {source._fingerprint}",
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
        channel=str(channel),
        tar_names=tar_names,
    )
    del encoder
    with Output(output, settings, clips.schema, shard).open() as folder:
        if push_to_hub is not None:
            hub.prepare(push_to_hub)
        changed, without_source = _compare_with_files(clips, folder, shard)
        if refresh and changed:
            folder.drop(set(changed))
        done, failures, _ = folder.finished()
        if not retry_failed:
            done |= failures.keys()
        items = [item for item in clips.items if in_shard(item.id, shard)]
        to_do = [item for item in items if item.id not in done]
        num_processes = num_processes or (2 if engine == "ray" else _default_processes(device))
        part_size = part_size or min(2000, max(50, math.ceil(len(to_do) / (4 * num_processes))))
        parts = [to_do[start : start + part_size] for start in range(0, len(to_do), part_size)]
        num_processes = max(1, min(num_processes, len(parts)))
        cores = max(1, num_cores() // num_processes)
        job = Job(
            source=clips.without_items(),
            output=folder,
            model=str(model),
            revision=commit or revision,
            device=device,
            batch_seconds=batch_seconds,
            num_readers=num_readers or cores,
            num_threads=cores if num_processes > 1 or engine == "ray" else None,
            stop_at_failure=on_error == "fail",
            channel=channel,
            max_clip_seconds=max_clip_seconds,
            peak_dbfs=peak_dbfs,
        )
        watch = Progress(len(to_do), settings.sampling_rate, progress)
        report = _Summaries(folder, watch)
        try:
            if engine == "ray":
                ray_engine.run(job, parts, report, num_processes, ray_address)
            elif num_processes == 1:
                processes.run_here(job, parts, report)
            else:
                processes.run_in_processes(job, parts, report, num_processes)
        except BaseException:
            watch.close()
            _try_to_summarize(folder)
            raise
        watch.close()
        total, failures = folder.summarize(item.id for item in clips.items)
        rows, _, _ = folder.finished()
        silent = [item.id for item in items if item.id not in rows and item.id not in failures]
        if push_to_hub is not None:
            hub.push(folder.folder, push_to_hub)
    seconds = time.monotonic() - started
    return Result(
        total, failures, watch.total, seconds, settings.sampling_rate, list(clips.passed_over), silent, changed,
        without_source,
    )  # fmt: skip


def _compare_with_files(clips: Source, folder: Output, shard: tuple[int, int]) -> tuple[list[str], list[str]]:
    """Ids of clips of this shard whose files have changed since they were read, and ids that have no source any more."""
    places = {item.id: item.place for item in clips.items}
    changed, without_source = [], []
    for id, before in folder.stamps().items():
        now = clips.stamp(places[id]) if id in places else NO_FILE
        if id not in places or (now == NO_FILE and before != NO_FILE):
            without_source.append(id)
        elif now != before and in_shard(id, shard):
            changed.append(id)
    return changed, without_source


def _name(source: str | os.PathLike) -> str:
    """Of a source by path: the last part, for people, and a hash of the whole, which is nobody's business where it is published."""
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

    def __init__(self, folder: Output, watch: Progress):
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
    # two threads in one process are as fast as two processes (benchmarks/README.md), and one model is less memory than two
    return max(1, num_cores() // 2) if device in (None, "cpu") else 1


def _check(engine, ray_address, num_processes, num_readers, batch_seconds, part_size, shard, on_error) -> None:
    if engine not in ENGINES:
        raise ValueError(f"Got the engine {engine!r}, expected one of {', '.join(ENGINES)}.")
    if ray_address is not None and engine != "ray":
        raise ValueError(f"Got the Ray address {ray_address!r} for the engine {engine!r}, expected the engine 'ray'.")
    if on_error not in ("record", "fail"):
        raise ValueError(f"Got on_error={on_error!r}, expected 'record' or 'fail'.")
    for name, value in (("num_processes", num_processes), ("num_readers", num_readers), ("part_size", part_size)):
        if value is not None and value < 1:
            raise ValueError(f"Got {name}={value}, expected at least 1.")
    encoding.check_batch_seconds(batch_seconds)
    index, number = shard
    if not 0 <= index < number:
        raise ValueError(f"Got the shard {index}/{number}, expected i/n with i from 0 to n - 1.")
