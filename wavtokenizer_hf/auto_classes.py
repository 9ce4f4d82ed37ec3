"""Which classes the Auto classes of transformers give, once `wavtokenizer_hf` is imported."""

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
    """
    Make the Auto classes give the classes of this package, in place of those that transformers >= 5.24 has itself.
    """
    AutoConfig.register("wavtokenizer", WavTokenizerConfig, exist_ok=True)
    AutoConfig.register("wavtokenizer_encoder", WavTokenizerEncoderConfig, exist_ok=True)
    AutoModel.register(WavTokenizerConfig, WavTokenizerModel, exist_ok=True)
    AutoModel.register(WavTokenizerEncoderConfig, WavTokenizerEncoderModel, exist_ok=True)
    AutoModelForAudioTokenization.register(WavTokenizerConfig, WavTokenizerModel, exist_ok=True)
    for config_class in (WavTokenizerConfig, WavTokenizerEncoderConfig):
        AutoTokenizer.register(config_class, NoTextTokenizer, exist_ok=True)
    extracted: list[type] = [WavTokenizerConfig, *_configs_with_native_extractor()]
    for model_config in dict.fromkeys(extracted):
        _register_feature_extractor(model_config)

    # so that save_pretrained writes the code too, and the folder loads with trust_remote_code=True without this
    # package
    WavTokenizerConfig.register_for_auto_class("AutoConfig")
    WavTokenizerEncoderConfig.register_for_auto_class("AutoConfig")
    WavTokenizerModel.register_for_auto_class("AutoModel")
    WavTokenizerEncoderModel.register_for_auto_class("AutoModel")
    WavTokenizerFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")


class NoTextTokenizer:
    """Refuse `AutoTokenizer` and the pipelines for text, which else report files that are missing."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ValueError: WavTokenizer encodes audio and has no tokenizer of text."""
        raise ValueError(
            f"{str(name_or_path)!r} is a WavTokenizer, which encodes audio and has no text tokenizer. AutoTokenizer "
            "and pipeline('feature-extraction') are for text: use AutoFeatureExtractor, AutoModel and model.encode."
        )


def _register_feature_extractor(config_class: type) -> None:
    # AutoAudioProcessor is to take the place of AutoFeatureExtractor (transformers, pull request 44394)
    for name in ("AutoFeatureExtractor", "AutoAudioProcessor"):
        auto_class = getattr(transformers, name, None)
        if auto_class is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of the one that is on its way out
                auto_class.register(config_class, WavTokenizerFeatureExtractor, exist_ok=True)


def _configs_with_native_extractor() -> list[type]:
    """Remove the native extractor from transformers' table; return the configs of the models that it is for.

    AutoFeatureExtractor goes by the class name in preprocessor_config.json and looks for it in this table before it
    looks among registered classes, so `register` alone never wins. The table is private: where there is none, the
    native extractor stays. It reads the same fields and gives the same samples.
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
