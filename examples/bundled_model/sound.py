"""The sound that the bundled model is trained on, and the utterances that are held out: all of it made here, from a
seed.

Speech is espeak-ng's; tones, chords, sweeps and noises are numpy's. The same seed gives the same files with the same
version of espeak-ng.
"""

import hashlib
import io
import subprocess
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import soxr
import texts
from tqdm import tqdm

from wavtokenizer_hf import audio


SAMPLING_RATE = 24000
SHORTEST, LONGEST = 1.0, 2.5  # seconds of a training clip: short, since training decodes a whole clip for each segment
SPEECH_SHARE = 0.85
SOURCES = 16  # made at a time
FLOOR_DB = (-75.0, -50.0)
"""dBFS of the noise under everything. espeak-ng fills its pauses with exact zeros: there a log-mel loss asks for 1e-7
and nothing else, and would spend the model on silence that no microphone records."""


def make_clips(folder: Path, hours: float, seed: int, name: str, num_workers: int) -> None:
    """Writes clips of 1 to 2.5 s to train or validate on, about `hours` in all; each `name` gives others."""
    folder.mkdir(parents=True, exist_ok=True)
    seconds, first = 0.0, 0
    with (
        ProcessPoolExecutor(num_workers) as executor,
        tqdm(total=round(hours * 3600), unit="s", desc=f"sound for {name}") as bar,
    ):
        while seconds < hours * 3600:
            for made in executor.map(partial(_write_clips, folder, seed, name), range(first, first + SOURCES)):
                seconds += made
                bar.update(round(made))
            first += SOURCES


def make_held_out(folder: Path, seed: int) -> None:
    """Writes 50 utterances, one for each held-out sentence, by voices that training never hears."""
    folder.mkdir(parents=True, exist_ok=True)
    for language, sentences in texts.HELD_OUT_SENTENCES.items():
        for index, sentence in enumerate(sentences):
            random = generator(seed, "held out", language, index)
            voice = f"{language}+{random.choice(texts.HELD_OUT_VARIANTS)}"
            waveform = speak(sentence, voice, rate=random.integers(130, 190), pitch=random.integers(25, 75))
            waveform = add_floor(waveform, random)
            audio.save(folder / f"{language}_{index}.wav", to_peak(waveform, -3.0), SAMPLING_RATE)


def espeak_version() -> str:
    """Raises FileNotFoundError if espeak-ng is not installed."""
    try:
        line = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "There is no program espeak-ng, which speaks the texts. Install it, as with: apt-get install espeak-ng"
        ) from error
    return line.split(":")[1].split("Data")[0].strip()


# ---------------------------------------------------------------------------------------------------------------------
# Sources: each gives a waveform (T,) at 24 kHz
# ---------------------------------------------------------------------------------------------------------------------


