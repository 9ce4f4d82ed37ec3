"""Models by name, as the command line and bulk work load them: what is wrong with one is a ValueError that says so in a line."""

import os

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from . import bundled_model
from .configuration_wavtokenizer import WavTokenizerConfig
from .feature_extraction_wavtokenizer import WavTokenizerFeatureExtractor


def find_model(name: str | os.PathLike) -> str:
    """
    Where a model is to be loaded from: of `bundled` the folder, of any other name the name.

    Raises:
        ValueError: the name is a path, and there is no such folder.
    """
    name = os.fspath(name)
    if name == "bundled":
        return str(bundled_model())
    if not os.path.isdir(name) and (name.startswith((".", "~", "/")) or name.count("/") > 1):
        raise ValueError(f"Cannot load the model {name!r}: there is no such folder.")
    return name


def load_model(
    model_class: type[PreTrainedModel],
    name: str | os.PathLike,
    revision: str | None = None,
    device: str | torch.device | None = None,
    **arguments,
) -> PreTrainedModel:
    """
    Loads a model for inference.

    Args:
        model_class: what of it is loaded, `WavTokenizerModel` or `WavTokenizerEncoderModel`.
        name: `bundled`, a folder, or a name on the Hub.
        revision: branch, tag or commit on the Hub.
        device: to which it goes; default: the CPU.
        arguments: further ones of `from_pretrained`.

    Raises:
        ValueError: it cannot be loaded, or lacks tensors; or there is no such device.
    """
    try:
        model, info = model_class.from_pretrained(
            find_model(name), revision=revision or "main", output_loading_info=True, **arguments
        )
    except (
        OSError,
        SafetensorError,
        RuntimeError,
        StrictDataclassError,
    ) as error:  # not every message names the model
        raise ValueError(f"Cannot load the model {os.fspath(name)!r}: {error}") from error
    if info["missing_keys"]:  # transformers would fill them with random numbers
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"The model {os.fspath(name)!r} lacks {len(info['missing_keys'])} tensors, such as {missing}."
        )
    try:
        return model.eval().to(device or "cpu")
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without that device
        raise ValueError(f"Cannot use the device {str(device)!r}: {error}") from error


def load_feature_extractor(
    name: str | os.PathLike, revision: str | None, config: WavTokenizerConfig
) -> WavTokenizerFeatureExtractor:
    """
    Load the feature extractor beside a model, which may scale clips to a peak. A folder may lack it: then nothing is scaled.

    Args:
        name: `bundled`, a folder, or a name on the Hub.
        revision: branch, tag or commit on the Hub.
        config: of the model.

    Raises:
        ValueError: it cannot be loaded, or is for another sampling rate than the model.
    """
    folder = find_model(name)
    if os.path.isdir(folder) and not os.path.exists(os.path.join(folder, "preprocessor_config.json")):
        return WavTokenizerFeatureExtractor(sampling_rate=config.sampling_rate, hop_length=config.hop_length)
    try:
        feature_extractor = WavTokenizerFeatureExtractor.from_pretrained(folder, revision=revision or "main")
    except OSError as error:
        raise ValueError(f"Cannot load the model {os.fspath(name)!r}: {error}") from error
    if feature_extractor.sampling_rate != config.sampling_rate:
        raise ValueError(
            f"The model {os.fspath(name)!r} is for {config.sampling_rate} Hz, and its preprocessor_config.json says "
            f"{feature_extractor.sampling_rate} Hz. Correct the wrong one."
        )
    return feature_extractor
