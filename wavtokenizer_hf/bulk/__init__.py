"""Tokens of whole corpora: `tokenize` writes a folder of Parquet and can be killed and run again; `tokenize_dataset` and
`AudioTokenizer` are for those who have a dataset of the datasets library. Needs the extra `bulk`.
"""

from .mapping import AudioDetokenizer, AudioTokenizer, detokenize_dataset, tokenize_dataset
from .run import Result, tokenize


__all__ = ["AudioDetokenizer", "AudioTokenizer", "Result", "detokenize_dataset", "tokenize", "tokenize_dataset"]
