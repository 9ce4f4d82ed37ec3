"""Run an evaluation: reconstruct every reference with every system, and compute every metric of each pair.

Systems run in this process, one clip after another; metrics run beside them in `num_workers` processes. Results do not
depend on the number of processes: each metric computes on one thread wherever it runs.
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
from .metrics import DISTRIBUTIONS, METRICS, PRESETS, SAMPLING_RATE, Clip, Options, package, score, unavailable_reason
from .report import CODEBOOK_FIGURES, FileResult, Report, SystemResult, WorstClip


MAX_SAMPLES_CUT = SAMPLING_RATE // 10
"""How much a decoded file may differ in length: other codecs fill the last frame up, or drop it. 0.1 s is more than a
frame of any codec in use, and less than a wrong file."""


References = Sequence[tuple[Path, Path]]
"""Audio files, each with its relative path in the report."""


class System(Protocol):
    """Interface of a system that is measured."""

    name: str
    gives_codes: bool

    def describe(self) -> dict: ...

    def reconstruct(self, place: Path, waveform: np.ndarray) -> tuple[np.ndarray, CodebookUsage | None]: ...


class Model:
    """A WavTokenizer to measure.

    Args:
        name: Name in the report.
        model: `WavTokenizerModel` at 24 kHz, on any device.
        peak_level: Level in dBFS that clips are scaled to before they are encoded, as its feature extractor says.
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
    def reconstruct(self, place: Path, waveform: np.ndarray) -> tuple[np.ndarray, CodebookUsage]:
        """Encode and decode (T,) -> (T,), cut to the length of the input. Return counts of the codes too."""
        peak = np.abs(waveform).max()
        (scaled,) = scale_to_peak([waveform], self.peak_level)
        audio_codes = self.model.encode(torch.from_numpy(scaled)[None, None].to(self.model.device)).audio_codes
        estimate, usage = self.decode(audio_codes[0, 0].cpu().numpy(), len(waveform))
        if self.peak_level is not None and peak > 0:
            estimate = estimate / np.float32(peak_gain(peak, self.peak_level))
        return estimate, usage

    @torch.inference_mode()
    def decode(self, audio_codes: np.ndarray, num_samples: int) -> tuple[np.ndarray, CodebookUsage]:
        """Decode codes (L,) int64 -> audio, cut to `num_samples`. Return counts of the codes too."""
        config = self.model.config
        decoded = self.model.decode(torch.from_numpy(audio_codes)[None, None].to(self.model.device)).audio_values
        usage = CodebookUsage.of(audio_codes, config.codebook_size, config.frame_rate)
        return decoded[0, 0, :num_samples].float().cpu().numpy(), usage


