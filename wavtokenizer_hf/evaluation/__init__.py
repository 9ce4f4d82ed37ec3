"""Measures a codec: how close reconstructions come to what went in, and how much of the codebook is used.

`evaluate` takes sound files and one or more systems (`Model`, or `DecodedFolder` for what any other codec decoded) and
gives a `Report`, which prints as a table and saves as JSON, CSV and pictures. Needs the extra `evaluation`.
"""

from .metrics import METRICS
from .report import Report
from .run import DecodedFolder, Model, evaluate


__all__ = ["METRICS", "DecodedFolder", "Model", "Report", "evaluate"]
