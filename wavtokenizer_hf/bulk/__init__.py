"""
Codes of whole corpora. Needs the extra `bulk`.

`tokenize` writes a folder of Parquet files, and its runs are resumable. `tokenize_dataset` and `AudioTokenizer` are
for those who have a dataset of the datasets library.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .mapping import AudioDetokenizer, AudioTokenizer, detokenize_dataset, tokenize_dataset
    from .options import TokenizeOptions
    from .records import Result
    from .run import tokenize
    from .verification import Verification, verify

_MODULES = {  # where each name is defined; all but options and records import torch
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


if not TYPE_CHECKING:  # to a type checker every name would exist, and be Any

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value  # the next time it is found without this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