class DecodedFolder:
    """Folder of audio files that another codec decoded. Each has the relative path of its reference, in any format.

    Args:
        folder: Folder of the files.
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

    def reconstruct(self, place: Path, waveform: np.ndarray) -> tuple[np.ndarray, None]:
        return audio.load(self.find(place), SAMPLING_RATE, max_seconds=MAX_CLIP_SECONDS), None

    def find(self, place: Path) -> Path:
        """Return the decoded file of a reference, of any extension. Raises ValueError if there are several."""
        if (self.folder / place).is_file():
            return self.folder / place
        found = [path for suffix in audio.SUFFIXES if (path := self.folder / place.with_suffix(suffix)).is_file()]
        if not found:
            raise FileNotFoundError(f"no decoded file {self.folder / place}, nor one of another format")
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
        references: For each file its path, and its place: a relative path that names it in the report and finds its
            partner in a `DecodedFolder`.
        systems: `Model`, `DecodedFolder`, or anything with their interface; at least one. The others are compared with
            the first, file by file.
        metrics: Names from `METRICS`, each of which must be able to run here. Defaults to those of the preset; one
            that cannot run is then reported as not run.
        utmos_weights: TorchScript file of UTMOS, which takes float32 (1, N) at 16 kHz, nominally in [-1, 1], and
            returns one number. It adds UTMOS to the metrics. Nothing is downloaded.
        num_workers: Number of processes for the metrics; 0: this process. Workers are spawned, so a script with some
            needs `if __name__ == "__main__":`.
        progress: Show progress on standard error.
        channel: Channel of references that have several: `"mean"`, `"left"`, `"right"` or a number from 0.
        crepe: Size of the pitch tracker CREPE: `"full"`, as in the paper, or `"tiny"`, about fifty times as fast.
        asr: Speech recognizer for the word error rate: name or folder for the pipeline of transformers. Defaults to
            pocketsphinx, for English.
        preset: Key of `PRESETS`, which names the metrics if `metrics` is None.

    Returns:
        `Report` on all files. Files that cannot be read or have no partner, and metrics without a number, are in it
        with the reason.

    Raises:
        ValueError: Nothing to measure, an unknown preset or size of CREPE, a metric that is unknown or was asked for
            and cannot run, two files of one place, or a system without a single reconstruction.
        ImportError: scipy, soundfile or soxr is missing, which every evaluation needs.
        ChildProcessError: A worker process was killed.
    """
    package("scipy")  # needed for the report at the end: fail before the work if it is missing

    asked = list(dict.fromkeys([*(metrics or ()), *(["utmos"] if utmos_weights is not None else [])]))
    if preset not in PRESETS:
        raise ValueError(f"Got preset={preset!r}, expected one of {', '.join(PRESETS)}.")
    metrics = list(dict.fromkeys([*PRESETS[preset], *asked])) if metrics is None else asked
    _check(references, systems, metrics)
    options = Options(None if utmos_weights is None else str(utmos_weights), crepe, asr)
    unavailable = {name: reason for name in metrics if (reason := unavailable_reason(name, options)) is not None}
    for name in asked:
        if name in unavailable:
            raise ValueError(f"{name} cannot run: {unavailable[name]}")
    runnable = [name for name in metrics if name not in unavailable]
    results = [SystemResult(system.name, system.describe(), [], unavailable) for system in systems]

    jobs = _reconstruct_all(references, systems, channel)
    scored = _score_all(jobs, runnable, options, num_workers)
    measured = set()
    with Progress(len(references), "files", shown=progress) as shown:
        for place, seconds, reconstructions, scores in scored:
            rows = zip(systems, results, reconstructions, scores, strict=True)
            for system, result, reconstruction, scored_pair in rows:
                if scored_pair is not None:
                    measured.add(system.name)
                file_result = _file_result(place, seconds, system, reconstruction, scored_pair, metrics, runnable)
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
    """Return the clips with the worst values of the first metric that has any, reconstructed again."""
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
        source, place = references[index]
        try:
            waveform = audio.load(source, SAMPLING_RATE, channel=channel, max_seconds=MAX_CLIP_SECONDS)
            estimate, _ = systems[number].reconstruct(place, waveform)
        except (
            ValueError,
            OSError,
            torch.OutOfMemoryError,
        ):  # the file has changed since it was measured; its values stay
            continue
        result = report.systems[number]
        worst.append(WorstClip(place.as_posix(), result.name, name, value, waveform, estimate))
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# One file after another
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Reconstruction:
    """Reconstruction of one reference by a system, or the reason why there is none."""

    estimate: np.ndarray | None = None
    usage: CodebookUsage | None = None
    samples_cut: int = 0
    failure: str | None = None


_Job = tuple[str, np.ndarray | None, list[_Reconstruction]]  # place, audio, one reconstruction for each system
_Score = tuple[dict[str, float | None], dict[str, str]]  # values and reasons, see `score`
_Scored = tuple[str, float | None, list[_Reconstruction], list[_Score | None]]


