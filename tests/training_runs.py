"""Shared fixtures for tests of the training loop: audio, a state with an initialised codebook, a finished run."""

import pytest
import torch
from tiny_training import tiny_settings

import wavtokenizer_hf.training.loop as loop
from wavtokenizer_hf.training import Settings, train
from wavtokenizer_hf.training.state import build


@pytest.fixture(autouse=True)
def without_rehearsal(request, monkeypatch):
    """
    Skip the memory estimate except in tests of memory: its trial steps take as long as a tiny run. Other processes
    still make it.
    """
    if "memory" not in request.node.name:
        monkeypatch.setattr(loop, "check_memory", lambda state, length: None)


@pytest.fixture
def clips() -> torch.Tensor:
    torch.manual_seed(0)
    return 0.3 * torch.randn(2, 1, 2400)


def started(settings: Settings):
    """Return a state whose codebook is initialised, as after k-means."""
    state = build(settings)
    torch.manual_seed(0)
    with torch.no_grad():
        latents = state.model.encoder_model.encoder(0.3 * torch.randn(4, 1, 2400))
    state.learner.start([latents.transpose(1, 2).flatten(0, 1)], 10, 300)
    return state


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a run of four steps, three of them with discriminators, and its output folder."""
    folder = tmp_path_factory.mktemp("finished")
    return train(tiny_settings(folder, mel_only_steps=1, num_logged_clips=1)), folder
