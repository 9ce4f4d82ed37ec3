"""Import modules of tests/fixtures: signals and weights by formula, and the loader of the reference implementation."""

import sys
from pathlib import Path


# tests/fixtures is not a package
sys.path.append(str(Path(__file__).parent.parent / "tests" / "fixtures"))

import build_checkpoint
import formula
import original


__all__ = ["build_checkpoint", "formula", "original"]
