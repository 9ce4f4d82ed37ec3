"""Ways out of this package: models as ONNX files, and token folders as the files that language models are trained from."""

from .onnx_export import OnnxReport, export_onnx
from .wavtokenizer_onnx import WavTokenizerOnnx


__all__ = ["OnnxReport", "WavTokenizerOnnx", "export_onnx"]
