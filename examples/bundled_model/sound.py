"""Generate synthetic audio from a seed: training clips of the bundled model, and held-out utterances.

espeak-ng generates speech. numpy generates tones, chords, sweeps and noises. With one version of espeak-ng, the same
seed gives the same files.
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
# seconds of a training clip; short, since training decodes a whole clip for each segment
MIN_SECONDS, MAX_SECONDS = 1.0, 2.5
SPEECH_SHARE = 0.85
SOURCES_PER_ROUND = 16
FLOOR_DB = (-75.0, -50.0)
"""Range of the noise floor in dBFS. espeak-ng fills pauses with digital silence, which no microphone records. Without
noise, a log-mel loss would make the model learn such silence exactly, at its limit of 1e-7."""


def make_clips(folder: Path, hours: float, seed: int, name: str, num_workers: int) -> None:
    """Write clips of 1 to 2.5 s, about `hours` in total. Each `name`, such as "training", gives other clips."""
    folder.mkdir(parents=True, exist_ok=True)
    seconds, first = 0.0, 0
    with (
        ProcessPoolExecutor(num_workers) as executor,
        tqdm(total=round(hours * 3600), unit="s", desc=f"audio for {name}") as progress_bar,
    ):
        while seconds < hours * 3600:
            indices = range(first, first + SOURCES_PER_ROUND)
            for written_seconds in executor.map(partial(_write_clips, folder, seed, name), indices):
                seconds += written_seconds
                progress_bar.update(round(written_seconds))
            first += SOURCES_PER_ROUND


def make_held_out(folder: Path, seed: int) -> None:
    """Write 50 utterances, one per held-out sentence, in voices that are not in training."""
    folder.mkdir(parents=True, exist_ok=True)
    for language, sentences in texts.HELD_OUT_SENTENCES.items():
        for index, sentence in enumerate(sentences):
            random = generator(seed, "held out", language, index)
            voice = f"{language}+{random.choice(texts.HELD_OUT_VARIANTS)}"
            waveform = speak(sentence, voice, rate=random.integers(130, 190), pitch=random.integers(25, 75))
            waveform = add_floor(waveform, random)
            audio.save(folder / f"{language}_{index}.wav", to_peak(waveform, -3.0), SAMPLING_RATE)


def espeak_version() -> str:
    """Return the version of espeak-ng. Raise FileNotFoundError if it is not installed."""
    try:
        line = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "The program espeak-ng, which speaks the texts, is missing. Install it, for example: apt-get install "
            "espeak-ng"
        ) from error
    return line.split(":")[1].split("Data")[0].strip()


# ---------------------------------------------------------------------------------------------------------------------
# Sources: each function returns a waveform (T,) at 24 kHz
# ---------------------------------------------------------------------------------------------------------------------


def speak(text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
    """Return speech of espeak-ng. `rate` is in words per minute, `pitch` from 0 to 99."""
    command = ["espeak-ng", "-v", voice, "-s", str(rate), "-p", str(pitch), "--stdin", "-w", "/dev/stdout"]
    wav_bytes = subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout
    waveform, sampling_rate = soundfile.read(io.BytesIO(wav_bytes), dtype="float32")
    return soxr.resample(waveform, sampling_rate, SAMPLING_RATE)


def random_speech(random: np.random.Generator) -> np.ndarray:
    language = random.choice(list(texts.TRAINING_WORDS))
    voice = f"{language}+{random.choice(texts.TRAINING_VARIANTS)}"
    text = texts.random_text(language, random)
    return speak(text, voice, rate=random.integers(110, 220), pitch=random.integers(5, 95))


def tones(random: np.random.Generator) -> np.ndarray:
    """Return a melody: notes of 0.1 to 0.8 s with one to four voices. Each voice has its own harmonics and decay."""
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
    """Return a tone that glides between random pitches: a sine or a band-limited sawtooth."""
    points = random.integers(3, 8)
    time = np.arange(int(random.uniform(3, 6) * SAMPLING_RATE))
    pitch = np.interp(time, np.linspace(0, len(time), points), 60 * 2 ** random.uniform(0, 6.5, points))
    phase = np.cumsum(pitch / SAMPLING_RATE)
    if random.random() < 0.5:
        return np.sin(2 * np.pi * phase).astype(np.float32)
    count = np.maximum(1, np.floor(11000 / pitch))  # harmonics below 11 kHz
    return sum(np.where(k <= count, np.sin(2 * np.pi * k * phase) / k, 0) for k in range(1, 21)).astype(np.float32)


def noise(random: np.random.Generator, length: int | None = None) -> np.ndarray:
    """Return noise with a random spectral slope and a varying level."""
    length = length or int(random.uniform(3, 6) * SAMPLING_RATE)
    spectrum = np.fft.rfft(random.standard_normal(length))
    frequencies = np.fft.rfftfreq(length, 1 / SAMPLING_RATE)
    colored = np.fft.irfft(spectrum * np.maximum(frequencies, 20) ** -random.uniform(0, 1), length)
    points = random.integers(2, 10)
    level = 10 ** (np.interp(np.arange(length), np.linspace(0, length, points), random.uniform(-30, 0, points)) / 20)
    return (colored / colored.std() * level).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Effects
# ---------------------------------------------------------------------------------------------------------------------


def equalize(waveform: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Imitate another microphone: apply a random smooth gain over frequency, within ±12 dB."""
    spectrum = np.fft.rfft(waveform)
    octaves = np.log2(np.maximum(np.linspace(0, SAMPLING_RATE / 2, len(spectrum)), 40) / 40)
    gain = np.interp(octaves, np.linspace(0, octaves[-1], 8), np.clip(random.normal(0, 5, 8), -12, 12))
    return np.fft.irfft(spectrum * 10 ** (gain / 20), len(waveform)).astype(np.float32)


