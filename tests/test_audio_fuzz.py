"""
Damaged audio files give samples or a ValueError within a second, and use no more memory than their content needs.
"""

import io
import os
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpus.awkward import aiff, au, caf, encoded, float_wav, id3v2, rf64, rifx, voice, wav
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from wavtokenizer_hf import audio, pipes
from wavtokenizer_hf.audio_errors import FAILURE_KINDS, AudioError


def variable_mp3_without_header() -> bytes:
    content = encoded(voice(0.4, 16000), "MP3", rate=16000, bitrate_mode="VARIABLE", compression_level=0.5)
    return content[content.index(content[:2], 100) :]


VOICE = voice(0.1, channels=2)
VALID = {
    "wav": wav(VOICE),
    "wav24": wav(VOICE, bits=24),
    "wav_float": float_wav(VOICE),
    "wav_rifx": rifx(VOICE[:, :1]),
    "wav_rf64": rf64(VOICE[:, :1]),
    "wav_adpcm": encoded(VOICE, "WAV", "MS_ADPCM"),
    "wav_gsm": encoded(VOICE[:, :1], "WAV", "GSM610", 8000),
    "aiff": aiff(VOICE),
    "au": au(VOICE),
    "caf": caf(VOICE),
    "w64": encoded(VOICE, "W64", "PCM_16"),
    "flac": encoded(VOICE, "FLAC"),
    "ogg": encoded(VOICE, "OGG", "VORBIS"),
    "opus": encoded(voice(0.1, 48000), "OGG", "OPUS", 48000),
    "mp3": encoded(VOICE, "MP3", rate=16000),
    "mp3_bare": variable_mp3_without_header(),
    "mp3_tagged": id3v2(300) + encoded(VOICE, "MP3", rate=16000),
    "nist": encoded(VOICE, "NIST", "PCM_16"),
    "voc": encoded(VOICE[:, :1], "VOC", "PCM_16", 16000),
}
SECONDS, MEMORY = 1.0, 200 * 2**20


@pytest.fixture(scope="module", autouse=True)
def decoders_are_imported():
    """Import the decoders first. Otherwise the first file would be charged for the import time."""
    with pytest.raises(AudioError):
        audio.decode(b"no audio")


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Return content with bytes flipped, overwritten, removed, duplicated and inserted, mostly in the headers."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        near = draw(st.sampled_from([64, 256, len(content)]))
        at = draw(st.integers(0, max(0, min(near, len(content)) - 1)))
        kind = draw(st.sampled_from(["flip", "number", "cut", "end", "insert", "repeat"]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":
            number = draw(st.sampled_from([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
            content[at : at + 4] = struct.pack(draw(st.sampled_from("<>")) + "I", number)
        elif kind == "cut":
            del content[at : at + draw(st.integers(1, 64))]
        elif kind == "end":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        else:
            content[at:at] = content[at : at + draw(st.integers(1, 512))]
    return bytes(content)


def check_answer(read, what: str) -> None:
    """Check for samples or an AudioError of a documented kind, within the time and memory limits."""
    error = None
    tracemalloc.start()
    started = time.thread_time()  # not wall time, which other processes affect
    try:
        samples = read()
        assert samples.dtype == np.float32 and samples.ndim == 1 and len(samples) > 0 and np.isfinite(samples).all()
        size = samples.nbytes
    except AudioError as refusal:
        size, error = 0, refusal
    finally:
        seconds, (_, peak) = time.thread_time() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert error is None or (error.kind in FAILURE_KINDS and "\n" not in str(error)), what
    assert seconds < SECONDS, what
    assert peak < MEMORY + 16 * size, what  # the samples, and their blocks before concatenation


def read_in_every_way(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    check_answer(lambda: audio.decode(content, max_seconds=3600).audio, "content")
    check_answer(lambda: np.concatenate(list(audio.read_blocks(path, block_seconds=0.05))), "blocks")
    stream = io.BufferedReader(io.BytesIO(content))
    check_answer(lambda: np.concatenate(list(pipes.read_audio(stream))), "pipe")


def fuzz(name: str, path: Path, num_examples: int) -> None:
    @seed(18)
    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(damaged(VALID[name]))
    def run(content):
        read_in_every_way(content, path)

    run()


@pytest.mark.parametrize("name", VALID)
def test_a_damaged_file_gives_samples_or_an_error_with_a_reason(name, tmp_path):
    fuzz(name, tmp_path / "file", int(os.environ.get("WAVTOKENIZER_FUZZ", "15")))


@pytest.mark.slow
@pytest.mark.parametrize("name", VALID)
def test_many_damaged_files_give_samples_or_an_error_with_a_reason(name, tmp_path):
    fuzz(name, tmp_path / "file", 3000)


@pytest.mark.parametrize("name", VALID)
def test_the_files_are_valid_before_they_are_damaged(name):
    assert len(audio.decode(VALID[name]).audio) > 0


@pytest.mark.parametrize("size", [2**48, 2**62, 2**64 - 1])
@pytest.mark.parametrize("name", ["w64", "caf"])
def test_a_chunk_beyond_the_largest_file_offset_gives_samples_or_an_error(name, size, tmp_path):
    """A reader cannot seek to the position after it. The slow test above found this."""
    if name == "w64":
        start = VALID[name].index(b"data\xf3") + 16
        content = VALID[name][:start] + struct.pack("<Q", size) + VALID[name][start + 8 :]
    else:
        start = VALID[name].index(b"data") + 4
        content = VALID[name][:start] + struct.pack(">Q", size) + VALID[name][start + 8 :]
    read_in_every_way(content, tmp_path / "file")


def test_a_header_that_claims_hours_takes_no_memory():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in (
        wav(VOICE, data_size=2**31 - 2**20),
        encoded(VOICE, "FLAC")[:18] + (24000 << 44 | 1 << 41 | 15 << 36 | 2**36 - 1).to_bytes(8, "big") + bytes(100),
        wav(VOICE, header_rate=1),
    ):
        with pytest.raises(AudioError):
            audio.decode(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10


def test_a_file_over_the_length_limit_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *arguments, **options: pytest.fail("it was read"))
    with pytest.raises(AudioError, match=r"expected at most 0\.05 s") as caught:
        audio.decode(VALID["flac"], max_seconds=0.05)
    assert caught.value.kind == "too-long"
