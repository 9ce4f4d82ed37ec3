"""
Tests that test_fast_cpu.py runs in one process per instruction set. pytest does not collect this file by its name.
"""

import os

import numpy as np
import pytest
import torch
from conftest import REFERENCE
from test_transformers_common import WavTokenizerEncoderModelTest, WavTokenizerModelTest

from wavtokenizer_hf import WavTokenizerModel


__all__ = ["WavTokenizerEncoderModelTest", "WavTokenizerModelTest"]  # their fp16 and bf16 tests run here too


@pytest.fixture(scope="module")
def model():
    return WavTokenizerModel.from_pretrained(os.environ["WAVTOKENIZER_TEST_FOLDER"]).eval()


@pytest.mark.parametrize("name", ["noise_0.5", "chirp_1.37"])
@torch.no_grad()
def test_golden_codes(model, name):
    import formula

    data = np.load(REFERENCE / f"{name}_75.npz")
    kind, seconds = name.split("_")
    audio = torch.from_numpy(formula.waveform(kind, float(seconds)))[None, None]
    codes = model.encode(audio).audio_codes[0].numpy()
    clear = data["margin"] >= 1e-6
    assert len(np.unique(codes)) > 10
    np.testing.assert_array_equal(codes[:, clear], data["codes"][:, clear])
    decoded = model.decode(torch.from_numpy(data["codes"])[None]).audio_values[0, 0].numpy()
    np.testing.assert_allclose(decoded, data["audio"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_rows_of_a_batch_get_what_they_get_alone(model):
    torch.manual_seed(0)
    lengths = (20000, 13001, 14500, 400)
    audio, mask = 0.1 * torch.randn(4, 1, 20000), torch.zeros(4, 20000)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    encoded = model.encode(audio, mask)
    for row, length in enumerate(lengths):
        alone = model.encode(audio[row : row + 1, :, :length]).audio_codes
        assert torch.equal(encoded.audio_codes[row, :, : alone.shape[-1]], alone[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_every_dtype_decodes_and_gives_the_codes_of_float32(tiny_model, dtype):
    audio = torch.randn(1, 1, 640)
    expected = tiny_model(audio)
    output = tiny_model.to(dtype)(audio)
    assert torch.equal(output.audio_codes, expected.audio_codes)
    noise = (output.audio_values - expected.audio_values).square().mean() / expected.audio_values.square().mean()
    assert 10 * torch.log10(1 / noise) > 20
