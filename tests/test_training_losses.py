"""Discriminators and losses against values of the reference implementation, with weights by formula."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FIXTURES, REFERENCE

from wavtokenizer_hf.training.discriminators import Discriminators
from wavtokenizer_hf.training.losses import (
    MEL_SCALES,
    InstantaneousFrequencyLoss,
    MelLoss,
    MelScalesLoss,
    adversarial_losses,
    discriminator_losses,
    used_discriminators,
    weighted_sum,
)
from wavtokenizer_hf.training.settings import WEIGHTS


pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4  # relative: sums of float32 products in another order than the reference implementation
EXPECTED = json.loads((REFERENCE / "training_losses.json").read_text())


def signals() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the real and the generated audio (2, 12000) of the golden data."""
    import formula

    speechlike, chirp, noise, clipped = (
        torch.from_numpy(formula.waveform(kind, 0.5)) for kind in ("speechlike", "chirp", "noise", "clipped")
    )
    return torch.stack([speechlike, chirp]), torch.stack([noise, 0.4 * clipped])


@pytest.fixture(scope="module")
def judged():
    """
    Return the outputs of the full-size discriminators, loaded by reference names, for the audio of the golden data.
    """
    import formula

    manifest = json.loads((REFERENCE / "manifest_discriminators.json").read_text())
    with torch.device("meta"):  # no random weights, since all are given
        discriminators = Discriminators()
    discriminators.load_state_dict(
        {name: torch.from_numpy(formula.fill(name, shape)) for name, shape in manifest.items()}, assign=True
    )
    with torch.no_grad():
        return tuple(discriminators(audio, bandwidth_id=0) for audio in signals())


def test_discriminator_losses_equal_the_reference_implementation(judged):
    for name, loss in discriminator_losses(*judged).items():
        assert loss.item() == pytest.approx(EXPECTED[f"{name}/discriminator_loss"], rel=TOLERANCE)


def test_adversarial_and_feature_losses_equal_the_reference_implementation(judged):
    losses = adversarial_losses(*judged)
    for name in ("multi_period", "multi_resolution", "dac"):
        assert losses[name].item() == pytest.approx(EXPECTED[f"{name}/generator_loss"], rel=TOLERANCE)
        features = losses[f"{name}_features"].item()
        assert features == pytest.approx(EXPECTED[f"{name}/feature_matching_loss"], rel=TOLERANCE)


def test_scores_and_feature_maps_equal_the_reference_implementation(judged):
    for name in ("multi_period", "multi_resolution"):
        judgements = judged[0][name]
        assert [list(judgement.scores.shape) for judgement in judgements] == EXPECTED[f"{name}/score_shapes"]
        assert [len(judgement.features) for judgement in judgements] == EXPECTED[f"{name}/feature_map_counts"]
        means = [judgement.scores.mean().item() for judgement in judgements]
        # means of scores of both signs: an absolute bound, at the size of single scores
        assert means == pytest.approx(EXPECTED[f"{name}/real_score_means"], abs=1e-4)


# Half of the golden batch is a pure chirp, whose upper bands hold only rounding errors of the FFT. Their logarithm
# differs by 6e-4 between the instruction sets that MKL selects by processor. With the instruction set of the golden
# value, the loss is equal within 2e-7, as the slow test shows.


