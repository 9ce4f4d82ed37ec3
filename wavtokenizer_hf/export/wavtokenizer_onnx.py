"""Run an exported WavTokenizer with onnxruntime: audio to codes and back, numpy in and out.

`wavtokenizer export-model` copies this file into every folder that it writes. It imports numpy and onnxruntime only,
so the folder works without torch and transformers:

    from wavtokenizer_onnx import WavTokenizerOnnx  # with the folder on sys.path

    model = WavTokenizerOnnx(folder)
    audio_codes = model.encode(audio[None, None]).audio_codes  # (1, 1, L) int64
    audio_values = model.decode(audio_codes).audio_values  # (1, 1, L * hop) float32

Shape letters: B rows of a batch, T samples, L = ceil(T / hop) codes.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np


CONFIG_NAME = "wavtokenizer_onnx.json"
MAX_CONFIG_BYTES = 2**20
_LIMITS = {
    "sampling_rate": (1000, 768_000), "hop_length": (1, 2**20), "codebook_size": (1, 2**20), "frames_back": (0, 2**20),
    "frames_ahead": (0, 2**20), "last_reach": (0, 2**20), "num_lstm_layers": (1, 64), "lstm_size": (1, 2**14),
}  # fmt: skip
"""Fields of the configuration -> smallest and largest value, so that a damaged file cannot exhaust the memory."""
NO_SAMPLE = 1e10  # larger samples overflow inside the model, and their codes would look valid
CHUNK_SECONDS, CHUNKS_ABOVE_SECONDS = 10, 60
"""`encode` splits audio longer than the second length into chunks of the first length."""


class EncoderOutput(NamedTuple):
    """`audio_codes` (B, 1, L) int64, 0 where the mask is False; `audio_codes_mask` (B, 1, L) bool."""

    audio_codes: np.ndarray
    audio_codes_mask: np.ndarray


class DecoderOutput(NamedTuple):
    """`audio_values` (B, 1, L * hop) float32, nominally in [-1, 1] and not clipped."""

    audio_values: np.ndarray


class WavTokenizerOnnx:
    """
    An exported WavTokenizer.

    The rows of a batch run one after another, so each row gets what it gets alone.

    Args:
        folder: Folder that `wavtokenizer export-model` wrote.
        providers: onnxruntime's execution providers, in order of preference.
        num_threads: Number of threads of each session. Defaults to onnxruntime's choice.

    Attributes:
        config: `sampling_rate` (Hz), `hop_length` (samples per code), `frame_rate` (codes per second),
            `codebook_size`.
        codebook_fingerprint: Short hash of the codebook, equal to `WavTokenizerModel.codebook_fingerprint`.

    Raises:
        ValueError: The folder is not an exported model, a file is missing, or a file belongs to another model.
        ImportError: onnxruntime is missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        num_threads: int | None = None,
    ):
        self.folder = Path(folder)
        path = self.folder / CONFIG_NAME
        if not path.is_file():
            raise ValueError(
                f"{self.folder} has no {CONFIG_NAME}, expected a folder that `wavtokenizer export-model` wrote."
            )
        try:
            files, fields = _read_config(path)
            self.config = SimpleNamespace(
                sampling_rate=fields["sampling_rate"],
                hop_length=fields["hop_length"],
                frame_rate=fields["sampling_rate"] / fields["hop_length"],
                codebook_size=fields["codebook_size"],
            )
            self.codebook_fingerprint = fields["codebook_fingerprint"]
            self._context = {name: fields[name] for name in ("frames_back", "frames_ahead", "last_reach")}
            self._state_shape = fields["num_lstm_layers"], fields["lstm_size"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {str(error)[:200]}. Export the model again.") from error
        if missing := [name for name in files if not (self.folder / name).is_file()]:
            raise ValueError(f"{self.folder} lacks {missing[0]}. Export the model again, or copy the whole folder.")
        self.files = tuple(files)
        self.providers = list(providers)
        self.num_threads = num_threads
        self._sessions: dict[str, Any] = {}

    def session(self, name: str) -> Any:
        """
        Return the `onnxruntime.InferenceSession` of a file, `encoder`, `encoder_stream` or `decoder`.

        It is loaded on first use.
        """
        if name not in self._sessions:
            self._sessions[name] = self._load(f"{name}.onnx")
        return self._sessions[name]

    def _load(self, name: str) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("An ONNX folder needs onnxruntime: pip install onnxruntime") from error
        if name not in self.files:
            raise ValueError(f"{self.folder} has no {name}: it holds {', '.join(self.files)}. Export the model again.")
        if unknown := set(self.providers) - set(onnxruntime.get_available_providers()):
            raise ValueError(
                f"Got the provider {sorted(unknown)[0]}, expected one of this onnxruntime: "
                f"{', '.join(onnxruntime.get_available_providers())}."
            )
        options = onnxruntime.SessionOptions()
        if self.num_threads is not None:
            options.intra_op_num_threads = self.num_threads
        try:
            session = onnxruntime.InferenceSession(self.folder / name, options, providers=self.providers)
        except Exception as error:  # the only base class of onnxruntime's errors
            raise ValueError(f"onnxruntime cannot load {self.folder / name}: {error}") from error
        metadata = session.get_modelmeta().custom_metadata_map
        for field, expected in (
            ("hop_length", self.config.hop_length),
            ("sampling_rate", self.config.sampling_rate),
            ("codebook_fingerprint", self.codebook_fingerprint),
        ):
            if metadata.get(field) != str(expected):
                raise ValueError(
                    f"{self.folder / name} has {field} {metadata.get(field)}, and {CONFIG_NAME} has {expected}. They "
                    "belong to different models. Export the model again."
                )
        return session

    def check_codebook_fingerprint(self, fingerprint: str) -> None:
        """Raise ValueError unless this model's codebook has that fingerprint."""
        if fingerprint != self.codebook_fingerprint:
            raise ValueError(
                f"These codes were made with the codebook {fingerprint}, this model has the codebook "
                f"{self.codebook_fingerprint}: it would decode them to other audio. Load the model that made them."
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Whole clips
    # -----------------------------------------------------------------------------------------------------------------

    def encode(
        self, input_values: np.ndarray, padding_mask: np.ndarray | None = None, chunk_seconds: float | None = None
    ) -> EncoderOutput:
        """
        Encode audio.

        Args:
            input_values: Floats (B, 1, T) at `config.sampling_rate`, nominally in [-1, 1]. Computed in float32.
            padding_mask: (B, T), 1 for real samples and 0 for padding. Each row may be padded on the left or on the
                right. Default: no padding.
            chunk_seconds: Encode in chunks of this length, in seconds, with memory that does not grow with T. By
                default, audio longer than 60 s is encoded in chunks of 10 s if the folder has `encoder_stream.onnx`.

        Returns:
            `EncoderOutput`. A row that is padded on the left has its codes at the right end.

        Raises:
            ValueError: `input_values` has another shape or type, or is not finite. The mask has gaps, or a row without
                a real sample.
        """
        input_values = np.asarray(input_values)
        if (
            input_values.ndim != 3
            or input_values.shape[1] != 1
            or input_values.size == 0
            or not np.issubdtype(input_values.dtype, np.floating)
        ):
            raise ValueError(
                f"Got input_values of shape {input_values.shape}, {input_values.dtype}; expected floats of shape "
                "(batch size, 1, samples) with at least one sample."
            )
        if chunk_seconds is not None and not chunk_seconds > 0:
            raise ValueError(f"Got chunk_seconds={chunk_seconds}, expected more than 0.")
        num_samples = input_values.shape[-1]
        hop, num_codes = self.config.hop_length, -(-num_samples // self.config.hop_length)
        audio_codes = np.zeros((len(input_values), 1, num_codes), np.int64)
        mask = np.zeros_like(audio_codes, dtype=bool)
        for row, (start, stop) in enumerate(_bounds(padding_mask, input_values, "padding_mask")):
            audio = input_values[row : row + 1, :, start:stop].astype(np.float32)
            if not _is_audio(audio):
                raise ValueError(
                    f"Row {row} of input_values holds NaN or infinite samples, or some beyond ±{NO_SAMPLE:g}. Repair "
                    "or drop the clip."
                )
            codes = self._encode_row(audio, chunk_seconds)
            end = num_codes if start > 0 else -(-stop // hop)
            audio_codes[row, :, end - codes.shape[-1] : end] = codes
            mask[row, :, end - codes.shape[-1] : end] = True
        return EncoderOutput(audio_codes, mask)

    def _encode_row(self, audio: np.ndarray, chunk_seconds: float | None) -> np.ndarray:
        rate = self.config.sampling_rate
        automatic = "encoder_stream.onnx" in self.files and audio.shape[-1] > CHUNKS_ABOVE_SECONDS * rate
        if chunk_seconds is None and not automatic:
            return self.session("encoder").run(["audio_codes"], {"input_values": audio})[0][0]
        stream, size = self.encode_stream(), max(1, round((chunk_seconds or CHUNK_SECONDS) * rate))
        blocks = [stream.push(audio[0, 0, start : start + size]) for start in range(0, audio.shape[-1], size)]
        return np.concatenate([*blocks, stream.flush()])[None]

    def decode(
        self,
        audio_codes: np.ndarray,
        audio_codes_mask: np.ndarray | None = None,
        window_seconds: float | None = None,
        overlap_seconds: float = 0.25,
    ) -> DecoderOutput:
        """
        Decode codes, with `bandwidth_id` 0.

        Args:
            audio_codes: Integers (B, 1, L) in [0, codebook_size).
            audio_codes_mask: (B, 1, L), 1 for real codes and 0 for padding. Each row may be padded on the left or on
                the right. Default: no padding.
            window_seconds: Decode in windows of this length, in seconds, with memory that does not grow with L. Audio
                is then approximate, since each code affects the audio of its whole window. Default: no windows.
            overlap_seconds: Overlap of two windows, in seconds; at most half a window.

        Returns:
            `DecoderOutput`, zero where the mask is zero.

        Raises:
            ValueError: The codes have another shape or type, or are outside the codebook. The mask or the windows are
                invalid.
        """
        audio_codes = np.asarray(audio_codes)
        if audio_codes.ndim != 3 or audio_codes.shape[1] != 1 or audio_codes.size == 0:
            raise ValueError(
                f"Got audio_codes of shape {audio_codes.shape}, expected (batch size, 1, codes) with at least one "
                "code."
            )
        hop = self.config.hop_length
        audio_values = np.zeros((len(audio_codes), 1, audio_codes.shape[-1] * hop), np.float32)
        for row, (start, stop) in enumerate(_bounds(audio_codes_mask, audio_codes, "audio_codes_mask")):
            codes = audio_codes[row, 0, start:stop]
            if window_seconds is None:
                audio = self._decode_row(codes)
            else:
                stream = self.decode_stream(window_seconds, overlap_seconds)
                audio = np.concatenate([stream.push(codes), stream.flush()])
            audio_values[row, 0, start * hop : stop * hop] = audio
        return DecoderOutput(audio_values)

    def _decode_row(self, codes: np.ndarray) -> np.ndarray:
        """Decode codes (L,) to audio (L * hop,)."""
        codes = self._check_codes(codes)
        return self.session("decoder").run(["waveform"], {"codes": codes[None]})[0][0]

    def _check_codes(self, codes: np.ndarray) -> np.ndarray:
        """
        Return the codes as int64. Raises ValueError if they are not integers in [0, codebook_size).

        onnxruntime does not reject negative codes: it counts them from the end of the codebook.
        """
        if not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"Got audio_codes of type {codes.dtype}, expected integers.")
        if codes.size and not (codes.min() >= 0 and codes.max() < self.config.codebook_size):
            raise ValueError(
                f"Got audio_codes from {codes.min()} to {codes.max()}, expected 0 to {self.config.codebook_size - 1}."
            )
        return codes.astype(np.int64)

    # -----------------------------------------------------------------------------------------------------------------
    # Streams
    # -----------------------------------------------------------------------------------------------------------------

    def encode_stream(self) -> "EncodeStream":
        """Return a stream that encodes audio chunk by chunk. Needs `encoder_stream.onnx`."""
        return EncodeStream(self)

    def decode_stream(self, window_seconds: float = 3.0, overlap_seconds: float = 0.25) -> "DecodeStream":
        """Return a stream that decodes codes chunk by chunk, in windows."""
        return DecodeStream(self, window_seconds, overlap_seconds)


def _bounds(mask: np.ndarray | None, values: np.ndarray, name: str) -> list[tuple[int, int]]:
    """Return start and end of the real values of each row. They must be one run at either end of the row."""
    size = values.shape[-1]
    if mask is None:
        return [(0, size)] * len(values)
    mask = np.asarray(mask)
    if mask.size != len(values) * size or mask.shape not in ((len(values), size), (len(values), 1, size)):
        raise ValueError(f"Got {name} of shape {mask.shape}, expected one entry for each entry of {values.shape}.")
    bounds = []
    for row, real in enumerate(mask.reshape(len(values), size)):
        indices = np.flatnonzero(real)
        if len(indices) == 0:
            raise ValueError(f"Row {row} of {name} has nothing real in it. Drop the row.")
        start, stop = int(indices[0]), int(indices[-1]) + 1
        if len(indices) != stop - start or (start > 0 and stop < size) or not np.isin(real, (0, 1)).all():
            raise ValueError(
                f"Row {row} of {name} is not a single run of ones at the row's beginning or end. Pad on one side only."
            )
        bounds.append((start, stop))
    return bounds


def _is_audio(audio: np.ndarray) -> bool:
    return bool((np.abs(audio) <= NO_SAMPLE).all())  # false for NaN


def _read_config(path: Path) -> tuple[list[str], dict]:
    """
    Return the names of the files and the fields of the model, whose numbers are checked against their limits.

    A damaged file raises ValueError, KeyError, TypeError or RecursionError.
    """
    with path.open("rb") as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise ValueError(f"it has more than {MAX_CONFIG_BYTES} bytes")
    content = json.loads(content)
    files, fields = content["files"], content["model"]
    if not isinstance(files, list) or not all(
        isinstance(name, str) and name == os.path.basename(name) for name in files
    ):
        raise ValueError("files is not a list of file names")
    for name, (minimum, maximum) in _LIMITS.items():
        if type(fields[name]) is not int or not minimum <= fields[name] <= maximum:
            raise ValueError(f"{name}={str(fields[name])[:50]}, expected {minimum} to {maximum}")
    return files, fields


class EncodeStream:
    """
    Encode audio chunk by chunk. The codes equal those of the whole audio, wherever the chunks are cut.

    The LSTM runs forward only, and its state is passed from step to step. All other layers see a fixed context. So
    each step encodes the new frames together with the samples of their context. The padding at the ends of a step
    affects the codes only where the audio itself begins or ends.
    """

    def __init__(self, model: WavTokenizerOnnx):
        self._session = model.session("encoder_stream")
        self._hop = model.config.hop_length
        # in frames: of the layers before the LSTM, and of the last convolution to either side
        self._left_context, self._last_context = model._context["frames_back"], model._context["last_reach"]
        self._right_context = max(1, model._context["frames_ahead"])  # at least 1, so flush() has a frame to encode
        layers, size = model._state_shape
        self._audio, self._audio_start = np.zeros((1, 1, 0), np.float32), 0  # the start is in frames
        self._hidden = self._cell = np.zeros((layers, 1, size), np.float32)
        self._frames, self._frames_start = np.zeros((1, size, 0), np.float32), 0
        self._num_convolved = self._num_codes = 0
        self._flushed = False

    @property
    def delay(self) -> int:
        """Maximum number of samples from the first sample of a code to the last sample that it depends on."""
        return (1 + self._right_context + self._last_context) * self._hop

    def push(self, audio: np.ndarray) -> np.ndarray:
        """Take the next samples (n,), n >= 0, and return the codes (m,) int64 that they complete."""
        audio = np.asarray(audio)
        if audio.ndim != 1 or not np.issubdtype(audio.dtype, np.floating) or not _is_audio(audio):
            raise ValueError(f"Got audio of shape {audio.shape}, {audio.dtype}; expected finite floats of shape (n,).")
        return self._step(audio.astype(np.float32), final=False)

    def flush(self) -> np.ndarray:
        """End the stream and return the codes of the remaining audio."""
        codes = self._step(np.zeros(0, np.float32), final=True)
        self._flushed = True
        return codes

    def _step(self, audio: np.ndarray, final: bool) -> np.ndarray:
        if self._flushed:
            raise ValueError("The stream has been flushed. Make a new one.")
        self._audio = np.concatenate([self._audio, audio[None, None]], axis=-1)
        end = self._audio_start * self._hop + self._audio.shape[-1]  # samples seen
        first = self._num_convolved
        last = -(-end // self._hop) if final else end // self._hop - self._right_context
        ready = last if final else last - self._last_context
        if end == 0 or last <= first or ready <= self._num_codes:  # no new code is complete
            return np.zeros(0, np.int64)
        bounds = [first - self._audio_start, last - self._audio_start]
        bounds += [self._num_codes - self._frames_start, ready - self._frames_start]
        codes, self._hidden, self._cell, frames = self._session.run(
            ["audio_codes", "hidden_out", "cell_out", "frames_out"],
            {
                "input_values": self._audio,
                "bounds": np.array(bounds, np.int64),
                "hidden": self._hidden,
                "cell": self._cell,
                "frames": self._frames,
            },
        )
        self._num_convolved, self._num_codes = last, ready
        audio_start, frames_start = max(0, last - self._left_context), max(0, ready - self._last_context)
        self._audio = self._audio[..., (audio_start - self._audio_start) * self._hop :].copy()
        self._frames = frames[..., frames_start - self._frames_start :].copy()
        self._audio_start, self._frames_start = audio_start, frames_start
        return codes[0, 0]


class DecodeStream:
    """
    Decode codes chunk by chunk, in windows that are crossfaded; see `WavTokenizerOnnx.decode`.

    Args:
        model: Exported WavTokenizer.
        window_seconds: Length of a window, in seconds.
        overlap_seconds: Overlap of two windows, in seconds; at most half a window.

    Raises:
        ValueError: The window is shorter than one frame, or than twice the overlap.
    """

    def __init__(self, model: WavTokenizerOnnx, window_seconds: float = 3.0, overlap_seconds: float = 0.25):
        rate = model.config.frame_rate
        if not (0 <= 2 * overlap_seconds <= window_seconds < math.inf and round(window_seconds * rate) > 0):
            raise ValueError(
                f"Got window_seconds={window_seconds} and overlap_seconds={overlap_seconds}, expected a window of at "
                f"least one frame ({1 / rate:.4f} s) and twice the overlap."
            )
        self._model = model
        self._size = round(window_seconds * rate)
        self._overlap = min(round(overlap_seconds * rate), self._size // 2)
        self._codes = np.zeros(0, np.int64)  # codes of the last window, and pending codes for the next one
        self._next_start = 0  # index in `_codes` where the next window starts
        self._tail = np.zeros(0, np.float32)  # audio of the last window from `_next_start` on
        self._flushed = False

    @property
    def delay(self) -> int:
        """Number of codes that the first audio needs."""
        return self._size

    def push(self, audio_codes: np.ndarray) -> np.ndarray:
        """Take the next codes (n,), n >= 0, and return the audio (m,) float32 that they complete."""
        if self._flushed:
            raise ValueError("The stream has been flushed. Make a new one.")
        self._codes = np.concatenate([self._codes, self._model._check_codes(np.asarray(audio_codes))])
        hop, complete = self._model.config.hop_length, []
        while len(self._codes) - self._next_start >= self._size:
            self._codes, self._next_start = self._codes[self._next_start :], self._size - self._overlap
            audio = _crossfade(self._tail, self._model._decode_row(self._codes[: self._size]))
            complete.append(audio[: self._next_start * hop])
            self._tail = audio[self._next_start * hop :]
        return np.concatenate([np.zeros(0, np.float32), *complete])

    def flush(self) -> np.ndarray:
        """End the stream and return the rest of its audio."""
        if self._flushed:
            raise ValueError("The stream has been flushed. Make a new one.")
        self._flushed = True
        hop, num_pending = self._model.config.hop_length, len(self._codes) - self._next_start
        if num_pending > len(self._tail) // hop:
            window = self._codes[-self._size :]  # a full window where possible, so it may start before `_next_start`
            audio = self._model._decode_row(window)
            return _crossfade(self._tail, audio[(len(window) - num_pending) * hop :])
        return self._tail


def _crossfade(tail: np.ndarray, audio: np.ndarray) -> np.ndarray:
    """Join two windows with a crossfade over the middle half of their overlap."""
    size = len(tail)
    if size == 0:
        return audio
    weight = np.clip(2 * (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5, 0, 1)
    return np.concatenate([tail + weight * (audio[:size] - tail), audio[size:]]).astype(np.float32)
