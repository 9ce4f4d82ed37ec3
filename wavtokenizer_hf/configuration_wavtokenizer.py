"""Configuration of WavTokenizer.

This file is copied unchanged into every Hub repository that we write: it imports the standard library, transformers
and huggingface_hub, and nothing else.
"""

import math
import os
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class WavTokenizerConfig(PreTrainedConfig):
    r"""
    Shape of a WavTokenizer: 24 kHz mono audio to one stream of codes and back.

    The defaults describe the published 40 tokens/s checkpoints; `upsampling_ratios=[8, 5, 4, 2]` gives the 75 tokens/s
    ones. Field names and defaults are those of the native WavTokenizer of transformers >= 5.24, so that either side
    reads the other's config.json. A value that this package does not build is refused by name.

    Args:
        sampling_rate (`int`, defaults to 24000): Hz of the audio that goes in and comes out.
        audio_channels (`int`, defaults to 1): must be 1, WavTokenizer is mono.
        num_filters (`int`, defaults to 32): channels after the first encoder convolution; each downsampling doubles
            them.
        upsampling_ratios (`list[int]`, defaults to `[6, 5, 5, 4]`): the encoder downsamples by these, last one first;
            their product is `hop_length`.
        num_residual_layers (`int`, defaults to 1): residual blocks before each downsampling of the encoder.
        dilation_growth_rate (`int`, defaults to 2): dilation of residual block j of a stage is this to the power j.
        compress (`int`, defaults to 2): a residual block's inner width is its width divided by this.
        use_conv_shortcut (`bool`, defaults to `True`): must be `True`, a residual block's shortcut is a convolution.
        use_causal_conv (`bool`, defaults to `False`): must be `False`.
        pad_mode (`str`, defaults to `"reflect"`): must be `"reflect"`, how the encoder continues audio at its ends.
        norm_type (`str`, defaults to `"weight_norm"`): must be `"weight_norm"`, of the encoder's convolutions.
        kernel_size, last_kernel_size, residual_kernel_size (`int`, default to 7, 7, 3): of the encoder's convolutions.
        num_lstm_layers (`int`, defaults to 2): layers of the encoder's forward LSTM.
        hidden_size (`int`, defaults to 512): channels of the encoder's output; equals `codebook_dim`.
        codebook_size (`int`, defaults to 4096): number of codebook entries; codes lie in `[0, codebook_size)`.
        codebook_dim (`int`, defaults to 512): numbers in each codebook entry.
        decoder_hidden_size (`int`, defaults to 768): channels of the decoder's backbone.
        decoder_intermediate_size (`int`, defaults to 2304): inner width of a ConvNeXt block.
        decoder_num_layers (`int`, defaults to 12): number of ConvNeXt blocks.
        adanorm_num_embeddings (`int`, defaults to 4): rows of the adaptive norms' tables, chosen by `bandwidth_id`.
        decoder_attention_num_groups (`int`, defaults to 32): groups of the GroupNorms of the backbone's front.
        norm_eps (`float`, defaults to 1e-6): epsilon of the decoder's norms.
        codebook_fingerprint (`str`, *optional*): short hash of the codebook (see
            [`WavTokenizerModel.codebook_fingerprint`]), kept up to date by `save_pretrained`.

    Raises:
        huggingface_hub.errors.StrictDataclassError: for a shape that is not a WavTokenizer; its `__cause__` is the
            ValueError or TypeError that says what is wrong.
    """

    model_type = "wavtokenizer"

    sampling_rate: int = 24000
    audio_channels: int = 1
    num_filters: int = 32
    upsampling_ratios: list[int] | tuple[int, ...] = (6, 5, 5, 4)
    num_residual_layers: int = 1
    dilation_growth_rate: int = 2
    compress: int = 2
    use_conv_shortcut: bool = True
    use_causal_conv: bool = False
    pad_mode: str = "reflect"
    norm_type: str = "weight_norm"
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    num_lstm_layers: int = 2
    hidden_size: int = 512
    codebook_size: int = 4096
    codebook_dim: int = 512
    decoder_hidden_size: int = 768
    decoder_intermediate_size: int = 2304
    decoder_num_layers: int = 12
    adanorm_num_embeddings: int = 4
    decoder_attention_num_groups: int = 32
    norm_eps: float | int = 1e-6
    codebook_fingerprint: str | None = None

    _SIZES: ClassVar[tuple[str, ...]] = (
        "sampling_rate", "compress", "dilation_growth_rate", "kernel_size", "last_kernel_size", "residual_kernel_size",
        "num_lstm_layers", "hidden_size", "codebook_size", "decoder_hidden_size", "decoder_intermediate_size",
        "decoder_num_layers", "adanorm_num_embeddings", "decoder_attention_num_groups",
    )  # fmt: skip

    @property
    def hop_length(self) -> int:
        """Samples per code: 320 (75 codes/s) or 600 (40 codes/s) in the published checkpoints."""
        return math.prod(self.upsampling_ratios)

    @property
    def n_fft(self) -> int:
        """Samples under one frame of the inverse STFT."""
        return 4 * self.hop_length

    @property
    def frame_rate(self) -> float:
        """Codes per second of audio."""
        return self.sampling_rate / self.hop_length

    @property
    def bit_rate(self) -> float:
        """Bits per second of the codes: 900 at 75 codes/s of 4096 entries, 480 at 40."""
        return self.frame_rate * math.log2(self.codebook_size)

    @property
    def encoder_config(self) -> "WavTokenizerEncoderConfig":
        """A new config of the encoder alone, with the same fields."""
        config = WavTokenizerEncoderConfig(**_without_classes(self.to_dict()))
        config._attn_implementation = self._attn_implementation  # to_dict leaves it out
        return config

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == WavTokenizerEncoderConfig.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds an encoder only, which cannot make audio. Load it with "
                "WavTokenizerEncoderModel, its config with WavTokenizerEncoderConfig, or either with the Auto classes."
            )
        return config_dict, kwargs

    def validate_architecture(self) -> None:
        """Refuses what the model does not build; part of the `@strict` validation."""
        built = {
            "audio_channels": 1,
            "use_conv_shortcut": True,
            "use_causal_conv": False,
            "pad_mode": "reflect",
            "norm_type": "weight_norm",
        }
        for name, value in built.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"Got {name}={getattr(self, name)!r}; this class builds {name}={value!r} only. Load such a "
                    "checkpoint with the classes of transformers >= 5.24: without wavtokenizer_hf and "
                    "trust_remote_code."
                )
        if self.codebook_dim != self.hidden_size:
            raise ValueError(
                f"Got codebook_dim={self.codebook_dim} and hidden_size={self.hidden_size}; they must be equal, "
                "since nothing projects the encoder's output onto the codebook."
            )
        at_least = dict.fromkeys(self._SIZES, 1)
        at_least |= {"num_residual_layers": 0, "num_filters": self.compress, "codebook_size": 2}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"Got {name}={getattr(self, name)}, expected at least {least}.")
            # a damaged file must not make a model of 10**9 layers
            most = 1000 if "_layers" in name else 768_000 if name == "sampling_rate" else 2**24
            if getattr(self, name) > most:
                raise ValueError(f"Got {name}={getattr(self, name)}, expected at most {most}.")
        if not self.norm_eps > 0:
            raise ValueError(f"Got norm_eps={self.norm_eps}, expected more than 0, as 1e-6.")
        if not 1 <= len(self.upsampling_ratios) <= 16 or min(self.upsampling_ratios) < 1 or self.hop_length > 2**24:
            raise ValueError(
                f"Got upsampling_ratios={list(self.upsampling_ratios)[:20]}, expected 1 to 16 positive integers, as "
                "[8, 5, 4, 2]."
            )
        if self.decoder_hidden_size % self.decoder_attention_num_groups != 0:
            raise ValueError(
                f"Got decoder_hidden_size={self.decoder_hidden_size}, expected a multiple of "
                f"decoder_attention_num_groups={self.decoder_attention_num_groups}."
            )

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        auto_map = output.get("auto_map")
        if auto_map is not None:
            output["auto_map"] = _plain_auto_map(auto_map)
            model_class = output["auto_map"].get("AutoModel", "")
            if model_class.endswith(".WavTokenizerModel"):  # and not the encoder alone, which cannot decode
                output["auto_map"].setdefault("AutoModelForAudioTokenization", model_class)
        return output


