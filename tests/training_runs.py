"""What the tests of the training loop share: audio, a state whose codebook has begun, a finished run."""

import pytest
import torch
from tiny_training import tiny_settings

import wavtokenizer_hf.training.loop as loop
from wavtokenizer_hf.training import Settings, train
from wavtokenizer_hf.training.state import build


@pytest.fixture(autouse=True)
def without_rehearsal(request, monkeypatch):
    """
    Only tests of memory, and those of other processes, make the small steps that estimate it: they take as long as a
    tiny run.
    """
    if "memory" not in request.node.name:
        monkeypatch.setattr(loop, "check_memory", lambda state, length: None)


@pytest.fixture
def sound() -> torch.Tensor:
    torch.manual_seed(0)
    return 0.3 * torch.randn(2, 1, 2400)


def started(settings: Settings):
    """A state whose codebook has begun, as after k-means."""
    state = build(settings)
    torch.manual_seed(0)
    with torch.no_grad():
        latents = state.model.encoder_model.encoder(0.3 * torch.randn(4, 1, 2400))
    state.learner.start([latents.transpose(1, 2).flatten(0, 1)], 10, 300)
    return state


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, three of them with discriminators, and the folder that it left behind."""
    folder = tmp_path_factory.mktemp("finished")
    return train(tiny_settings(folder, mel_only_steps=1, num_logged_clips=1)), folder
