"""
The model against golden data of the reference implementation, and against itself: rows of batches, dtypes, compiled
graphs.
"""

import copy
import hashlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from conftest import REFERENCE, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from wavtokenizer_hf import WavTokenizerEncoderModel, WavTokenizerFeatureExtractor, WavTokenizerModel
from wavtokenizer_hf import modeling_wavtokenizer_batching as batching
from wavtokenizer_hf import modeling_wavtokenizer_cpu as cpu
from wavtokenizer_hf import modeling_wavtokenizer_padding as padding
from wavtokenizer_hf.long_audio import EncodeStream
from wavtokenizer_hf.modeling_wavtokenizer_batching import CPU_POLICY, TOGETHER_POLICY, EncodePolicy
from wavtokenizer_hf.modeling_wavtokenizer_encoder import WavTokenizerConv1d
from wavtokenizer_hf.modeling_wavtokenizer_precision import full_float32


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: tiny layers gain nothing from more, and the full-size tests here are short."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# Golden data of the reference implementation
# ---------------------------------------------------------------------------------------------------------------------

SIGNALS = ("chirp_1.37", "noise_0.5", "speechlike_3.0")


@pytest.fixture(params=SIGNALS)
def golden(request, rate):
    """Return a signal, with the output of the reference implementation for it."""
    import formula

    kind, seconds = request.param.split("_")
    data = np.load(REFERENCE / f"{request.param}_{rate}.npz")
    return SimpleNamespace(input_values=torch.from_numpy(formula.waveform(kind, float(seconds)))[None, None], **data)


def test_codes_equal_the_reference_implementation(golden, models, rate):
    codes = models(rate).encode(golden.input_values).audio_codes[0].numpy()
    assert codes.shape == golden.codes.shape
    assert len(np.unique(golden.codes)) > 10  # otherwise equality would prove little
    clear = golden.margin >= 1e-6  # below that, float32 cannot decide which entry is nearest
    np.testing.assert_array_equal(codes[:, clear], golden.codes[:, clear])


def test_audio_equals_the_reference_implementation(golden, models, rate):
    audio = models(rate).decode(torch.from_numpy(golden.codes)[None]).audio_values[0, 0].numpy()
    assert np.abs(golden.audio).max() > 0.01
    np.testing.assert_allclose(audio, golden.audio, atol=1e-4, rtol=0)


def test_latents_equal_the_reference_implementation(golden, models, rate):
    latents = models(rate).encode(golden.input_values, output_latents=True).latents[0].numpy()
    # sums of up to 4096 float32 products, in another order than the reference implementation
    np.testing.assert_allclose(latents[:, :8], golden.encoder_head, atol=1e-4, rtol=0)
    np.testing.assert_allclose(latents[:, -8:], golden.encoder_tail, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 8, 17, 100, 319, 321, 601, 2000])
