"""Helpers for tests of training: a few audio clips, and settings of a run that takes seconds."""

from pathlib import Path
from unittest import mock

import numpy as np
import soundfile
import torch
from conftest import tiny_config

from wavtokenizer_hf.training import Settings, train


TINY = {
    name: value
    for name, value in tiny_config().to_diff_dict().items()
    if name in tiny_config().__class__.__dataclass_fields__ and name not in ("model_type", "codebook_fingerprint")
}


def write_clips(folder: Path, count: int = 6, seconds: float = 0.2) -> Path:
    """Write audio files of chirps in noise, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    times = np.arange(round(seconds * 24000)) / 24000
    for index in range(count):
        chirp = 0.3 * np.sin(2 * np.pi * (150 + 90 * index + 800 * times) * times)
        soundfile.write(folder / f"clip_{index}.wav", chirp + 0.02 * random.standard_normal(len(times)), 24000)
    return folder


def tiny_settings(folder: Path, **changes) -> Settings:
    """Return settings of a tiny run on the clips in `folder / "clips"`, which are written if they are missing."""
    clips, validation = folder / "clips", folder / "validation"
    if not clips.exists():
        write_clips(clips)
    if not validation.exists():
        write_clips(validation, count=3)
    fields = {
        "output": str(folder / "run"),
        "train_data": str(clips),
        "validation_data": str(validation),
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
        "num_logged_clips": 0,
    }
    return Settings(**{**fields, **changes})


def train_by_plain_descent(folder: Path, output: Path, **changes) -> None:
    """Train with settings under which rounding hardly changes the result, to compare one process with several."""
    # not AdamW: it divides by the size of gradients, which amplifies rounding of tiny ones
    descent = mock.patch(
        "wavtokenizer_hf.training.state._adamw",
        lambda module, learning_rate: torch.optim.SGD(module.parameters(), 1e-3),
    )
    # no dropout, since its masks differ; diverse latents, so that rounding changes no code; some entries are replaced
    steady = {"dropout": 0.0, "normalize_encoder": True, "dead_code_threshold": 0.5, "max_gradient_norm": 1.0}
    with descent:
        train(tiny_settings(folder, output=str(output), **{**steady, **changes}))
