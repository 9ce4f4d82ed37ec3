"""Decoders for audio files: soundfile (libsndfile), and torchcodec (FFmpeg) for formats that libsndfile lacks.

A decoder returns all samples of a file or raises an error. It never stops at an estimated length.
"""

import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .audio_containers import Container, has_second_flac, inspect
from .audio_errors import AudioError, TruncatedAudioError
from .extras import require


BLOCK_FRAMES = 4096
"""Samples per channel in one read. A damaged file loses less than this before the damage."""

MAX_DECODED_BYTES = 2**34
"""Maximum bytes of samples of a clip that is decoded at once."""


_CONCATENATED = "it holds several concatenated files, and only the first would be read"


class SoundfileDecoder:
    """Decode a file with libsndfile.

    Args:
        file: Seekable binary file with the content.
        container: Result of `audio_containers.inspect`.
        name: Name of the file in messages.
        path: Path of the file, if it has one. libsndfile opens it directly where the content needs no correction.

    Attributes:
        sampling_rate: Sampling rate in Hz, from the header, unchecked.
        num_channels: Number of channels, from the header, unchecked.
        num_frames: Samples per channel, from the header, or None.

    Raises:
        AudioError: libsndfile cannot read the file.
    """

    def __init__(self, file: BinaryIO, container: Container, name: str, path: Path | None):
        self._soundfile = soundfile_module()
        self._name, self._container, self._content = name, container, file
        self._corrected_file: _CorrectedFile | None = None
        source: str | bytes | _CorrectedFile
        is_plain = container.format not in ("", "mpeg") and container.start == 0
        is_plain = is_plain and container.end is None and container.patch is None
        if path is not None and is_plain:
            source = os.fspath(path) if sys.platform == "win32" else os.fsencode(path)
        else:
            source = self._corrected_file = _CorrectedFile(file, container)
        try:
            self._file = self._soundfile.SoundFile(source)
        except (RuntimeError, EOFError) as error:  # LibsndfileError is a RuntimeError
            raise AudioError(decoder_message(error)) from error
        # SoundFile.read (0.14) seeks to its position after every block, which changes the samples of MP3 decoders
        self._file.seekable = lambda: False
        self.sampling_rate, self.num_channels = self._file.samplerate, self._file.channels
        # streamed FLAC has an unknown length
        self.num_frames = self._file.frames if self._file.frames < 2**62 else None
        if container.format == "mpeg" and (container.estimates_length or container.patch):
            self.num_frames = None

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all samples, (n, C) float32, n > 0. Raises AudioError, or TruncatedAudioError if they end early."""
        block_size, num_read = max(1, min(BLOCK_FRAMES, 2**22 // self.num_channels)), 0
        try:
            # do not read beyond the end, where libFLAC would parse a tag as a frame
            while (size := block_size if self.num_frames is None else min(block_size, self.num_frames - num_read)) > 0:
                block = self._file.read(size, dtype="float32", always_2d=True)
                if len(block) == 0:
                    break
                num_read += len(block)
                yield block
        except RuntimeError as error:
            if not self._is_truncated(num_read):
                raise AudioError(
                    f"Cannot read {self._name} as audio: {decoder_message(error)}. The file may be damaged."
                ) from error
        if self._corrected_file is not None and self._corrected_file.error is not None:
            raise self._corrected_file.error
        if self._is_truncated(num_read):
            raise TruncatedAudioError(self._truncation_message(num_read))
        if self._container.format == "flac" and has_second_flac(self._content, self._container.start):
            raise AudioError(f"Cannot read {self._name} as audio: {_CONCATENATED}. Split it.")
        num_counted = self._container.num_frames
        # MP3 decoders drop encoder delay and padding (12-bit numbers) and the first frames without a bit reservoir
        if num_counted is not None and num_read < num_counted - 2**14:
            raise AudioError(
                f"The decoder ended after {num_read} of {num_counted} samples of {self._name}. The file may be "
                "damaged."
            )

    def _is_truncated(self, num_read: int) -> bool:
        return self._container.num_missing > 0 or (self.num_frames is not None and num_read < self.num_frames)

    def _truncation_message(self, num_read: int) -> str:
        promised = f"{self.num_frames}"
        if self.num_frames is None or num_read >= self.num_frames:
            promised = f"at least {self._container.num_missing} bytes more"
        return (
            f"{self._name} ends early, after {num_read} samples; its header promises {promised}. "
            "It is truncated or damaged."
        )

    def close(self) -> None:
        self._file.close()


class TorchcodecDecoder:
    """Decode a file with FFmpeg. The interface is that of `SoundfileDecoder`.

    Raises:
        AudioError: FFmpeg cannot read the file.
        ImportError: torchcodec cannot be imported.
    """

    def __init__(self, file: BinaryIO, container: Container, name: str):
        decoder_class = torchcodec_decoder()
        self._name, self._container = name, container
        file.seek(0)
        try:
            self._decoder = decoder_class(file.getvalue() if isinstance(file, io.BytesIO) else file)
        except Exception as error:  # torchcodec raises RuntimeError, ValueError or OSError for FFmpeg's errors
            raise AudioError(decoder_message(error)) from error
        metadata = self._decoder.metadata
        self.sampling_rate, self.num_channels = metadata.sample_rate, metadata.num_channels
        duration = metadata.duration_seconds_from_header
        self.num_frames = None if duration is None else round(duration * self.sampling_rate)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all samples, as `SoundfileDecoder.blocks` does.

        The file is decoded at once, since decoded ranges of WMA overlap by some samples (torchcodec 0.13).
        """
        size = 4 * (self.num_frames or 0) * self.num_channels
        if size > MAX_DECODED_BYTES:
            raise AudioError(
                f"{self._name} would take {size / 2**30:.0f} GiB of memory, since its format is decoded at once; "
                f"expected at most {MAX_DECODED_BYTES / 2**30:.0f}. Convert it to FLAC with ffmpeg, or cut it.",
                "memory",
            )
        try:
            samples = self._decoder.get_all_samples().data.T.numpy()
        except (RuntimeError, ValueError) as error:
            raise AudioError(
                f"Cannot read {self._name} as audio: {decoder_message(error)}. The file may be damaged."
            ) from error
        for start in range(0, len(samples), BLOCK_FRAMES):
            yield np.ascontiguousarray(samples[start : start + BLOCK_FRAMES])
        if self._container.num_missing > 0:
            raise TruncatedAudioError(
                f"{self._name} ends early: its header promises at least {self._container.num_missing} bytes more."
            )

    def close(self) -> None:
        pass


