"""Long and live audio: chunks and streams give the codes of the whole."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import wavtokenizer_hf.modeling_wavtokenizer as modeling
from wavtokenizer_hf.long_audio import EncodeStream


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def whole(model, audio):
    """Latents of the audio in one piece, past `encode` and its automatic chunks."""
    return model.encoder_model.encoder(audio)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(length=st.integers(1, 600), frames=st.integers(1, 40), seed=st.integers(0, 1000))
def test_chunks_of_any_size_give_what_the_whole_gives(tiny_model, length, frames, seed):
    audio = torch.from_numpy(np.random.default_rng(seed).standard_normal((1, 1, length)).astype(np.float32))
    chunked = tiny_model.encode(audio, output_latents=True, chunk_seconds=frames * 16 / 24000)
    expected = whole(tiny_model, audio)
    # 1e-6 of the scale: small chunks let some libraries order float32 sums in another way
    torch.testing.assert_close(
        chunked.latents / expected.abs().max(), expected / expected.abs().max(), atol=1e-6, rtol=0
    )
    assert torch.equal(chunked.audio_codes, tiny_model.quantizer.encode(expected))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    frames=st.integers(1, 20),
    left=st.booleans(),
    together=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_chunks_of_a_ragged_batch_give_each_row_what_it_gets_alone(
    tiny_model, monkeypatch, lengths, frames, left, together, seed
):
    rng = np.random.default_rng(seed)
    audio, mask = torch.full((len(lengths), 1, max(lengths)), float("nan")), torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        place = slice(max(lengths) - length, None) if left else slice(0, length)
        audio[row, 0, place] = torch.from_numpy(rng.standard_normal(length).astype(np.float32))
        mask[row, place] = 1
    with monkeypatch.context() as patch:
        if together:
            patch.setattr(modeling, "_one_by_one", lambda audio: False)
        chunked = tiny_model.encode(audio, mask, chunk_seconds=frames * 16 / 24000)
    for row in range(len(lengths)):
        alone = tiny_model.quantizer.encode(whole(tiny_model, audio[row : row + 1, :, mask[row].bool()]))
        assert torch.equal(chunked.audio_codes[row][chunked.audio_codes_mask[row]], alone[0, 0])


def test_chunks_give_the_codes_of_the_whole_at_full_size(models, rate):
    torch.manual_seed(0)
    audio = 0.1 * torch.randn(1, 1, 24000 * 10 + 123)
    expected = whole(models(rate), audio)
    for chunk_seconds in (None, 2.5):  # None: automatic, above 10 s
        chunked = models(rate).encode(audio, output_latents=True, chunk_seconds=chunk_seconds)
        # equal to the last bit where this was written; libraries of other machines may order sums in other ways
        torch.testing.assert_close(chunked.latents, expected, atol=1e-5, rtol=0)
        assert torch.equal(chunked.audio_codes, models(rate).quantizer.encode(expected))
        assert len(chunked.audio_codes.unique()) > 100


@pytest.mark.parametrize("seconds", [0.02, 1.0])
def test_a_stream_gives_the_codes_of_the_whole(models, rate, seconds):
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
def test_a_stream_does_not_care_how_it_is_cut(tiny_model, cuts, seed):
    audio = np.random.default_rng(seed).standard_normal(sum(cuts)).astype(np.float32)
    stream, codes, start = EncodeStream(tiny_model), [], 0
    for cut in cuts:
        codes.append(stream.push(audio[start : start + cut]))
        start += cut
        stream = EncodeStream(tiny_model, pickle.loads(pickle.dumps(stream.state)))  # as if moved elsewhere
    codes = torch.cat([*codes, stream.flush()])
    if start == 0:
        assert codes.numel() == 0
    else:
        assert torch.equal(codes, tiny_model.encode(torch.from_numpy(audio)[None, None]).audio_codes[0, 0])


def test_a_code_comes_out_after_the_delay_that_is_promised(models, rate):
    stream = EncodeStream(models(rate))
    hop = models(rate).config.hop_length
    assert stream.delay == {75: 5 * 320, 40: 5 * 600}[rate]
    assert stream.push(torch.randn(stream.delay - 1)).numel() == 0
    assert stream.push(torch.randn(1)).numel() == 1
    assert stream.push(torch.randn(hop)).numel() == 1


def test_what_a_stream_remembers_does_not_grow(tiny_model):
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
def test_a_stream_refuses_and_can_go_on(tiny_model, audio, message):
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


@pytest.mark.parametrize("chunk_seconds", [0, -1, float("nan")])
def test_chunks_of_no_length_are_refused(tiny_model, chunk_seconds):
    with pytest.raises(ValueError, match="chunk_seconds"):
        tiny_model.encode(torch.zeros(1, 1, 100), chunk_seconds=chunk_seconds)


def test_the_reach_of_the_encoder_is_not_underestimated(models, rate):
    """A change of one sample moves no frame farther away than the encoder says it reaches (the LSTM aside)."""
    encoder = models(rate).encoder_model.encoder
    hop = encoder.hop_length
    torch.manual_seed(0)
    audio = torch.randn(1, 1, 30 * hop + 1)
    before = encoder._convolve(audio, None)
    for place in (10 * hop, 11 * hop - 1, 30 * hop):
        changed = audio.clone()
        changed[..., place] += 1
        moved = (encoder._convolve(changed, None) != before).any(1)[0].nonzero().flatten()
        assert place // hop - encoder.frames_ahead <= moved.min()
        assert moved.max() <= place // hop + encoder.frames_back
