"""
Sources of clips, one module per kind.

A source first lists its clips, each with an id and a locator. Workers then read each clip by its locator.
"""

from .base import Item, Source
from .files import FileSource
from .hf_datasets import HFDatasetSource
from .lhotse_shar import LhotseSource
from .opening import open_source
from .parquet import ParquetSource
from .segments import SegmentSource
from .tar_shards import TarSource


__all__ = [
    "FileSource",
    "HFDatasetSource",
    "Item",
    "LhotseSource",
    "ParquetSource",
    "SegmentSource",
    "Source",
    "TarSource",
    "open_source",
]