def test_clips_shorter_than_the_padding_equal_the_reference_implementation(num_samples, models, rate):
    import formula

    data = np.load(REFERENCE / f"short_{rate}.npz")
    audio = torch.from_numpy(formula.waveform("noise", 0.5)[:num_samples])[None, None]
    encoded = models(rate).encode(audio, output_latents=True)
    np.testing.assert_array_equal(encoded.audio_codes[0, 0].numpy(), data[f"codes_{num_samples}"])
    np.testing.assert_allclose(encoded.latents[0].numpy(), data[f"latents_{num_samples}"], atol=1e-4, rtol=0)
    decoded = models(rate).decode(encoded.audio_codes).audio_values[0, 0].numpy()
    np.testing.assert_allclose(decoded, data[f"audio_{num_samples}"], atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a padded batch, under each policy
# ---------------------------------------------------------------------------------------------------------------------

POLICIES = {
    "one_by_one": EncodePolicy(together_seconds=0, shared_lstm_seconds=0, block_seconds=3),
    "shared_lstm": EncodePolicy(together_seconds=0, shared_lstm_seconds=60, block_seconds=3),
    "cpu": CPU_POLICY,
    "together": TOGETHER_POLICY,
}


@pytest.fixture(params=list(POLICIES))
def policy(request):
    return POLICIES[request.param]


def margins(model, latents):
    """Return the relative gap between the nearest and the second-nearest entry of each frame, in float64: (L,)."""
    entries = model.quantizer.codebook.embed.double()
    nearest = torch.cdist(latents[0].T.double(), entries).topk(2, largest=False).values
    return 1 - nearest[:, 0] / nearest[:, 1]


def check_rows(model, clips, padding_side, policy):
    """Check that every row of a batch of `clips` gets the codes, latents and audio that its clip gets alone.

    Only without a recheck, a code may differ where two entries are almost equally near, since float32 sums run in
    another order than alone. benchmarks/README.md states how often that happens.
    """
    hop = model.config.hop_length
    extractor = WavTokenizerFeatureExtractor(hop_length=hop, padding_side=padding_side)
    batch = extractor(clips, sampling_rate=24000, return_tensors="pt")
    batch["input_values"][~batch["padding_mask"].bool()[:, None]] = float("nan")  # the model must never read it
    encoded = model.encoder_model._encode(**batch, output_latents=True, policy=policy)
    decoded = model.decode(encoded.audio_codes, audio_codes_mask=encoded.audio_codes_mask).audio_values
    both = model(**batch)
    if policy is CPU_POLICY:
        assert torch.equal(both.audio_codes, encoded.audio_codes)
    for row, clip in enumerate(clips):
        real = encoded.audio_codes_mask[row, 0].bool()
        alone = model.encode(torch.from_numpy(clip)[None, None], output_latents=True)
        frames = alone.audio_codes.shape[-1]
        padding = real.numel() - frames
        frames_of_clip = slice(padding, None) if padding_side == "left" else slice(0, frames)
        assert real[frames_of_clip].all() and real.sum() == frames
        codes = encoded.audio_codes[row, :, frames_of_clip]
        differ = codes[0] != alone.audio_codes[0, 0]
        assert not differ.any() or (policy is TOGETHER_POLICY and margins(model, alone.latents)[differ].max() < 1e-5)

        latents = encoded.latents[row][:, frames_of_clip]
        scale = alone.latents.abs().max()
        torch.testing.assert_close(latents / scale, alone.latents[0] / scale, atol=1e-5, rtol=0)
        assert (encoded.latents[row][:, ~real] == 0).all()

        audio_alone = model.decode(codes[None]).audio_values[0, 0]
        real_samples = real.repeat_interleave(hop)
        torch.testing.assert_close(decoded[row, 0, real_samples], audio_alone, atol=1e-5, rtol=0)
        assert (decoded[row, 0, ~real_samples] == 0).all()

        real_samples = batch["padding_mask"][row].bool()
        if policy is CPU_POLICY:
            torch.testing.assert_close(
                both.audio_values[row, 0, real_samples], audio_alone[: len(clip)], atol=1e-5, rtol=0
            )
        assert (both.audio_values[row, 0, ~real_samples] == 0).all()


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=5),
    padding_side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 1000),
)
def test_batch_gives_each_row_what_it_gets_alone(tiny_model, policy, lengths, padding_side, seed):
    rng = np.random.default_rng(seed)
    clips = [rng.standard_normal(length).astype(np.float32) for length in lengths]
    check_rows(tiny_model, clips, padding_side, policy)


@pytest.mark.parametrize("name", ["cpu", "together"])
@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 72000), min_size=2, max_size=4),
    short=st.lists(st.integers(1, 400), min_size=0, max_size=2),
    padding_side=st.sampled_from(["left", "right"]),
)
def test_batch_gives_each_row_what_it_gets_alone_at_full_size(models, rate, name, lengths, short, padding_side):
    rng = np.random.default_rng(sum(lengths))
    clips = [(0.1 * rng.standard_normal(length)).astype(np.float32) for length in lengths + short]
    check_rows(models(rate), clips, padding_side, POLICIES[name])


def test_rows_in_one_lstm_batch_get_the_latents_they_get_alone(models, rate):
    """The codes are exactly the same, since rows with near ties are computed again, alone."""
    torch.manual_seed(0)
    model, lengths = models(rate), [15000, 36000, 36001, 7001, 20000]
    batch, mask = 0.1 * torch.randn(5, 1, 36001), torch.zeros(5, 36001)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    encoded = model.encode(batch, mask, output_latents=True)
    for row, length in enumerate(lengths):
        alone = model.encode(batch[row : row + 1, :, :length], output_latents=True)
        frames = alone.audio_codes.shape[-1]
        difference = (encoded.latents[row, :, :frames] - alone.latents[0]).norm(dim=0)
        assert (difference <= batching.SHARED_LSTM_TOLERANCE * alone.latents[0].norm(dim=0)).all()
        assert torch.equal(encoded.audio_codes[row, :, :frames], alone.audio_codes[0])


def test_a_row_with_a_near_tie_gets_exactly_the_codes_it_gets_alone(tiny_model):
    """Two entries are equally near by construction, so everything is a near tie."""
    torch.manual_seed(0)
    audio = torch.randn(3, 1, 20 * 16)
    latents = tiny_model.encode(audio[:1], output_latents=True).latents
    middle, step = latents[0, :, 3], torch.randn(16)
    tiny_model.quantizer.codebook.embed[:2] = torch.stack([middle + 1e-2 * step, middle - 1e-2 * step])
    assert batching.clear_codes(tiny_model.encoder_model, latents, batching.SHARED_LSTM_TOLERANCE) is None
    for policy in (POLICIES["shared_lstm"], POLICIES["cpu"]):
        encoded = tiny_model.encoder_model._encode(audio, output_latents=True, policy=policy)
        assert torch.equal(encoded.latents[:1], tiny_model.encode(audio[:1], output_latents=True).latents)


