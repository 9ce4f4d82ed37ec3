"""What the tests of training share: a few clips of sound, and settings of a run that takes seconds."""

from pathlib import Path

import numpy as np
import soundfile
from conftest import tiny_config

from wavtokenizer_hf.training import Settings


TINY = {
    name: value
    for name, value in tiny_config().to_diff_dict().items()
    if name in tiny_config().__class__.__dataclass_fields__ and name != "model_type"
}


def write_clips(folder: Path, count: int = 6, seconds: float = 0.2) -> Path:
    """Sound files of chirps in noise, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    times = np.arange(round(seconds * 24000)) / 24000
    for index in range(count):
        chirp = 0.3 * np.sin(2 * np.pi * (150 + 90 * index + 800 * times) * times)
        soundfile.write(folder / f"clip_{index}.wav", chirp + 0.02 * random.standard_normal(len(times)), 24000)
    return folder


def tiny_settings(folder: Path, **changes) -> Settings:
    """A run of a tiny model on the clips in `folder / "clips"`, which it writes if they are not there."""
    clips = folder / "clips"
    if not clips.exists():
        write_clips(clips)
    fields = {
        "output": str(folder / "run"),
        "train_data": str(clips),
        "validation_data": str(clips),
        "config": TINY,
        "steps": 4,
        "mel_only_steps": 2,
        "batch_size": 2,
        "segment_seconds": 0.1,
        "num_workers": 0,
        "learning_rate": 1e-3,
        "discriminator_scale": 1 / 32,
        "kmeans_latents": 600,
        "kmeans_iterations": 10,
        "log_every": 1,
        "validate_every": 2,
        "num_validation_clips": 2,
        "num_logged_clips": 1,
    }
    return Settings(**{**fields, **changes})
