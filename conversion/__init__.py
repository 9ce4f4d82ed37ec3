"""Checkpoints of the reference implementation: load them, convert them to folders for transformers, and back.

checkpoints.yaml, published.py   table of the published checkpoints, and their checks
download.py                      download their files from the Hub
checkpoint.py                    open a checkpoint file without running code in it
mapping.py                       tensor names: kept, dropped or refused
architecture.py                  tensor shapes -> configuration, compared with the YAML file
source.py                        files -> weights: one file, the parts of one, or the mean of several
from_original.py                 weights -> model or folder, with a report
to_original.py                   folder -> checkpoint and YAML file of the reference implementation
card.py                          model cards
push.py                          upload a folder to the Hub
command.py                       `wavtokenizer convert` and `wavtokenizer checkpoints`
convert.py                       `python -m conversion.convert`, from the root of the repository

The folder is at the top of the repository and is installed as `wavtokenizer_hf.conversion`. Tensors and configuration
fields have the names of the native WavTokenizer of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..modeling_wavtokenizer import WavTokenizerModel

__all__ = ["load_original"]


def load_original(
    name_or_path: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> WavTokenizerModel:
    """
    Load a checkpoint of the reference implementation without converting it to a folder.

    Args:
        name_or_path (`str` or `Path`):
            Checkpoint file, or name of a published checkpoint (`wavtokenizer checkpoints` lists them). A published
            checkpoint is downloaded into the cache of huggingface_hub and checked.
        revision (`str`, *optional*): Branch, tag or commit of the published checkpoint's repository on the Hub.
        token (`str` or `bool`, *optional*): Access token of the Hub. Defaults to the one of `hf auth login`.
        cache_dir (`str` or `Path`, *optional*): Folder of the download cache. Defaults to that of huggingface_hub.

    Returns:
        [`WavTokenizerModel`]: Model in float32, on the CPU, in eval mode.

    Raises:
        ValueError: The name is unknown, the file fails a check, or it is not a usable WavTokenizer.
        OSError: The file cannot be downloaded or read.
    """
    from .from_original import load  # imports torch

    return load(name_or_path, revision, token, cache_dir)
