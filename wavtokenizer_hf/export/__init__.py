"""Export models as ONNX files, and token folders as training files for language models."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names
from .wavtokenizer_onnx import WavTokenizerOnnx


if TYPE_CHECKING:
    from .onnx_export import OnnxReport, export_onnx

__all__ = ["OnnxReport", "WavTokenizerOnnx", "export_onnx"]


# onnx_export needs torch, and `WavTokenizerOnnx` does not
if not TYPE_CHECKING:  # a type checker would accept every name, as Any
    __getattr__, __dir__ = lazy_names(__name__, {"OnnxReport": "onnx_export", "export_onnx": "onnx_export"})
