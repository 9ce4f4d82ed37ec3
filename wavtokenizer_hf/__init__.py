"""WavTokenizer for Hugging Face: 24 kHz audio to one stream of 40 or 75 codes per second, and back."""

from pathlib import Path

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization

from .configuration_wavtokenizer import WavTokenizerConfig
from .feature_extraction_wavtokenizer import WavTokenizerFeatureExtractor
from .modeling_wavtokenizer import (
    WavTokenizerDecoderOutput,
    WavTokenizerEncoderModel,
    WavTokenizerEncoderOutput,
    WavTokenizerModel,
    WavTokenizerOutput,
)


__version__ = "0.1.0"

# exist_ok: a transformers with its own "wavtokenizer" must not stop this package from being imported
AutoConfig.register("wavtokenizer", WavTokenizerConfig, exist_ok=True)
AutoModel.register(WavTokenizerConfig, WavTokenizerModel, exist_ok=True)
AutoModelForAudioTokenization.register(WavTokenizerConfig, WavTokenizerModel, exist_ok=True)
AutoFeatureExtractor.register(WavTokenizerConfig, WavTokenizerFeatureExtractor, exist_ok=True)

# so that save_pretrained writes the code too, and the folder loads with trust_remote_code=True without this package
WavTokenizerConfig.register_for_auto_class("AutoConfig")
WavTokenizerModel.register_for_auto_class("AutoModel")
WavTokenizerEncoderModel.register_for_auto_class("AutoModel")
WavTokenizerFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")


def bundled_model() -> Path:
    """Folder of the small model that comes with this package: 75 tokens/s, for demos, tests and teaching; see its README.md.

    It was trained on synthetic sound, so no language model should be trained on its codes.
    """
    return Path(__file__).parent / "bundled"


__all__ = [
    "WavTokenizerConfig",
    "WavTokenizerDecoderOutput",
    "WavTokenizerEncoderModel",
    "WavTokenizerEncoderOutput",
    "WavTokenizerFeatureExtractor",
    "WavTokenizerModel",
    "WavTokenizerOutput",
    "bundled_model",
]
