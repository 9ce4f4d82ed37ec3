"""
Whether a run fits: the memory of its steps, estimated from steps on one and on two segments before the first real one.
"""

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
CGROUP_LIMITS = (  # (limit, usage) of the control group that a container runs in
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Estimate:
    """Memory of a run's steps in bytes.

    Args:
        fixed: what does not depend on the batch: weights, gradients, optimizers, and the process itself on a CPU.
        per_segment: what each segment of a batch adds.
    """

    fixed: float
    per_segment: float

    def of(self, batch_size: int) -> float:
        """Return the bytes that a step of this many segments takes."""
        return self.fixed + batch_size * self.per_segment

    def largest_batch(self, available: float) -> int:
        """Return the largest batch whose step fits into `available` bytes; 0 if none does."""
        return max(0, int((available - self.fixed) // max(self.per_segment, 1.0)))


def estimate(measure: Callable[[int], int | None], optimizer_bytes: int, segments: int) -> Estimate | None:
    """
    The memory of steps, from two small ones.

    Args:
        measure: (segments) -> peak in bytes of a step on so many segments that changes nothing; None where the system
            does not tell.
        optimizer_bytes: what the optimizers will add at their first step.
        segments: size of the smaller step; the larger has twice as many.
    """
    if measure(segments) is None:  # not counted: the first step of a process also loads libraries
        return None
    small, large = measure(segments), measure(2 * segments)
    if small is None or large is None:
        return None
    per_segment = max(large - small, 0) / segments
    return Estimate(small - segments * per_segment + optimizer_bytes, per_segment)


def refusal(found: Estimate, available: float, settings: Settings) -> str | None:
    """Return why a run does not fit and which settings would, or None if it fits."""
    needed = found.of(settings.batch_size)
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
            f"{found.of(fitting) / GB:.1f} GB and learns from as many segments a step."
        )
    seconds = settings.segment_seconds * (0.9 * available - found.fixed) / max(found.per_segment, 1.0)
    if seconds >= 0.25:
        return text + f"Use --batch-size 1 --segment-seconds {math.floor(seconds * 10) / 10:g}."
    return text + (
        "No batch fits. Leave discriminators out (--loss-weights multi_period=0 multi_period_features=0 ...), or use "
        "a machine with more memory."
    )


def available_memory(device: torch.device, settings: Settings, num_processes: int = 1) -> float | None:
    """Bytes that this process may hold in all, with what it holds now; None where the system does not tell.

    On a CPU the free memory is shared out evenly among the processes of the run.
    """
    if settings.memory_gb is not None:
        return settings.memory_gb * GB
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    available = _meminfo().get("MemAvailable")
    held = _status().get("VmRSS")
    if available is None or held is None:
        return None
    limits = [available]
    for limit, usage in CGROUP_LIMITS:
        try:
            limits.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return min(limits) / num_processes + held


class PeakMemory:
    """
    The highest memory of this process, or of a GPU, while a block runs: `bytes`, None where the system does not tell.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak
                self.known = True
            except OSError:
                self.known = False
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_reserved(self.device)
        elif self.known:
            self.bytes = _status().get("VmHWM")


def _status() -> dict[str, int]:
    return _read_kilobytes(f"/proc/{os.getpid()}/status")


def _meminfo() -> dict[str, int]:
    return _read_kilobytes("/proc/meminfo")


def _read_kilobytes(path: str) -> dict[str, int]:
    """The lines `Name:  123 kB` of a file, in bytes; empty where there is no such file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    parts = [line.split() for line in lines]
    return {part[0].rstrip(":"): int(part[1]) * 1024 for part in parts if len(part) == 3 and part[2] == "kB"}
