"""The fast CPU path steps aside wherever it does not apply, and the plain layers give the same result without it."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from conftest import REFERENCE, tiny_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wavtokenizer_hf import WavTokenizerEncoderModel, WavTokenizerModel
from wavtokenizer_hf import modeling_wavtokenizer_cpu as cpu
from wavtokenizer_hf.long_audio import DecodeStream, EncodeStream
from wavtokenizer_hf.modeling_wavtokenizer_encoder import WavTokenizerConv1d


@pytest.fixture(autouse=True)
def no_gradients(one_thread):
    with torch.no_grad():
        yield


@pytest.fixture
def fresh_trials():
    """Let the operators be tried again within the test, and after it."""
    cpu._works.cache_clear()
    yield
    cpu._works.cache_clear()


def golden(rate: int, name: str):
    import formula

    data = np.load(REFERENCE / f"{name}_{rate}.npz")
    kind, seconds = name.split("_")
    return torch.from_numpy(formula.waveform(kind, float(seconds)))[None, None], data


def ragged(seed: int = 0):
    """Return a batch (4, 1, 700) of noise with a mask; the rows have 700, 333, 16 and 1 samples."""
    torch.manual_seed(seed)
    audio, mask = torch.randn(4, 1, 700), torch.zeros(4, 700)
    for row, length in enumerate((700, 333, 16, 1)):
        mask[row, :length] = 1
    return audio, mask


# ---------------------------------------------------------------------------------------------------------------------
# Without the fast path
# ---------------------------------------------------------------------------------------------------------------------


def test_the_fast_path_runs_on_this_machine(models):
    """Otherwise the tests below would compare the plain layers with themselves."""
    if not cpu._works("linear", torch.float32):
        pytest.skip("torch has none of oneDNN's operators here")
    model = models(75)
    layers = model.encoder_model.encoder.downsampling_layers
    assert cpu.fast_convolve(layers, torch.zeros(1, 1, 24000)).shape == (1, 512, 75)
    assert cpu.fast_linear(model.head.linear, torch.zeros(1, 5, 768)).shape == (1, 5, 1282)


@pytest.mark.parametrize("name", ["noise_0.5", "chirp_1.37"])
def test_the_plain_layers_alone_give_the_golden_codes_and_audio(models, rate, name, monkeypatch):
    monkeypatch.setattr(cpu, "enabled", False)
    audio, data = golden(rate, name)
    encoded = models(rate).encode(audio, output_latents=True)
    clear = data["margin"] >= 1e-6
    np.testing.assert_array_equal(encoded.audio_codes[0].numpy()[:, clear], data["codes"][:, clear])
    np.testing.assert_allclose(encoded.latents[0, :, :8].numpy(), data["encoder_head"], atol=1e-4, rtol=0)
    decoded = models(rate).decode(torch.from_numpy(data["codes"])[None]).audio_values[0, 0]
    np.testing.assert_allclose(decoded.numpy(), data["audio"], atol=1e-4, rtol=0)


def test_rows_and_chunks_get_the_same_codes_without_the_fast_path(tiny_model, monkeypatch):
    audio, mask = ragged()
    expected = tiny_model.encode(audio, mask)
    chunked = tiny_model.encode(audio[:1], chunk_seconds=0.005)
    decoded = tiny_model.decode(expected.audio_codes, audio_codes_mask=expected.audio_codes_mask).audio_values
    monkeypatch.setattr(cpu, "enabled", False)
    plain = tiny_model.encode(audio, mask)
    assert torch.equal(plain.audio_codes, expected.audio_codes)
    assert torch.equal(tiny_model.encode(audio[:1], chunk_seconds=0.005).audio_codes, chunked.audio_codes)
    plain_audio = tiny_model.decode(plain.audio_codes, audio_codes_mask=plain.audio_codes_mask).audio_values
    torch.testing.assert_close(plain_audio, decoded, atol=1e-5, rtol=0)
    for row, length in enumerate((700, 333, 16, 1)):
        alone = tiny_model.encode(audio[row : row + 1, :, :length]).audio_codes
        assert torch.equal(plain.audio_codes[row, :, : alone.shape[-1]], alone[0])


def test_the_model_is_complete_without_the_fast_file(tiny_model, tmp_path):
    """Use the core files with a stub for modeling_wavtokenizer_cpu.py, in a process without this package."""
    audio, mask = ragged()
    expected = tiny_model.encode(audio, mask)
    tiny_model.save_pretrained(tmp_path / "model")
    names = ["linear", "feed_forward", "depthwise", "convolve", "lstm", "scores"]
    stub = "".join(f"def fast_{name}(*arguments):\n    return None\n\n\n" for name in names)
    assert (tmp_path / "model" / "modeling_wavtokenizer_cpu.py").is_file()
    (tmp_path / "model" / "modeling_wavtokenizer_cpu.py").write_text(stub)
    torch.save((audio, mask, expected.audio_codes), tmp_path / "expected.pt")
    code = """
