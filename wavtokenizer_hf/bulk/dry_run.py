"""What a run of `tokenize` would make, from a sample of its clips."""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from . import encoding
from .options import TokenizeOptions
from .records import Failure
from .sources import open_source
from .work import num_cores


SAMPLE_SIZE = 50  # clips
BYTES_PER_CODE = 1.55  # random codes of 4096 entries as uint16 in zstd Parquet, measured; real ones take less


def estimate(
    source: str | os.PathLike | Any,
    model: str,
    options: TokenizeOptions | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """
    Encode up to 50 clips, evenly spread over the source, and scale up. The number of clips is exact, all else is an
    estimate.

    Args:
        source, model, options: As for `tokenize`. `num_processes`, `shard` and what concerns the output folder have no
            effect.
        on_progress: Called with the number of clips of the sample that are done, and of all.

    Returns:
        `clips`, `hours` of audio, `tokens`, `mib` of Parquet, `hours_of_one_process`, and of the sample
        `clips_sampled` and `clips_failed`.

    Raises:
        ValueError: no clips, a model that cannot be loaded, or no clip of the sample can be read.
    """
    options = options or TokenizeOptions()
    clips = open_source(
        source, options.column, options.dataset_config, options.split, options.dataset_revision, options.tar_names
    )
    encoder, feature_extractor = encoding.load_encoder(model, options.revision, options.device, options.peak_dbfs)
    numbers = np.unique(np.linspace(0, len(clips.items) - 1, SAMPLE_SIZE).round().astype(int))
    read = [partial(clips.read, clips.items[number].locator) for number in numbers]
    started = time.monotonic()
    windows = encoding.tokenize_clips(
        encoder, feature_extractor, read, options.batch_seconds, num_cores(), options.channel, options.max_clip_seconds
    )
    results = []
    on_progress(0, len(read))
    for window in windows:
        results += window
        on_progress(len(results), len(read))
    seconds = time.monotonic() - started
    good = [result for result in results if not isinstance(result, Failure)]
    failures = [result for result in results if isinstance(result, Failure)]
    if not good:
        raise ValueError(f"No clip of a sample of {len(results)} can be read; the first: {failures[0].reason}")
    scale = len(clips.items) / len(results)
    num_codes = sum(len(result.audio_codes) for result in good) * scale
    return {
        "clips": len(clips.items),
        "hours": sum(result.num_samples for result in good) * scale / encoder.config.sampling_rate / 3600,
        "tokens": round(num_codes),
        "mib": num_codes * BYTES_PER_CODE / 2**20,
        "hours_of_one_process": seconds * scale / 3600,
        "clips_sampled": len(results),
        "clips_failed": len(results) - len(good),
    }
