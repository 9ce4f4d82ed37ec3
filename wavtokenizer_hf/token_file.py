"""Token files: the codes of one clip, with the length and codebook fingerprint for decoding."""

import json
import os
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import save as serialize

from .atomic_files import write_bytes
from .find_files import TOKEN_FORMATS
from .limited_files import (
    DTYPE_BITS,
    one_line,
    parse_json,
    parse_npy,
    parse_safetensors_header,
    read_file,
    read_stream,
    safetensors_header_size,
)


@dataclass
class TokenFile:
    """Codes of one clip, and the model that made them.

    Args:
        audio_codes: Integers of shape (L,), each in [0, 65536). Stored as uint16.
        model: Name or folder of the model, as the user gave it.
        codebook_fingerprint: Fingerprint of the model's codebook.
        sampling_rate: Sampling rate of the audio, in Hz.
        hop_length: Samples per code.
        num_samples: Number of samples of the clip. The last code may cover more.
    """

    audio_codes: np.ndarray
    model: str
    codebook_fingerprint: str
    sampling_rate: int
    hop_length: int
    num_samples: int

    def __post_init__(self) -> None:
        codes = np.asarray(self.audio_codes)
        if codes.ndim != 1 or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(
                f"Got codes of shape {codes.shape} and dtype {codes.dtype}, expected integers of shape (L,)."
            )
        if codes.min() < 0 or codes.max() > MAX_CODE:
            raise ValueError(f"Got codes from {codes.min()} to {codes.max()}, expected 0 to {MAX_CODE}.")
        for name in INTEGER_FIELDS:
            if not 1 <= getattr(self, name) < 2**63:
                raise ValueError(
                    f"Got {name}={str(getattr(self, name))[:50]}, expected at least 1 and less than 2**63."
                )
        if -(-self.num_samples // self.hop_length) != codes.size:
            raise ValueError(
                f"Got {codes.size} codes for {self.num_samples} samples at {self.hop_length} samples per code, "
                f"expected {-(-self.num_samples // self.hop_length)}."
            )
        self.audio_codes = codes.astype(np.uint16)

    def save(self, path: str | os.PathLike, format: str | None = None) -> Path:
        """Save the token file atomically.

        Args:
            path: Output file.
            format: `"safetensors"` (`audio_codes` as uint16 (L,), the other fields as metadata) or `"json"`, which
                store all fields, or `"npy"` or `"txt"` (one number per line), which store the codes only. Default: the
                extension of `path`.

        Raises:
            ValueError: The format is not one of these, or the file would exceed `MAX_BYTES`.
            OSError: The file cannot be written.
        """
        path = Path(path)
        return write_bytes(path, self.to_bytes(format or path.suffix[1:]))

    def to_bytes(self, format: str) -> bytes:
        """Return the content of a token file, see `save`.

        Args:
            format: `"safetensors"`, `"json"`, `"npy"` or `"txt"`.

        Raises:
            ValueError: The format is not one of these, or the content exceeds `MAX_BYTES`, the limit of `load`.
        """
        content = self._to_bytes(format)
        if len(content) > MAX_BYTES:
            raise ValueError(f"The clip needs {len(content)} bytes as {format}, expected at most {MAX_BYTES}. Cut it.")
        return content

    def _to_bytes(self, format: str) -> bytes:
        if format == "safetensors":
            return serialize({"audio_codes": self.audio_codes}, {key: str(v) for key, v in self._metadata().items()})
        if format == "json":
            return (json.dumps({**self._metadata(), "audio_codes": self.audio_codes.tolist()}) + "\n").encode()
        if format == "txt":
            return "".join(f"{code}\n" for code in self.audio_codes.tolist()).encode()
        if format == "npy":
            buffer = BytesIO()
            np.save(buffer, self.audio_codes)
            return buffer.getvalue()
        raise ValueError(f"Got the token format {format!r}, expected one of {', '.join(TOKEN_FORMATS)}.")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TokenFile":
        """Load a `.safetensors` or `.json` token file. Raises ValueError if it is not one."""
        path = Path(path)
        try:
            return cls.from_bytes(read_file(path, MAX_BYTES), "json" if path.suffix == ".json" else "safetensors")
        except ValueError as error:
            raise ValueError(f"{path} is not a token file of wavtokenizer_hf: {one_line(error)}") from error

    @classmethod
    def from_bytes(cls, content: bytes, format: str) -> "TokenFile":
        """Parse the content of a token file, `"safetensors"` or `"json"`. Raises ValueError if it is invalid."""
        if format == "json":
            fields = parse_json(content)
            if not isinstance(fields, dict):
                raise ValueError(f"it is a {type(fields).__name__}, expected an object")
            codes = _codes_of_json(fields.get("audio_codes"))
        else:
            tensors, fields = parse_safetensors_header(content, len(content))
            codes = _codes_of_safetensors(content, tensors)
            fields = {
                name: int(value) if name in INTEGER_FIELDS and value.isdecimal() else value
                for name, value in fields.items()
            }
        field_types = {"model": str, "codebook_fingerprint": str, **dict.fromkeys(INTEGER_FIELDS, int)}
        for name, field_type in field_types.items():
            if name not in fields:
                raise ValueError(f"it lacks {name!r}")
            if type(fields[name]) is not field_type:
                expected = "text" if field_type is str else "an integer"
                raise ValueError(f"its {name} is {str(fields[name])[:100]!r}, expected {expected}")
        return cls(codes, **{name: fields[name] for name in field_types})

    def check_rate(self, config: Any) -> None:
        """Raise ValueError unless `sampling_rate` and `hop_length` equal those of a model's config."""
        for name in ("sampling_rate", "hop_length"):
            if getattr(self, name) != getattr(config, name):
                raise ValueError(
                    f"The tokens have {name}={getattr(self, name)}, and the model has {getattr(config, name)}. Use "
                    f"the model that made them, {self.model}."
                )

    def _metadata(self) -> dict:
        fields = asdict(self)
        del fields["audio_codes"]
        return fields


MAX_CODE = 2**16 - 1

MAX_BYTES = 2**28
"""Maximum size of a token file: 500 hours at 75 codes per second as safetensors, 150 hours as JSON."""

INTEGER_FIELDS = ("sampling_rate", "hop_length", "num_samples")


def _codes_of_json(values: Any) -> np.ndarray:
    if values is None:
        raise ValueError("it lacks 'audio_codes'")
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError("its audio_codes are not a list of integers")
    try:
        return np.array(values, np.int64)
    except OverflowError as error:
        raise ValueError("its audio_codes hold numbers beyond 64 bits") from error


def _codes_of_safetensors(content: bytes, tensors: dict) -> np.ndarray:
    if "audio_codes" not in tensors:
        raise ValueError("it lacks 'audio_codes'")
    dtype, shape, start, end = tensors["audio_codes"]
    if dtype[0] not in "UI" or len(shape) != 1:
        raise ValueError(
            f"its audio_codes have the type {dtype} and the shape {shape}, expected integers of shape (L,)"
        )
    return np.frombuffer(content[start:end], f"<{dtype[0].lower()}{DTYPE_BITS[dtype] // 8}")


def load_bare_codes(path: str | os.PathLike) -> np.ndarray:
    """Load codes, int64 (L,), from a `.npy` or `.txt` file. Such a file does not record the model.

    Raises:
        ValueError: The file holds anything but codes.
    """
    path = Path(path)
    try:
        return bare_codes_from_bytes(read_file(path, MAX_BYTES), path.suffix[1:])
    except ValueError as error:
        raise ValueError(f"{path} does not hold codes: {one_line(error)}") from error


def bare_codes_from_bytes(content: bytes, format: str) -> np.ndarray:
    """Parse codes, int64 (L,), from the content of a `.npy` or `.txt` file. Raises ValueError for other content."""
    codes = parse_npy(content) if format == "npy" else _codes_of_text(content)
    if codes.ndim != 1 or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"it is an array of shape {codes.shape}, dtype {codes.dtype}; expected integers (L,).")
    if codes.min() < 0 or codes.max() > MAX_CODE:
        raise ValueError(f"it holds numbers from {codes.min()} to {codes.max()}, expected codes from 0 to {MAX_CODE}.")
    return codes.astype(np.int64)


def _codes_of_text(content: bytes) -> np.ndarray:
    if invalid := content.translate(None, b"0123456789 \t\r\n"):
        raise ValueError(f"it holds {invalid[:20]!r}, expected numbers separated by whitespace")
    try:
        return np.array(content.split(), np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError("it holds numbers beyond 64 bits") from error


def read_tokens(stream: BinaryIO, format: str, start: bytes = b"") -> bytes:
    """Read a token file from a stream, after `start`, which was read before. Raises ValueError beyond `MAX_BYTES`."""
    if format == "safetensors":
        start += stream.read(8 - len(start))
        safetensors_header_size(start, MAX_BYTES)  # refuse an endless stream of other data
    return read_stream(stream, MAX_BYTES, start)


def detect_format(start: bytes) -> str:
    """Return the format of a token file from its first two bytes. safetensors begins with the size of the header."""
    if start[:1] == b"{":
        return "json"
    if start == b"\x93N":
        return "npy"
    return "txt" if all(byte in b"0123456789 \t\r\n" for byte in start) else "safetensors"
