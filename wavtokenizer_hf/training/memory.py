"""Check that a run fits into memory, with an estimate from steps on one and on two segments."""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .settings import Settings


logger = logging.getLogger(__name__)

GB = 1e9
CGROUP_LIMITS = (  # (limit, usage) of the control group of a container: version 2, version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated memory of a training step in bytes.

    Args:
        fixed: Memory that does not depend on the batch: weights, gradients, optimizers; on a CPU also the process.
        per_segment: Memory per segment of the batch.
    """

    fixed: float
    per_segment: float

    def bytes_for(self, batch_size: int) -> float:
        """Return the bytes that a step on this many segments takes."""
        return self.fixed + batch_size * self.per_segment

    def largest_batch(self, available: float) -> int:
        """Return the largest batch size that fits into `available` bytes, or 0."""
        return max(0, int((available - self.fixed) // max(self.per_segment, 1.0)))


def estimate_memory(
    measure: Callable[[int], int | None], optimizer_bytes: int, segments: int
) -> MemoryEstimate | None:
    """
    Estimate the memory of a step by extrapolation from two small steps.

    Args:
        measure: Function (segments) -> peak memory in bytes of a step on this many segments that changes nothing. None
            if the system does not report it.
        optimizer_bytes: Bytes that the optimizers will allocate at their first step.
        segments: Number of segments of the smaller step. The larger step has twice as many.

    Returns:
        The estimate, or None if the system does not report memory.
    """
    if measure(segments) is None:  # warm-up: the first step of a process also loads libraries
        return None
    small, large = measure(segments), measure(2 * segments)
    if small is None or large is None:
        return None
    per_segment = max(large - small, 0) / segments
    return MemoryEstimate(small - segments * per_segment + optimizer_bytes, per_segment)


def refusal_reason(found: MemoryEstimate, available: float, settings: Settings) -> str | None:
    """Return why a run does not fit and which settings fit, or None if it fits."""
    needed = found.bytes_for(settings.batch_size)
    if needed <= available:
        return None
    text = (
        f"A step on batch_size={settings.batch_size} segments of {settings.segment_seconds:g} s needs about "
        f"{needed / GB:.1f} GB ({found.fixed / GB:.1f} GB, and {found.per_segment / GB:.2f} GB for each segment), and "
        f"{available / GB:.1f} GB are free. "
    )
    fitting = found.largest_batch(0.9 * available)
    if fitting:
        accumulation = math.ceil(settings.batch_size * settings.gradient_accumulation / fitting)
        return text + (
            f"Use --batch-size {fitting} --gradient-accumulation {accumulation}, which needs about "
            f"{found.bytes_for(fitting) / GB:.1f} GB and uses as many segments per step."
        )
    seconds = settings.segment_seconds * (0.9 * available - found.fixed) / max(found.per_segment, 1.0)
    if seconds >= 0.25:
        return text + f"Use --batch-size 1 --segment-seconds {math.floor(seconds * 10) / 10:g}."
    return text + (
        "No batch fits. Leave discriminators out (--loss-weights multi_period=0 multi_period_features=0 ...), or use "
        "a machine with more memory."
    )


def available_memory(device: torch.device, settings: Settings, num_processes: int = 1) -> float | None:
    """Return the bytes that this process may use in total, including what it uses now.

    On a CPU, the free memory is divided evenly among the processes of the run. None if the system does not report it.
    """
    if settings.memory_gb is not None:
        return settings.memory_gb * GB
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    available = _meminfo().get("MemAvailable")
    resident = _process_status().get("VmRSS")
    if available is None or resident is None:
        return None
    limits = [available]
    for limit, usage in CGROUP_LIMITS:
        try:
            limits.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return min(limits) / num_processes + resident


class PeakMemory:
    """Measure the peak memory of this process, or of a GPU, in a `with` block.

    Attributes:
        bytes: Peak memory. None if the system does not report it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # Linux: reset VmHWM
                self.can_measure = True
            except OSError:
                self.can_measure = False
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_reserved(self.device)
        elif self.can_measure:
            self.bytes = _process_status().get("VmHWM")


def _process_status() -> dict[str, int]:
    return _read_kilobytes(f"/proc/{os.getpid()}/status")


def _meminfo() -> dict[str, int]:
    return _read_kilobytes("/proc/meminfo")


def _read_kilobytes(path: str) -> dict[str, int]:
    """Return the lines `Name:  123 kB` of a file as name -> bytes. Empty if the file does not exist."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    rows = [line.split() for line in lines]
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}
