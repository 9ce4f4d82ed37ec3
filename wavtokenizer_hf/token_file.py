"""Token files: the codes of one clip, with what is needed to decode them to exactly the right sound and length."""

import json
import os
import struct
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as deserialize
from safetensors.numpy import save as serialize

from .atomic_files import write_bytes


@dataclass
class TokenFile:
    """The codes of one clip and where they come from.

    Args:
        audio_codes: integers of shape (L,), each in [0, 65536); kept as uint16.
        model: name or folder of the model that made them, as it was given.
        codebook_fingerprint: of that model's codebook.
        sampling_rate: Hz of the audio.
        hop_length: samples per code.
        num_samples: samples of the clip; the last code may cover more than there were.
    """

    audio_codes: np.ndarray
    model: str
    codebook_fingerprint: str
    sampling_rate: int
    hop_length: int
    num_samples: int

    def __post_init__(self):
        codes = np.asarray(self.audio_codes)
        if codes.ndim != 1 or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(
                f"Got codes of shape {codes.shape} and dtype {codes.dtype}, expected integers of shape (L,)."
            )
        if codes.min() < 0 or codes.max() > np.iinfo(np.uint16).max:
            raise ValueError(
                f"Got codes from {codes.min()} to {codes.max()}, expected 0 to {np.iinfo(np.uint16).max}."
            )
        if self.hop_length < 1 or self.sampling_rate < 1:
            raise ValueError(
                f"Got hop_length={self.hop_length} and sampling_rate={self.sampling_rate}, expected at least 1 each."
            )
        if -(-self.num_samples // self.hop_length) != codes.size:
            raise ValueError(
                f"Got {codes.size} codes for {self.num_samples} samples at {self.hop_length} samples per code, "
                f"expected {-(-self.num_samples // self.hop_length)}."
            )
        self.audio_codes = codes.astype(np.uint16)

    def save(self, path: str | os.PathLike, format: str | None = None) -> Path:
        """Writes the file under a temporary name first; `format` is by default what the ending of `path` says.

        `safetensors` (`audio_codes` uint16 (L,), the rest as metadata) and `json` keep everything; `npy` and `txt`
        (one number a line) keep the codes alone. Raises ValueError for another format.
        """
        path = Path(path)
        return write_bytes(path, self.to_bytes(format or path.suffix[1:]))

    def to_bytes(self, format: str) -> bytes:
        """The content of a file of that format: `safetensors`, `json`, `npy` or `txt`."""
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
        raise ValueError(f"Got the token format {format!r}, expected one of {', '.join(FORMATS)}.")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TokenFile":
        """Reads a `.safetensors` or `.json` token file. Raises ValueError for anything else."""
        path = Path(path)
        try:
            return cls.from_bytes(path.read_bytes(), "json" if path.suffix == ".json" else "safetensors")
        except ValueError as error:
            raise ValueError(f"{path} is not a token file of wavtokenizer_hf: {error}") from error

    @classmethod
    def from_bytes(cls, content: bytes, format: str) -> "TokenFile":
        """The content of a token file, `safetensors` or `json`. Raises ValueError for anything else."""
        try:
            if format == "json":
                fields = json.loads(content)
                codes = np.asarray(fields["audio_codes"])
            else:
                codes = deserialize(content)["audio_codes"]
                (header_size,) = struct.unpack("<Q", content[:8])  # safetensors reads metadata from a path only
                fields = json.loads(content[8 : 8 + header_size]).get("__metadata__", {})
            return cls(
                audio_codes=codes,
                model=fields["model"],
                codebook_fingerprint=fields["codebook_fingerprint"],
                sampling_rate=int(fields["sampling_rate"]),
                hop_length=int(fields["hop_length"]),
                num_samples=int(fields["num_samples"]),
            )
        except KeyError as error:
            raise ValueError(f"it lacks {error}") from error
        except (SafetensorError, TypeError, ValueError) as error:
            raise ValueError(str(error)) from error

    def _metadata(self) -> dict:
        fields = asdict(self)
        del fields["audio_codes"]
        return fields


FORMATS = ("safetensors", "json", "npy", "txt")


def load_bare_codes(path: str | os.PathLike) -> np.ndarray:
    """Reads the codes of a `.npy` or `.txt` file, which say nothing of the model that made them: integers (L,).

    Raises ValueError if the file holds anything else.
    """
    path = Path(path)
    try:
        return bare_codes_from_bytes(path.read_bytes(), path.suffix[1:])
    except ValueError as error:
        raise ValueError(f"{path} does not hold codes: {error}") from error


def bare_codes_from_bytes(content: bytes, format: str) -> np.ndarray:
    """The content of a `npy` or `txt` file -> integers (L,). Raises ValueError if it holds anything else."""
    try:
        codes = np.load(BytesIO(content), allow_pickle=False) if format == "npy" else np.array(content.split(), int)
    except EOFError as error:
        raise ValueError(f"{error}. Expected integers.") from error
    if codes.ndim != 1 or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"it is an array of shape {codes.shape}, dtype {codes.dtype}; expected integers (L,).")
    return codes


def format_of(start: bytes) -> str:
    """Which of the formats begins with these two bytes. A safetensors file begins with the length of its header."""
    if start[:1] == b"{":
        return "json"
    if start == b"\x93N":
        return "npy"
    return "txt" if all(byte in b"0123456789 \t\r\n" for byte in start) else "safetensors"
