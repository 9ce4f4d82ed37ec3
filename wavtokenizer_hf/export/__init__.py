"""
Ways out of this package: models as ONNX files, and token folders as the files that language models are trained from.
"""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names
from .wavtokenizer_onnx import WavTokenizerOnnx


if TYPE_CHECKING:
    from .onnx_export import OnnxReport, export_onnx

__all__ = ["OnnxReport", "WavTokenizerOnnx", "export_onnx"]


# these need torch, `WavTokenizerOnnx` does not
if not TYPE_CHECKING:  # to a type checker every name would exist, and be Any
    __getattr__, __dir__ = lazy_names(__name__, {"OnnxReport": "onnx_export", "export_onnx": "onnx_export"})