import sys, torch
sys.modules["wavtokenizer_hf"] = None
from transformers import AutoModel
audio, mask, codes = torch.load(sys.argv[2])
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    encoded = model.encode(audio, mask)
    assert torch.equal(encoded.audio_codes, codes)
    model.decode(encoded.audio_codes, audio_codes_mask=encoded.audio_codes_mask)
assert sys.modules[type(model).__module__].fast_linear() is None
"""
    arguments = [sys.executable, "-c", code, tmp_path / "model", tmp_path / "expected.pt"]
    subprocess.run(arguments, check=True, cwd=tmp_path, env={**_environment(), "HF_HOME": str(tmp_path / "hf")})


def _environment() -> dict:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def missing(*arguments, **kwargs):
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")


def refusing(*arguments, **kwargs):
    raise RuntimeError("could not create a primitive descriptor for the inner product")


def disagreeing(inputs, weight, bias, add=None, gelu=False):
    return torch.zeros(*inputs.shape[:-1], 32 if weight.shape[0] == 32 else 160, dtype=inputs.dtype)


@pytest.mark.parametrize("operator", [missing, refusing, disagreeing])
def test_an_operator_that_fails_its_trial_is_not_used(tiny_model, monkeypatch, fresh_trials, operator):
    audio, mask = ragged()
    expected = tiny_model(audio, mask)
    cpu._works.cache_clear()
    monkeypatch.setattr(cpu, "_linear_operator", operator)
    assert not cpu._works("linear", torch.float32)
    output = tiny_model(audio, mask)
    assert torch.equal(output.audio_codes, expected.audio_codes)
    torch.testing.assert_close(output.audio_values, expected.audio_values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("operator", ["_linear_operator", "_lstm_operator"])
def test_an_operator_that_raises_after_its_trial_falls_back_to_the_plain_layers(tiny_model, monkeypatch, operator):
    audio, mask = ragged()
    expected = tiny_model(audio, mask)
    monkeypatch.setattr(cpu, operator, refusing)
    output = tiny_model(audio, mask)
    assert torch.equal(output.audio_codes, expected.audio_codes)
    torch.testing.assert_close(output.audio_values, expected.audio_values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_decoding_works_in_every_dtype_on_this_processor(tiny_model, dtype):
    codes = torch.randint(0, 64, (2, 1, 30))
    expected = tiny_model.decode(codes).audio_values
    decoded = tiny_model.to(dtype).decode(codes).audio_values
    assert decoded.dtype == torch.float32
    noise = (decoded - expected).square().mean() / expected.square().mean()
    assert 10 * torch.log10(1 / noise) > {torch.bfloat16: 20, torch.float16: 40, torch.float64: 100}[dtype]


# ---------------------------------------------------------------------------------------------------------------------
# Layers used by other libraries
# ---------------------------------------------------------------------------------------------------------------------


def test_forward_hooks_of_every_layer_fire_in_inference(tiny_model):
    for kind in (WavTokenizerConv1d, nn.Conv1d, nn.ELU, nn.Linear, nn.RNNBase):
        seen = []
        layers = [layer for layer in tiny_model.modules() if isinstance(layer, kind)]
        handles = [layer.register_forward_pre_hook(lambda layer, inputs, s=seen: s.append(layer)) for layer in layers]
        tiny_model(torch.randn(1, 1, 640))
        assert set(seen) == set(layers) and layers
        for handle in handles:
            handle.remove()


def test_global_forward_hooks_see_every_convolution(tiny_model):
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda layer, inputs, output: seen.add(layer))
    try:
        tiny_model(torch.randn(1, 1, 640))
    finally:
        handle.remove()
    assert {layer for layer in tiny_model.modules() if isinstance(layer, nn.Conv1d)} <= seen


def test_flop_counters_count_the_same_with_and_without_gradients(tiny_model):
    audio, flops = torch.randn(1, 1, 640), []
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
            tiny_model(audio, output_latents=True)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


class ForwardOnly(nn.Module):
    """A replacement for nn.Linear like those of some libraries: it has `forward(x)` and no weight."""

    def __init__(self, layer):
        super().__init__()
        self.hidden = [layer]

    def forward(self, inputs):
        return self.hidden[0](inputs)


class LoRA(nn.Module):
    def __init__(self, layer, merged: bool):
        super().__init__()
        self.base_layer, self.merged = layer, merged
        self.down = torch.linspace(-0.1, 0.1, 2 * layer.in_features).reshape(2, -1)
        self.up = torch.linspace(0.1, -0.1, 2 * layer.out_features).reshape(-1, 2)

    @property
    def weight(self):  # as in peft
        return self.base_layer.weight

    def forward(self, inputs):
        if self.merged:
            return nn.functional.linear(inputs, self.weight + self.up @ self.down, self.base_layer.bias)
        return self.base_layer(inputs) + inputs @ self.down.T @ self.up.T


def replace_linear_layers(model, make) -> int:
    replaced = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, make(child))
                replaced += 1
    return replaced


def test_decoding_works_with_layers_that_have_forward_only(tiny_model):
    codes = torch.randint(0, 64, (1, 1, 20))
    expected = tiny_model.decode(codes).audio_values
    assert replace_linear_layers(tiny_model, ForwardOnly) == 2 * 2 + 1
    torch.testing.assert_close(tiny_model.decode(codes).audio_values, expected, atol=1e-6, rtol=0)


def test_decoding_works_with_a_convolution_without_bias(tiny_model):
    codes = torch.randint(0, 64, (1, 1, 20))
    for block in tiny_model.backbone.convnext:
        block.dwconv.bias.zero_()
    expected = tiny_model.decode(codes).audio_values
    for block in tiny_model.backbone.convnext:
        block.dwconv.bias = None
    torch.testing.assert_close(tiny_model.decode(codes).audio_values, expected, atol=1e-6, rtol=0)


def test_a_lora_delta_comes_before_the_gelu(tiny_model):
    codes = torch.randint(0, 64, (1, 1, 20))
    before = tiny_model.decode(codes).audio_values
    audio = []
    for merged in (False, True):
        model = copy.deepcopy(tiny_model)
        replace_linear_layers(model, lambda layer, merged=merged: LoRA(layer, merged))
        audio.append(model.decode(codes).audio_values)
    torch.testing.assert_close(audio[0], audio[1], atol=1e-5, rtol=0)
    assert (audio[0] - before).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantization_finds_the_linear_layers(tiny_model):
    codes = torch.randint(0, 64, (1, 1, 20))
    expected = tiny_model.decode(codes).audio_values
    quantized = torch.ao.quantization.quantize_dynamic(tiny_model, {nn.Linear}, dtype=torch.qint8)
    layers = [layer for layer in quantized.modules() if isinstance(layer, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(layers) == 2 * 2 + 1
    decoded = quantized.decode(codes).audio_values
    assert 0 < (decoded - expected).abs().max() < 0.2 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_default_dtype_changes_nothing(tiny_model, dtype):
    results = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            results.append(everything(tiny_model))
        finally:
            torch.set_default_dtype(torch.float32)
    assert_equal(*results)


def test_another_default_device_changes_nothing(tiny_model):
    results = []
    for default in (None, "meta"):
        torch.set_default_device(default)
        try:
            results.append(everything(tiny_model))
        finally:
            torch.set_default_device(None)
    assert_equal(*results)


def everything(model) -> list[torch.Tensor]:
    """Return codes and audio of rows, chunks, windows and streams."""
    generator = torch.Generator("cpu").manual_seed(0)
    audio = torch.randn(3, 1, 900, generator=generator, dtype=torch.float32, device="cpu")
    mask = (torch.arange(900, device="cpu") < torch.tensor([[900], [500], [3]], device="cpu")).long()
    encoded = model.encode(audio, mask, output_latents=True)
    codes = encoded.audio_codes
    stream, decoder = EncodeStream(model), DecodeStream(model, 0.01, 0.002)
    return [
        codes,
        encoded.latents,
        model.encode(audio[:1], chunk_seconds=0.01).audio_codes,
        model.decode(codes, audio_codes_mask=encoded.audio_codes_mask).audio_values,
        model.decode(codes, window_seconds=0.01, overlap_seconds=0.002).audio_values,
        model.decode(codes, 0, encoded.audio_codes_mask, window_seconds=0.01, overlap_seconds=0.002).audio_values,
        stream.push(audio[0, 0]),
        stream.flush(),
        decoder.push(codes[0, 0]),
        decoder.flush(),
    ]


def assert_equal(results: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for result, other in zip(results, others, strict=True):
        assert result.dtype == other.dtype and torch.equal(result, other)


@pytest.mark.parametrize("package", ["pickle", "cloudpickle", "torch.save"])
def test_a_model_can_be_pickled(tiny_model, package):
    tiny_model(torch.randn(1, 1, 640))  # values cached by inference must not interfere
    expected = everything(tiny_model)
    if package == "torch.save":
        buffer = io.BytesIO()
        torch.save(tiny_model, buffer)
        buffer.seek(0)
        unpickled = torch.load(buffer, weights_only=False)
    else:
        module = {"pickle": pickle, "cloudpickle": cloudpickle}[package]
        unpickled = pickle.loads(module.dumps(tiny_model))
    assert not unpickled.training and type(unpickled) is WavTokenizerModel
    assert_equal(everything(unpickled), expected)
    assert isinstance(pickle.loads(pickle.dumps(tiny_model.encoder_model)), WavTokenizerEncoderModel)


def test_pickling_keeps_dtype_and_frozen_parameters(tiny_model):
    tiny_model.to(torch.bfloat16).train()
    tiny_model.backbone.requires_grad_(False)
    unpickled = pickle.loads(pickle.dumps(tiny_model))
    assert unpickled.training
    for (name, parameter), other in zip(tiny_model.named_parameters(), unpickled.parameters(), strict=True):
        assert parameter.dtype == other.dtype and parameter.requires_grad == other.requires_grad, name


def test_a_model_with_replaced_layers_refuses_to_be_pickled(tiny_model):
    replace_linear_layers(tiny_model, ForwardOnly)
    with pytest.raises(pickle.PicklingError, match="save_pretrained"):
        pickle.dumps(tiny_model)
    assert isinstance(copy.deepcopy(tiny_model).head.linear, ForwardOnly)  # a copy in memory is complete


# ---------------------------------------------------------------------------------------------------------------------
# Other processors and devices
# ---------------------------------------------------------------------------------------------------------------------

INSTRUCTION_SETS = {
    "sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},  # no fp16 and no AMX
}


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_codes_are_the_same_with_other_instruction_sets(name, folders, tmp_path):
    """Run golden codes, rows of batches, dtypes and transformers' half-precision tests in a separate process."""
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    arguments += [
        "-k",
        "golden or rows or every_dtype or fp16 or bf16",
        str(Path(__file__).parent / "instruction_sets.py"),
    ]
    environment = {**_environment(), **INSTRUCTION_SETS[name], "WAVTOKENIZER_TEST_FOLDER": str(folders(75))}
    environment["OMP_NUM_THREADS"] = "1"
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "passed" in result.stdout and "failed" not in result.stdout


