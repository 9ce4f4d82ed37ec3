"""Tokens of whole corpora: `tokenize` writes a folder of Parquet and can be killed and run again; `tokenize_dataset` and
`AudioTokenizer` are for those who have a dataset of the datasets library. Needs the extra `bulk`.
"""

from .mapping import AudioDetokenizer, AudioTokenizer, detokenize_dataset, tokenize_dataset
from .run import Result, tokenize
from .verify import Verification, verify


__all__ = [
    "AudioDetokenizer",
    "AudioTokenizer",
    "Result",
    "Verification",
    "detokenize_dataset",
    "tokenize",
    "tokenize_dataset",
    "verify",
]
