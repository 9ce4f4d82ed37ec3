"""Write training files for language models: Megatron, WebDataset, JSON lines, Lhotse Shar.

A format splits the rows into chunks, writes each chunk, and merges the chunks at the end.
"""

import io
import json
import shutil
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_files import fsync
from ..extras import require
from .files import open_atomic
from .sequences import BadRow, Sequences, order_by_source
from .token_folder import Index, TokenFolder


CHUNK_ROWS = 2000  # rows that each process repeats after a crash


class Format:
    """
    Base class of the formats of `export_tokens`.

    `output` is the output folder, `parts` the name of its folder for intermediate files, and `number` the number of a
    chunk.

    Attributes:
        index_columns: Columns of the index that `plan` needs.
    """

    index_columns: tuple[str, ...] = ()

    def check(self, folder: TokenFolder) -> None:
        """Raise ValueError if the folder cannot be exported to this format, ImportError if a package is missing."""

    def describe(self) -> dict:
        """Return the settings that determine the bytes of the files, for JSON."""
        raise NotImplementedError

    def columns(self, folder: TokenFolder) -> list[str]:
        """Return the names of the columns that `write_chunk` needs."""
        return folder.column_names

    def plan(self, folder: TokenFolder, index: Index) -> list[np.ndarray]:
        """Return the positions of the rows of each chunk in the index."""
        raise NotImplementedError

    def chunk_files(self, output: Path, parts: str, number: int) -> list[Path]:
        """Return the paths of the files of a chunk."""
        raise NotImplementedError

    def write_chunk(
        self, folder: TokenFolder, rows: list[dict], output: Path, parts: str, number: int, bad: list[BadRow]
    ) -> dict[str, int]:
        """
        Write the files of a chunk, and append rows that cannot be exported to `bad`.

        Returns:
            `num_sequences` and `num_ids` of the chunk, and `num_bytes` if its files are final.
        """
        raise NotImplementedError

    def finish(self, folder: TokenFolder, output: Path, parts: str, num_chunks: int) -> int:
        """Merge the chunks into the final files. Return the size of the files that this writes, in bytes."""
        return 0


# ---------------------------------------------------------------------------------------------------------------------
# Megatron: NAME.bin and NAME.idx
# ---------------------------------------------------------------------------------------------------------------------

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_TYPE_CODES = {"uint8": 1, "int32": 4, "uint16": 8}  # megatron/core/datasets/indexed_dataset.py, 0.16.1
_MAX_UINT16_VOCABULARY = 65_499  # for larger vocabularies, Megatron's DType.optimal_dtype returns int32


