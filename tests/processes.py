"""Processor time and memory of a process and its children, for slow tests. Linux only."""

import os
import re
import subprocess
import time
from pathlib import Path


def used_by(process: subprocess.Popen) -> tuple[float, float]:
    """
    Processor seconds, and the largest memory at a moment in MB, of a process and those that it started, until it ends.
    """
    seconds, memory = {}, 0.0
    while process.poll() is None:
        now, waiting = 0.0, [process.pid]
        while waiting:
            folder = Path("/proc", str(waiting.pop()))
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                resident = re.search(r"Pss:\s+(\d+)", (folder / "smaps_rollup").read_text())
                waiting += [pid for task in folder.glob("task/*/children") for pid in task.read_text().split()]
            except OSError:
                continue  # it has just ended
            seconds[folder.name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            now += int(resident[1]) / 1000 if resident else 0
        memory = max(memory, now)
        time.sleep(0.1)
    return sum(seconds.values()), memory
