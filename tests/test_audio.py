"""Reading and writing audio files."""

import importlib.util
import logging
import sys

import numpy as np
import pytest
import soundfile
import torch

from wavtokenizer_hf import audio


@pytest.fixture
def tone():
    """Return half a second of a 440 Hz sine at 24 kHz."""
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(12000) / 24000)).astype(np.float32)


@pytest.mark.parametrize("read", [audio.load, audio.decode, audio.seconds])
def test_an_unreadable_file_raises_an_error_that_names_it(tmp_path, monkeypatch, read):
    path = audio.save(tmp_path / "a.wav", np.zeros(10, np.float32))
    monkeypatch.setattr(audio.os, "access", lambda path, mode: False)  # tests may run as root, who can read every file
    with pytest.raises(PermissionError, match="no permission to read"):
        read(path)


def test_a_file_at_the_models_rate_is_read_unchanged(tone, tmp_path):
    soundfile.write(tmp_path / "tone.wav", tone, 24000, subtype="FLOAT")
    loaded = audio.load(tmp_path / "tone.wav")
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, tone)


def test_another_rate_is_resampled_and_logged(tmp_path, tone, caplog):
    caplog.set_level(logging.INFO)
    time = np.arange(22050) / 44100
    soundfile.write(tmp_path / "tone.flac", 0.5 * np.sin(2 * np.pi * 440 * time), 44100)
    loaded = audio.load(tmp_path / "tone.flac")
    assert len(loaded) == 12000
    np.testing.assert_allclose(loaded[500:-500], tone[500:-500], atol=1e-3)
    assert "resampled from 44100 to 24000 Hz" in caplog.text


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 96000, 12345])
@pytest.mark.parametrize(("name", "subtype"), [("a.wav", "FLOAT"), ("a.flac", None), ("a.mp3", None), ("a.ogg", None)])
def test_load_gives_the_same_samples_as_transformers(tmp_path, rate, channels, name, subtype):
    if not hasattr(audio.audio_utils, "_load_audio_soundfile"):
        pytest.skip("this is an older version of transformers")
    if name == "a.mp3" and rate in (96000, 12345):
        pytest.skip("MP3 has no such rate")
    noise = np.random.default_rng(0).uniform(-1, 1, (10001, channels))
    soundfile.write(tmp_path / name, noise, rate, subtype=subtype)
    expected = audio.audio_utils.load_audio(str(tmp_path / name), sampling_rate=24000, backend="soundfile")
    np.testing.assert_array_equal(audio.load(tmp_path / name), expected)


def test_several_channels_are_averaged_with_a_warning(tmp_path, tone, caplog):
    soundfile.write(tmp_path / "stereo.wav", np.stack([tone, -0.5 * tone], 1), 24000, subtype="FLOAT")
    np.testing.assert_allclose(audio.load(tmp_path / "stereo.wav"), 0.25 * tone, atol=1e-6)
    assert "stereo.wav: 2 channels, averaged to one" in caplog.text


@pytest.mark.parametrize("backend", ["torchcodec", "torchaudio"])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("rate", [24000, 44100])
def test_other_backends_give_the_same_audio_up_to_resampling(tmp_path, tone, backend, channels, rate, caplog):
    caplog.set_level(logging.INFO)
    skip_without(backend)
    time = np.arange(rate) / rate
    tones = np.stack([np.sin(2 * np.pi * 440 * (i + 1) * time) for i in range(channels)], 1)
    soundfile.write(tmp_path / "sound.wav", 0.5 * tones, rate, subtype="FLOAT")
    expected = audio.load(tmp_path / "sound.wav")
    said = caplog.messages[:]
    loaded = audio.load(tmp_path / "sound.wav", backend=backend)
    assert loaded.dtype == np.float32 and loaded.shape == (24000,)
    # away from the ends, the three resamplers agree on tones to well below audibility
    np.testing.assert_allclose(loaded[500:-500], expected[500:-500], atol=1e-6 if rate == 24000 else 1e-3)
    assert caplog.messages == 2 * said


