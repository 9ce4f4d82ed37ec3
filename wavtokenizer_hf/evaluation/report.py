"""Results of an evaluation: values per file, means and differences, as a table, JSON, CSV and plots.

A value that could not be computed is None (null in JSON, an empty cell in CSV). The report counts such values and
lists the reasons.
"""

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .. import audio
from ..atomic_files import write_text
from .codebook import CodebookUsage
from .metrics import METRICS, SAMPLING_RATE


CODEBOOK_METRICS = {
    "codebook_utilization": ("codebook use", ""),
    "codebook_perplexity": ("perplexity", ""),
    "codebook_entropy": ("entropy", "bit/s"),
}
"""Codebook metric of a model -> title and unit."""

REPORT_FILES = ("report.json", "files.csv", "metrics.png", "codebook.png")

INTERVAL = "95 % interval of the mean over files, Student's t"


@dataclass
class FileResult:
    """Values of one file for one system.

    Args:
        file: Path of the reference, relative to its folder.
        seconds: Length of the reference. None if it could not be read.
        values: Name of a metric or codebook metric -> value, or None.
        reasons: Name of a metric without a value -> reason. Unavailable metrics are left out.
        samples_cut: Samples by which the decoded file was longer (> 0) or shorter (< 0) than its reference.
        codes: Counts of the codes. None for a folder of decoded files, or after a failure.
    """

    file: str
    seconds: float | None
    values: dict[str, float | None]
    reasons: dict[str, str]
    samples_cut: int = 0
    codes: CodebookUsage | None = None

    def failures(self) -> list[tuple[list[str], str]]:
        """Return the metrics without a value, grouped by reason: (names, reason)."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(name)
        return [(names, reason) for reason, names in by_reason.items()]


@dataclass(frozen=True)
class Summary:
    """Mean and 95 % interval of the values, or differences, of `count` files. `failures` files have no value."""

    mean: float | None
    low: float | None
    high: float | None
    count: int
    failures: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Summary":
        """Return the mean and 95 % interval (Student's t) of the values that are not None.

        Fewer than two values have no interval.
        """
        from scipy.stats import t

        numbers = np.array([value for value in values if value is not None], dtype=np.float64)
        count, failures = len(numbers), len(values) - len(numbers)
        if count == 0:
            return cls(None, None, None, 0, failures)
        mean = float(numbers.mean())
        if count == 1:
            return cls(mean, None, None, 1, failures)
        margin = float(t.ppf(0.975, count - 1) * numbers.std(ddof=1) / math.sqrt(count))
        return cls(mean, mean - margin, mean + margin, count, failures)


@dataclass
class SystemResult:
    """Results of one system, in the order of the references.

    Args:
        name: Name of the system.
        description: Facts for the JSON report.
        files: One result per reference.
        unavailable: Metric that cannot run on this machine -> reason.
    """

    name: str
    description: dict
    files: list[FileResult]
    unavailable: dict[str, str]

    @property
    def names(self) -> list[str]:
        return list(self.files[0].values)

    def column(self, name: str) -> list[float | None]:
        return [file.values[name] for file in self.files]

    @property
    def codes(self) -> CodebookUsage | None:
        """Counts of the codes of all files."""
        counted = [file.codes for file in self.files if file.codes is not None]
        return sum(counted[1:], counted[0]) if counted else None

    @property
    def num_cut(self) -> int:
        return sum(file.samples_cut != 0 for file in self.files)


@dataclass
class WorstClip:
    """One of the clips with the worst values, to listen to.

    Args:
        file: Path of the reference, relative to its folder.
        system: Name of the system.
        metric: Metric by which clips are ranked.
        value: Value of that metric.
        original, reconstruction: Audio of shape (T,), float32, at 24 kHz.
    """

    file: str
    system: str
    metric: str
    value: float
    original: np.ndarray
    reconstruction: np.ndarray


@dataclass
class Report:
    """Result of `evaluate`. Differences are per file: values of each further system minus those of the first.

    Args:
        systems: One result per system.
        versions: Versions of the packages that computed the metrics.
        settings: Metric -> description of its settings.
        worst: Clips with the worst values, worst first.
    """

    systems: list[SystemResult]
    versions: dict[str, str]
    settings: dict[str, str] = field(default_factory=dict)
    worst: list[WorstClip] = field(default_factory=list)

    @property
    def ranking(self) -> str | None:
        """Metric by which clips are ranked: the first one with values."""
        names = (name for name in METRICS if any(name in system.names for system in self.systems))
        return next(
            (n for n in names if any(v is not None for s in self.systems if n in s.names for v in s.column(n))), None
        )

    @property
    def names(self) -> list[str]:
        """Metrics and codebook metrics that at least one system has."""
        return list(dict.fromkeys(name for system in self.systems for name in system.names))

    @property
    def failures(self) -> list[dict]:
        """Missing values: file, system, metrics and reason. Unavailable metrics are left out."""
        return [
            {"file": file.file, "system": system.name, "metrics": names, "reason": reason}
            for system in self.systems
            for file in system.files
            for names, reason in file.failures()
        ]

    def differences(self) -> list[tuple[str, str, dict[str, Summary]]]:
        """Return the differences to the first system, over files for which both have a value.

        Returns:
            Tuples (system, first system, metric -> summary of the differences).
        """
        first = self.systems[0]
        differences = []
        for system in self.systems[1:]:
            summaries = {}
            for name in system.names:
                if name not in first.names:
                    continue
                pairs = zip(system.column(name), first.column(name), strict=True)
                summaries[name] = Summary.of([None if a is None or b is None else a - b for a, b in pairs])
            differences.append((system.name, first.name, summaries))
        return differences

    def to_dict(self) -> dict:
        """Return the report for JSON, without the values of single files."""
        first, names = self.systems[0], self.names
        return {
            "num_files": len(first.files),
            "seconds": sum(file.seconds or 0 for file in first.files),
            "interval": INTERVAL,
            "settings": {name: self.settings.get(name, METRICS[name].settings) for name in names if name in METRICS},
            "units": {name: _unit(name) for name in names},
            "versions": self.versions,
            "systems": [
                {
                    "name": system.name,
                    **system.description,
                    "metrics": {
                        name: {**asdict(Summary.of(system.column(name))), "not_run": system.unavailable.get(name)}
                        for name in system.names
                    },
                    "all_codes": _all_codes(system),
                    "num_files_cut": system.num_cut,
                }
                for system in self.systems
            ],
            "differences": [
                {
                    "system": name,
                    "minus": first_name,
                    "metrics": {metric: asdict(summary) for metric, summary in summaries.items()},
                }
                for name, first_name, summaries in self.differences()
            ],
            "failures": self.failures,
        }

    def table(self) -> str:
        """Return the report as text for a terminal."""
        first = self.systems[0]
        seconds = sum(file.seconds or 0 for file in first.files)
        lines = [f"{len(first.files)} files, {seconds:.1f} s. Mean and {INTERVAL}."]
        for system in self.systems:
            lines += ["", system.name]
            for name in system.names:
                if name in system.unavailable:
                    lines.append(f"  {_title(name):<24}not run: {system.unavailable[name]}")
                else:
                    lines.append(_row(name, Summary.of(system.column(name))))
            if (usage := system.codes) is not None:
                lines.append(
                    f"  all {usage.num_codes} codes together: {usage.num_used} of {len(usage.counts)} entries in use "
                    f"({usage.utilization:.1%}), perplexity {usage.perplexity:.1f}, {usage.bits_per_second:.1f} of "
                    f"{math.log2(len(usage.counts)) * usage.frame_rate:.1f} bit/s"
                )
            if system.num_cut:
                lines.append(f"  {system.num_cut} decoded files differ in length, the longer of each pair was cut")
        for name, first_name, summaries in self.differences():
            lines += ["", f"{name} minus {first_name}, file by file"]
            lines += [_row(metric, summary, sign="+") for metric, summary in summaries.items() if summary.count]
        return "\n".join(lines)

    def save(self, folder: str | os.PathLike) -> list[Path]:
        """Write the report to files.

        The files are report.json, files.csv, metrics.png, and worst.md with its audio files. If a model was measured,
        codebook.png is written too.

        Args:
            folder: Output folder (created if missing).

        Returns:
            Paths of the files, without the audio files in worst/.
        """
        from .plots import plot_codebook, plot_metrics

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = [
            write_text(folder / "report.json", json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"),
            write_text(folder / "files.csv", self._csv()),
            plot_metrics(folder / "metrics.png", self),
        ]
        if self.worst:
            written.append(self._write_worst(folder))
        if any(system.codes is not None for system in self.systems):
            written.append(plot_codebook(folder / "codebook.png", self))
        return written

    def _write_worst(self, folder: Path) -> Path:
        """Write worst.md, and for each of its rows worst/NN_original.wav and worst/NN_reconstruction.wav."""
        audio_folder = folder / "worst"
        audio_folder.mkdir(exist_ok=True)
        title = METRICS[self.worst[0].metric].title
        lines = [f"# The {len(self.worst)} worst clips by {title}", ""]
        lines += [f"| {title} | file | system | original | reconstruction |", "|---|---|---|---|---|"]
        for index, clip in enumerate(self.worst):
            links = []
            for kind, waveform in (("original", clip.original), ("reconstruction", clip.reconstruction)):
                path = audio.save(audio_folder / f"{index:02d}_{kind}.wav", waveform, SAMPLING_RATE)
                links.append(f"[listen](worst/{path.name})")
            lines.append(f"| {clip.value:.3f} | {clip.file} | {clip.system} | {' | '.join(links)} |")
        return write_text(folder / "worst.md", "\n".join(lines) + "\n")

    def _csv(self) -> str:
        """Return CSV text with one row per file and system. The last column holds the reasons of missing values."""
        names = self.names
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["file", "system", "seconds", "samples_cut", *names, "failures"])
        for system in self.systems:
            for file in system.files:
                failures = "; ".join(f"{', '.join(missing)}: {reason}" for missing, reason in file.failures())
                values = [file.values.get(name) for name in names]
                writer.writerow([file.file, system.name, file.seconds, file.samples_cut, *values, failures])
        return buffer.getvalue()


def _all_codes(system: SystemResult) -> dict | None:
    usage = system.codes
    if usage is None:
        return None
    return {"num_codes": usage.num_codes, "num_used": usage.num_used, **usage.metrics()}


def _title(name: str) -> str:
    if name in CODEBOOK_METRICS:
        return CODEBOOK_METRICS[name][0] + " per file"
    return METRICS[name].title + (" ↑" if METRICS[name].higher_is_better else " ↓")


def _unit(name: str) -> str:
    return CODEBOOK_METRICS[name][1] if name in CODEBOOK_METRICS else METRICS[name].unit


def _row(name: str, summary: Summary, sign: str = "") -> str:
    if summary.mean is None:
        return f"  {_title(name):<24}{'none':>10} {'':<32}{0:>6} files, {summary.failures} failed"
    interval = "" if summary.low is None else f"[{summary.low:{sign}.3f}, {summary.high:{sign}.3f}]"
    mean = f"{summary.mean:{sign}.3f}"
    failed = f", {summary.failures} failed" if summary.failures else ""
    unit = f" {_unit(name)}" if _unit(name) else ""
    return f"  {_title(name):<24}{mean:>10} {interval + unit:<32}{summary.count:>6} files{failed}"
