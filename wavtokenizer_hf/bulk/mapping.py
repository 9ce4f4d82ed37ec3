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


class _Mapped:
    """Function for `datasets.Dataset.map`, with one model per process.

    `map` caches by a hash of the pickled object, so the object names the weights: by the commit of a model on the Hub,
    or by a hash of the weights in a folder and its peak level. A loaded model is pickled with its weights.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        revision: str | None,
        device: str | None,
        feature_extractor: WavTokenizerFeatureExtractor | None = None,
    ):
        self._loaded: tuple[Any, Any] | None = None  # model and feature extractor of this process
        self.folder_contents: tuple[str, float | None] | None = None
        self.model: Any  # a name, or a loaded model
        self.device = device
        if not isinstance(model, (str, os.PathLike)):
            _check_loaded(model, revision, device, feature_extractor)
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
            self.folder_contents = encoding.weights_fingerprint(loaded), level

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def _ready(self, rank: int | None) -> tuple[Any, Any]:
        """Return the model and feature extractor of this process. Load them when they are first needed."""
        if self._loaded is None:
            if _in_child() and not torch.cuda.is_available():
                # `map` does not say how many processes there are; as many threads in each make them up to 30 times as
                # slow
                torch.set_num_threads(1)
            device = self.device or encoding.default_device(_number() if rank is None else rank)
            if isinstance(self.model, str):
                self._loaded = self._load(device)
            else:  # in a child the model is a copy of this process alone
                moves = _in_child() and self.model.device.type == "cuda"
                self._loaded = (self.model.to(device) if moves else self.model), self.feature_extractor
        return self._loaded

    def _load(self, device: str) -> tuple[Any, WavTokenizerFeatureExtractor | None]:
        raise NotImplementedError


def _check_loaded(
    model: Any, revision: str | None, device: str | None, feature_extractor: WavTokenizerFeatureExtractor | None
) -> None:
    """
    Raise TypeError or ValueError if a loaded model cannot be used, or was given with arguments for a model by name.
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


def _number() -> int:
    """
    Of this process among those of `map(num_proc=...)`, which says it only `with_rank=True`; 0 if there are no others.
    """
    identity = require("multiprocess", "bulk").current_process()._identity
    return identity[-1] - 1 if identity else 0


def _in_child() -> bool:
    """Whether this is a process of `map(num_proc=...)`, which uses multiprocess, or of multiprocessing."""
    return parent_process() is not None or require("multiprocess", "bulk").parent_process() is not None


class AudioTokenizer(_Mapped):
    """
    Function for `map` that encodes audio: `dataset.map(AudioTokenizer("bundled"), batched=True, with_rank=True,
    num_proc=2)`.

    Each row gets `audio_codes` (list of uint16), `num_samples`, `duration` (seconds), `source_sampling_rate` (Hz),
    `source_channels`, `codebook_fingerprint`, `warnings` (kinds), `failure` and `failure_kind`. Audio that cannot be
    read gets no codes, and the reason in `failure`. The kinds are those of `wavtokenizer_hf.audio_errors`.
    `tokenize_dataset` calls this.

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
        feature_extractor: That of a loaded model. It may scale clips to a peak. Default: no scaling.
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
            self.model = getattr(
                self.model, "encoder_model", self.model
            )  # a decoder would only make the pickle larger
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
        encoder, feature_extractor = self._ready(rank)
        sounds = batch[self.column]
        read = [partial(sounds.__getitem__, index) for index in range(len(sounds))]
        num_readers = 1 if _in_child() else num_cores()
        windows = encoding.tokenize_clips(
            encoder, feature_extractor, read, self.batch_seconds, num_readers, self.channel, self.max_clip_seconds
        )
        rows = [self._row(result, encoder.codebook_fingerprint) for window in windows for result in window]
        return {name: [row[name] for row in rows] for name in _features()}

    def _row(self, result: Any, codebook_fingerprint: str) -> dict[str, Any]:
        if isinstance(result, Failure):
            if self.on_error == "fail":
                raise ValueError(result.reason)
            return {**dict.fromkeys(_features()), "failure": result.reason, "failure_kind": result.kind}
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


def _features() -> dict[str, Any]:
    """Return the columns that AudioTokenizer gives, with the types of the datasets library."""
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

    Audio is decoded here and not by the dataset, so damaged audio becomes a row with the reason in `failure` and no
    codes. Other columns are carried along. An `IterableDataset` stays one and is encoded while it is read.

    Args:
        dataset: `datasets.Dataset`, `IterableDataset`, or a dictionary of either.
        model: Name on the Hub, folder, or `bundled`; or a loaded `WavTokenizerModel` or `WavTokenizerEncoderModel`,
            which is used on its device.
        revision: Branch, tag or commit of the model on the Hub.
        column: Column of the audio: an Audio column, decoded or not, or paths.
        device: Device of the model. Defaults to one GPU per process, or the CPU.
        batch_seconds: Seconds of audio per batch.
        batch_size: Rows that are read at once.
        num_proc: Number of processes, each with its own model; not for an `IterableDataset`. With GPUs they have to be
            spawned: `multiprocess.set_start_method("spawn")`.
        on_error: `"record"` writes the reason into the row, `"fail"` raises ValueError at the first clip that cannot
            be read.
        channel: Channel of audio that has several: `"mean"`, `"left"`, `"right"` or a number from 0.
        max_clip_seconds: A longer clip fails.
        feature_extractor: That of a loaded model. It may scale clips to a peak. Default: no scaling.

    Returns:
        A dataset of the same kind, with the columns of `AudioTokenizer` in place of `column`.

    Raises:
        ValueError: There is no such column, or the dataset has columns with the names of the new ones; the model
            cannot be loaded; a clip cannot be read, with `on_error="fail"`.
        TypeError: The model is neither a name nor a model of this package.
        PicklingError: With `num_proc`, a loaded model whose layers were replaced.
    """
    datasets = require("datasets", "bulk")
    function = AudioTokenizer(
        model, revision, column, device, batch_seconds, on_error, channel, max_clip_seconds, feature_extractor
    )
    return _map(dataset, function, column, _features(), batch_size, num_proc, {column: datasets.Audio(decode=False)})


