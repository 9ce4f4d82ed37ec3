"""
Encode whole corpora. Needs the extra `bulk`.

`tokenize` writes a folder of Parquet files, and its runs are resumable. `tokenize_dataset` and `AudioTokenizer` take
a dataset of the datasets library.
"""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names


if TYPE_CHECKING:
    from .mapping import AudioDetokenizer, AudioTokenizer, detokenize_dataset, tokenize_dataset
    from .options import TokenizeOptions
    from .records import Result
    from .run import tokenize
    from .verification import Verification, verify

_MODULES = {  # public name -> module that defines it. All but options and records import torch.
    "AudioDetokenizer": "mapping",
    "AudioTokenizer": "mapping",
    "Result": "records",
    "TokenizeOptions": "options",
    "Verification": "verification",
    "detokenize_dataset": "mapping",
    "tokenize": "run",
    "tokenize_dataset": "mapping",
    "verify": "verification",
}

__all__ = [
    "AudioDetokenizer",
    "AudioTokenizer",
    "Result",
    "TokenizeOptions",
    "Verification",
    "detokenize_dataset",
    "tokenize",
    "tokenize_dataset",
    "verify",
]


if not TYPE_CHECKING:  # a type checker would take every name for one that exists, of type Any
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
