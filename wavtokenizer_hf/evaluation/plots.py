"""Plots of an evaluation. Needs the extra `evaluation` (matplotlib)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plots import new_figure, save_figure
from .metrics import METRICS


if TYPE_CHECKING:
    from .report import Report, SystemResult


def plot_metrics(path: Path, report: "Report") -> Path:
    """Plot each metric that has values: one dot per file and system, with lines between the dots of a file.

    Args:
        path: Image file to write. Its extension sets the format.
        report: Report to plot.
    """
    names = [
        name
        for name in METRICS
        if any(name in system.names and _numbers(system, name).size for system in report.systems)
    ]
    columns = min(4, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure = new_figure((4 * columns, 3 * rows + 0.6))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(names) :]:
        axes.remove()
    for axes, name in zip(grid, names, strict=False):
        columns_of = [
            np.array([np.nan if value is None else value for value in system.column(name)], dtype=np.float64)
            if name in system.names
            else np.full(len(system.files), np.nan)
            for system in report.systems
        ]
        values = np.stack(columns_of)  # (systems, files)
        # spread the dots of a system horizontally, sorted by the first system, so that they do not overlap
        shift = np.empty(values.shape[1])
        shift[np.argsort(values[0], kind="stable")] = np.linspace(-0.3, 0.3, values.shape[1])
        positions = np.arange(len(values))[:, None] + shift
        if len(values) > 1:
            axes.plot(positions, values, color="0.8", linewidth=0.5, zorder=1)
        for index, system_values in enumerate(values):
            axes.scatter(positions[index], system_values, s=8, color=f"C{index}", zorder=2)
            if np.isfinite(system_values).any():
                axes.hlines(np.nanmean(system_values), index - 0.4, index + 0.4, color=f"C{index}", zorder=3)
        metric = METRICS[name]
        better = "higher is better" if metric.higher_is_better else "lower is better"
        axes.set(title=metric.title, ylabel=", ".join(filter(None, (metric.unit, better))), xticks=[])
    _legend(figure, report)
    return save_figure(figure, path)


def plot_codebook(path: Path, report: "Report") -> Path:
    """Plot how often each codebook entry occurs, most frequent first. Each model has a line, and a dotted mean."""
    figure = new_figure((8, 4.5))
    axes = figure.subplots()
    for index, system in enumerate(report.systems):
        usage = system.codes
        if usage is None:
            continue
        counts = np.sort(usage.counts)[::-1]
        counts = counts[counts > 0]
        label = f"{system.name}: {usage.num_used} of {len(usage.counts)} in use, perplexity {usage.perplexity:.0f}"
        axes.step(np.arange(1, len(counts) + 1), counts, where="mid", color=f"C{index}", label=label)
        axes.axhline(usage.num_codes / len(usage.counts), color=f"C{index}", linestyle=":")
    axes.set(xlabel="codebook entry, most frequent first", ylabel="occurrences", yscale="log")
    axes.set_title("codebook use (dotted: all entries equally often)")
    axes.legend()
    return save_figure(figure, path)


def _numbers(system: "SystemResult", name: str) -> np.ndarray:
    return np.array([value for value in system.column(name) if value is not None], dtype=np.float64)


def _legend(figure: Any, report: "Report") -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=f"C{index}", alpha=0.5, label=system.name) for index, system in enumerate(report.systems)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