def _reconstruct_all(references: References, systems: Sequence[System], channel: str | int) -> Iterator[_Job]:
    """Yield (place, waveform or None, one reconstruction per system) for each reference."""
    for source, place in references:
        try:
            waveform = audio.load(source, SAMPLING_RATE, channel=channel, max_seconds=MAX_CLIP_SECONDS)
        except ImportError:
            raise
        except Exception as error:
            yield utf8_name(place.as_posix()), None, [_Reconstruction(failure=_reason(error)) for _ in systems]
            continue
        yield utf8_name(place.as_posix()), waveform, [_reconstruct(system, place, waveform) for system in systems]


def _reason(error: Exception) -> str:
    is_known = isinstance(error, (ValueError, OSError))
    return str(error) if is_known else f"{type(error).__name__}: {error}"


def _reconstruct(system: System, place: Path, waveform: np.ndarray) -> _Reconstruction:
    try:
        estimate, usage = system.reconstruct(place, waveform)
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
    """Yield (place, seconds, reconstructions, scores) for each job, in order. A score is None after a failure."""
    if num_workers == 0:
        for place, waveform, reconstructions in jobs:
            with _one_thread():
                scores = _score(waveform, [one.estimate for one in reconstructions], names, options)
            yield place, _seconds(waveform), reconstructions, scores
        return

    # not fork: a forked process inherits the locks of torch's threads, but not the threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start_worker) as executor:
        waiting: deque[tuple[str, float | None, list[_Reconstruction], Future]] = deque()

        def first_in_line() -> _Scored:
            place, seconds, reconstructions, future = waiting.popleft()
            return place, seconds, reconstructions, future.result()

        try:
            for place, waveform, reconstructions in jobs:
                estimates = [one.estimate for one in reconstructions]
                future = executor.submit(_score, waveform, estimates, names, options)
                for one in reconstructions:
                    one.estimate = None  # only the worker's copy is needed from here on
                waiting.append((place, _seconds(waveform), reconstructions, future))
                if len(waiting) > 2 * num_workers:  # so that audio does not pile up in memory
                    yield first_in_line()
            while waiting:
                yield first_in_line()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "A worker process was killed, perhaps for want of memory. Use fewer workers or shorter files."
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
        same = reference if length == len(waveform) else Clip(waveform[:length], options)
        scores.append(score(same, Clip(estimate[:length], options), names))
    return scores


def _file_result(
    place: str,
    seconds: float | None,
    system: System,
    reconstruction: _Reconstruction,
    scored: _Score | None,
    metrics: Iterable[str],
    runnable: Iterable[str],
) -> FileResult:
    figures = list(CODEBOOK_FIGURES) if system.gives_codes else []
    values: dict[str, float | None] = dict.fromkeys([*metrics, *figures])
    if scored is None:
        failure = reconstruction.failure or ""  # it is there where nothing was scored
        return FileResult(place, seconds, values, dict.fromkeys([*runnable, *figures], failure))
    scores, reasons = scored
    values |= scores
    if reconstruction.usage is not None:
        values |= reconstruction.usage.figures()
    return FileResult(place, seconds, values, reasons, reconstruction.samples_cut, reconstruction.usage)


# ---------------------------------------------------------------------------------------------------------------------
# What they share
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
        raise ValueError(f"Got systems of one name: {', '.join(system.name for system in systems)}. Name them apart.")
    seen: dict[Path, Path] = {}
    for source, place in references:
        if place in seen:
            raise ValueError(f"{seen[place]} and {source} would both be {place} in the report. Evaluate them apart.")
        seen[place] = source


def _seconds(waveform: np.ndarray | None) -> float | None:
    return None if waveform is None else len(waveform) / SAMPLING_RATE


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, as in a worker process: the last bits of float32 sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _versions(names: list[str]) -> dict[str, str]:
    packages = ["torch", "transformers", "numpy", "soxr", *(each for name in names for each in METRICS[name].packages)]
    found = {"wavtokenizer_hf": __version__}
    for name in dict.fromkeys(packages):
        with suppress(PackageNotFoundError):  # not needed with the options that were given
            found[name] = version(DISTRIBUTIONS.get(name, name))
    return found
