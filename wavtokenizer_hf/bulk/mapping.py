"""Encode and decode datasets of the `datasets` library."""

import os
import tempfile
from collections.abc import Sequence
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .. import audio
from ..audio_errors import MAX_CLIP_SECONDS, check_channel
from ..configuration_wavtokenizer import WavTokenizerEncoderConfig
from ..extras import require
from ..feature_extraction_wavtokenizer import WavTokenizerFeatureExtractor
from ..loading import load_model, target_peak
from ..model_names import find_torch_model
from ..modeling_wavtokenizer import WavTokenizerEncoderModel, WavTokenizerModel
from . import encoding
from .options import check_on_error, check_seconds
from .records import Failure
from .sources.base import check_column
from .work import num_cores


class _MapFunction:
    """
    Function for `datasets.Dataset.map`, with one model per process.

    `map` caches results by a hash of the pickled function, so the function must identify the weights. For a model on
    the Hub it holds the commit. For a folder it holds a hash of the weights, and the peak level. A loaded model is
    pickled with its weights.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        revision: str | None,
        device: str | None,
        feature_extractor: WavTokenizerFeatureExtractor | None = None,
    ):
        self._loaded: tuple[Any, Any] | None = None  # model and feature extractor of this process
        self.folder_fingerprint: tuple[str, float | None] | None = None  # hash of the weights, and peak level
        self.model: Any  # a name, or a loaded model
        self.device = device
        if not isinstance(model, (str, os.PathLike)):
            _check_loaded_model(model, revision, device, feature_extractor)
            self.model, self.revision, self.feature_extractor = model, None, feature_extractor
            self.sampling_rate = model.config.sampling_rate
            return
        if feature_extractor is not None:
            raise ValueError("Got a feature_extractor for a model by name, which has its own. Leave it out.")
        try:
            config = WavTokenizerEncoderConfig.from_pretrained(
                find_torch_model(model, revision), revision=revision or "main"
            )
        except OSError as error:
            raise ValueError(f"Cannot load the model {model!r}: {error}") from error
        self.model = str(model)
        commit = getattr(config, "_commit_hash", None)
        self.revision = commit or revision
        self.sampling_rate = config.sampling_rate
        if commit is None:
            loaded, feature_extractor = self._load("cpu")
            level = None if feature_extractor is None else target_peak(feature_extractor)
            self.folder_fingerprint = encoding.weights_fingerprint(loaded), level

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def _load_once(self, rank: int | None) -> tuple[Any, Any]:
        """Return the model and feature extractor of this process. The first call loads them."""
        if self._loaded is None:
            if _in_child_process() and not torch.cuda.is_available():
                # `map` does not report the number of processes, and one thread per core in each of them makes them up
                # to 30 times slower
                torch.set_num_threads(1)
            device = self.device or encoding.default_device(_process_index() if rank is None else rank)
            if isinstance(self.model, str):
                self._loaded = self._load(device)
            else:
                # a child process has its own copy of the model, so moving it affects no other process
                is_moved = _in_child_process() and self.model.device.type == "cuda"
                self._loaded = (self.model.to(device) if is_moved else self.model), self.feature_extractor
        return self._loaded

    def _load(self, device: str) -> tuple[Any, WavTokenizerFeatureExtractor | None]:
        raise NotImplementedError


def _check_loaded_model(
    model: Any, revision: str | None, device: str | None, feature_extractor: WavTokenizerFeatureExtractor | None
) -> None:
    """
    Check a loaded model and the arguments passed with it.

    Raises:
        TypeError: The model is not one of this package.
        ValueError: The arguments are for a model by name, or the feature extractor has another sampling rate.
    """
    if not isinstance(model, (WavTokenizerModel, WavTokenizerEncoderModel)):
        raise TypeError(
            f"Got a {type(model).__module__}.{type(model).__name__} as the model, expected a name or a "
            "WavTokenizerModel of wavtokenizer_hf. wavtokenizer_hf.upgrade(model) converts one of transformers' own."
        )
    for name, value in (("revision", revision), ("device", device)):
        if value is not None:
            raise ValueError(f"Got {name}={value!r} with a loaded model, which has its own. Leave it out.")
    if feature_extractor is not None and feature_extractor.sampling_rate != model.config.sampling_rate:
        raise ValueError(
            f"Got a feature extractor for {feature_extractor.sampling_rate} Hz and a model for "
            f"{model.config.sampling_rate} Hz. Load both from one folder."
        )


def _process_index() -> int:
    """
    Return the index of this process among those of `map(num_proc=...)`, or 0 outside of them.

    `map` passes the rank only with `with_rank=True`.
    """
    identity = require("multiprocess", "bulk").current_process()._identity
    return identity[-1] - 1 if identity else 0


def _in_child_process() -> bool:
    """Return whether this is a child process of multiprocessing, or of multiprocess (used by `map(num_proc=...)`)."""
    return parent_process() is not None or require("multiprocess", "bulk").parent_process() is not None


class AudioTokenizer(_MapFunction):
    """
    Function for `map` that encodes audio.

    ```python
    dataset.map(AudioTokenizer("bundled"), batched=True, with_rank=True, num_proc=2)
    ```

    Each row gets `audio_codes` (list of uint16), `num_samples`, `duration` (seconds), `source_sampling_rate` (Hz),
    `source_channels`, `codebook_fingerprint`, `warnings` (kinds), `failure` and `failure_kind`. A row whose audio
    cannot be read has no codes, and the reason in `failure`. The kinds are those of `wavtokenizer_hf.audio_errors`.
    `tokenize_dataset` uses this class.

    Args:
        model: Name on the Hub, folder, or `bundled`; or a loaded `WavTokenizerModel` or `WavTokenizerEncoderModel`.
        revision: Branch, tag or commit of the model on the Hub. It is resolved once.
        column: Column of the audio: an Audio column, decoded or not, or paths.
        device: Device of the model. Defaults to one GPU per process, or the CPU.
        batch_seconds: Seconds of audio per batch.
        on_error: `"record"` writes the reason into the row, `"fail"` raises ValueError at the first clip that cannot
            be read.
        channel: Channel of audio that has several: `"mean"`, `"left"`, `"right"` or a number from 0.
        max_clip_seconds: A longer clip fails.
        feature_extractor: Feature extractor of a loaded model, which may scale clips to a peak. Default: no scaling.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        revision: str | None = None,
        column: str = "audio",
        device: str | None = None,
        batch_seconds: float = 120,
        on_error: str = "record",
        channel: str | int = "mean",
        max_clip_seconds: float = MAX_CLIP_SECONDS,
        feature_extractor: WavTokenizerFeatureExtractor | None = None,
    ):
        check_on_error(on_error)
        check_seconds("batch_seconds", batch_seconds)
        check_seconds("max_clip_seconds", max_clip_seconds)
        check_channel(channel)
        super().__init__(model, revision, device, feature_extractor)
        if not isinstance(self.model, str):
            encoding.check_codebook_size(self.model.config)
            # without the decoder, the pickle is smaller
            self.model = getattr(self.model, "encoder_model", self.model)
            if feature_extractor is None:
                config = self.model.config
                self.feature_extractor = WavTokenizerFeatureExtractor(
                    sampling_rate=config.sampling_rate, hop_length=config.hop_length
                )
        self.column, self.batch_seconds, self.on_error = column, batch_seconds, on_error
        self.channel, self.max_clip_seconds = channel, max_clip_seconds

    def _load(self, device: str) -> tuple[Any, WavTokenizerFeatureExtractor | None]:
        return encoding.load_encoder(self.model, self.revision, device)

    def __call__(self, batch: dict[str, Sequence], rank: int | None = None) -> dict[str, list]:
        encoder, feature_extractor = self._load_once(rank)
        clips = batch[self.column]
        readers = [partial(clips.__getitem__, index) for index in range(len(clips))]
        num_readers = 1 if _in_child_process() else num_cores()
        windows = encoding.tokenize_clips(
            encoder, feature_extractor, readers, self.batch_seconds, num_readers, self.channel, self.max_clip_seconds
        )
        rows = [self._to_row(result, encoder.codebook_fingerprint) for window in windows for result in window]
        return {name: [row[name] for row in rows] for name in _tokenizer_features()}

    def _to_row(self, result: Any, codebook_fingerprint: str) -> dict[str, Any]:
        if isinstance(result, Failure):
            if self.on_error == "fail":
                raise ValueError(result.reason)
            return {**dict.fromkeys(_tokenizer_features()), "failure": result.reason, "failure_kind": result.kind}
        return {
            "audio_codes": result.audio_codes,
            "num_samples": result.num_samples,
            "duration": result.num_samples / self.sampling_rate,
            "source_sampling_rate": result.source_sampling_rate,
            "source_channels": result.source_channels,
            "codebook_fingerprint": codebook_fingerprint,
            "warnings": list(result.warnings),
            "failure": None,
            "failure_kind": None,
        }


