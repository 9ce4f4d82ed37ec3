"""Load models by name. Raises ValueError with a one-line reason."""

import os
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .audio_errors import check_peak
from .configuration_wavtokenizer import WavTokenizerConfig
from .feature_extraction_wavtokenizer import WavTokenizerFeatureExtractor
from .limited_files import FLOAT_DTYPES, MAX_HEADER_BYTES, one_line, read_json_object, read_safetensors_header
from .model_names import find_model, find_torch_model
from .modeling_wavtokenizer_typing import Model


UNREADABLE = (OSError, ValueError, SafetensorError, RuntimeError, StrictDataclassError, OverflowError, KeyError)
"""Exceptions that reading a damaged model raises."""


def load_model(
    model_class: type[Model],
    name: str | os.PathLike,
    revision: str | None = None,
    device: str | torch.device | None = None,
    **arguments: Any,
) -> Model:
    """
    Load a model for inference.

    Args:
        model_class: `WavTokenizerModel`, or `WavTokenizerEncoderModel` for the encoder alone.
        name: `bundled`, the name of a published checkpoint, a folder, or OWNER/NAME on the Hub. A published checkpoint
            is converted on first use, see `model_names`.
        revision: Branch, tag or commit on the Hub. Default: main.
        device: Device to load the model on. Defaults to CPU.
        arguments: Further arguments of `from_pretrained`.

    Raises:
        ValueError: The model cannot be loaded or lacks tensors, or there is no such device.
    """
    name = os.fspath(name)
    source, revision = find_torch_model(name, revision), revision or "main"
    try:
        check_files(model_class, source, revision)
        loaded: Any = model_class.from_pretrained(  # a pair, unlike its annotation, because of output_loading_info
            source, revision=revision, output_loading_info=True, use_safetensors=True, **arguments
        )
        model, info = cast(tuple[Model, dict[str, Any]], loaded)
    except UNREADABLE as error:  # few of the messages name the model
        raise ValueError(f"Cannot load the model {name!r}: {one_line(_reason(error))}") from error
    if info["missing_keys"]:  # transformers would fill them with random numbers
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"The model {name!r} lacks {len(info['missing_keys'])} tensors, such as {missing}.")
    check_finite(model, name)
    try:
        model.eval().to(device or "cpu")
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without that device
        raise ValueError(f"Cannot use the device {str(device)!r}: {one_line(error)}") from error
    return model


def load_feature_extractor(
    name: str | os.PathLike, revision: str | None, config: WavTokenizerConfig, peak_dbfs: float | str = "model"
) -> WavTokenizerFeatureExtractor:
    """
    Load the feature extractor of a model. For a folder without preprocessor_config.json, return one without scaling.

    Args:
        name: `bundled`, the name of a published checkpoint, a folder, or OWNER/NAME on the Hub.
        revision: Branch, tag or commit on the Hub. Default: main.
        config: Config of the model.
        peak_dbfs: Peak level that clips are scaled to, in dBFS, at most 0. `"none"`: no scaling. Default: the setting
            of preprocessor_config.json.

    Raises:
        ValueError: The feature extractor cannot be loaded, has an invalid value, or has another sampling rate than the
            model.
    """
    check_peak(peak_dbfs)
    feature_extractor = _read_feature_extractor(os.fspath(name), revision, config)
    if peak_dbfs == "none":
        feature_extractor.normalize_audio = False
    elif peak_dbfs != "model":
        feature_extractor.normalize_audio, feature_extractor.target_peak_dB_FS = True, float(peak_dbfs)
    return feature_extractor