def test_near_ties_are_found_in_float32_under_autocast(tiny_model):
    latents = torch.randn(1, 16, 50)
    gaps = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            frames = latents.split(1, dim=-1)
            found = [batching.clear_codes(tiny_model.encoder_model, frame, 2e-2) is None for frame in frames]
        gaps.append(found)
    assert gaps[0] == gaps[1] and 0 < sum(gaps[0]) < 50


@pytest.fixture(scope="module")
def model_with_equal_entries(models):
    """
    Return a model, audio (3, 1, T) and its codes by hand. Some entries that the audio uses are repeated at lower
    indices.
    """
    with torch.no_grad():
        torch.manual_seed(0)
        model, audio = copy.deepcopy(models(75)), 0.1 * torch.randn(3, 1, 18000)
        before = model.encode(audio).audio_codes
        used = before.unique()[-20:]
        unused_codes = torch.tensor([code for code in range(200) if code not in before])[:20]
        model.quantizer.codebook.embed[unused_codes] = model.quantizer.codebook.embed[used]
        expected = before.clone()
        for first, second in zip(unused_codes, used, strict=True):
            expected[before == second] = first
    assert used.min() > unused_codes.max() and not torch.equal(before, expected)
    return model, audio, expected


def test_of_equal_entries_the_first_one_wins(model_with_equal_entries, policy):
    model, audio, expected = model_with_equal_entries
    assert torch.equal(model.encoder_model._encode(audio, policy=policy).audio_codes, expected)


def test_of_equal_entries_the_first_one_wins_in_plain_compiled_and_streamed_encoding(model_with_equal_entries):
    model, audio, expected = model_with_equal_entries
    with torch.enable_grad():  # plain layers
        encoded = model.encode(audio[:1], output_latents=True)
    assert torch.equal(encoded.audio_codes, expected[:1])
    compiled = torch.compile(model.quantizer.encode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(encoded.latents.detach()), expected[:1])
    stream = EncodeStream(model)
    assert torch.equal(torch.cat([stream.push(audio[0, 0]), stream.flush()]), expected[0, 0])


def test_latents_that_are_not_finite_are_refused(tiny_model):
    tiny_model.encoder_model.encoder.layers[0].conv.bias.mul_(0)
    tiny_model.encoder_model.encoder.layers[0].conv.parametrizations.weight.original0.mul_(100)
    loud, batch = torch.full((1, 1, 400), 3e38), torch.randn(3, 1, 400)
    batch[1] = loud
    for audio, policy in ((loud, "cpu"), (batch, "cpu"), (batch, "shared_lstm"), (batch, "together")):
        with pytest.raises(ValueError, match="largest sample of the audio is 3e\\+38, expected about 1"):
            tiny_model.encoder_model._encode(audio, policy=POLICIES[policy])
    tiny_model.encoder_model.encoder.layers[0].conv.bias[0] = float("nan")
    with pytest.raises(ValueError, match="weights of the model are damaged"):
        tiny_model.encode(torch.randn(1, 1, 400))


def test_a_mask_without_padding_changes_nothing(tiny_model, policy):
    audio = torch.randn(3, 1, 100)
    without = tiny_model.encoder_model._encode(audio, policy=policy)
    with_mask = tiny_model.encoder_model._encode(audio, torch.ones(3, 100), policy=policy)
    assert torch.equal(without.audio_codes, with_mask.audio_codes)
    assert torch.equal(tiny_model(audio).audio_values, tiny_model(audio, torch.ones(3, 100)).audio_values)
    assert with_mask.audio_codes_mask.all()


def test_each_row_of_a_batch_can_be_padded_on_its_own_side(tiny_model, policy):
    audio, mask = torch.randn(2, 1, 100), torch.ones(2, 100)
    mask[0, :40] = 0
    mask[1, 70:] = 0
    encoded = tiny_model.encoder_model._encode(audio, mask, policy=policy)
    assert torch.equal(encoded.audio_codes[0, :, -4:], tiny_model.encode(audio[:1, :, 40:]).audio_codes[0])
    assert torch.equal(encoded.audio_codes[1, :, :5], tiny_model.encode(audio[1:, :, :70]).audio_codes[0])


