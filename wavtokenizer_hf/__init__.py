"""WavTokenizer for Hugging Face: 24 kHz audio to one stream of 40 or 75 codes per second, and back.

The import is light: torch and transformers are imported when something of them is used. The Auto classes of
transformers give the classes of this package as soon as both packages are imported, in whatever order.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from .import_hook import after_import
from .lazy_names import lazy_names


if TYPE_CHECKING:
    from .configuration_wavtokenizer import WavTokenizerConfig, WavTokenizerEncoderConfig
    from .feature_extraction_wavtokenizer import WavTokenizerFeatureExtractor
    from .modeling_wavtokenizer import (
        WavTokenizerDecoderOutput,
        WavTokenizerEncoderModel,
        WavTokenizerEncoderOutput,
        WavTokenizerModel,
        WavTokenizerOutput,
    )
    from .modeling_wavtokenizer_encoder import EncoderState
    from .modeling_wavtokenizer_windows import DecoderState
    from .native_upgrade import upgrade


__version__ = "0.1.0"

_MODULES = {  # where each name of the interface is defined
    "DecoderState": "modeling_wavtokenizer_windows",
    "EncoderState": "modeling_wavtokenizer_encoder",
    "WavTokenizerConfig": "configuration_wavtokenizer",
    "WavTokenizerDecoderOutput": "modeling_wavtokenizer",
    "WavTokenizerEncoderConfig": "configuration_wavtokenizer",
    "WavTokenizerEncoderModel": "modeling_wavtokenizer",
    "WavTokenizerEncoderOutput": "modeling_wavtokenizer",
    "WavTokenizerFeatureExtractor": "feature_extraction_wavtokenizer",
    "WavTokenizerModel": "modeling_wavtokenizer",
    "WavTokenizerOutput": "modeling_wavtokenizer",
    "upgrade": "native_upgrade",
}


if not TYPE_CHECKING:  # to a type checker every name would exist, and be Any
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)


def bundled_model() -> Path:
    """Return the folder of the small model that comes with this package: 24 kHz, 75 codes/s.

    It is made for demos, tests and teaching. Do not train a language model on its codes. README.md in the folder has
    its figures.
    """
    return Path(__file__).parent / "bundled"


def _register() -> None:
    """Register the Auto classes of this package."""
    from .auto_classes import register  # imports torch

    register()


_REGISTERED = (
    "auto_classes",
    "configuration_wavtokenizer",
    "feature_extraction_wavtokenizer",
    "modeling_wavtokenizer",
)
_PARTS = (
    "batching",
    "cpu",
    "encoder",
    "padding",
    "pickling",
    "precision",
    "typing",
    "windows",
)  # of modeling_wavtokenizer
after_import(
    "transformers",
    _register,
    dependents=[
        *(f"{__name__}.{module}" for module in (*_REGISTERED, "native_upgrade")),
        *(f"{__name__}.modeling_wavtokenizer_{part}" for part in _PARTS),
    ],
)


__all__ = [
    "DecoderState",
    "EncoderState",
    "WavTokenizerConfig",
    "WavTokenizerDecoderOutput",
    "WavTokenizerEncoderConfig",
    "WavTokenizerEncoderModel",
    "WavTokenizerEncoderOutput",
    "WavTokenizerFeatureExtractor",
    "WavTokenizerModel",
    "WavTokenizerOutput",
    "bundled_model",
    "upgrade",
]
