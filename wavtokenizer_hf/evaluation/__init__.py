"""Measure a codec: quality of reconstructions, and use of the codebook. Needs the extra `evaluation`.

`evaluate` takes audio files and one or more systems: `Model`, or `DecodedFolder` for the output of any other codec. It
returns a `Report`, which prints a table and saves JSON, CSV and plots.
"""

from .metrics import METRICS
from .report import Report
from .run import DecodedFolder, Model, evaluate


__all__ = ["METRICS", "DecodedFolder", "Model", "Report", "evaluate"]
