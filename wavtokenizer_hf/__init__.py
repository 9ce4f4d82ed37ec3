"""WavTokenizer for Hugging Face: 24 kHz audio to one stream of 40 or 75 codes per second, and back.

Importing the package is fast: torch and transformers are imported on first use. The Auto classes of transformers know
the classes of this package as soon as both packages are imported, in either order.
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

_MODULES = {  # public name -> module that defines it
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

    It is meant for demos, tests and teaching. Do not train a language model on its codes. README.md in the folder
    lists its measured quality.
    """
    return Path(__file__).parent / "bundled"


def _register() -> None:
    """Register the classes of this package with the Auto classes of transformers."""
    from .auto_classes import register  # imports torch

    register()


_CORE_MODULES = (  # those that `_register` imports
    "auto_classes",
    "configuration_wavtokenizer",
    "feature_extraction_wavtokenizer",
    "modeling_wavtokenizer",
)
_MODELING_SUFFIXES = (  # of the modules modeling_wavtokenizer_*
    "batching",
    "cpu",
    "encoder",
    "padding",
    "pickling",
    "precision",
    "typing",
    "windows",
)
after_import(
    "transformers",
    _register,
    dependents=[
        *(f"{__name__}.{module}" for module in (*_CORE_MODULES, "native_upgrade")),
        *(f"{__name__}.modeling_wavtokenizer_{suffix}" for suffix in _MODELING_SUFFIXES),
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