class AudioDetokenizer(_Mapped):
    """
    Function for `map` that decodes codes to a column `audio`, FLAC files of 16 bits; the inverse of `AudioTokenizer`.

    Codes of another codebook are refused if the rows have `codebook_fingerprint`. Audio is cut to `num_samples` where
    a row has it. A row without codes gets no audio.

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
        model, _ = self._ready(rank)
        for fingerprint in set(batch.get("codebook_fingerprint", ())) - {None}:
            model.check_codebook_fingerprint(fingerprint)
        rows = list(batch[self.column])
        lengths = batch["num_samples"] if "num_samples" in batch else [None] * len(rows)
        return {"audio": [self._sound(model, codes, length) for codes, length in zip(rows, lengths, strict=True)]}

    @torch.inference_mode()
    def _sound(self, model: WavTokenizerModel, codes: Any, num_samples: int | None) -> dict[str, Any] | None:
        if codes is None:
            return None
        audio_codes = torch.from_numpy(np.asarray(codes).astype(np.int64))[None, None].to(model.device)
        values = model.decode(audio_codes).audio_values[0, 0, :num_samples]
        with tempfile.TemporaryDirectory() as folder:
            path = audio.save(Path(folder, "clip.flac"), values, model.config.sampling_rate)
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
    Replace the codes of a dataset by audio, in an Audio column `audio` at the model's sampling rate.

    Args:
        dataset: Result of `tokenize_dataset`, or the output folder of `tokenize` as `datasets.load_dataset` reads it.
        model: Name on the Hub, folder, or `bundled`; or a loaded `WavTokenizerModel`, which is used on its device.
        revision: Branch, tag or commit of the model on the Hub.
        column: Column of the codes.
        device: Device of the model. Defaults to one GPU per process, or the CPU.
        batch_size: Rows that are read at once.
        num_proc: Processes, each with a model; not for an `IterableDataset`.

    Returns:
        A dataset of the same kind, with `audio` in place of `column`.

    Raises:
        ValueError: There is no such column, or an `audio` already; the codes are of another codebook; the model cannot
            be loaded.
        TypeError: The model is neither a name nor a model of this package with a decoder.
    """
    datasets = require("datasets", "bulk")
    function = AudioDetokenizer(model, revision, column, device)
    audio_feature = datasets.Audio(sampling_rate=function.sampling_rate)
    # as bytes first: what goes into an Audio column as a Python object is encoded anew by torchcodec
    added = {"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
    sounds = _map(dataset, function, column, added, batch_size, num_proc, {})
    if isinstance(sounds, dict):
        return type(sounds)({name: part.cast_column("audio", audio_feature) for name, part in sounds.items()})
    return sounds.cast_column("audio", audio_feature)


def _map(
    dataset: Any, function: _Mapped, column: str, added: dict, batch_size: int, num_proc: int | None, casts: dict
) -> Any:
    """`dataset.map` in batches; `column` goes and `added` come, whatever kind of dataset it is."""
    if isinstance(dataset, dict):
        one = partial(_map, function=function, column=column, added=added, batch_size=batch_size)
        return type(dataset)({name: one(part, num_proc=num_proc, casts=casts) for name, part in dataset.items()})
    streaming = isinstance(dataset, require("datasets", "bulk").IterableDataset)
    if streaming and num_proc is not None:
        raise ValueError(
            f"Got num_proc={num_proc} for an IterableDataset, which is read in one process. Leave it out."
        )
    features = dataset.features or dataset._resolve_features().features  # a stream may not know its own yet
    check_column(list(features), column, "the dataset")
    taken = sorted((set(features) - {column}) & set(added))
    if taken:
        raise ValueError(f"The dataset has a column {taken[0]!r} already. Rename or remove it.")
    for name, feature in casts.items():
        if isinstance(features[name], type(feature)):
            dataset = dataset.cast_column(name, feature)
    kept = {name: feature for name, feature in features.items() if name != column}
    options = {} if streaming else {"with_rank": True, "num_proc": num_proc}
    format = _format(dataset)
    if format is not None:  # in some formats `map` (datasets 5.2) would empty the columns that stay
        dataset = dataset.with_format(None)
    mapped = dataset.map(
        function,
        batched=True,
        batch_size=batch_size,
        remove_columns=[column],
        features=type(features)({**kept, **added}),
        **options,
    )
    return mapped if format is None else mapped.with_format(format)


def _format(dataset: Any) -> str | None:
    """The format that `with_format` gave a dataset or a stream of one."""
    if hasattr(dataset, "format"):
        return dataset.format["type"]
    formatting = getattr(dataset, "_formatting", None)
    return None if formatting is None else formatting.format_type