@pytest.mark.parametrize(
    ("kernel_size", "stride"),
    [(kernel_size, stride) for kernel_size in (3, 7, 10, 16) for stride in (1, 2, 5, 8) if kernel_size >= stride],
)
def test_reflection_follows_the_rule_of_the_architecture(kernel_size, stride):
    """Compare with the rule in architecture.md, number by number."""
    total = kernel_size - stride
    right = total // 2
    left = total - right
    for length in range(1, 40):
        signal = list(range(1, length + 1))
        count = (length - kernel_size + total) / stride + 1
        extra = (int(np.ceil(count)) - 1) * stride + kernel_size - total - length
        zeros = max(max(left, right + extra) - length + 1, 0)
        longer = signal + [0] * zeros
        mirrored = [longer[i] for i in range(left, 0, -1)] + longer
        mirrored += [longer[-2 - i] for i in range(right + extra)]
        expected = mirrored[: len(mirrored) - zeros]

        alone = padding.reflect_pad(torch.tensor([[signal]], dtype=torch.float), None, left, right, stride)
        assert alone[0, 0].tolist() == expected
        row = torch.full((1, 1, 45), 99.0)
        row[0, 0, :length] = torch.tensor(signal)
        rows = padding.reflect_pad(row, torch.tensor([length]), left, right, stride)
        assert rows[0, 0, : len(expected)].tolist() == expected


# ---------------------------------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_those_of_float32_for_every_loaded_dtype(folders, models, dtype):
    audio = 0.1 * torch.randn(1, 1, 8000)
    loaded = WavTokenizerModel.from_pretrained(folders(75), dtype=dtype).eval()
    assert loaded.backbone.embed.weight.dtype == dtype
    assert torch.equal(loaded.encode(audio).audio_codes, models(75).encode(audio).audio_codes)


def test_codes_are_those_of_float32_after_a_cast(tiny_model):
    audio = torch.randn(1, 1, 500)
    expected = tiny_model.encode(audio, output_latents=True).latents
    for cast in (tiny_model.bfloat16, tiny_model.half, lambda: tiny_model.to(torch.bfloat16)):
        assert torch.equal(cast().encode(audio, output_latents=True).latents, expected)
        assert tiny_model.backbone.embed.weight.dtype != torch.float32


def test_codes_are_those_of_float32_under_autocast_and_lower_matmul_precision(models):
    audio = 0.1 * torch.randn(1, 1, 8000)
    expected = models(75).encode(audio, output_latents=True).latents
    torch.set_float32_matmul_precision("medium")  # on this kind of CPU: matmuls in bfloat16
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(models(75).encode(audio, output_latents=True).latents, expected)
        assert torch.get_float32_matmul_precision() == "medium"  # the caller's setting is restored
    finally:
        torch.set_float32_matmul_precision("highest")


def test_codes_are_those_of_float32_in_a_graph_compiled_under_autocast(models):
    audio = 0.1 * torch.randn(1, 1, 4000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(models(75).encode, fullgraph=True, backend="aot_eager")(audio, output_latents=True)
    expected = models(75).encode(audio, output_latents=True)
    torch.testing.assert_close(compiled.latents, expected.latents, atol=1e-4, rtol=0)
    assert torch.equal(compiled.audio_codes, expected.audio_codes)


def test_threads_do_not_undo_each_others_float32():
    """One block begins within another and ends after it: the switches stay set while either needs them."""
    torch.set_float32_matmul_precision("medium")
    try:
        switch, device = torch.backends.mkldnn.matmul, torch.device("cpu")
        first, second = full_float32(device), full_float32(device)
        first.__enter__()
        second.__enter__()
        assert switch.fp32_precision == "ieee"
        first.__exit__(None, None, None)
        assert switch.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert switch.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_threads_that_encode_concurrently_get_the_same_codes(models):
    audio = [0.1 * torch.randn(1, 1, 3000) for _ in range(4)]
    expected = [models(75).encode(clip, output_latents=True).latents for clip in audio]
    torch.set_float32_matmul_precision("medium")

    def encode(clip):
        with torch.no_grad():
            return [models(75).encode(clip, output_latents=True).latents for _ in range(4)]

    try:
        with ThreadPoolExecutor(4) as pool:
            for latents, alone in zip(pool.map(encode, audio), expected, strict=True):
                assert all(torch.equal(each, alone) for each in latents)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_model_created_in_bfloat16_encodes_in_float32():
    model = AutoModel.from_config(tiny_config(), dtype=torch.bfloat16).eval()
    assert model.backbone.embed.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in model.encoder_model.state_dict().values()} == {torch.float32}
    assert model(torch.randn(1, 1, 100)).audio_values.dtype == torch.float32
    assert len(model.codebook_fingerprint) == 16
    encoder = AutoModel.from_config(tiny_config(), dtype=torch.bfloat16).encoder_model.double().half()
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.float32}


