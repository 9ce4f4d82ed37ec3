"""Measure a codec: how close reconstructions are to the original audio, and how much of the codebook is used.

`evaluate` takes audio files and one or more systems: `Model`, or `DecodedFolder` for the output of any other codec. It
returns a `Report`, which prints as a table and saves as JSON, CSV and pictures. Needs the extra `evaluation`.
"""

from .metrics import METRICS
from .report import Report
from .run import DecodedFolder, Model, evaluate


__all__ = ["METRICS", "DecodedFolder", "Model", "Report", "evaluate"]