def speak(text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
    """espeak-ng's speech. `rate` in words a minute, `pitch` from 0 to 99."""
    command = ["espeak-ng", "-v", voice, "-s", str(rate), "-p", str(pitch), "--stdin", "-w", "/dev/stdout"]
    spoken = subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout
    waveform, sampling_rate = soundfile.read(io.BytesIO(spoken), dtype="float32")
    return soxr.resample(waveform, sampling_rate, SAMPLING_RATE)


def random_speech(random: np.random.Generator) -> np.ndarray:
    language = random.choice(list(texts.TRAINING_WORDS))
    voice = f"{language}+{random.choice(texts.TRAINING_VARIANTS)}"
    text = texts.random_text(language, random)
    return speak(text, voice, rate=random.integers(110, 220), pitch=random.integers(5, 95))


def tones(random: np.random.Generator) -> np.ndarray:
    """A melody of chords: notes of 0.1 to 0.8 s of one to four voices, each with harmonics of its own and a decay."""
    notes = []
    for _ in range(random.integers(5, 12)):
        time = np.arange(int(random.uniform(0.1, 0.8) * SAMPLING_RATE)) / SAMPLING_RATE
        note = np.zeros(len(time))
        for _ in range(random.integers(1, 5)):
            pitch = 55 * 2 ** (random.integers(0, 60) / 12)
            fall = random.uniform(0.5, 2.5)
            for harmonic in range(1, min(20, int(11000 / pitch)) + 1):
                note += harmonic**-fall * np.sin(2 * np.pi * (harmonic * pitch * time + random.random()))
        rise = np.minimum(1, time / 0.005) * np.minimum(1, (time[-1] - time) / 0.01)
        notes.append(note * rise * np.exp(-random.uniform(0, 6) * time))
    return np.concatenate(notes).astype(np.float32)


def sweep(random: np.random.Generator) -> np.ndarray:
    """A tone that glides between random pitches, at times with the buzz of a sawtooth."""
    points = random.integers(3, 8)
    time = np.arange(int(random.uniform(3, 6) * SAMPLING_RATE))
    pitch = np.interp(time, np.linspace(0, len(time), points), 60 * 2 ** random.uniform(0, 6.5, points))
    phase = np.cumsum(pitch / SAMPLING_RATE)
    if random.random() < 0.5:
        return np.sin(2 * np.pi * phase).astype(np.float32)
    count = np.maximum(1, np.floor(11000 / pitch))  # harmonics below 11 kHz
    return sum(np.where(k <= count, np.sin(2 * np.pi * k * phase) / k, 0) for k in range(1, 21)).astype(np.float32)


def noise(random: np.random.Generator, length: int | None = None) -> np.ndarray:
    """Noise of a random colour whose level comes and goes."""
    length = length or int(random.uniform(3, 6) * SAMPLING_RATE)
    spectrum = np.fft.rfft(random.standard_normal(length))
    frequencies = np.fft.rfftfreq(length, 1 / SAMPLING_RATE)
    colored = np.fft.irfft(spectrum * np.maximum(frequencies, 20) ** -random.uniform(0, 1), length)
    points = random.integers(2, 10)
    level = 10 ** (np.interp(np.arange(length), np.linspace(0, length, points), random.uniform(-30, 0, points)) / 20)
    return (colored / colored.std() * level).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# What happens to a source
# ---------------------------------------------------------------------------------------------------------------------


def equalize(waveform: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Another microphone: a random smooth gain over frequency, within 12 dB either way."""
    spectrum = np.fft.rfft(waveform)
    octaves = np.log2(np.maximum(np.linspace(0, SAMPLING_RATE / 2, len(spectrum)), 40) / 40)
    gain = np.interp(octaves, np.linspace(0, octaves[-1], 8), np.clip(random.normal(0, 5, 8), -12, 12))
    return np.fft.irfft(spectrum * 10 ** (gain / 20), len(waveform)).astype(np.float32)


def reverberate(waveform: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A small room: noise that decays by 60 dB within 0.1 to 0.5 s, behind the direct sound."""
    decay = random.uniform(0.1, 0.5)
    time = np.arange(int(decay * SAMPLING_RATE)) / SAMPLING_RATE
    echo = random.standard_normal(len(time)) * 10 ** (-3 * time / decay)
    echo *= random.uniform(0.1, 0.6) / np.linalg.norm(echo)
    echo[0] += 1
    size = 1 << (len(waveform) + len(echo)).bit_length()
    wet = np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(echo, size), size)
    return wet[: len(waveform)].astype(np.float32)


def add_floor(waveform: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """
    The waveform at full scale, and under it soft noise, falling a little towards high frequencies as a room's does.
    """
    floor = noise(random, len(waveform))
    level = 10 ** (random.uniform(*FLOOR_DB) / 20)
    return to_peak(waveform, 0.0) + level * (floor / floor.std() + random.standard_normal(len(floor))).astype(
        np.float32
    )


def to_peak(waveform: np.ndarray, decibels: float) -> np.ndarray:
    return waveform * np.float32(10 ** (decibels / 20) / max(np.abs(waveform).max(), 1e-9))


def mix(waveform: np.ndarray, other: np.ndarray, decibels: float) -> np.ndarray:
    """Adds another sound, repeated or cut to length, that many decibels below the first."""
    other = np.resize(other, len(waveform))
    return waveform + other * np.float32(waveform.std() / max(other.std(), 1e-9) * 10 ** (-decibels / 20))


# ---------------------------------------------------------------------------------------------------------------------
# Clips
# ---------------------------------------------------------------------------------------------------------------------


def _write_clips(folder: Path, seed: int, name: str, index: int) -> float:
    """The clips of source number `index`; returns how many seconds were written."""
    random = generator(seed, name, index)
    waveform = _source(random)
    written, start = 0, 0
    while len(waveform) - start >= SHORTEST * SAMPLING_RATE:
        length = int(random.uniform(SHORTEST, LONGEST) * SAMPLING_RATE)
        piece = waveform[start : start + length]
        if len(piece) >= SHORTEST * SAMPLING_RATE:
            audio.save(folder / f"{index:06d}_{start:07d}.wav", to_peak(piece, -3.0), SAMPLING_RATE)
            written += len(piece)
        start += length
    return written / SAMPLING_RATE


def _source(random: np.random.Generator) -> np.ndarray:
    if random.random() < SPEECH_SHARE:
        waveform = random_speech(random)
        if random.random() < 0.25:
            behind = [noise, tones, sweep, random_speech][random.integers(4)]
            waveform = mix(waveform, behind(random), random.uniform(5, 35))
    else:
        waveform = [tones, sweep, noise][random.integers(3)](random)
    if random.random() < 0.6:
        waveform = equalize(waveform, random)
    if random.random() < 0.2:
        waveform = reverberate(waveform, random)
    return add_floor(waveform, random)


def generator(*parts: int | str) -> np.random.Generator:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
