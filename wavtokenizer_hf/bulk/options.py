"""Options of `tokenize`. Imports no torch, so that the command line can check its arguments first."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from ..audio_errors import MAX_CLIP_SECONDS, check_channel, check_peak


ENGINES = ("processes", "ray")
ON_ERROR = ("record", "fail")
TAR_NAMES = ("ending", "webdataset")


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """
    Options of `tokenize`.

    Args:
        revision: Branch, tag or commit of the model on the Hub.
        column: Column of the audio, or of the paths in a list. Defaults to `audio`, and in lists also `path` or
            `file_name`.
        dataset_config: Configuration of a dataset on the Hub.
        dataset_revision: Branch, tag or commit of a dataset on the Hub.
        split: Split of a dataset. Defaults to `train`.
        tar_names: Where names in tar shards are split: `"ending"` splits before the known extension of an audio file,
            `"webdataset"` at the first dot.
        channel: Channel of clips that have several: `"mean"`, `"left"`, `"right"` or a number from 0.
        max_clip_seconds: A longer clip fails, before it is read if its header gives its length.
        peak_dbfs: Peak level that each clip is scaled to, in dBFS, at most 0. `"none"`: no scaling. Defaults to the
            level in the model's preprocessor_config.json.
        batch_seconds: Seconds of audio per batch, padding included. Memory grows with it.
        device: Device of the models. Defaults to one GPU per process, or the CPU.
        engine: `"processes"` on this machine, or `"ray"`.
        ray_address: Address of a Ray cluster. All its machines must see source, model and output under the same paths.
            By default Ray starts on this machine.
        num_processes: Number of worker processes, each with a model. Default: one per GPU; on a CPU, one per two
            cores; 2 with Ray. Workers are spawned, so a script with several needs `if __name__ == "__main__":`.
        num_readers: Threads per process that read, decode and resample ahead of the model. Defaults to its share of
            the cores.
        part_size: Clips per Parquet file. A crash costs at most one file per process. Default: 2000, or fewer if there
            would be less than four files per process.
        shard: `(i, n)`: encode only the clips of shard i of n, from 0. All shards may write to one folder at once.
        on_error: `"record"` lists a clip that fails and continues, `"fail"` stops at the first one.
        retry_failed: Try clips again that failed in an earlier run.
        refresh: Encode clips again whose file has changed its size or time since it was read.
        push_to_hub: Name of the dataset on the Hub to upload the folder to at the end.
        license: Licence for the dataset card, by the Hub's name. Defaults to the licence in the source's card.
        language: Language codes for the dataset card, such as `("en", "de")`. Defaults to those in the source's card.

    Raises:
        ValueError: An option has a value that is not described above.
    """

    revision: str | None = None
    column: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    split: str | None = None
    tar_names: str = "ending"
    channel: str | int = "mean"
    max_clip_seconds: float = MAX_CLIP_SECONDS
    peak_dbfs: float | str = "model"
    batch_seconds: float = 120
    device: str | None = None
    engine: Literal["processes", "ray"] = "processes"
    ray_address: str | None = None
    num_processes: int | None = None
    num_readers: int | None = None
    part_size: int | None = None
    shard: tuple[int, int] = (0, 1)
    on_error: Literal["record", "fail"] = "record"
    retry_failed: bool = False
    refresh: bool = False
    push_to_hub: str | None = None
    license: str | None = None
    language: tuple[str, ...] | list[str] | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"Got the engine {self.engine!r}, expected one of {', '.join(ENGINES)}.")
        if self.ray_address is not None and self.engine != "ray":
            raise ValueError(
                f"Got the Ray address {self.ray_address!r} for the engine {self.engine!r}, expected the engine 'ray'."
            )
        check_on_error(self.on_error)
        check_tar_names(self.tar_names)
        check_channel(self.channel)
        check_peak(self.peak_dbfs)
        for name in ("num_processes", "num_readers", "part_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Got {name}={value}, expected at least 1.")
        for name, value in (("license", self.license), *(("language", code) for code in self.language or ())):
            if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", value):
                raise ValueError(
                    f"Got {name}={value!r}, expected a name that the Hub knows, such as 'cc-by-4.0' or 'en'."
                )
        check_seconds("batch_seconds", self.batch_seconds)
        check_seconds("max_clip_seconds", self.max_clip_seconds)
        index, number = self.shard
        if not 0 <= index < number:
            raise ValueError(f"Got the shard {index}/{number}, expected i/n with i from 0 to n - 1.")

    def card_metadata(self) -> dict[str, str | list[str]]:
        """Return the metadata of the dataset card that these options set."""
        metadata = {"license": self.license, "language": list(self.language or ())}
        return {name: value for name, value in metadata.items() if value}


def check_on_error(on_error: str) -> None:
    if on_error not in ON_ERROR:
        raise ValueError(f"Got on_error={on_error!r}, expected 'record' or 'fail'.")


def check_tar_names(tar_names: str) -> None:
    if tar_names not in TAR_NAMES:
        raise ValueError(f"Got tar_names={tar_names!r}, expected one of {', '.join(TAR_NAMES)}.")


def check_seconds(name: str, seconds: float) -> None:
    """Raise ValueError unless a duration is finite and above 0."""
    if not 0 < seconds < math.inf:
        raise ValueError(f"Got {name}={seconds}, expected more than 0.")