def open_decoder(file: BinaryIO, name: str, path: Path | None = None) -> SoundfileDecoder | TorchcodecDecoder:
    """Open audio with the first decoder that can read it.

    Args:
        file: Seekable binary file with the content.
        name: Name of the audio in messages.
        path: Path of the file, if it has one.

    Raises:
        AudioError: No installed decoder can read it.
        ImportError: soundfile is missing.
    """
    container = inspect(file)
    if container.has_more:
        error = AudioError(_CONCATENATED)
        hint = "Split it"
    else:
        try:
            return SoundfileDecoder(file, container, name, path)
        except AudioError as libsndfile_error:
            error, hint = libsndfile_error, "It may be damaged"
    if container.format not in ("flac", "mpeg") and not container.has_more:
        try:
            return TorchcodecDecoder(file, container, name)
        except ImportError:
            hint = "Install torchcodec, which reads more formats (pip install 'wavtokenizer_hf[codecs]')"
        except AudioError:
            hint = "It may be damaged"
    source = "FILE" if path is None else shlex.quote(str(path))
    raise AudioError(
        f"Cannot read {name} as audio: {error}. {hint}, or try: ffmpeg -i {source} -f wav - | wavtokenizer encode - "
        "--model MODEL --output OUTPUT",
        "truncated" if container.num_missing > 0 else "unreadable",
    ) from error


class _CorrectedFile(io.RawIOBase):
    """Content of an audio file for libsndfile, without leading tags and with a corrected length.

    Where libsndfile would estimate the length, the file pretends to be much longer, so that it reads until its decoder
    ends. The decoder (mpg123) looks for a tag in the last 128 bytes, so those are zeros.
    """

    def __init__(self, file: BinaryIO, container: Container):
        super().__init__()
        self._content, self._start, self._patch = file, container.start, container.patch
        self._position = 0
        self.error: OSError | None = None
        self._size = file.seek(0, 2) - container.start
        if container.end is not None:
            self._size = min(self._size, container.end)
        self._end = 64 * self._size + 2**20 if container.estimates_length else self._size

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._end)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._end - self._position))
        if self._position >= self._size:
            content = bytes(wanted if self._position >= self._end - 128 else 0)
        else:
            try:
                self._content.seek(self._start + self._position)
                content = self._content.read(wanted)
            except OSError as error:  # libsndfile would treat it as the end of the file
                self.error, content = error, b""
        if self._patch is not None:
            offset, patch = self._patch[0] - self._position, self._patch[1]
            if -len(patch) < offset < len(content):
                patched = bytearray(content)
                for index, byte in enumerate(patch, start=offset):
                    if 0 <= index < len(patched):
                        patched[index] = byte
                content = bytes(patched)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def write(self, content: Any) -> int:  # soundfile requires the method
        raise io.UnsupportedOperation("read only")


def decoder_message(error: Exception) -> str:
    """Return the message of a decoder's error without its prefix.

    The prefix is a memory address, which differs from run to run, or a line of torchcodec's source.
    """
    text = str(getattr(error, "error_string", error)).strip().partition("\n")[0]
    return re.sub(r"^.*\.cpp:\d+, ", "", text).rstrip(".")


def soundfile_module() -> Any:
    """Import soundfile. Raises ImportError if it or soxr is missing."""
    require("soxr", "audio")  # audio.load resamples with it
    return require("soundfile", "audio")


def torchcodec_decoder() -> Any:
    """Return the decoder class of torchcodec. Raises ImportError if it or the FFmpeg libraries cannot be loaded."""
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError and OSError if FFmpeg is missing
        message = str(error).strip().partition("\n")[0]
        raise ImportError(f"backend='torchcodec' needs torchcodec and the libraries of FFmpeg: {message}") from error
    return AudioDecoder
