"""Modules of tests/fixtures that benchmarks use: signals and weights by formula, and the reference implementation."""

import sys
from pathlib import Path


# a folder of scripts, which is not installed
sys.path.append(str(Path(__file__).parent.parent / "tests" / "fixtures"))

import build_checkpoint
import formula
import original


__all__ = ["build_checkpoint", "formula", "original"]
