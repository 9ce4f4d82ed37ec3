"""Decoders of audio files: soundfile (libsndfile), and torchcodec (FFmpeg) for what libsndfile does not know.

A decoder gives all samples of a file or says that it cannot: it does not stop at a length that was estimated.
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

from .audio_containers import Container, holds_another_flac, inspect
from .audio_errors import AudioError, TruncatedAudioError
from .extras import require


UNIT = 4096
"""Samples of each channel that are decoded at once: what is lost where a file is damaged is less than this."""

LARGEST_WHOLE = 2**34
"""Bytes of samples that torchcodec may give at once."""


_SEVERAL = "several files follow each other in it, of which the first alone would be read"


class SoundfileDecoder:
    """
    Samples of a file by libsndfile.

    Args:
        file: seekable binary file with the content.
        name: for messages.
        path: of the file, which libsndfile then opens itself, where nothing has to be mended on the way.

    Attributes:
        sampling_rate, num_channels: as the header says, unchecked.
        num_frames: samples of each channel as the header says, or None.

    Raises:
        AudioError: libsndfile cannot read it.
    """

    def __init__(self, file: BinaryIO, container: Container, name: str, path: Path | None):
        self._soundfile = soundfile_module()
        self._name, self._container, self._content = name, container, file
        self._view: _View | None = None
        source: str | bytes | _View
        is_plain = container.format not in ("", "mpeg") and container.start == 0
        is_plain = is_plain and container.end is None and container.patch is None
        if path is not None and is_plain:
            source = os.fspath(path) if sys.platform == "win32" else os.fsencode(path)
        else:
            source = self._view = _View(file, container)
        try:
            self._file = self._soundfile.SoundFile(source)
        except (RuntimeError, EOFError) as error:  # LibsndfileError among them
            raise AudioError(reason(error)) from error
        # SoundFile.read (0.14) seeks to where it already is, after every block; an MP3 decoder then gives other
        # samples
        self._file.seekable = lambda: False
        self.sampling_rate, self.num_channels = self._file.samplerate, self._file.channels
        self.num_frames = (
            self._file.frames if self._file.frames < 2**62 else None
        )  # FLAC that was streamed says "unknown"
        if container.format == "mpeg" and (container.estimates_length or container.patch):
            self.num_frames = None

    def blocks(self) -> Iterator[np.ndarray]:
        """Gives all samples, (n, C) float32, n > 0. Raises AudioError, or TruncatedAudioError where they end too early."""
        unit, num_read = max(1, min(UNIT, 2**22 // self.num_channels)), 0
        try:
            # not beyond the end, where libFLAC would take a tag for a frame
            while (size := unit if self.num_frames is None else min(unit, self.num_frames - num_read)) > 0:
                block = self._file.read(size, dtype="float32", always_2d=True)
                if len(block) == 0:
                    break
                num_read += len(block)
                yield block
        except RuntimeError as error:
            if not self._is_cut(num_read):
                raise AudioError(
                    f"Cannot read {self._name} as sound: {reason(error)}. The file may be damaged."
                ) from error
        if self._view is not None and self._view.error is not None:
            raise self._view.error
        if self._is_cut(num_read):
            raise TruncatedAudioError(self._how_cut(num_read))
        if self._container.format == "flac" and holds_another_flac(self._content, self._container.start):
            raise AudioError(f"Cannot read {self._name} as sound: {_SEVERAL}. Split it.")
        counted = self._container.num_frames
        # an MP3 decoder drops the delay of the encoder and what fills the last frame up, 12 bits each, and waits for
        # its bits
        if counted is not None and num_read < counted - 2**14:
            raise AudioError(
                f"The decoder ended after {num_read} of {counted} samples of {self._name}. The file may be damaged."
            )

    def _is_cut(self, num_read: int) -> bool:
        return self._container.num_missing > 0 or (self.num_frames is not None and num_read < self.num_frames)

    def _how_cut(self, num_read: int) -> str:
        promised = f"{self.num_frames}"
        if self.num_frames is None or num_read >= self.num_frames:
            promised = f"at least {self._container.num_missing} bytes more"
        return (
            f"{self._name} ends early: {num_read} samples came, its header promises {promised}. "
            "It is cut off, or damaged."
        )

    def close(self) -> None:
        self._file.close()


class TorchcodecDecoder:
    """Samples of a file by FFmpeg: as `SoundfileDecoder`. Raises ImportError too, where torchcodec does not import."""

    def __init__(self, file: BinaryIO, container: Container, name: str):
        decoder_class = torchcodec_decoder()
        self._name, self._container = name, container
        file.seek(0)
        try:
            self._decoder = decoder_class(file.getvalue() if isinstance(file, io.BytesIO) else file)
        except Exception as error:  # FFmpeg's errors come as RuntimeError, ValueError or OSError
            raise AudioError(reason(error)) from error
        metadata = self._decoder.metadata
        self.sampling_rate, self.num_channels = metadata.sample_rate, metadata.num_channels
        duration = metadata.duration_seconds_from_header
        self.num_frames = None if duration is None else round(duration * self.sampling_rate)

    def blocks(self) -> Iterator[np.ndarray]:
        """
        As `SoundfileDecoder.blocks`, but the file is decoded whole: ranges of WMA overlap by some samples (torchcodec
        0.13).
        """
        size = 4 * (self.num_frames or 0) * self.num_channels
        if size > LARGEST_WHOLE:
            raise AudioError(
                f"{self._name} would take {size / 2**30:.0f} GiB of memory, since its format is decoded whole; "
                f"expected at most {LARGEST_WHOLE / 2**30:.0f}. Convert it to FLAC with ffmpeg, or cut it.",
                "memory",
            )
        try:
            samples = self._decoder.get_all_samples().data.T.numpy()
        except (RuntimeError, ValueError) as error:
            raise AudioError(
                f"Cannot read {self._name} as sound: {reason(error)}. The file may be damaged."
            ) from error
        for start in range(0, len(samples), UNIT):
            yield np.ascontiguousarray(samples[start : start + UNIT])
        if self._container.num_missing > 0:
            raise TruncatedAudioError(
                f"{self._name} ends early: its header promises at least {self._container.num_missing} bytes more."
            )

    def close(self) -> None:
        pass


def open_decoder(file: BinaryIO, name: str, path: Path | None = None) -> SoundfileDecoder | TorchcodecDecoder:
    """
    Opens audio with the decoder that knows its format.

    Args:
        file: seekable binary file with the content.
        name: for messages.
        path: where the content lies, if it is a file.

    Raises:
        AudioError: no decoder that is installed can read it.
        ImportError: soundfile is missing.
    """
    container = inspect(file)
    if container.has_more:
        error = AudioError(_SEVERAL)
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
        f"Cannot read {name} as sound: {error}. {hint}, or try: ffmpeg -i {source} -f wav - | wavtokenizer encode - "
        "--model MODEL --output OUTPUT",
        "truncated" if container.num_missing > 0 else "unreadable",
    ) from error


class _View(io.RawIOBase):
    """
    The content of a file from where its audio starts, as libsndfile shall see it.

    Where libsndfile would estimate the length, the end seems far away, so that it reads until its decoder ends. The
    decoder (mpg123) looks for a tag in the last 128 bytes, so there are some.
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
            except OSError as error:  # libsndfile would take it for the end
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

    def write(self, content: Any) -> int:  # soundfile takes no file without
        raise io.UnsupportedOperation("read only")


def reason(error: Exception) -> str:
    """What a decoder says, without what comes before: the address of content in memory, which is another each time, or
    the place in torchcodec's source."""
    text = str(getattr(error, "error_string", error)).strip().partition("\n")[0]
    return re.sub(r"^.*\.cpp:\d+, ", "", text).rstrip(".")


def soundfile_module() -> Any:
    require("soxr", "audio")  # transformers resamples with it
    return require("soundfile", "audio")


def torchcodec_decoder() -> Any:
    """The decoder class of torchcodec. Raises ImportError where it, or the libraries of FFmpeg, do not load."""
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, RuntimeError, OSError) as error:  # the latter two where FFmpeg is missing
        message = str(error).strip().partition("\n")[0]
        raise ImportError(f"backend='torchcodec' needs torchcodec and the libraries of FFmpeg: {message}") from error
    return AudioDecoder