def _tokenizer_features() -> dict[str, Any]:
    """Return the columns that AudioTokenizer adds, with their types in the datasets library."""
    datasets, pyarrow = require("datasets", "bulk"), require("pyarrow", "bulk")
    types = {
        "num_samples": "int64",
        "duration": "float64",
        "source_sampling_rate": "int32",
        "source_channels": "int16",
        "codebook_fingerprint": "string",
        "failure": "string",
        "failure_kind": "string",
    }
    codes = pyarrow.schema([("audio_codes", pyarrow.list_(pyarrow.uint16()))])
    warnings = pyarrow.schema([("warnings", pyarrow.list_(pyarrow.string()))])
    return {
        **datasets.Features.from_arrow_schema(codes),
        **{name: datasets.Value(dtype) for name, dtype in types.items()},
        **datasets.Features.from_arrow_schema(warnings),
    }


def tokenize_dataset(
    dataset: Any,
    model: str | PreTrainedModel,
    *,
    revision: str | None = None,
    column: str = "audio",
    device: str | None = None,
    batch_seconds: float = 120,
    batch_size: int = 100,
    num_proc: int | None = None,
    on_error: str = "record",
    channel: str | int = "mean",
    max_clip_seconds: float = MAX_CLIP_SECONDS,
    feature_extractor: WavTokenizerFeatureExtractor | None = None,
) -> Any:
    """
    Replace the audio column of a dataset by codes.

    This function decodes the audio, not the dataset. So damaged audio becomes a row without codes, with the reason in
    `failure`. Other columns stay. An `IterableDataset` stays one, and its clips are encoded while it is read.

    Args:
        dataset: `datasets.Dataset`, `IterableDataset`, or a dictionary of either.
        model: Name on the Hub, folder, or `bundled`; or a loaded `WavTokenizerModel` or `WavTokenizerEncoderModel`,
            which is used on its device.
        revision: Branch, tag or commit of the model on the Hub.
        column: Column of the audio: an Audio column, decoded or not, or paths.
        device: Device of the model. Defaults to one GPU per process, or the CPU.
        batch_seconds: Seconds of audio per batch.
        batch_size: Rows that are read at once.
        num_proc: Number of processes, each with its own model; not for an `IterableDataset`. With GPUs, set
            `multiprocess.set_start_method("spawn")` first.
        on_error: `"record"` writes the reason into the row, `"fail"` raises ValueError at the first clip that cannot
            be read.
        channel: Channel of audio that has several: `"mean"`, `"left"`, `"right"` or a number from 0.
        max_clip_seconds: A longer clip fails.
        feature_extractor: Feature extractor of a loaded model, which may scale clips to a peak. Default: no scaling.

    Returns:
        A dataset of the same kind, with the columns of `AudioTokenizer` in place of `column`.

    Raises:
        ValueError: There is no such column; the dataset has a column with the name of a new one; the model cannot be
            loaded; or a clip cannot be read, with `on_error="fail"`.
        TypeError: The model is neither a name nor a model of this package.
        PicklingError: With `num_proc`, the layers of a loaded model were replaced.
    """
    datasets = require("datasets", "bulk")
    function = AudioTokenizer(
        model, revision, column, device, batch_seconds, on_error, channel, max_clip_seconds, feature_extractor
    )
    undecoded = {column: datasets.Audio(decode=False)}
    return _map_column(dataset, function, column, _tokenizer_features(), batch_size, num_proc, undecoded)


