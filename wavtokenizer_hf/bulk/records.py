"""
What bulk work passes on and writes down. Imports no torch, so that the command line, card and sources stay light.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import numpy as np

FORMAT = 4
"""Version of the output folder; folders with another one are refused."""

OWN_COLUMNS = (
    "id", "audio_codes", "num_samples", "duration", "source_sampling_rate", "source_channels", "codebook_fingerprint",
    "warnings", "source_size", "source_mtime_ns",
)  # fmt: skip
"""Columns of the output that do not come from the source."""

Stamp = tuple[int | None, int | None]
"""
Size in bytes and time of the last change in ns since 1970 of the file that a clip came from; None where there is none.
"""

NO_FILE: Stamp = (None, None)


@dataclass
class Tokens:
    """The codes of one clip, and what they were made of."""

    audio_codes: "np.ndarray"  # (L,) uint16
    num_samples: int  # of the clip at the model's sampling rate; the last code may cover more
    source_sampling_rate: int  # Hz
    source_channels: int
    warnings: tuple[str, ...] = ()  # of audio_errors.WARNING_KINDS


@dataclass
class Failure:
    """Why a clip has no codes, for people and in one word of `audio_errors.FAILURE_KINDS`."""

    reason: str
    kind: str = "error"


@dataclass
class Settings:
    """What the rows depend on. A folder holds rows of one kind only."""

    source: str
    column: str | None
    dataset_config: str | None
    dataset_revision: str | None
    split: str | None
    model: str
    revision: str | None  # the commit, for a model from the Hub
    codebook_fingerprint: str
    encoder_fingerprint: str
    codebook_size: int
    hop_length: int
    sampling_rate: int
    target_peak_dB_FS: float | None  # None: clips are not scaled
    columns: dict[str, str]  # of the source: name -> type
    format: int = FORMAT
    channel: str = "mean"
    tar_names: str = "ending"


@dataclass
class Summary:
    """Counts of the clips of a Parquet file, or of several."""

    num_clips: int = 0
    num_failures: int = 0
    num_samples: int = 0
    num_codes: int = 0
    num_warned: int = 0  # clips with a row and a warning

    def __add__(self, other: "Summary") -> "Summary":
        return Summary(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Result:
    """
    What an output folder holds after a run of `tokenize`.

    Args:
        total: Counts of all clips in the folder, of all shards and runs.
        failures: Id of each clip that failed -> its failure, with `reason` and `kind`.
        done_now: Counts of this run.
        seconds: Duration of this run.
        sampling_rate: Sampling rate of the samples that are counted, in Hz.
        passed_over: Files, and members of shards, that are no clips.
        silent: Ids of clips of this run's shard that have neither a row nor a failure. If there are any, this package
            has a bug.
        changed: Ids of clips of this run's shard whose file has another size or time than when it was read. `refresh`
            encodes them again.
        without_source: Ids of clips with a row or a failure that the source does not hold any more, or whose file is
            gone.
    """

    total: Summary
    failures: dict[str, Failure]
    done_now: Summary
    seconds: float
    sampling_rate: int
    passed_over: list[str]
    silent: list[str]
    changed: list[str]
    without_source: list[str]