def test_audio_is_float32_for_every_default_dtype(tiny_model):
    codes = torch.randint(0, 64, (1, 1, 20))
    expected = tiny_model.decode(codes).audio_values
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(tiny_model.decode(codes).audio_values, expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_magnitudes_are_limited_to_100(tiny_model):
    """By hand: every magnitude is exp(7), limited to 100, and every phase 90 degrees, so all frames are equal."""
    head = tiny_model.head
    head.linear.weight.zero_()
    head.linear.bias[:33], head.linear.bias[33:] = 7, np.pi / 2
    audio = head(torch.zeros(1, 5, 16))[0, 0].numpy()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(64) / 64)
    frame = np.fft.irfft(100j * np.ones(33)) * window
    assert np.abs(frame).max() > 1
    total, envelope = np.zeros(5 * 16 + 48), np.zeros(5 * 16 + 48)
    for start in range(0, 5 * 16, 16):
        total[start : start + 64] += frame
        envelope[start : start + 64] += window**2
    np.testing.assert_allclose(audio, total[24:-24] / envelope[24:-24], atol=1e-3)


def test_weights_may_be_offloaded(tiny_model):
    audio = torch.randn(2, 1, 100)
    expected = tiny_model(audio)
    offloaded = accelerate.cpu_offload(tiny_model, execution_device=torch.device("cpu"))(audio)
    assert torch.equal(offloaded.audio_codes, expected.audio_codes)
    torch.testing.assert_close(offloaded.audio_values, expected.audio_values, atol=1e-6, rtol=0)


def test_bfloat16_decodes_close_to_float32(folders, models):
    codes = torch.randint(0, 4096, (1, 1, 100))
    expected = models(75).decode(codes).audio_values
    decoded = WavTokenizerModel.from_pretrained(folders(75), dtype=torch.bfloat16).eval().decode(codes).audio_values
    assert decoded.dtype == torch.float32
    noise = (decoded - expected).square().mean()
    assert 10 * torch.log10(expected.square().mean() / noise) > 20  # dB


# ---------------------------------------------------------------------------------------------------------------------
# Other guarantees of the model
# ---------------------------------------------------------------------------------------------------------------------