@dataclass
class MegatronFormat(Format):
    """
    Write `tokens.bin` and `tokens.idx` for Megatron Core's IndexedDataset. One sequence is one document.

    `vocabulary.json` beside them records the ids of the codes, the codebook, and the settings of the sequences.

    Args:
        sequences: Settings for turning rows into sequences.
        loss_mask: Also write `loss_mask.bin` and `loss_mask.idx`, uint8: 1 for each id that carries loss as a target.
        ids_type: `uint16` or `int32`. None: the type that Megatron chooses for a vocabulary of this size.
    """

    sequences: Sequences
    loss_mask: bool = False
    ids_type: str | None = None

    def __post_init__(self) -> None:
        size = self.sequences.vocab_size
        if self.ids_type is None:
            self.ids_type = "uint16" if size <= _MAX_UINT16_VOCABULARY else "int32"
        if self.ids_type not in ("uint16", "int32"):
            raise ValueError(f"Got ids of type {self.ids_type!r}, expected uint16 or int32.")
        if size - 1 > np.iinfo(self.ids_type).max:
            raise ValueError(
                f"Got ids of type {self.ids_type}, which end at {np.iinfo(self.ids_type).max}, and the vocabulary "
                f"needs {size - 1}. Use int32."
            )

    @property
    def index_columns(self) -> tuple[str, ...]:  # type: ignore[override]  # read-only is enough
        return ("source_id", "clip_num") if self.sequences.kind == "interleaved" else ()

    def check(self, folder: TokenFolder) -> None:
        vocabulary = self.sequences.vocabulary
        if missing := sorted(set(self.sequences.columns) - set(folder.column_names)):
            raise ValueError(
                f"{folder.folder} has no column {missing[0]!r}, but {', '.join(folder.column_names)}. Choose other "
                "sequences, or name the text column."
            )
        if vocabulary.codebook_size != folder.settings["codebook_size"]:
            raise ValueError(
                f"The vocabulary is for {vocabulary.codebook_size} codes, and {folder.folder} has codes of a "
                f"codebook of {folder.settings['codebook_size']}. Use the vocabulary of that codebook."
            )
        vocabulary.check_codebook_fingerprint(folder.codebook_fingerprint)

    def describe(self) -> dict:
        return {
            "name": "megatron",
            "sequences": self.sequences.describe(),
            "loss_mask": self.loss_mask,
            "ids_type": self.ids_type,
        }

    def columns(self, folder: TokenFolder) -> list[str]:
        return [*self.sequences.columns, "num_samples"]

    def plan(self, folder: TokenFolder, index: Index) -> list[np.ndarray]:
        if self.sequences.kind != "interleaved":
            return np.array_split(np.arange(len(index)), np.arange(CHUNK_ROWS, len(index), CHUNK_ROWS))
        order = order_by_source(index)
        sources = index.columns["source_id"][order].astype(str)
        starts = np.flatnonzero(np.concatenate([[True], sources[1:] != sources[:-1]]))
        cuts, last = [], 0
        for start in starts.tolist():
            if start - last >= CHUNK_ROWS:
                cuts.append(start)
                last = start
        return np.array_split(order, cuts)

    def _dtypes(self) -> dict[str, str]:
        """Return the name of each pair of files (.bin and .idx) -> dtype of its values."""
        return {"tokens": str(self.ids_type), **({"loss_mask": "uint8"} if self.loss_mask else {})}

    def chunk_files(self, output: Path, parts: str, number: int) -> list[Path]:
        return [output / parts / f"{number:06d}.{name}" for name in (*self._dtypes(), "lengths")]

    def write_chunk(
        self, folder: TokenFolder, rows: list[dict], output: Path, parts: str, number: int, bad: list[BadRow]
    ) -> dict[str, int]:
        ids, masks, bad_rows = self.sequences.make(rows)
        bad += bad_rows
        lengths = np.array([len(sequence) for sequence in ids], np.int32)
        content = [np.concatenate(arrays or [np.zeros(0)]) for arrays in (ids, masks)]
        dtypes = list(self._dtypes().values())
        paths = self.chunk_files(output, parts, number)
        for path, values, dtype in zip(paths[:-1], content, dtypes, strict=False):
            with open_atomic(path) as file:
                file.write(values.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
        with open_atomic(paths[-1]) as file:
            file.write(lengths.astype("<i4").tobytes())
        return {"num_sequences": len(lengths), "num_ids": int(lengths.sum())}

    def finish(self, folder: TokenFolder, output: Path, parts: str, num_chunks: int) -> int:
        lengths = np.concatenate(
            [np.fromfile(self.chunk_files(output, parts, number)[-1], "<i4") for number in range(num_chunks)]
        )
        size = 0
        for position, (name, dtype) in enumerate(self._dtypes().items()):
            paths = (self.chunk_files(output, parts, number)[position] for number in range(num_chunks))
            with open_atomic(output / f"{name}.bin") as file:
                for path in paths:
                    with path.open("rb") as chunk:
                        shutil.copyfileobj(chunk, file, 2**20)
                size += file.tell()
            with open_atomic(output / f"{name}.idx") as file:
                _write_index(file, lengths, dtype)
                size += file.tell()
        content = {**self.sequences.describe(), "codebook_fingerprint": folder.codebook_fingerprint}
        with open_atomic(output / "vocabulary.json", "w") as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return size


def _write_index(file: Any, lengths: np.ndarray, dtype: str) -> None:
    """
    Write an .idx file: header, sequence lengths (int32), sequence offsets in bytes (int64), and document boundaries
    (int64), which are the index of the first sequence of each document and the number of sequences.
    """
    file.write(_MAGIC + struct.pack("<QB", _VERSION, _TYPE_CODES[dtype]))
    file.write(struct.pack("<QQ", len(lengths), len(lengths) + 1))
    file.write(lengths.astype("<i4").tobytes())
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    file.write(np.concatenate([[0], ends[:-1]]).astype("<i8").tobytes())
    file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


# ---------------------------------------------------------------------------------------------------------------------
# Sharded formats: each chunk is a shard
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ShardedFormat(Format):
    """
    Base class of formats with shards of about equal size, with the clips in their order.

    Args:
        shard_size: Approximate size of a shard, in bytes.
    """

    shard_size: int = 256 * 2**20

    name = ""
    bytes_per_row, bytes_per_code = 0.0, 0.0  # estimates, which `plan` sizes the shards by
    index_columns = ("num_samples",)

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"Got shard_size={self.shard_size}, expected at least 1.")

    def describe(self) -> dict:
        return {"name": self.name, "shard_size": self.shard_size}

    def plan(self, folder: TokenFolder, index: Index) -> list[np.ndarray]:
        num_codes = -(-index.columns["num_samples"] // folder.hop_length)
        sizes = np.cumsum(self.bytes_per_row + self.bytes_per_code * num_codes)
        shards = ((sizes - sizes[0]) // self.shard_size).astype(np.int64)
        return np.split(np.arange(len(index)), np.flatnonzero(np.diff(shards)) + 1)

    def write_chunk(
        self, folder: TokenFolder, rows: list[dict], output: Path, parts: str, number: int, bad: list[BadRow]
    ) -> dict[str, int]:
        self._write(folder, rows, output, number)
        size = sum(path.stat().st_size for path in self.chunk_files(output, parts, number))
        return {
            "num_sequences": len(rows),
            "num_ids": sum(len(row["audio_codes"]) for row in rows),
            "num_bytes": size,
        }

    def _write(self, folder: TokenFolder, rows: list[dict], output: Path, number: int) -> None:
        raise NotImplementedError


def _metadata(row: dict, folder: TokenFolder) -> dict:
    """Return the other columns of a row, and the hop length and sampling rate of its codes."""
    values = {name: value for name, value in row.items() if name != "audio_codes"}
    return {**values, "hop_length": folder.hop_length, "sampling_rate": folder.sampling_rate}


@dataclass
class WebDatasetFormat(ShardedFormat):
    """
    Write `tokens-000000.tar` and so on, with `codes.npy` (uint16) and `json` for each clip.

    The key of a clip is a running number. Its `id` is in the JSON.
    """

    name = "webdataset"
    bytes_per_row, bytes_per_code = 512 * 3 + 400.0, 2.0

    def chunk_files(self, output: Path, parts: str, number: int) -> list[Path]:
        return [output / f"tokens-{number:06d}.tar"]

    def _write(self, folder: TokenFolder, rows: list[dict], output: Path, number: int) -> None:
        (path,) = self.chunk_files(output, "", number)
        with open_atomic(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for position, row in enumerate(rows):
                key, codes = f"{number:06d}-{position:07d}", io.BytesIO()
                np.save(codes, row["audio_codes"].astype("<u2"))
                metadata = json.dumps(_metadata(row, folder), ensure_ascii=False, default=_to_json).encode()
                for extension, content in (("codes.npy", codes.getvalue()), ("json", metadata)):
                    member = tarfile.TarInfo(f"{key}.{extension}")  # no times or owners, so the bytes are reproducible
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


@dataclass
class JsonlFormat(ShardedFormat):
    """Write `tokens-000000.jsonl` and so on, with one clip per line and `audio_codes` as a list."""

    name = "jsonl"
    bytes_per_row, bytes_per_code = 300.0, 5.5

    def chunk_files(self, output: Path, parts: str, number: int) -> list[Path]:
        return [output / f"tokens-{number:06d}.jsonl"]

    def _write(self, folder: TokenFolder, rows: list[dict], output: Path, number: int) -> None:
        (path,) = self.chunk_files(output, "", number)
        with open_atomic(path, "w") as file:
            for row in rows:
                line = {**_metadata(row, folder), "audio_codes": row["audio_codes"].tolist()}
                file.write(json.dumps(line, ensure_ascii=False, default=_to_json) + "\n")


def _to_json(value: Any) -> Any:
    """Convert a value that JSON does not support: bytes to text, dates and times to ISO format."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise ValueError(f"A column holds {type(value).__name__}, which JSON does not support. Drop the column.")


@dataclass
class LhotseFormat(ShardedFormat):
    """
    Write Lhotse Shar: a CutSet in `shar/cuts.000000.jsonl.gz`, and its uint16 arrays in `shar/audio_codes.000000.tar`.

    The columns `text` and `speaker` become the supervision of a cut. All other columns become its custom fields.
    """

    name = "lhotse"
    bytes_per_row, bytes_per_code = 512 * 5 + 300.0, 2.0

    def check(self, folder: TokenFolder) -> None:
        require("lhotse", "lhotse")

    def chunk_files(self, output: Path, parts: str, number: int) -> list[Path]:
        shar = output / "shar"  # a separate folder, since lhotse reads every file in it as a field of the cuts
        return [shar / f"cuts.{number:06d}.jsonl.gz", shar / f"audio_codes.{number:06d}.tar"]

    def _write(self, folder: TokenFolder, rows: list[dict], output: Path, number: int) -> None:
        lhotse, shar = require("lhotse", "lhotse"), require("lhotse.shar", "lhotse")
        frame_shift = folder.hop_length / folder.sampling_rate
        partial = output / f".shard-{number:06d}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with shar.SharWriter(str(partial), fields={"audio_codes": "numpy"}, shard_size=None) as writer:
            for row in rows:
                text, speaker, duration = row.get("text"), row.get("speaker"), row["duration"]
                supervisions = [] if text is None and speaker is None else [
                    lhotse.SupervisionSegment(
                        id=row["id"], recording_id=row["id"], start=0, duration=duration, text=text, speaker=speaker
                    )
                ]  # fmt: skip
                custom = {
                    name: value
                    for name, value in _metadata(row, folder).items()
                    if name not in ("id", "duration", "text", "speaker")
                }
                custom = json.loads(json.dumps(custom, default=_to_json))
                cut = lhotse.MonoCut(row["id"], 0, duration, 0, supervisions=supervisions, custom=custom)
                writer.write(
                    cut.attach_tensor("audio_codes", row["audio_codes"], frame_shift=frame_shift, temporal_dim=0)
                )
        for path in self.chunk_files(output, "", number):
            path.parent.mkdir(exist_ok=True)
            fsync(partial / path.name.replace(f".{number:06d}", ""))
            (partial / path.name.replace(f".{number:06d}", "")).replace(path)
        shutil.rmtree(partial)