@pytest.mark.parametrize("backend", ["torchcodec", "torchaudio"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_other_backends_refuse_files_without_audio(tmp_path, backend, content):
    skip_without(backend)
    (tmp_path / "sound.wav").write_bytes(content)
    with pytest.raises(ValueError, match="Cannot read"):
        audio.load(tmp_path / "sound.wav", backend=backend)


def skip_without(backend: str) -> None:
    """
    Skip if a backend is missing. No extra installs them: torchcodec needs FFmpeg's libraries, and torchaudio reads
    with torchcodec.
    """
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchcodec does not import: {error}")
    if backend == "torchaudio":
        pytest.importorskip("torchaudio")
        if not hasattr(audio.audio_utils, "_load_audio_soundfile"):
            pytest.skip("this is an older version of transformers")


@pytest.mark.parametrize("backend", ["torchcodec", "torchaudio"])
def test_a_backend_that_is_not_installed_is_named(tmp_path, tone, backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    path = audio.save(tmp_path / "tone.wav", tone)
    if backend == "torchaudio" and importlib.util.find_spec("torchaudio"):
        pytest.skip("torchaudio is installed")
    with pytest.raises(ImportError, match=backend):
        audio.load(path, backend=backend)


def test_an_unknown_backend_is_refused(tmp_path, tone):
    with pytest.raises(ValueError, match="expected one of soundfile, torchcodec, torchaudio"):
        audio.load(audio.save(tmp_path / "tone.wav", tone), backend="librosa")


@pytest.mark.parametrize("shape", [(12000,), (1, 12000), (1, 1, 12000)])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_saved_audio_is_read_back(tmp_path, tone, shape, kind, caplog):
    values = tone.reshape(shape)
    path = audio.save(tmp_path / "tone.wav", torch.from_numpy(values) if kind == "torch" else values)
    np.testing.assert_allclose(audio.load(path), tone, atol=2 / 32768)  # 16-bit integers
    assert soundfile.info(path).subtype == "PCM_16"
    assert not caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["tone.wav"]


def test_a_float_file_keeps_every_value(tmp_path, tone):
    path = audio.save(tmp_path / "loud.wav", 3 * tone, subtype="FLOAT")
    np.testing.assert_array_equal(audio.load(path), 3 * tone)


def test_clipping_is_never_silent(tmp_path, tone, caplog):
    audio.save(tmp_path / "loud.wav", 3 * tone)
    assert f"{(np.abs(3 * tone) > 1).sum()} of 12000 samples lie outside [-1, 1]" in caplog.text


def test_a_failed_save_keeps_the_previous_file_and_leaves_no_other(tmp_path, tone, monkeypatch):
    path = audio.save(tmp_path / "tone.wav", tone)
    before = path.read_bytes()

    def full_disk(file, samples):
        raise OSError("No space left on device")

    monkeypatch.setattr(soundfile.SoundFile, "write", full_disk)
    with pytest.raises(OSError, match="No space"):
        audio.save(path, 0.1 * tone)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["tone.wav"]


def test_an_unwritable_path_raises_oserror(tmp_path, tone):
    with pytest.raises(OSError, match="Cannot write"):
        audio.save(tmp_path / "absent" / "tone.wav", tone)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "There is no file"),
        (b"", ValueError, "Cannot read"),
        (b"<html>not found</html>", ValueError, "Cannot read"),
    ],
)
def test_load_refuses(tmp_path, content, error, message):
    path = tmp_path / "sound.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        audio.load(path)


def test_a_file_without_samples_is_refused(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 24000)
    with pytest.raises(ValueError, match="holds no samples"):
        audio.load(tmp_path / "empty.wav")


@pytest.mark.parametrize(
    ("values", "name", "message"),
    [
        (np.zeros((2, 100), np.float32), "a.wav", r"shape \(2, 100\), expected one mono clip"),
        (np.zeros(0, np.float32), "a.wav", r"shape \(0,\)"),
        (np.zeros(100, np.int16), "a.wav", "dtype int16"),
        (np.full(100, np.nan), "a.wav", "NaN"),
        (np.zeros(100, np.float32), "a.txt", "extension"),
        (np.zeros(100, np.float32), "a", "extension"),
    ],
)
def test_save_refuses_and_writes_nothing(tmp_path, values, name, message):
    with pytest.raises(ValueError, match=message):
        audio.save(tmp_path / name, values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "subtype"), [("a.wav", "PCM_16"), ("a.wav", "FLOAT"), ("a.flac", None), ("a.mp3", None)]
)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100])
def test_blocks_join_to_the_samples_of_the_whole_file(tmp_path, name, subtype, channels, rate):
    noise = 0.5 * np.random.default_rng(0).uniform(-1, 1, (30001, channels))
    soundfile.write(tmp_path / name, noise, rate, subtype=subtype)
    blocks = list(audio.read_blocks(tmp_path / name, 24000, block_seconds=0.1))
    assert len(blocks) > 3
    np.testing.assert_array_equal(np.concatenate(blocks), audio.load(tmp_path / name))


@pytest.mark.parametrize(("cut", "error"), [(b"", "Cannot read"), (b"fLaC and then nothing", "Cannot read")])
def test_reading_blocks_refuses_files_without_audio(tmp_path, cut, error):
    (tmp_path / "a.flac").write_bytes(cut)
    with pytest.raises(ValueError, match=error):
        list(audio.read_blocks(tmp_path / "a.flac"))


def test_a_truncated_flac_file_fails_at_its_end(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-1, 1, 96000), 24000)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(whole[: len(whole) // 2])
    blocks = audio.read_blocks(tmp_path / "a.flac", block_seconds=0.5)
    assert len(next(blocks)) == 12000
    with pytest.raises(audio.TruncatedAudioError, match="its header promises 96000"):
        list(blocks)


def test_writing_in_blocks_gives_the_same_file_as_writing_at_once(tmp_path, tone):
    audio.save(tmp_path / "whole.wav", 3 * tone)
    with audio.writing(tmp_path / "blocks.wav") as write:
        for block in np.array_split(3 * tone, 7):
            write(block)
        assert not (tmp_path / "blocks.wav").exists()
    assert (tmp_path / "blocks.wav").read_bytes() == (tmp_path / "whole.wav").read_bytes()


def test_an_error_between_blocks_leaves_no_file(tmp_path, tone):
    def stop_after_a_block():
        with audio.writing(tmp_path / "a.wav") as write:
            write(tone)
            raise KeyError

    with pytest.raises(KeyError):
        stop_after_a_block()
    assert not list(tmp_path.iterdir())


def test_a_wav_file_too_long_for_its_header_is_refused(tmp_path, tone, monkeypatch):
    monkeypatch.setattr(audio, "MAX_WAV_SIZE", 20000)
    with pytest.raises(ValueError, match="4 GiB"):
        audio.save(tmp_path / "a.wav", tone)
    assert not list(tmp_path.iterdir())
