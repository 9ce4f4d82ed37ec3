"""Estimate the output and duration of a run of `tokenize` from a sample of its clips."""

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
BYTES_PER_CODE = 1.55  # measured for random codes below 4096 as uint16 in zstd Parquet; real codes take less


def estimate(
    source: str | os.PathLike | Any,
    model: str,
    options: TokenizeOptions | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """
    Encode up to 50 clips, evenly spread over the source, and scale up.

    The number of clips is exact. All other values are estimates.

    Args:
        source, model, options: As for `tokenize`. `num_processes`, `shard` and the options of the output folder have
            no effect.
        on_progress: Called with the number of encoded clips and the number of all clips of the sample.

    Returns:
        Values for the whole source: `clips`, `hours` of audio, `tokens`, `mib` of Parquet and `hours_of_one_process`.
        Values for the sample: `clips_sampled` and `clips_failed`.

    Raises:
        ValueError: The source has no clips, the model cannot be loaded, or no clip of the sample can be read.
    """
    options = options or TokenizeOptions()
    clips = open_source(
        source, options.column, options.dataset_config, options.split, options.dataset_revision, options.tar_names
    )
    encoder, feature_extractor = encoding.load_encoder(model, options.revision, options.device, options.peak_dbfs)
    indices = np.unique(np.linspace(0, len(clips.items) - 1, SAMPLE_SIZE).round().astype(int))
    readers = [partial(clips.read, clips.items[index].locator) for index in indices]
    started = time.monotonic()
    windows = encoding.tokenize_clips(
        encoder,
        feature_extractor,
        readers,
        options.batch_seconds,
        num_cores(),
        options.channel,
        options.max_clip_seconds,
    )
    results = []
    on_progress(0, len(readers))
    for window in windows:
        results += window
        on_progress(len(results), len(readers))
    seconds = time.monotonic() - started
    tokens = [result for result in results if not isinstance(result, Failure)]
    failures = [result for result in results if isinstance(result, Failure)]
    if not tokens:
        raise ValueError(
            f"No clip of a sample of {len(results)} can be read. The first one failed: {failures[0].reason}"
        )
    scale = len(clips.items) / len(results)
    num_codes = sum(len(clip.audio_codes) for clip in tokens) * scale
    return {
        "clips": len(clips.items),
        "hours": sum(clip.num_samples for clip in tokens) * scale / encoder.config.sampling_rate / 3600,
        "tokens": round(num_codes),
        "mib": num_codes * BYTES_PER_CODE / 2**20,
        "hours_of_one_process": seconds * scale / 3600,
        "clips_sampled": len(results),
        "clips_failed": len(failures),
    }