class AudioDetokenizer(_MapFunction):
    """
    Function for `map` that decodes codes to a column `audio`: the inverse of `AudioTokenizer`.

    The audio is 16-bit FLAC. If a row has `num_samples`, its audio is cut to that length. A row without codes gets no
    audio. If the rows have `codebook_fingerprint`, a model with another codebook is refused.

    Args:
        model: Name on the Hub, folder, or `bundled`; or a loaded `WavTokenizerModel`.
        revision: Branch, tag or commit of the model on the Hub.
        column: Column of the codes.
        device: Device of the model. Defaults to one GPU per process, or the CPU.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        revision: str | None = None,
        column: str = "audio_codes",
        device: str | None = None,
    ):
        if isinstance(model, WavTokenizerEncoderModel):
            raise TypeError("Got a WavTokenizerEncoderModel, which has no decoder. Load a WavTokenizerModel.")
        super().__init__(model, revision, device)
        self.column = column

    def _load(self, device: str) -> tuple[Any, WavTokenizerFeatureExtractor | None]:
        return load_model(WavTokenizerModel, self.model, self.revision, device), None

    def __call__(self, batch: dict[str, Sequence], rank: int | None = None) -> dict[str, list]:
        model, _ = self._load_once(rank)
        for fingerprint in set(batch.get("codebook_fingerprint", ())) - {None}:
            model.check_codebook_fingerprint(fingerprint)
        rows = list(batch[self.column])
        lengths = batch["num_samples"] if "num_samples" in batch else [None] * len(rows)
        return {"audio": [self._decode(model, codes, length) for codes, length in zip(rows, lengths, strict=True)]}

    @torch.inference_mode()
    def _decode(self, model: WavTokenizerModel, codes: Any, num_samples: int | None) -> dict[str, Any] | None:
        if codes is None:
            return None
        audio_codes = torch.from_numpy(np.asarray(codes).astype(np.int64))[None, None].to(model.device)
        waveform = model.decode(audio_codes).audio_values[0, 0, :num_samples]
        with tempfile.TemporaryDirectory() as folder:
            path = audio.save(Path(folder, "clip.flac"), waveform, model.config.sampling_rate)
            return {"bytes": path.read_bytes(), "path": None}


def detokenize_dataset(
    dataset: Any,
    model: str | PreTrainedModel,
    *,
    revision: str | None = None,
    column: str = "audio_codes",
    device: str | None = None,
    batch_size: int = 100,
    num_proc: int | None = None,
) -> Any:
    """
    Replace the codes of a dataset by an Audio column `audio` at the model's sampling rate.

    Args:
        dataset: Result of `tokenize_dataset`, or the output folder of `tokenize` as `datasets.load_dataset` reads it.
        model: Name on the Hub, folder, or `bundled`; or a loaded `WavTokenizerModel`, which is used on its device.
        revision: Branch, tag or commit of the model on the Hub.
        column: Column of the codes.
        device: Device of the model. Defaults to one GPU per process, or the CPU.
        batch_size: Rows that are read at once.
        num_proc: Number of processes, each with its own model; not for an `IterableDataset`.

    Returns:
        A dataset of the same kind, with `audio` in place of `column`.

    Raises:
        ValueError: There is no such column; the dataset has a column `audio` already; another codebook made the codes;
            or the model cannot be loaded.
        TypeError: The model is neither a name nor a model of this package with a decoder.
    """
    datasets = require("datasets", "bulk")
    function = AudioDetokenizer(model, revision, column, device)
    audio_feature = datasets.Audio(sampling_rate=function.sampling_rate)
    # as bytes first: with an Audio feature, `map` would encode the values again with torchcodec
    new_features = {"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
    decoded = _map_column(dataset, function, column, new_features, batch_size, num_proc, {})
    if isinstance(decoded, dict):
        return type(decoded)({name: split.cast_column("audio", audio_feature) for name, split in decoded.items()})
    return decoded.cast_column("audio", audio_feature)


def _map_column(
    dataset: Any,
    function: _MapFunction,
    column: str,
    new_features: dict[str, Any],
    batch_size: int,
    num_proc: int | None,
    casts: dict[str, Any],
) -> Any:
    """
    Replace a column of a dataset of any kind by the columns that a function returns.

    Args:
        dataset: `datasets.Dataset`, `IterableDataset`, or a dictionary of either.
        function: Function for `map`.
        column: Column to remove.
        new_features: Name -> type of the columns that the function returns.
        batch_size: Rows that are read at once.
        num_proc: Number of processes; None for an `IterableDataset`.
        casts: Name -> type to which a column is cast first, if it has a type of that class.
    """
    if isinstance(dataset, dict):
        return type(dataset)(
            {
                name: _map_column(split, function, column, new_features, batch_size, num_proc, casts)
                for name, split in dataset.items()
            }
        )
    streaming = isinstance(dataset, require("datasets", "bulk").IterableDataset)
    if streaming and num_proc is not None:
        raise ValueError(
            f"Got num_proc={num_proc} for an IterableDataset, which is read in one process. Leave it out."
        )
    features = dataset.features or dataset._resolve_features().features  # a stream may not have read its features yet
    check_column(list(features), column, "the dataset")
    conflicts = sorted((set(features) - {column}) & set(new_features))
    if conflicts:
        raise ValueError(f"The dataset has a column {conflicts[0]!r} already. Rename or remove it.")
    for name, feature in casts.items():
        if isinstance(features[name], type(feature)):
            dataset = dataset.cast_column(name, feature)
    other_features = {name: feature for name, feature in features.items() if name != column}
    options = {} if streaming else {"with_rank": True, "num_proc": num_proc}
    dataset_format = _get_format(dataset)
    if dataset_format is not None:  # with some formats, `map` (datasets 5.2) would empty the other columns
        dataset = dataset.with_format(None)
    mapped = dataset.map(
        function,
        batched=True,
        batch_size=batch_size,
        remove_columns=[column],
        features=type(features)({**other_features, **new_features}),
        **options,
    )
    return mapped if dataset_format is None else mapped.with_format(dataset_format)


def _get_format(dataset: Any) -> str | None:
    """Return the format that `with_format` set on a `Dataset` or an `IterableDataset`."""
    if hasattr(dataset, "format"):
        return dataset.format["type"]
    formatting = getattr(dataset, "_formatting", None)
    return None if formatting is None else formatting.format_type
