"""Long and live audio: chunks and streams give the codes of the whole clip; windows of codes cross-fade."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wavtokenizer_hf import WavTokenizerModel
from wavtokenizer_hf.audio import load
from wavtokenizer_hf.long_audio import DecodeStream, EncodeStream
from wavtokenizer_hf.modeling_wavtokenizer_batching import CPU_POLICY, TOGETHER_POLICY


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def whole(model, audio):
    """Return the latents of the undivided audio. This bypasses `encode` and its automatic chunks."""
    return model.encoder_model.encoder(audio)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(length=st.integers(1, 600), frames=st.integers(1, 40), seed=st.integers(0, 1000))
def test_chunks_of_any_size_give_the_codes_of_the_whole_clip(tiny_model, length, frames, seed):
    audio = torch.from_numpy(np.random.default_rng(seed).standard_normal((1, 1, length)).astype(np.float32))
    chunked = tiny_model.encode(audio, output_latents=True, chunk_seconds=frames * 16 / 24000)
    expected = whole(tiny_model, audio)
    # 1e-6 of the scale: for small chunks, some libraries order float32 sums differently
    torch.testing.assert_close(
        chunked.latents / expected.abs().max(), expected / expected.abs().max(), atol=1e-6, rtol=0
    )
    assert torch.equal(chunked.audio_codes, tiny_model.quantizer.encode(expected))


@pytest.mark.parametrize(
    "shape",
    [
        {"upsampling_ratios": [1, 4, 2, 2]},
        {"upsampling_ratios": [2, 1, 3]},
        {"kernel_size": 4, "residual_kernel_size": 6, "last_kernel_size": 4},
        {"num_residual_layers": 3, "kernel_size": 1},
    ],
    ids=str,
)
def test_chunks_give_the_codes_of_the_whole_clip_in_models_of_other_shapes(shape):
    torch.manual_seed(0)
    model = WavTokenizerModel(tiny_config(**shape)).eval()
    for frames in (1, 2, 7):
        for length in (1, 50, 333):
            audio = torch.randn(1, 1, length)
            chunk_seconds = frames / model.config.frame_rate
            chunked = model.encode(audio, output_latents=True, chunk_seconds=chunk_seconds).latents
            expected = whole(model, audio)
            torch.testing.assert_close(
                chunked / expected.abs().max(), expected / expected.abs().max(), atol=1e-6, rtol=0
            )


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    frames=st.integers(1, 20),
    left=st.booleans(),
    together=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_chunks_of_a_ragged_batch_give_each_row_what_it_gets_alone(tiny_model, lengths, frames, left, together, seed):
    rng = np.random.default_rng(seed)
    audio, mask = torch.full((len(lengths), 1, max(lengths)), float("nan")), torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        index = slice(max(lengths) - length, None) if left else slice(0, length)
        audio[row, 0, index] = torch.from_numpy(rng.standard_normal(length).astype(np.float32))
        mask[row, index] = 1
    chunked = tiny_model.encoder_model._encode(
        audio, mask, chunk_seconds=frames * 16 / 24000, policy=TOGETHER_POLICY if together else CPU_POLICY
    )
    for row in range(len(lengths)):
        alone = tiny_model.quantizer.encode(whole(tiny_model, audio[row : row + 1, :, mask[row].bool()]))
        assert torch.equal(chunked.audio_codes[row][chunked.audio_codes_mask[row].bool()], alone[0, 0])


@pytest.mark.parametrize("num_frames", [39, 41, 79, 85, 400])
def test_chunks_have_at_most_the_requested_length_and_none_is_short(tiny_model, num_frames):
    sizes = []
    tiny_model.encoder_model.encoder.layers[0].register_forward_hook(
        lambda layer, inputs, output: sizes.append(inputs[0].shape[-1])
    )
    tiny_model.encode(torch.zeros(1, 1, num_frames * 16), chunk_seconds=40 * 16 / 24000)
    assert all(20 * 16 - 16 <= size <= 40 * 16 for size in sizes) or len(sizes) == 1
    assert len(sizes) > 1 or num_frames < 40


def test_chunks_give_the_codes_of_the_whole_clip_at_full_size(models, rate):
    torch.manual_seed(0)
    audio = 0.1 * torch.randn(1, 1, 24000 * 10 + 123)
    encoder = models(rate).encoder_model.encoder
    assert encoder.left_context + 1 + encoder.right_context == 4  # the shortest chunk, as `encode` says
    expected = whole(models(rate), audio)
    for chunk_seconds in (None, 2.5):  # None: automatic, above 10 s
        chunked = models(rate).encode(audio, output_latents=True, chunk_seconds=chunk_seconds)
        # bit-identical where this was written; libraries on other machines may order sums differently
        torch.testing.assert_close(chunked.latents, expected, atol=1e-5, rtol=0)
        assert torch.equal(chunked.audio_codes, models(rate).quantizer.encode(expected))
        assert len(chunked.audio_codes.unique()) > 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["speech", "noise", "tones"])
def test_five_minutes_have_the_same_codes_in_chunks_and_streams_of_any_size(models, rate, kind):
    rng = np.random.default_rng(0)
    audio = torch.from_numpy(five_minutes(kind, rng))
    model = models(rate)
    latents = whole(model, audio[None, None])[0].T
    expected = model.quantizer.encode(latents.T[None])[0, 0]
    found = {
        f"chunks of {seconds:g} s": model.encode(audio[None, None], chunk_seconds=seconds).audio_codes[0, 0]
        for seconds in (0.5, 3, 10, 60)
    }
    stream, cuts = EncodeStream(model), np.sort(rng.integers(0, len(audio), 200))
    chunks = [stream.push(torch.from_numpy(block)) for block in np.split(audio.numpy(), cuts)]
    found["stream"] = torch.cat([*chunks, stream.flush()])
    for name, codes in found.items():
        differ = codes != expected
        nearest = torch.cdist(latents[differ].double(), model.quantizer.codebook.embed.double()).topk(2, largest=False)
        margins = 1 - nearest.values[:, 0] / nearest.values[:, 1]
        print(f"{rate} tokens/s, {kind}, {name}: {int(differ.sum())} of {len(expected)} codes differ")
        assert (margins < 1e-6).all(), name  # float32 cannot decide which of the two entries is nearer
    assert len(expected.unique()) > 100


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_an_hour_is_encoded_in_250_megabytes():
    code = """
