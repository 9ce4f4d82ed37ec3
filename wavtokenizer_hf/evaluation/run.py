"""Run an evaluation: reconstruct every reference with every system, and compute the metrics of each pair.

Systems run in this process, one clip at a time. Metrics run at the same time in `num_workers` processes. Results do
not depend on the number of processes, because each metric uses one thread in any process.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from .. import __version__, audio
from ..audio_errors import MAX_CLIP_SECONDS
from ..feature_extraction_wavtokenizer import peak_gain
from ..find_files import utf8_name
from ..long_audio import scale_to_peak
from ..modeling_wavtokenizer import WavTokenizerModel
from ..progress import Progress
from ..worker_processes import end_with_parent
from .codebook import CodebookUsage
from .metrics import (
    DISTRIBUTIONS,
    METRICS,
    PRESETS,
    SAMPLING_RATE,
    Clip,
    Options,
    import_package,
    score,
    unavailable_reason,
)
from .report import CODEBOOK_METRICS, FileResult, Report, SystemResult, WorstClip


MAX_SAMPLES_CUT = SAMPLING_RATE // 10
"""Maximum difference in length of a decoded file, because other codecs pad or drop the last frame.

0.1 s is more than a frame of any codec in use, and less than the difference to a wrong file.
"""

References = Sequence[tuple[Path, Path]]
"""Audio files, each with its relative path in the report."""


class System(Protocol):
    """Interface of a system that is measured."""

    name: str
    gives_codes: bool

    def describe(self) -> dict: ...

    def reconstruct(self, relative_path: Path, waveform: np.ndarray) -> tuple[np.ndarray, CodebookUsage | None]: ...


class Model:
    """WavTokenizer model to measure.

    Args:
        name: Name in the report.
        model: `WavTokenizerModel` at 24 kHz, on any device.
        peak_level: Peak level in dBFS that clips are scaled to before encoding, as the model's feature extractor does.
            Decoded audio is scaled back. Defaults to no scaling.
    """

    gives_codes = True

    def __init__(self, name: str, model: WavTokenizerModel, peak_level: float | None = None):
        if model.config.sampling_rate != SAMPLING_RATE:
            raise ValueError(f"Got a model for {model.config.sampling_rate} Hz, the metrics need {SAMPLING_RATE} Hz.")
        self.name = name
        self.model = model.eval()
        self.peak_level = peak_level

    def describe(self) -> dict:
        config = self.model.config
        return {
            "kind": "model",
            "codebook_fingerprint": self.model.codebook_fingerprint,
            "codebook_size": config.codebook_size,
            "tokens_per_second": config.frame_rate,
            "bits_per_second": config.bit_rate,
            "device": str(self.model.device),
            "dtype": str(self.model.head.linear.weight.dtype).removeprefix("torch."),
        }

    @torch.inference_mode()
    def reconstruct(self, relative_path: Path, waveform: np.ndarray) -> tuple[np.ndarray, CodebookUsage]:
        """Encode and decode audio (T,). Return audio of the same length, and counts of the codes."""
        peak = np.abs(waveform).max()
        (scaled,) = scale_to_peak([waveform], self.peak_level)
        audio_codes = self.model.encode(torch.from_numpy(scaled)[None, None].to(self.model.device)).audio_codes
        estimate, usage = self.decode(audio_codes[0, 0].cpu().numpy(), len(waveform))
        if self.peak_level is not None and peak > 0:
            estimate = estimate / np.float32(peak_gain(peak, self.peak_level))
        return estimate, usage

    @torch.inference_mode()
    def decode(self, audio_codes: np.ndarray, num_samples: int) -> tuple[np.ndarray, CodebookUsage]:
        """Decode codes (L,), int64. Return audio of `num_samples` samples, and counts of the codes."""
        config = self.model.config
        decoded = self.model.decode(torch.from_numpy(audio_codes)[None, None].to(self.model.device)).audio_values
        usage = CodebookUsage.of(audio_codes, config.codebook_size, config.frame_rate)
        return decoded[0, 0, :num_samples].float().cpu().numpy(), usage


class DecodedFolder:
    """Folder of audio files that another codec decoded.

    Each file has the relative path of its reference. Its extension may differ.

    Args:
        folder: Folder of the decoded files.
        name: Name in the report. Defaults to the folder as given.
    """

    gives_codes = False

    def __init__(self, folder: str | os.PathLike, name: str | None = None):
        self.folder = Path(folder)
        self.name = name or str(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}.")

    def describe(self) -> dict:
        return {"kind": "decoded files"}

    def reconstruct(self, relative_path: Path, waveform: np.ndarray) -> tuple[np.ndarray, None]:
        return audio.load(self.find(relative_path), SAMPLING_RATE, max_seconds=MAX_CLIP_SECONDS), None

    def find(self, relative_path: Path) -> Path:
        """Return the decoded file of a reference.

        Args:
            relative_path: Relative path of the reference. The decoded file may have another extension.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: There are several.
        """
        if (self.folder / relative_path).is_file():
            return self.folder / relative_path
        found = [
            path for suffix in audio.SUFFIXES if (path := self.folder / relative_path.with_suffix(suffix)).is_file()
        ]
        if not found:
            raise FileNotFoundError(f"no decoded file {self.folder / relative_path}, nor one of another format")
        if len(found) > 1:
            raise ValueError(f"several decoded files for one: {', '.join(map(str, found))}")
        return found[0]


def evaluate(
    references: References,
    systems: Sequence[System],
    metrics: Iterable[str] | None = None,
    utmos_weights: str | Path | None = None,
    num_workers: int = 0,
    progress: bool = False,
    channel: str | int = "mean",
    crepe: str = "full",
    asr: str | None = None,
    preset: str = "quick",
) -> Report:
    """
    Measure one or more systems on the same audio files.

    Args:
        references: Tuples of the path of an audio file and a relative path. The relative path is its name in the
            report, and its path in a `DecodedFolder`.
        systems: One or more of `Model`, `DecodedFolder`, or objects with their interface. The others are compared with
            the first, file by file.
        metrics: Names from `METRICS`. A metric that cannot run here raises ValueError. Defaults to the metrics of the
            preset, of which those that cannot run are reported as not run.
        utmos_weights: TorchScript file of UTMOS, which takes float32 (1, N) at 16 kHz, nominally in [-1, 1], and
            returns one number. It adds UTMOS to the metrics. Nothing is downloaded.
        num_workers: Number of worker processes for the metrics. 0: compute them in this process. Workers are spawned,
            so a script that uses them needs `if __name__ == "__main__":`.
        progress: Whether to show progress on standard error.
        channel: Channel of references that have several: `"mean"`, `"left"`, `"right"` or a number from 0.
        crepe: Size of the pitch tracker CREPE: `"full"`, as in the paper, or `"tiny"`, about fifty times as fast.
        asr: Speech recognition model for the word error rate: name or folder for the pipeline of transformers.
            Defaults to pocketsphinx, for English.
        preset: Key of `PRESETS`, the set of metrics if `metrics` is None.

    Returns:
        Report on all files. It lists, with the reason, files that cannot be read or have no decoded file, and metrics
        without a value.

    Raises:
        ValueError: There is nothing to measure; a preset, metric or size of CREPE is unknown; a requested metric
            cannot run; two references have the same relative path; or a system has no reconstruction of any file.
        ImportError: scipy, soundfile or soxr is missing, which every evaluation needs.
        ChildProcessError: A worker process was killed.
    """
    import_package("scipy")  # the report needs it at the end; fail before the work if it is missing

    requested = list(dict.fromkeys([*(metrics or ()), *(["utmos"] if utmos_weights is not None else [])]))
    if preset not in PRESETS:
        raise ValueError(f"Got preset={preset!r}, expected one of {', '.join(PRESETS)}.")
    metrics = list(dict.fromkeys([*PRESETS[preset], *requested])) if metrics is None else requested
    _check(references, systems, metrics)
    options = Options(None if utmos_weights is None else str(utmos_weights), crepe, asr)
    unavailable = {name: reason for name in metrics if (reason := unavailable_reason(name, options)) is not None}
    for name in requested:
        if name in unavailable:
            raise ValueError(f"{name} cannot run: {unavailable[name]}")
    runnable = [name for name in metrics if name not in unavailable]
    results = [SystemResult(system.name, system.describe(), [], unavailable) for system in systems]

    jobs = _reconstruct_all(references, systems, channel)
    scored = _score_all(jobs, runnable, options, num_workers)
    measured = set()
    with Progress(len(references), "files", shown=progress) as shown:
        for relative_path, seconds, reconstructions, scores in scored:
            rows = zip(systems, results, reconstructions, scores, strict=True)
            for system, result, reconstruction, system_score in rows:
                if system_score is not None:
                    measured.add(system.name)
                file_result = _file_result(
                    relative_path, seconds, system, reconstruction, system_score, metrics, runnable
                )
                result.files.append(file_result)
            shown.update()
    for result in results:
        if result.name not in measured:
            first = result.files[0]
            raise ValueError(
                f"{result.name} gave nothing to measure for any of {len(result.files)} files. "
                f"{first.file}: {next(iter(first.reasons.values()))}"
            )
    settings = {name: METRICS[name].settings for name in metrics}
    for name in {"f0_error", "voicing_f1"} & set(metrics):
        settings[name] = f"{settings[name]}; CREPE {crepe}"
    if asr is not None and "word_error_rate" in metrics:
        settings["word_error_rate"] = f"against the transcript of the original, by {asr}"
    report = Report(results, _versions(runnable), settings)
    report.worst = _worst_clips(report, references, systems, channel)
    return report


def _worst_clips(
    report: Report, references: References, systems: Sequence[System], channel: str | int, count: int = 10
) -> list[WorstClip]:
    """Return the clips with the worst values of the ranking metric. They are reconstructed again."""
    name = report.ranking
    if name is None:
        return []
    sign = 1 if METRICS[name].higher_is_better else -1
    scored = [
        (sign * value, index, number, value)
        for number, result in enumerate(report.systems)
        for index, value in enumerate(result.column(name))
        if value is not None
    ]
    worst = []
    for _, index, number, value in sorted(scored)[:count]:
        source, relative_path = references[index]
        try:
            waveform = audio.load(source, SAMPLING_RATE, channel=channel, max_seconds=MAX_CLIP_SECONDS)
            estimate, _ = systems[number].reconstruct(relative_path, waveform)
        except (ValueError, OSError, torch.OutOfMemoryError):
            continue  # the file has changed since it was measured; its values stay
        result = report.systems[number]
        worst.append(WorstClip(relative_path.as_posix(), result.name, name, value, waveform, estimate))
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruct and score
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Reconstruction:
    """Reconstruction of one reference by a system, or the reason why there is none."""

    estimate: np.ndarray | None = None
    usage: CodebookUsage | None = None
    samples_cut: int = 0
    failure: str | None = None


_Job = tuple[str, np.ndarray | None, list[_Reconstruction]]  # relative path, audio, one reconstruction per system
_Score = tuple[dict[str, float | None], dict[str, str]]  # values and reasons, see `score`
_Scored = tuple[str, float | None, list[_Reconstruction], list[_Score | None]]


def _reconstruct_all(references: References, systems: Sequence[System], channel: str | int) -> Iterator[_Job]:
    """Yield (relative path, waveform or None, one reconstruction per system) for each reference."""
    for source, relative_path in references:
        name = utf8_name(relative_path.as_posix())
        try:
            waveform = audio.load(source, SAMPLING_RATE, channel=channel, max_seconds=MAX_CLIP_SECONDS)
        except ImportError:
            raise
        except Exception as error:
            yield name, None, [_Reconstruction(failure=_reason(error)) for _ in systems]
            continue
        yield name, waveform, [_reconstruct(system, relative_path, waveform) for system in systems]


def _reason(error: Exception) -> str:
    is_known = isinstance(error, (ValueError, OSError))
    return str(error) if is_known else f"{type(error).__name__}: {error}"


def _reconstruct(system: System, relative_path: Path, waveform: np.ndarray) -> _Reconstruction:
    try:
        estimate, usage = system.reconstruct(relative_path, waveform)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        return _Reconstruction(failure=str(error))
    samples_cut = len(estimate) - len(waveform)
    if abs(samples_cut) > MAX_SAMPLES_CUT:
        return _Reconstruction(
            failure=f"decoded to {len(estimate)} samples at {SAMPLING_RATE} Hz, the reference has {len(waveform)}; "
            f"expected a difference of at most {MAX_SAMPLES_CUT}"
        )
    return _Reconstruction(estimate, usage, samples_cut)


def _score_all(jobs: Iterable[_Job], names: list[str], options: Options, num_workers: int) -> Iterator[_Scored]:
    """Yield (relative path, seconds, reconstructions, scores) for each job, in order. A failure has the score None."""
    if num_workers == 0:
        for relative_path, waveform, reconstructions in jobs:
            with _single_thread():
                scores = _score(waveform, [one.estimate for one in reconstructions], names, options)
            yield relative_path, _seconds(waveform), reconstructions, scores
        return

    # not fork: a forked process inherits the locks of torch's threads, but not the threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start_worker) as executor:
        pending: deque[tuple[str, float | None, list[_Reconstruction], Future]] = deque()

        def next_result() -> _Scored:
            relative_path, seconds, reconstructions, future = pending.popleft()
            return relative_path, seconds, reconstructions, future.result()

        try:
            for relative_path, waveform, reconstructions in jobs:
                estimates = [one.estimate for one in reconstructions]
                future = executor.submit(_score, waveform, estimates, names, options)
                for one in reconstructions:
                    one.estimate = None  # only the worker's copy is needed from here on
                pending.append((relative_path, _seconds(waveform), reconstructions, future))
                if len(pending) > 2 * num_workers:  # bounds the audio in memory
                    yield next_result()
            while pending:
                yield next_result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "A worker process was killed, perhaps because memory ran out. Use fewer workers or shorter files."
            ) from error
        finally:
            executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    end_with_parent()
    torch.set_num_threads(1)


def _score(
    waveform: np.ndarray | None, estimates: list[np.ndarray | None], names: list[str], options: Options
) -> list[_Score | None]:
    """Compute the metrics of each estimate of one reference: (values, reasons), or None without an estimate."""
    if waveform is None:
        return [None] * len(estimates)
    reference = Clip(waveform, options)
    scores: list[_Score | None] = []
    for estimate in estimates:
        if estimate is None:
            scores.append(None)
            continue
        length = min(len(waveform), len(estimate))
        shortened = reference if length == len(waveform) else Clip(waveform[:length], options)
        scores.append(score(shortened, Clip(estimate[:length], options), names))
    return scores


def _file_result(
    relative_path: str,
    seconds: float | None,
    system: System,
    reconstruction: _Reconstruction,
    system_score: _Score | None,
    metrics: Iterable[str],
    runnable: Iterable[str],
) -> FileResult:
    codebook_metrics = list(CODEBOOK_METRICS) if system.gives_codes else []
    values: dict[str, float | None] = dict.fromkeys([*metrics, *codebook_metrics])
    if system_score is None:
        failure = reconstruction.failure or ""  # always set without a score
        return FileResult(relative_path, seconds, values, dict.fromkeys([*runnable, *codebook_metrics], failure))
    scores, reasons = system_score
    values |= scores
    if reconstruction.usage is not None:
        values |= reconstruction.usage.metrics()
    return FileResult(relative_path, seconds, values, reasons, reconstruction.samples_cut, reconstruction.usage)


# ---------------------------------------------------------------------------------------------------------------------
# Shared functions
# ---------------------------------------------------------------------------------------------------------------------


def _check(references: References, systems: Sequence[System], metrics: list[str]) -> None:
    if not references or not systems or not metrics:
        raise ValueError(
            f"Got {len(references)} files, {len(systems)} systems and {len(metrics)} metrics, expected at least one "
            "each."
        )
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"Got the metrics {', '.join(unknown)}, expected some of {', '.join(METRICS)}.")
    if len({system.name for system in systems}) < len(systems):
        raise ValueError(
            f"Got systems of the same name: {', '.join(system.name for system in systems)}. Give each its own name."
        )
    seen: dict[Path, Path] = {}
    for source, relative_path in references:
        if relative_path in seen:
            raise ValueError(
                f"{seen[relative_path]} and {source} would both be {relative_path} in the report. Evaluate them "
                "separately."
            )
        seen[relative_path] = source


def _seconds(waveform: np.ndarray | None) -> float | None:
    return None if waveform is None else len(waveform) / SAMPLING_RATE


@contextmanager
def _single_thread() -> Iterator[None]:
    """Use one thread, as in a worker process, because float32 sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _versions(names: list[str]) -> dict[str, str]:
    packages = ["torch", "transformers", "numpy", "soxr", *(each for name in names for each in METRICS[name].packages)]
    versions = {"wavtokenizer_hf": __version__}
    for name in dict.fromkeys(packages):
        with suppress(PackageNotFoundError):  # the options can make a package unnecessary
            versions[name] = version(DISTRIBUTIONS.get(name, name))
    return versions