def test_every_tensor_is_on_the_models_device(monkeypatch):
    """
    Fake tensors refuse operations across devices. Their device is "meta", which for the model is simply not the CPU:
    torch's CPU builds cannot run convolutions of fake CUDA tensors. Fake tensors hold no values, so the model checks
    none, as in a compiled graph.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.device("meta"):
        model = WavTokenizerModel(tiny_config()).eval()
        audio, mask = torch.randn(2, 1, 200), torch.ones(2, 200, dtype=torch.long)
        codes_mask = torch.ones(2, 1, 13, dtype=torch.long)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for arguments in ({}, {"padding_mask": mask}):
            for chunk_seconds in (None, 0.004):
                encoded = model.encode(audio, **arguments, chunk_seconds=chunk_seconds, output_latents=True)
                assert encoded.audio_codes.shape == (2, 1, 13)
                assert {tensor.device.type for tensor in encoded.values()} == {"meta"}
        for arguments in ({}, {"audio_codes_mask": codes_mask}, {"window_seconds": 0.004, "overlap_seconds": 0.001}):
            decoded = model.decode(encoded.audio_codes, **arguments).audio_values
            assert decoded.device.type == "meta" and decoded.shape == (2, 1, 13 * 16)
        with pytest.raises(RuntimeError, match="same device"):  # otherwise the test could not fail
            model.encoder_model.encoder(torch.randn(1, 1, 100))


def test_a_mask_on_another_device_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"Got padding_mask on meta, the batch is on cpu\. Move both to one device"):
        tiny_model.encode(torch.randn(1, 1, 100), torch.ones(1, 100, device="meta"))
    codes = torch.zeros(1, 1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="Got audio_codes_mask on meta"):
        tiny_model.decode(codes, audio_codes_mask=torch.ones(1, 1, 5, device="meta"))