def test_encode_and_decode_compile_to_one_graph(tiny_model):
    audio, mask = torch.randn(2, 1, 100), torch.ones(2, 100, dtype=torch.long)
    mask[1, 60:] = 0
    encode = torch.compile(tiny_model.encode, fullgraph=True, backend="aot_eager")
    decode = torch.compile(tiny_model.decode, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for arguments in ((audio,), (audio, mask)):
            expected = tiny_model.encode(*arguments)
            compiled = encode(*arguments)
            assert torch.equal(compiled.audio_codes, expected.audio_codes)
            if len(arguments) == 2:
                assert torch.equal(compiled.audio_codes_mask, expected.audio_codes_mask)
            expected_audio = tiny_model.decode(expected.audio_codes, 0, expected.audio_codes_mask).audio_values
            compiled_audio = decode(expected.audio_codes, 0, expected.audio_codes_mask).audio_values
            torch.testing.assert_close(compiled_audio, expected_audio, atol=1e-5, rtol=0)


def test_the_encoder_can_be_exported_for_batches_of_any_size(tiny_model):
    class Codes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_model.encoder_model

        def forward(self, audio):
            return self.model.encode(audio).audio_codes

    exported = torch.export.export(
        Codes(), (torch.randn(3, 1, 1000),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    ).module()
    for batch_size in (1, 2, 5):
        audio = torch.randn(batch_size, 1, 1000)
        assert torch.equal(exported(audio), tiny_model.encode(audio).audio_codes)


def test_eager_attention_equals_sdpa(tiny_model):
    codes, mask = torch.randint(0, 64, (2, 1, 20)), torch.ones(2, 1, 20)
    mask[0, :, 12:] = 0
    audio = {}
    for implementation in ("sdpa", "eager"):
        tiny_model.set_attn_implementation(implementation)
        audio[implementation] = tiny_model.decode(codes, audio_codes_mask=mask).audio_values
    torch.testing.assert_close(audio["eager"], audio["sdpa"], atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")  # its new name is of 5.23
@torch.enable_grad()
def test_gradients_are_the_same_with_checkpointing(tiny_model):
    audio, mask = torch.randn(2, 1, 100), torch.ones(2, 100)
    mask[1, 60:] = 0
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny_model.gradient_checkpointing_enable()
        tiny_model.train()
        torch.manual_seed(0)  # for the dropout
        tiny_model.zero_grad()
        output = tiny_model(audio, mask, output_latents=True)
        (output.audio_values.square().sum() + output.latents.square().sum()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in tiny_model.named_parameters()})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.enable_grad()
def test_training_mode_does_not_change_the_codebook(tiny_model):
    before = {name: buffer.clone() for name, buffer in tiny_model.named_buffers()}
    tiny_model.train()
    tiny_model(torch.randn(2, 1, 100)).audio_values.sum().backward()
    assert "encoder_model.quantizer.codebook.embed" in before
    for name, buffer in tiny_model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_new_model_is_initialised_like_the_reference_implementation():
    model = WavTokenizerModel(tiny_config())
    conv = model.encoder_model.encoder.layers[0].conv
    assert torch.allclose(conv.weight, conv.parametrizations.weight.original1)  # gain = length of the direction
    block = model.backbone.convnext[0]
    assert (block.gamma == 1 / 2).all()
    assert (block.norm.scale.weight == 1).all() and (block.norm.shift.weight == 0).all()
    assert 0.01 < block.pwconv1.weight.std() < 0.03 and (block.pwconv1.bias == 0).all()
    assert len(model.quantizer.codebook.embed.unique(dim=0)) == 64
    # loud noise uses several codes; otherwise tests of codes on new models would be empty
    torch.manual_seed(0)
    assert len(model.encode(100 * torch.randn(1, 1, 2000)).audio_codes.unique()) > 2


def test_weights_that_a_file_lacks_are_initialised(tiny_model, tmp_path):
    """As from a file saved with folded weight norm: its convolutions have a bias and no weight."""
    without_norms = {
        name: tensor for name, tensor in tiny_model.state_dict().items() if ".parametrizations." not in name
    }
    tiny_model.save_pretrained(tmp_path, state_dict=without_norms)
    loaded = WavTokenizerModel.from_pretrained(tmp_path)
    for layer in loaded.encoder_model.encoder.layers:
        if isinstance(layer, WavTokenizerConv1d):
            gain, direction = (
                layer.conv.parametrizations.weight.original0,
                layer.conv.parametrizations.weight.original1,
            )
            torch.testing.assert_close(gain, direction.flatten(1).norm(dim=1)[:, None, None])
            assert 0 < direction.abs().max() <= direction[0].numel() ** -0.5


def test_layers_without_bias_are_initialised(tiny_model):
    """Adapters, for example, add such layers."""
    for layer in (tiny_model.backbone.convnext[0].pwconv1, tiny_model.backbone.pos_net[0].conv1):
        layer.bias = None
        layer.weight.zero_()
        layer.weight._is_hf_initialized = False
        tiny_model._init_weights(layer)
        assert layer.weight.std() > 0.01


def test_the_encoder_model_loads_from_a_whole_model_and_from_its_own_folder(tiny_model, tmp_path):
    audio = torch.randn(1, 1, 300)
    expected = tiny_model.encode(audio).audio_codes
    tiny_model.save_pretrained(tmp_path / "whole")
    encoder, info = WavTokenizerEncoderModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(encoder.eval().encode(audio).audio_codes, expected)
    assert encoder.codebook_fingerprint == tiny_model.codebook_fingerprint
    encoder.save_pretrained(tmp_path / "own")
    assert torch.equal(WavTokenizerEncoderModel.from_pretrained(tmp_path / "own").encode(audio).audio_codes, expected)


def test_the_fingerprint_is_a_hash_of_the_codebook_and_is_saved(tiny_model, tmp_path):
    entries = np.asarray(tiny_model.quantizer.codebook.embed.tolist(), dtype="<f4")
    expected = hashlib.sha256(entries.tobytes()).hexdigest()[:16]
    assert tiny_model.codebook_fingerprint == expected
    tiny_model.save_pretrained(tmp_path)
    assert WavTokenizerModel.from_pretrained(tmp_path).config.codebook_fingerprint == expected


def test_codes_of_another_codebook_are_refused_with_both_fingerprints(tiny_model):
    own = tiny_model.codebook_fingerprint
    tiny_model.check_codebook_fingerprint(own)
    with pytest.raises(ValueError, match=f"0123456789abcdef.*{own}"):
        tiny_model.check_codebook_fingerprint("0123456789abcdef")


def test_forward_equals_encode_followed_by_decode(tiny_model):
    audio = torch.randn(2, 1, 101)
    output = tiny_model(audio, output_latents=True)
    encoded = tiny_model.encode(audio, output_latents=True)
    assert torch.equal(output.audio_codes, encoded.audio_codes) and torch.equal(output.latents, encoded.latents)
    assert output.audio_values.shape == audio.shape
    assert torch.equal(output.audio_values, tiny_model.decode(encoded.audio_codes).audio_values[..., :101])
    assert tiny_model.encode(audio).latents is None
    assert isinstance(tiny_model.encode(audio, return_dict=False), tuple)


def test_bandwidth_id_selects_the_norms(tiny_model):
    codes = torch.randint(0, 64, (1, 1, 20))
    before = tiny_model.decode(codes, bandwidth_id=2).audio_values
    for table in (tiny_model.backbone.norm.shift, tiny_model.backbone.convnext[0].norm.scale):
        table.weight[2] += torch.randn(16)
        assert not torch.equal(tiny_model.decode(codes, bandwidth_id=2).audio_values, before)
        table.weight[2] = table.weight[0]
    assert torch.equal(tiny_model.decode(codes).audio_values, before)  # all rows of a new model's tables are equal


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

AUDIO = torch.zeros(2, 1, 100)


def mask_with(value, *indices):
    mask = torch.ones(2, 100)
    for index in indices:
        mask[index] = value
    return mask


@pytest.mark.parametrize(
    ("input_values", "padding_mask", "message"),
    [
        (np.zeros((1, 1, 100), np.float32), None, "ndarray, expected a float tensor"),
        (torch.zeros(1, 1, 100, dtype=torch.int16), None, "int16, expected a float tensor"),
        (torch.zeros(100), None, r"shape \(100,\), expected \(batch size, 1, samples\)"),
        (torch.zeros(1, 2, 100), None, "mono"),
        (torch.zeros(1, 1, 0), None, "at least one clip of one sample"),
        (torch.zeros(0, 1, 100), None, "at least one clip of one sample"),
        (torch.full((1, 1, 100), float("nan")), None, "Row 0 of input_values holds NaN"),
        (torch.full((1, 1, 100), float("inf")), None, "Row 0 of input_values holds NaN or infinite"),
        (AUDIO, torch.ones(2, 99), r"padding_mask of shape \(2, 99\), expected a tensor of shape \(2, 100\)"),
        (AUDIO, torch.ones(2, 2, 100), r"padding_mask of shape \(2, 2, 100\)"),
        (AUDIO, [[1] * 100] * 2, "padding_mask of shape list"),
        (AUDIO, mask_with(0.5, (0, 3)), "other than 0 and 1"),
        (AUDIO, mask_with(0, (1, 50)), "Row 1 of padding_mask has gaps"),
        (AUDIO, mask_with(0, (1, slice(0, 10)), (1, slice(90, None))), "Row 1 .* padding on both sides"),
        (AUDIO, mask_with(0, (1, slice(None))), "Row 1 of padding_mask has no valid step"),
    ],
)
def test_encode_refuses(tiny_model, input_values, padding_mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.encode(input_values, padding_mask)
    with pytest.raises(ValueError, match=message):
        tiny_model(input_values, padding_mask)


@pytest.mark.parametrize(
    ("audio_codes", "arguments", "message"),
    [
        ([[[1, 2]]], {}, "type list, expected an integer tensor"),
        (torch.zeros(1, 1, 5), {}, "float32, expected an integer tensor"),
        (torch.zeros(1, 1, 5, dtype=torch.bool), {}, "bool, expected an integer tensor"),
        (torch.zeros(1, 1, 5, dtype=torch.complex128), {}, "complex128, expected an integer tensor"),
        (torch.zeros(1, 1, 5, dtype=torch.long), {"bandwidth_id": True}, "bandwidth_id=True, expected an int"),
        (torch.zeros(5, dtype=torch.long), {}, r"shape \(5,\), expected \(batch size, 1, codes\)"),
        (torch.zeros(1, 8, 5, dtype=torch.long), {}, r"shape \(1, 8, 5\)"),
        (torch.zeros(1, 1, 0, dtype=torch.long), {}, "at least one code"),
        (torch.full((1, 1, 5), 64), {}, "from 64 to 64, expected 0 to 63"),
        (torch.full((1, 1, 5), -1), {}, "from -1 to -1, expected 0 to 63"),
        (torch.zeros(1, 1, 5, dtype=torch.long), {"bandwidth_id": 4}, "bandwidth_id=4, expected an int from 0 to 3"),
        (torch.zeros(1, 1, 5, dtype=torch.long), {"audio_codes_mask": torch.ones(1, 5)}, r"expected .* \(1, 1, 5\)"),
        (
            torch.zeros(1, 1, 5, dtype=torch.long),
            {"audio_codes_mask": torch.tensor([[[1, 0, 1, 1, 1]]])},
            "Row 0 of audio_codes_mask has gaps",
        ),
    ],
)
def test_decode_refuses(tiny_model, audio_codes, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.decode(audio_codes, **arguments)


def test_padding_may_hold_codes_that_do_not_exist(tiny_model):
    codes, mask = torch.tensor([[[1, 2, 3, -1, 9999]]]), torch.tensor([[[1, 1, 1, 0, 0]]])
    audio = tiny_model.decode(codes, audio_codes_mask=mask).audio_values
    torch.testing.assert_close(audio[..., :48], tiny_model.decode(codes[..., :3]).audio_values, atol=1e-6, rtol=0)


def test_an_encoder_refuses_to_decode():
    with pytest.raises(ValueError, match="has no decoder"):
        WavTokenizerEncoderModel(tiny_config()).decode(torch.zeros(1, 1, 5, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_causal_conv": True}, "use_causal_conv"),
        ({"pad_mode": "constant"}, "pad_mode"),
        ({"norm_type": "time_group_norm"}, "norm_type"),
        ({"audio_channels": 2}, "audio_channels"),
        ({"codebook_dim": 8}, "codebook_dim"),
        ({"upsampling_ratios": []}, "upsampling_ratios"),
        ({"decoder_hidden_size": 18}, "decoder_hidden_size"),
        ({"codebook_size": 1}, "codebook_size=1, expected at least 2"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"num_residual_layers": -1}, "num_residual_layers"),
        ({"compress": 8}, "num_filters=4, expected at least 8"),
        ({"norm_eps": 0}, "norm_eps"),
        ({"num_filters": "many"}, "num_filters"),
    ],
)
def test_a_config_of_an_impossible_shape_is_refused(changes, message):
    with pytest.raises(Exception, match=message):  # huggingface_hub wraps the ValueError in its own class
        tiny_config(**changes)


def change_in_place(tensor: torch.Tensor) -> None:
    tensor.mul_(1.5)


def change_data(tensor: torch.Tensor) -> None:
    tensor.data.mul_(1.5)


def change_a_part_of_data(tensor: torch.Tensor) -> None:
    tensor.data[..., 1:].mul_(1.5) if tensor.shape[-1] > 1 else tensor.data[1:].mul_(1.5)


def clip_data(tensor: torch.Tensor) -> None:
    tensor.data.clamp_(-0.01, 0.01)


def change_by_another(tensor: torch.Tensor) -> None:
    tensor.data = 1.5 * tensor


@pytest.mark.parametrize("change", [change_in_place, change_data, change_a_part_of_data, clip_data, change_by_another])
@pytest.mark.parametrize(
    "name",
    [
        "layers.1.block.1.conv.parametrizations.weight.original0",
        "layers.1.block.1.conv.parametrizations.weight.original1",
        "lstm.weight_hh_l1",
        "lstm.bias_ih_l0",
        "codebook.embed",
    ],
)
@torch.no_grad()
def test_values_computed_from_weights_follow_them(tiny_model, name, change):
    audio = torch.randn(1, 1, 16 * 100)
    before = tiny_model.encode(audio, output_latents=True)
    (tensor,) = (tensor for key, tensor in tiny_model.state_dict(keep_vars=True).items() if key.endswith(name))
    change(tensor)
    after = tiny_model.encode(audio, output_latents=True)
    fresh = WavTokenizerModel(tiny_model.config).eval()
    fresh.load_state_dict(tiny_model.state_dict())
    expected = fresh.encode(audio, output_latents=True)
    assert not all(torch.equal(before[field], after[field]) for field in ("audio_codes", "latents"))
    assert torch.equal(after.audio_codes, expected.audio_codes) and torch.equal(after.latents, expected.latents)


@torch.no_grad()
def test_a_model_that_has_encoded_can_be_copied(tiny_model):
    audio = torch.randn(1, 1, 16 * 100)
    expected = tiny_model.encode(audio).audio_codes
    assert torch.equal(copy.deepcopy(tiny_model).encode(audio).audio_codes, expected)


def test_codes_are_the_same_with_and_without_gradients(models, rate):
    torch.manual_seed(0)
    audio = 0.1 * torch.randn(1, 1, 24000)
    with torch.enable_grad():
        codes = models(rate).encode(audio).audio_codes
    with torch.inference_mode():
        assert torch.equal(codes, models(rate).encode(audio).audio_codes)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(num_samples=st.integers(1, 5000))
def test_a_clip_of_any_length_gives_the_same_result_by_matmul_and_by_convolution(tiny_model, num_samples):
    audio = torch.randn(1, 1, num_samples)
    by_products = tiny_model.encoder_model.encoder(audio)
    with torch.enable_grad():
        by_convolutions = tiny_model.encoder_model.encoder(audio)
    assert by_products.shape == by_convolutions.shape
    torch.testing.assert_close(by_products, by_convolutions.detach(), rtol=1e-5, atol=1e-6)


def test_clips_of_many_lengths_are_padded_to_few_sizes():
    lengths = range(1000, 16 * 1000, 7)  # four octaves
    sizes = [cpu._bucket_length(length) for length in lengths]
    assert len(set(sizes)) <= 4 * 8 + 1
    assert all(length <= size <= 1.125 * length + 1 for length, size in zip(lengths, sizes, strict=True))
