"""Dataclasses that the modules of bulk work share. Imports no torch, so that the command line starts fast."""

from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import numpy as np

FORMAT = 4
"""Version of the output folder's format. Folders with another version are refused."""

OWN_COLUMNS = (
    "id", "audio_codes", "num_samples", "duration", "source_sampling_rate", "source_channels", "codebook_fingerprint",
    "warnings", "source_size", "source_mtime_ns",
)  # fmt: skip
"""Columns of the output that do not come from the source."""

Stamp = tuple[int | None, int | None]
"""Size in bytes of the file with a clip, and time of its last change in ns since 1970; both None without a file."""

NO_FILE: Stamp = (None, None)


@dataclass
class Tokens:
    """The codes of one clip, and facts about its audio."""

    audio_codes: "np.ndarray"  # (L,) uint16
    num_samples: int  # length of the clip at the model's sampling rate; the last code may cover more
    source_sampling_rate: int  # Hz
    source_channels: int
    warnings: tuple[str, ...] = ()  # a selection of audio_errors.WARNING_KINDS


@dataclass
class Failure:
    """
    The reason why a clip has no codes.

    Args:
        reason: Reason in words, for users.
        kind: One of `audio_errors.FAILURE_KINDS`.
    """

    reason: str
    kind: str = "error"


@dataclass
class Settings:
    """Settings that the rows depend on. All rows of a folder have the same settings."""

    source: str
    column: str | None
    dataset_config: str | None
    dataset_revision: str | None
    split: str | None
    model: str
    revision: str | None  # commit of a model from the Hub
    codebook_fingerprint: str
    encoder_fingerprint: str
    codebook_size: int
    hop_length: int
    sampling_rate: int
    target_peak_dB_FS: float | None  # None: clips are not scaled
    columns: dict[str, str]  # extra columns of the source: name -> type
    format: int = FORMAT
    channel: str = "mean"
    tar_names: str = "ending"


@dataclass
class Summary:
    """Counts over the clips of one or several Parquet files."""

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
    Result of a run of `tokenize`, and content of its output folder.

    Args:
        total: Counts over all clips in the folder, for all shards and runs.
        failures: Id of each clip that failed -> its failure, with `reason` and `kind`.
        done_now: Counts of this run.
        seconds: Duration of this run.
        sampling_rate: Sampling rate of the counted samples, in Hz.
        passed_over: Files of the source, and members of its tar shards, that were skipped because they hold no clip.
        silent: Ids of clips of this run's shard that have neither a row nor a failure. If there are any, this package
            has a bug.
        changed: Ids of clips of this run's shard whose file has changed its size or time since it was read. `refresh`
            encodes them again.
        without_source: Ids of clips with a row or a failure that the source does not hold any more, or whose file is
            missing.
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
