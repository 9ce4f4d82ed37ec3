"""
Ways out of this package: models as ONNX files, and token folders as the files that language models are trained from.
"""

from typing import TYPE_CHECKING, Any

from .wavtokenizer_onnx import WavTokenizerOnnx


if TYPE_CHECKING:
    from .onnx_export import OnnxReport, export_onnx

__all__ = ["OnnxReport", "WavTokenizerOnnx", "export_onnx"]


if not TYPE_CHECKING:  # to a type checker every name would exist, and be Any

    def __getattr__(name: str) -> Any:
        """`export_onnx` and its report, on first use: they need torch, `WavTokenizerOnnx` does not."""
        if name in ("OnnxReport", "export_onnx"):
            from . import onnx_export

            return getattr(onnx_export, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