def _read_feature_extractor(
    name: str, revision: str | None, config: WavTokenizerConfig
) -> WavTokenizerFeatureExtractor:
    folder, revision = find_model(name, revision), revision or "main"
    if os.path.isdir(folder) and not os.path.exists(os.path.join(folder, "preprocessor_config.json")):
        return WavTokenizerFeatureExtractor(sampling_rate=config.sampling_rate, hop_length=config.hop_length)
    try:
        if path := _file(folder, "preprocessor_config.json", revision):
            read_json_object(path)
        feature_extractor = WavTokenizerFeatureExtractor.from_pretrained(folder, revision=revision)
    except (*UNREADABLE, TypeError, AttributeError) as error:
        raise ValueError(f"Cannot load the feature extractor of {name!r}: {one_line(_reason(error))}") from error
    if feature_extractor.sampling_rate != config.sampling_rate:
        raise ValueError(
            f"The model {name!r} has a sampling rate of {config.sampling_rate} Hz, and its preprocessor_config.json "
            f"has {feature_extractor.sampling_rate} Hz. Correct the wrong one."
        )
    return feature_extractor


def target_peak(feature_extractor: WavTokenizerFeatureExtractor) -> float | None:
    """Return the peak level in dBFS that clips are scaled to, or None for no scaling."""
    return feature_extractor.target_peak_dB_FS if feature_extractor.normalize_audio else None


def check_files(model_class: type[PreTrainedModel], source: str, revision: str = "main") -> None:
    """
    Check config.json and the header of the weights before a model is allocated.

    Args:
        model_class: As in `load_model`.
        source: Folder, or name on the Hub, whose files are fetched into its cache.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: A file is damaged, the config has more layers than there are tensors, or a tensor holds integers or
            has another shape than the config gives.
        OSError: A file cannot be read or fetched.
    """
    path = _file(source, "config.json", revision)
    if path is None:
        return  # from_pretrained raises the error, and lists the files that exist
    read_json_object(path)
    tensors = _headers(source, revision)
    if not tensors:
        return
    config_class: Any = model_class.config_class  # None for abstract classes only
    config = config_class.from_pretrained(source, revision=revision)
    for field in ("num_lstm_layers", "num_residual_layers", "decoder_num_layers"):
        if getattr(config, field) > len(tensors):
            raise ValueError(
                f"config.json has {field}={getattr(config, field)}, and the weights hold only {len(tensors)} tensors."
            )
    with torch.device("meta"):  # computes shapes without allocating memory
        expected = model_class(config).state_dict()
    for name, tensor in expected.items():
        # an encoder loads from the weights of a whole model, and the other way round
        names = (name, f"encoder_model.{name}", name.removeprefix("encoder_model."))
        dtype_and_shape = next((tensors[name] for name in names if name in tensors), None)
        if dtype_and_shape is None:
            continue  # `load_model` reports missing tensors, after transformers has mapped older names
        dtype, shape = dtype_and_shape
        if shape != tuple(tensor.shape):
            raise ValueError(f"{name} has the shape {shape}, and config.json gives {tuple(tensor.shape)}.")
        if tensor.is_floating_point() and dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} holds numbers of type {dtype}, expected floats ({', '.join(FLOAT_DTYPES)}).")


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Raise ValueError if a weight or buffer holds NaN or infinite numbers, because their codes would look valid."""
    for tensor_name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"The model {name!r} cannot be used: {count} of the {tensor.numel()} numbers of {tensor_name} are "
                "NaN or infinite. Its training diverged or the file is damaged."
            )


def _headers(source: str, revision: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the type and shape of every tensor in the safetensors files of a model; empty if it has none."""
    files = [_file(source, "model.safetensors", revision)]
    if files == [None]:
        index = _file(source, "model.safetensors.index.json", revision)
        if index is None:
            return {}
        weight_map = read_json_object(index, max_bytes=MAX_HEADER_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{index} has no weight_map of file names.")
        if outside := next((file for file in weight_map.values() if os.path.basename(file) != file), None):
            raise ValueError(f"{index} names {outside!r}, expected files beside it.")
        files = [_file(source, file, revision) for file in sorted(set(weight_map.values()))]
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in filter(None, files):
        tensors, _ = read_safetensors_header(file)
        headers |= {name: (dtype, shape) for name, (dtype, shape, _, _) in tensors.items()}
    return headers


def _file(source: str, name: str, revision: str) -> str | None:
    """Return the path of one file of a model, or None if it has no such file."""
    return cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)


def _reason(error: Exception) -> BaseException:
    # the cause is the config's own message; huggingface_hub wraps it with the name of the validator
    return error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
