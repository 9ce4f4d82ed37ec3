"""Pictures of an evaluation. Needs the extra `evaluation` (matplotlib)."""

from pathlib import Path

import numpy as np

from ..plots import save_figure
from .metrics import METRICS


def plot_metrics(path: Path, report) -> Path:
    """Writes one histogram over files for each metric that gave numbers, the systems laid over each other.

    Args:
        path: where to write; the ending names the format.
        report: a `Report`.
    """
    names = [
        name
        for name in METRICS
        if any(name in system.names and _numbers(system, name).size for system in report.systems)
    ]
    columns = min(4, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure = _figure(figsize=(4 * columns, 3 * rows + 0.6))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(names) :]:
        axes.remove()
    for axes, name in zip(grid, names, strict=False):
        numbers_of = [_numbers(system, name) for system in report.systems]
        edges = np.histogram_bin_edges(np.concatenate(numbers_of), bins=20)
        for index, (system, numbers) in enumerate(zip(report.systems, numbers_of, strict=True)):
            if numbers.size:
                axes.hist(numbers, edges, alpha=0.5, color=f"C{index}", label=system.name)
                axes.axvline(numbers.mean(), color=f"C{index}")
        metric = METRICS[name]
        better = "higher is better" if metric.higher_is_better else "lower is better"
        axes.set(title=metric.title, xlabel=", ".join(filter(None, (metric.unit, better))), ylabel="files")
        axes.yaxis.get_major_locator().set_params(integer=True)
    _legend(figure, report)
    return save_figure(figure, path)


def plot_codebook(path: Path, report) -> Path:
    """Writes how often each codebook entry occurs, most frequent first, beside equal use; one line for each model."""
    figure = _figure(figsize=(8, 4.5))
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


def _numbers(system, name: str) -> np.ndarray:
    return np.array([value for value in system.column(name) if value is not None], dtype=np.float64)


def _legend(figure, report) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=f"C{index}", alpha=0.5, label=system.name) for index, system in enumerate(report.systems)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))


def _figure(figsize: tuple[float, float]):
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no state
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'wavtokenizer_hf[evaluation]'") from error
    return Figure(figsize=figsize, layout="constrained")