@strict
class WavTokenizerEncoderConfig(WavTokenizerConfig):
    """
    Config of [`WavTokenizerEncoderModel`], the encoder and quantizer alone: the fields of [`WavTokenizerConfig`], so
    that it can be read from the config.json of a whole WavTokenizer. The decoder's fields are not used.
    """

    model_type = "wavtokenizer_encoder"

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        if (
            config_dict.get("model_type") == WavTokenizerConfig.model_type
        ):  # a whole WavTokenizer, whose encoder is meant
            config_dict = _without_classes(config_dict)
        return config_dict, kwargs


def _without_classes(fields: dict) -> dict:
    """Fields of a whole model's config but for those that name its classes."""
    return {name: value for name, value in fields.items() if name not in ("model_type", "architectures", "auto_map")}


def _plain_auto_map(auto_map: dict) -> dict:
    # transformers takes a class whose name contains "Tokenizer" for a text tokenizer and writes the pair
    # [name, null] instead of the name; its loaders then crash on the pair. (dynamic_module_utils.custom_object_save,
    # transformers 5.23.0.) Every JSON writer of a config goes through to_dict, so the pair is undone there. The
    # feature extractor has a copy of this line, so that it loads without the config's file.
    return {key: value if isinstance(value, str) else value[0] for key, value in auto_map.items()}


__all__ = ["WavTokenizerConfig", "WavTokenizerEncoderConfig"]