import re, torch
from pathlib import Path
from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerEncoderModel

def peak():  # not ru_maxrss, which begins with that of the process that started this one
    return int(re.search("VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1000

model = WavTokenizerEncoderModel(WavTokenizerConfig(upsampling_ratios=[8, 5, 4, 2])).eval()
audio = torch.empty(1, 1, 3600 * 24000).uniform_(-0.1, 0.1)
before = peak()
with torch.inference_mode():
    assert model.encode(audio).audio_codes.shape == (1, 1, 3600 * 75)
print(peak() - before)
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert 0 < int(output) < 250, f"{output} MB"


def five_minutes(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return five minutes at 24 kHz, (T,) float32."""
    length = 300 * 24000
    if kind == "noise":
        return (0.1 * rng.standard_normal(length)).astype(np.float32)
    if kind == "tones":  # a new chord of three every half a second
        frequencies = np.repeat(rng.uniform(80, 8000, (600, 3)), 12000, axis=0)
        return (0.1 * np.sin(2 * np.pi * np.cumsum(frequencies, axis=0) / 24000).sum(1)).astype(np.float32)
    speech = load(Path(__file__).parent.parent / "examples" / "speech.flac")
    takes = []  # the same sentences, each time at another level with other noise
    while sum(map(len, takes)) < length:
        takes.append(speech * rng.uniform(0.1, 1) + 0.003 * rng.standard_normal(len(speech)))
    return np.concatenate(takes)[:length].astype(np.float32)


@pytest.mark.parametrize("seconds", [0.02, 1.0])
def test_a_stream_gives_the_codes_of_the_whole_clip(models, rate, seconds):
    torch.manual_seed(0)
    audio = 0.1 * torch.randn(72000 if seconds == 1 else 6000)
    stream = EncodeStream(models(rate))
    codes = [stream.push(block) for block in audio.split(round(24000 * seconds))]
    codes.append(stream.flush())
    expected = models(rate).encode(audio[None, None]).audio_codes[0, 0]
    assert torch.equal(torch.cat(codes), expected)
    assert len(expected.unique()) > 5


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(st.integers(0, 100), min_size=0, max_size=12), seed=st.integers(0, 1000))
def test_a_stream_gives_the_same_codes_for_any_block_sizes(tiny_model, cuts, seed):
    audio = np.random.default_rng(seed).standard_normal(sum(cuts)).astype(np.float32)
    stream, codes, start = EncodeStream(tiny_model), [], 0
    for cut in cuts:
        codes.append(stream.push(audio[start : start + cut]))
        start += cut
        stream = EncodeStream(tiny_model, pickle.loads(pickle.dumps(stream.state)))  # as if moved to another device
    codes = torch.cat([*codes, stream.flush()])
    if start == 0:
        assert codes.numel() == 0
    else:
        assert torch.equal(codes, tiny_model.encode(torch.from_numpy(audio)[None, None]).audio_codes[0, 0])


def test_a_code_is_returned_after_the_promised_delay(models, rate):
    stream = EncodeStream(models(rate))
    hop = models(rate).config.hop_length
    assert stream.delay == {75: 5 * 320, 40: 5 * 600}[rate]
    assert stream.push(torch.randn(stream.delay - 1)).numel() == 0
    assert stream.push(torch.randn(1)).numel() == 1
    assert stream.push(torch.randn(hop)).numel() == 1


def test_the_state_of_a_stream_does_not_grow(tiny_model):
    stream, sizes = EncodeStream(tiny_model), []
    for _ in range(20):
        stream.push(torch.randn(1000))
        sizes.append(len(pickle.dumps(stream.state)))
    assert max(sizes[5:]) <= max(sizes[:5])
    assert max(sizes) < 20_000


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (torch.zeros(1, 10), r"shape \(1, 10\)"),
        (torch.zeros(10, dtype=torch.int16), "int16"),
        (torch.full((3,), float("nan")), "NaN"),
    ],
)
def test_a_stream_can_continue_after_a_refused_input(tiny_model, audio, message):
    stream = EncodeStream(tiny_model)
    good = torch.randn(100)
    first = stream.push(good)
    with pytest.raises(ValueError, match=message):
        stream.push(audio)
    codes = torch.cat([first, stream.flush()])
    assert torch.equal(codes, tiny_model.encode(good[None, None]).audio_codes[0, 0])
    with pytest.raises(ValueError, match="has been flushed"):
        stream.push(good)
    with pytest.raises(ValueError, match="has been flushed"):
        stream.flush()


def test_a_stream_at_another_rate_is_refused(tiny_model):
    stream = EncodeStream(tiny_model)
    with pytest.raises(ValueError, match="Got audio at 16000 Hz, expected 24000 Hz"):
        stream.push(torch.randn(100), sampling_rate=16000)
    assert len(stream.push(torch.randn(1600), sampling_rate=24000)) > 0


def test_a_stream_flushed_before_any_input_is_finished(tiny_model):
    stream = EncodeStream(tiny_model)
    assert len(stream.flush()) == 0
    with pytest.raises(ValueError, match="has been flushed"):
        stream.push(torch.randn(100))


@pytest.mark.parametrize("chunk_seconds", [0, -1, float("nan")])
def test_chunks_of_zero_length_are_refused(tiny_model, chunk_seconds):
    with pytest.raises(ValueError, match="chunk_seconds"):
        tiny_model.encode(torch.zeros(1, 1, 100), chunk_seconds=chunk_seconds)


def test_the_reach_of_the_encoder_is_not_underestimated(models, rate):
    """A change of one sample changes no frame beyond the context that the encoder declares (apart from the LSTM)."""
    encoder = models(rate).encoder_model.encoder
    hop = encoder.hop_length
    torch.manual_seed(0)
    audio = torch.randn(1, 1, 30 * hop + 1)
    before = encoder.downsample(audio)
    for index in (10 * hop, 11 * hop - 1, 30 * hop):
        changed = audio.clone()
        changed[..., index] += 1
        moved = (encoder.downsample(changed) != before).any(1)[0].nonzero().flatten()
        assert index // hop - encoder.right_context <= moved.min()
        assert moved.max() <= index // hop + encoder.left_context


HOP, RATE = 16, 24000 / 16  # samples of a code and codes of a second, of the tiny model


def some_codes(length: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 64, (rows, 1, length)))


def test_codes_that_fit_in_one_window_are_decoded_exactly(tiny_model):
    for length in (1, 19, 20):
        codes = some_codes(length)
        windowed = tiny_model.decode(codes, window_seconds=20 / RATE, overlap_seconds=10 / RATE).audio_values
        assert torch.equal(windowed, tiny_model.decode(codes).audio_values)


def test_windows_cross_fade_and_are_exact_between_overlaps(tiny_model):
    codes = some_codes(52)
    windowed = tiny_model.decode(codes, window_seconds=20 / RATE, overlap_seconds=4 / RATE).audio_values[0, 0]
    starts = [0, 16, 32]
    alone = [tiny_model.decode(codes[..., start : start + 20]).audio_values[0, 0] for start in starts]
    for index, start in enumerate(starts):
        first, last = 0 if index == 0 else 4, 20 if index == 2 else 16
        inner = windowed[(start + first) * HOP : (start + last) * HOP]
        assert torch.equal(inner, alone[index][first * HOP : last * HOP])
    for index, joint in enumerate(starts[1:]):
        previous, following = alone[index][16 * HOP :], alone[index + 1][: 4 * HOP]
        faded = windowed[joint * HOP : (joint + 4) * HOP]
        rounding = 1e-6 * windowed.abs().max()
        # between the two windows: the previous one at the start and the next one at the end, without a jump
        assert (faded >= torch.minimum(previous, following) - rounding).all() and (
            faded <= torch.maximum(previous, following) + rounding
        ).all()
        assert torch.equal(faded[:HOP], previous[:HOP]) and torch.equal(faded[-HOP:], following[-HOP:])
        share = (faded - previous)[HOP:-HOP] / (following - previous)[HOP:-HOP]  # grows linearly over the middle half
        expected = (torch.arange(2 * HOP) + 0.5) / (2 * HOP)
        sure = (following - previous)[HOP:-HOP].abs() > 0.01 * windowed.abs().max()
        assert sure.sum() > HOP
        torch.testing.assert_close(share[sure], expected[sure], atol=1e-3, rtol=0)


def test_the_last_window_is_as_long_as_the_others(tiny_model):
    codes = some_codes(38)  # the third window would have 6 codes
    windowed = tiny_model.decode(codes, window_seconds=20 / RATE, overlap_seconds=4 / RATE).audio_values[0, 0]
    last = tiny_model.decode(codes[..., -20:]).audio_values[0, 0]
    assert torch.equal(windowed[36 * HOP :], last[18 * HOP :])
    assert len(windowed) == 38 * HOP


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    cuts=st.lists(st.integers(0, 30), min_size=1, max_size=10),
    window=st.integers(1, 20),
    share=st.floats(0, 0.5),
    seed=st.integers(0, 1000),
)
def test_a_stream_of_codes_gives_the_windowed_audio_for_any_block_sizes(tiny_model, cuts, window, share, seed):
    codes = some_codes(sum(cuts), seed)[0, 0]
    settings = (window / RATE, int(share * window) / RATE)
    stream, chunks, start = DecodeStream(tiny_model, *settings), [], 0
    for cut in cuts:
        chunks.append(stream.push(codes[start : start + cut]))
        start += cut
        stream = DecodeStream(tiny_model, *settings, state=pickle.loads(pickle.dumps(stream.state)))  # as if moved
    streamed = torch.cat([*chunks, stream.flush()])
    assert len(streamed) == start * HOP
    if start > 0:
        whole = tiny_model.decode(codes[None, None], window_seconds=settings[0], overlap_seconds=settings[1])
        assert torch.equal(streamed, whole.audio_values[0, 0])


def test_audio_is_returned_as_soon_as_a_window_is_full(tiny_model):
    stream = DecodeStream(tiny_model, 20 / RATE, 4 / RATE)
    assert stream.delay == 20
    codes = some_codes(36)[0, 0].tolist()
    lengths = [len(stream.push([code])) // HOP for code in codes]
    assert lengths == 19 * [0] + [16] + 15 * [0] + [16]


def test_the_state_of_a_stream_of_codes_does_not_grow(tiny_model):
    stream, sizes = DecodeStream(tiny_model, 20 / RATE, 4 / RATE), []
    for seed in range(20):
        stream.push(some_codes(36, seed)[0, 0])
        sizes.append(len(pickle.dumps(stream.state)))
    assert max(sizes) < 5_000
    assert max(sizes[5:]) <= max(sizes[:5])


@pytest.mark.parametrize("left", [False, True])
def test_rows_of_a_padded_batch_are_decoded_in_windows_as_alone(tiny_model, left):
    codes, lengths = some_codes(50, rows=3), (50, 31, 7)
    mask = torch.zeros(3, 1, 50)
    for row, length in enumerate(lengths):
        mask[row, :, slice(50 - length, None) if left else slice(0, length)] = 1
    windows = {"window_seconds": 20 / RATE, "overlap_seconds": 4 / RATE}
    together = tiny_model.decode(codes, audio_codes_mask=mask, **windows).audio_values
    for row, length in enumerate(lengths):
        real = mask[row, 0].bool()
        alone = tiny_model.decode(codes[row : row + 1, :, real], **windows).audio_values[0, 0]
        assert torch.equal(together[row, 0][real.repeat_interleave(HOP)], alone)
        assert (together[row, 0][~real.repeat_interleave(HOP)] == 0).all()
        assert len(alone) == length * HOP


@pytest.mark.parametrize(
    ("window", "overlap"),
    [(0.4, 0), (0, 0), (-3, 0), (20, 11), (20, -1), (4, 20), (float("nan"), 0), (20, float("nan")), (float("inf"), 0)],
)
def test_invalid_windows_are_refused(tiny_model, window, overlap):
    windows = {"window_seconds": window / RATE, "overlap_seconds": overlap / RATE}
    with pytest.raises(ValueError, match="expected a window of at least one frame"):
        tiny_model.decode(some_codes(10), **windows)
    with pytest.raises(ValueError, match="expected a window of at least one frame"):
        DecodeStream(tiny_model, **windows)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[1, 2]], r"shape \(1, 2\)"),
        ([1.0, 2.0], "float32"),
        ([1, 64], "from 1 to 64, expected 0 to 63"),
        ([-1, 3], "from -1 to 3"),
    ],
)
def test_a_stream_of_codes_can_continue_after_a_refused_input(tiny_model, codes, message):
    stream = DecodeStream(tiny_model, 20 / RATE, 4 / RATE)
    good = some_codes(30)[0, 0]
    first = stream.push(good[:25])
    with pytest.raises(ValueError, match=message):
        stream.push(codes)
    streamed = torch.cat([first, stream.push(good[25:]), stream.flush()])
    whole = tiny_model.decode(good[None, None], window_seconds=20 / RATE, overlap_seconds=4 / RATE)
    assert torch.equal(streamed, whole.audio_values[0, 0])
    with pytest.raises(ValueError, match="has been flushed"):
        stream.push(good)
    with pytest.raises(ValueError, match="has been flushed"):
        stream.flush()


def test_an_overlap_of_half_a_window_may_fall_between_two_codes(tiny_model):
    codes = some_codes(60)
    halves, fewer = (
        tiny_model.decode(codes, window_seconds=15 / RATE, overlap_seconds=overlap / RATE).audio_values
        for overlap in (7.5, 7)
    )
    assert torch.equal(halves, fewer)


def test_a_stream_of_codes_refuses_a_bandwidth_id_that_the_model_lacks(tiny_model):
    with pytest.raises(ValueError, match="bandwidth_id=4"):
        DecodeStream(tiny_model, bandwidth_id=4)
