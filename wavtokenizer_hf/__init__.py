"""WavTokenizer for Hugging Face: 24 kHz audio to one stream of 40 or 75 codes per second, and back."""

from pathlib import Path

from .auto_classes import register as _register_auto_classes
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
from .upgrade import upgrade


__version__ = "0.1.0"

_register_auto_classes()


def bundled_model() -> Path:
    """Folder of the small model that comes with this package: 75 tokens/s, for demos, tests and teaching; see its README.md.

    It was trained on synthetic sound, so no language model should be trained on its codes.
    """
    return Path(__file__).parent / "bundled"


def _from_original(cls, name_or_path, revision=None, token=None, cache_dir=None):
    """
    Loads an original checkpoint of WavTokenizer, with no converted folder in between.

    Args:
        name_or_path (`str` or `Path`): a file, or the name of a published checkpoint (`wavtokenizer checkpoints` lists
            them), which is downloaded from the Hub into its cache, and checked.
        revision, token, cache_dir: of the download, as in `huggingface_hub.hf_hub_download`.

    Returns:
        [`WavTokenizerModel`]: float32, on the CPU, in eval mode.

    Raises:
        ValueError: no such name, or the file is not a usable WavTokenizer; see `conversion.convert.convert`.
        OSError: the file cannot be had or read.
    """
    try:
        from conversion.convert import load
    except ModuleNotFoundError as error:
        raise ImportError(
            "from_original needs the folder `conversion`, which is installed with wavtokenizer_hf: run "
            "pip install on the whole checkout, or load a converted folder with from_pretrained."
        ) from error
    return load(name_or_path, cls, revision, token, cache_dir)


# added here and not in the class, since the file of the class is copied into every Hub repository, where conversion is not
WavTokenizerModel.from_original = classmethod(_from_original)


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