def reverberate(waveform: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Imitate a small room: add an echo of noise that decays by 60 dB within 0.1 to 0.5 s."""
    decay = random.uniform(0.1, 0.5)
    time = np.arange(int(decay * SAMPLING_RATE)) / SAMPLING_RATE
    echo = random.standard_normal(len(time)) * 10 ** (-3 * time / decay)
    echo *= random.uniform(0.1, 0.6) / np.linalg.norm(echo)
    echo[0] += 1
    size = 1 << (len(waveform) + len(echo)).bit_length()
    wet = np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(echo, size), size)
    return wet[: len(waveform)].astype(np.float32)


def add_floor(waveform: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Scale the waveform to full scale, and add soft noise that falls slightly with frequency, as in rooms."""
    floor = noise(random, len(waveform))
    level = 10 ** (random.uniform(*FLOOR_DB) / 20)
    return to_peak(waveform, 0.0) + level * (floor / floor.std() + random.standard_normal(len(floor))).astype(
        np.float32
    )


def to_peak(waveform: np.ndarray, decibels: float) -> np.ndarray:
    return waveform * np.float32(10 ** (decibels / 20) / max(np.abs(waveform).max(), 1e-9))


def mix(waveform: np.ndarray, other: np.ndarray, decibels: float) -> np.ndarray:
    """Add another waveform, repeated or cut to length, `decibels` below the first."""
    other = np.resize(other, len(waveform))
    return waveform + other * np.float32(waveform.std() / max(other.std(), 1e-9) * 10 ** (-decibels / 20))


# ---------------------------------------------------------------------------------------------------------------------
# Clips
# ---------------------------------------------------------------------------------------------------------------------


def _write_clips(folder: Path, seed: int, name: str, index: int) -> float:
    """Write the clips of source number `index`. Return their total seconds."""
    random = generator(seed, name, index)
    waveform = _source(random)
    num_samples, start = 0, 0
    while len(waveform) - start >= MIN_SECONDS * SAMPLING_RATE:
        length = int(random.uniform(MIN_SECONDS, MAX_SECONDS) * SAMPLING_RATE)
        clip = waveform[start : start + length]
        if len(clip) >= MIN_SECONDS * SAMPLING_RATE:
            audio.save(folder / f"{index:06d}_{start:07d}.wav", to_peak(clip, -3.0), SAMPLING_RATE)
            num_samples += len(clip)
        start += length
    return num_samples / SAMPLING_RATE


def _source(random: np.random.Generator) -> np.ndarray:
    if random.random() < SPEECH_SHARE:
        waveform = random_speech(random)
        if random.random() < 0.25:
            background = [noise, tones, sweep, random_speech][random.integers(4)]
            waveform = mix(waveform, background(random), random.uniform(5, 35))
    else:
        waveform = [tones, sweep, noise][random.integers(3)](random)
    if random.random() < 0.6:
        waveform = equalize(waveform, random)
    if random.random() < 0.2:
        waveform = reverberate(waveform, random)
    return add_floor(waveform, random)


def generator(*parts: int | str) -> np.random.Generator:
    """Return a random generator that is seeded by all `parts`."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