def test_mel_loss_equals_the_reference_up_to_fft_rounding():
    real, fake = signals()
    assert MelLoss()(fake, real).item() == pytest.approx(EXPECTED["mel_loss"], rel=2e-3)


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL's FFT")
def test_mel_loss_equals_the_reference_with_its_fft():
    # MKL reads Intel's variable when it is loaded, so this needs a separate process
    code = (
        "import test_training_losses as t; from wavtokenizer_hf.training.losses import MelLoss;"
        "real, fake = t.signals(); print(MelLoss()(fake, real).item())"
    )
    paths = [os.path.dirname(__file__), str(FIXTURES), str(REFERENCE), os.path.dirname(os.path.dirname(__file__))]
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(result.stdout) == pytest.approx(EXPECTED["mel_loss"], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("n_fft", "hop_length", "num_mels"), [(1024, 256, 100), (256, 64, 20), (512, 128, 40), (2048, 512, 160)]
)
def test_mel_magnitudes_equal_a_float64_hand_calculation(n_fft, hop_length, num_mels):
    real, _ = signals()
    signal = real[0].double().numpy()
    padded = np.pad(signal, n_fft // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    frames = np.stack([padded[start : start + n_fft] * window for start in range(0, len(signal) + 1, hop_length)])
    magnitudes = np.abs(np.fft.rfft(frames))  # (frames, n_fft / 2 + 1)
    edges = 700 * (
        10 ** (np.linspace(0, 2595 * np.log10(1 + 12000 / 700), num_mels + 2) / 2595) - 1
    )  # HTK's mel scale
    bins = np.arange(n_fft // 2 + 1) * 24000 / n_fft
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    expected = np.log(np.maximum(np.maximum(0, np.minimum(rising, falling)) @ magnitudes.T, 1e-7))
    got = MelLoss(24000, n_fft, hop_length, num_mels).log_mel(real[:1])[0].numpy()
    np.testing.assert_allclose(got, expected, atol=1e-3)  # logarithms of float32 sums


def test_the_multi_scale_loss_is_the_mean_of_mel_losses_without_empty_bands():
    real, fake = signals()
    loss = MelScalesLoss()
    sizes = [(scale.log_mel.n_fft, scale.log_mel.hop_length, len(scale.log_mel.filters)) for scale in loss.scales]
    assert sizes == [(256, 64, 20), (512, 128, 40), (2048, 512, 160)] and 1024 not in MEL_SCALES
    assert all((scale.log_mel.filters > 0).any(dim=1).all() for scale in loss.scales)
    each = [MelLoss(24000, *size)(fake, real) for size in sizes]
    assert loss(fake, real).item() == pytest.approx(sum(each).item() / 3, rel=1e-6)


def test_each_discriminator_except_dac_uses_the_bandwidth_id():
    torch.manual_seed(0)
    discriminators = Discriminators(scale=1 / 16)
    with torch.no_grad():
        for module in discriminators.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.normal_()
        audio = torch.randn(1, 2400)
        first, second = discriminators(audio, 0), discriminators(audio, 3)
    for name, hears in (("multi_period", True), ("multi_resolution", True), ("dac", False)):
        for one, other in zip(first[name], second[name], strict=True):
            assert torch.equal(one.scores, other.scores) is not hears


def test_dac_discriminator_ignores_level_and_offset():
    torch.manual_seed(0)
    discriminators, audio = Discriminators(scale=1 / 16, names=("dac",)), torch.randn(1, 2400)
    with torch.no_grad():
        plain, changed = (discriminators(each, 0)["dac"] for each in (audio, 0.1 * audio + 0.3))
    for one, other in zip(plain, changed, strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-3, atol=1e-4)  # float32 offsets cancel, nearly


def test_total_weighs_each_loss_by_its_name():
    ones = {name: torch.ones(()) for name in WEIGHTS}
    assert weighted_sum(ones, WEIGHTS).item() == 45 + 1000 + 6
    with pytest.raises(KeyError):  # a loss without a weight is not dropped silently
        weighted_sum({"unheard_of": torch.ones(())}, WEIGHTS)


def test_a_discriminator_without_weight_is_not_created():
    weights = {**WEIGHTS, "dac": 0, "dac_features": 0, "multi_period": 0}
    names = used_discriminators(weights)
    assert names == ("multi_period", "multi_resolution")
    assert not hasattr(Discriminators(scale=1 / 16, names=names), "dac")


def test_the_frequency_loss_sees_pitch_better_than_mel_losses_and_ignores_absolute_phase():
    time = torch.arange(4 * 24000) / 24000  # a long signal, since the ends are mirrored

    def sine(hertz, level=0.3, phase=0.0):
        return level * torch.sin(2 * torch.pi * (hertz * time + phase))[None]

    loss, low = InstantaneousFrequencyLoss(), sine(220)
    assert loss(low, low).item() == pytest.approx(0, abs=1e-3)  # up to a constant that keeps gradients finite
    assert loss(sine(220, phase=0.25), low).item() < 0.1
    assert loss(-low, low).item() < 1e-3
    # 10 Hz apart the phase moves by 0.335 rad more in a hop of 128 samples, and by 0.670 in one of 256.
    # Magnitudes differ too.
    expected = (2 * math.sin(0.335 / 2) + 2 * math.sin(0.670 / 2)) / 2
    assert expected < loss(sine(230), low).item() < 1.5 * expected
    assert loss(low + sine(5000, level=0.1), low).item() < 0.1
    silence = torch.zeros(1, 4 * 24000, requires_grad=True)
    loss(silence, low).backward()
    assert silence.grad.isfinite().all()
