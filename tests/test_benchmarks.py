"""Benchmarks meant for other machines also run here, in their smallest form."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *arguments: str) -> str:
    pytest.importorskip("transformers.models.wavtokenizer", reason="transformers 5.24 or later has a native model")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCHMARKS / script, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu():
    output = run("gpu.py", "--device", "cpu", "--quick")
    assert "| encode, native one by one |" in output and "| decode, bfloat16 |" in output
    assert output.rstrip().endswith("| 0 of 2 |")  # our model has no wrong codes


@pytest.mark.slow
def test_the_comparison_with_transformers_runs():
    output = run("compare_with_transformers.py", "--seconds", "1", "--batch-seconds", "2", "--rounds", "1")
    padded = re.findall(r"^\| 8 of [\d.]+ to .*$", output, re.MULTILINE)
    assert len(padded) == 2 and all(row.endswith("| 0 of 8 |") for row in padded)  # the last column is for our model
    assert "| 0 of 75 |" in output
