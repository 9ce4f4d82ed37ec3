"""Register the classes of `wavtokenizer_hf` with the Auto classes of transformers."""

import os
import warnings
from typing import Any, NoReturn

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForAudioTokenization, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_wavtokenizer import WavTokenizerConfig, WavTokenizerEncoderConfig
from .feature_extraction_wavtokenizer import WavTokenizerFeatureExtractor
from .modeling_wavtokenizer import WavTokenizerEncoderModel, WavTokenizerModel


def register() -> None:
    """Make the Auto classes load the classes of this package, in place of the native ones of transformers >= 5.24."""
    AutoConfig.register("wavtokenizer", WavTokenizerConfig, exist_ok=True)
    AutoConfig.register("wavtokenizer_encoder", WavTokenizerEncoderConfig, exist_ok=True)
    AutoModel.register(WavTokenizerConfig, WavTokenizerModel, exist_ok=True)
    AutoModel.register(WavTokenizerEncoderConfig, WavTokenizerEncoderModel, exist_ok=True)
    AutoModelForAudioTokenization.register(WavTokenizerConfig, WavTokenizerModel, exist_ok=True)
    for config_class in (WavTokenizerConfig, WavTokenizerEncoderConfig):
        AutoTokenizer.register(config_class, NoTextTokenizer, exist_ok=True)
    extractor_configs: list[type] = [WavTokenizerConfig, *_configs_with_native_extractor()]
    for extractor_config in dict.fromkeys(extractor_configs):
        _register_feature_extractor(extractor_config)

    # save_pretrained copies the code too, so the folder loads with trust_remote_code=True without this package
    WavTokenizerConfig.register_for_auto_class("AutoConfig")
    WavTokenizerEncoderConfig.register_for_auto_class("AutoConfig")
    WavTokenizerModel.register_for_auto_class("AutoModel")
    WavTokenizerEncoderModel.register_for_auto_class("AutoModel")
    WavTokenizerFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")


class NoTextTokenizer:
    """Placeholder that refuses `AutoTokenizer` and text pipelines, which otherwise report missing files."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ValueError: WavTokenizer encodes audio and has no text tokenizer."""
        raise ValueError(
            f"{str(name_or_path)!r} is a WavTokenizer, which encodes audio and has no text tokenizer. AutoTokenizer "
            "and pipeline('feature-extraction') are for text: use AutoFeatureExtractor, AutoModel and model.encode."
        )


def _register_feature_extractor(config_class: type) -> None:
    # AutoAudioProcessor will replace AutoFeatureExtractor (transformers, pull request 44394)
    for name in ("AutoFeatureExtractor", "AutoAudioProcessor"):
        auto_class = getattr(transformers, name, None)
        if auto_class is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # raised by the deprecated class
                auto_class.register(config_class, WavTokenizerFeatureExtractor, exist_ok=True)


def _configs_with_native_extractor() -> list[type]:
    """Remove the native extractor from transformers' table and return the config classes of its models.

    AutoFeatureExtractor looks up the class name of preprocessor_config.json in this table before the registered
    classes, so `register` alone has no effect. The table is private. If a version of transformers lacks it, the
    native extractor stays in use. It reads the same fields and returns the same samples.
    """
    try:
        from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
    except ImportError:
        return []
    configs = []
    for model_type, names in list(FEATURE_EXTRACTOR_MAPPING_NAMES.items()):
        classes: Any = names
        if isinstance(names, str):
            classes = (names,)
        elif isinstance(names, dict):
            classes = names.values()
        if WavTokenizerFeatureExtractor.__name__ in classes:
            del FEATURE_EXTRACTOR_MAPPING_NAMES[model_type]
            configs.append(CONFIG_MAPPING[model_type])
    return configs
