"""Collect recorded audio for the bundled model: human speech and music from Debian packages, split by speaker.

`make_recordings` downloads the packages by name (apt-get, without root), unpacks them (dpkg -x), and writes 24 kHz
clips to training/, validation/ and held_out_voices/. Held-out speakers are in held_out_voices/ only.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import sound
import soundfile
import soxr
from tqdm import tqdm

from wavtokenizer_hf import audio


@dataclass(frozen=True)
class Package:
    """Debian package with recorded audio."""

    name: str
    licence: str  # licence of the audio, by the package's copyright file
    pattern: str  # regular expression of the paths to use; `prefix` and its group make up the speaker's name
    prefix: str = ""
    music: bool = False


_ASTERISK = r".*/sounds/([^/]+)/.*\.g722"
PACKAGES = (
    *(Package(f"asterisk-core-sounds-{code}-g722", "CC-BY-SA-3.0", _ASTERISK) for code in ("en", "es", "fr")),
    Package("asterisk-core-sounds-it-g722", "CC-BY-3.0", _ASTERISK),
    Package("asterisk-core-sounds-ru-g722", "CC-BY-3.0", _ASTERISK),
    Package("klettres-data", "GPL-2+", r".*/klettres/([^/]+)/(?:alpha|syllab)/.*\.ogg", "klettres_"),
    Package("ktuberling-data", "GPL-2+", r".*/sounds/([^/]+)/.*\.(?:ogg|opus|wav)", "ktuberling_"),
    Package("tuxpaint-stamps-default", "GPL-2", r".*_desc_([a-z]+)\.ogg", "tuxpaint_"),
    Package("hedgewars-data", "GPL-2", r".*/Data/(Music)/.*\.ogg", "hedgewars_", music=True),
)
"""Packages to use. Their other audio is left out: effects, and the voices of hedgewars, which are under the GFDL."""

HELD_OUT_SPEAKERS = ("it_IT_m_Carlo", "fr_CA_f_June")
HELD_OUT_LANGUAGES = ("da", "lt")
"""Languages held out in klettres, ktuberling and tuxpaint, since a volunteer may have recorded for several of them."""
HELD_OUT_COUNTS = {"it_IT_m_Carlo": 90, "fr_CA_f_June": 60, "da": 40, "lt": 40}  # utterances to evaluate on
HELD_OUT_SECONDS = (1.0, 8.0)
MIN_SAMPLING_RATE = 16000  # Hz; some files have telephone quality
MUSIC_SECONDS = 60  # of each music file, so that music stays a small part
VALIDATION_SHARE = 0.01
# seconds of a training clip; longer recordings are cut, since training reads whole clips
MIN_SECONDS, MAX_SECONDS = 0.35, 4.0
EDGE_SECONDS = 0.12  # silence to keep at each end
AUGMENTED_SHARE = 0.6  # share of the training recordings that also have an augmented copy


def make_recordings(folder: Path, seed: int, num_workers: int) -> dict:
    """
    Write training/, validation/ and held_out_voices/ in `folder`.

    Returns:
        Speaker -> package, number of files, and seconds.

    Raises:
        RuntimeError: apt-get, dpkg or ffmpeg is missing, or a package cannot be downloaded or has no audio.
    """
    check_programs()
    for split in ("training", "validation", "held_out_voices"):
        (folder / split).mkdir(parents=True, exist_ok=True)
    speakers: dict[str, dict] = {}
    for package in PACKAGES:
        with tempfile.TemporaryDirectory(dir=folder) as unpacked:
            unpack(package.name, Path(unpacked))
            files = list(find_files(package, Path(unpacked)))
            if not files:
                raise RuntimeError(
                    f"The package {package.name} has no audio at the expected paths ({package.pattern})."
                )
            write = partial(_write_recording, folder, seed, package.music)
            with ProcessPoolExecutor(num_workers) as executor:
                durations = executor.map(write, *zip(*files, strict=True), chunksize=16)
                durations = tqdm(durations, total=len(files), desc=package.name)
                for (_, speaker, _), seconds in zip(files, durations, strict=True):
                    entry = speakers.setdefault(speaker, {"package": package.name, "files": 0, "seconds": 0.0})
                    entry["files"] += seconds > 0
                    entry["seconds"] = round(entry["seconds"] + seconds, 2)
    choose_held_out(folder / "held_out_voices", seed)
    return speakers


def check_programs() -> None:
    """Raise RuntimeError if a required program is missing."""
    for program, use in (("apt-get", "downloads"), ("dpkg", "unpacks"), ("ffmpeg", "decodes G.722 of")):
        if shutil.which(program) is None:
            raise RuntimeError(
                f"The program {program}, which {use} the packages of recordings, is missing. Install it, or train on "
                "synthetic audio alone with --sound synthetic."
            )


def unpack(name: str, folder: Path) -> None:
    """Download a Debian package and unpack it into `folder`, without root. Raise RuntimeError if that fails."""
    command = ["apt-get", "download", "-q", name]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    packages = list(folder.glob("*.deb"))
    if result.returncode or not packages:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(
            f"Cannot download the Debian package {name}: {reason}. Run `apt-get update` first, or train on synthetic "
            "audio alone with --sound synthetic."
        )
    subprocess.run(["dpkg", "-x", str(packages[0]), str(folder)], check=True, capture_output=True)
    packages[0].unlink()


def find_files(package: Package, folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield path, speaker and a name without slashes of each audio file to use, in order."""
    for path in sorted(folder.rglob("*")):
        relative_path = path.relative_to(folder).as_posix()
        match = re.fullmatch(package.pattern, relative_path)
        # Asterisk's silence/ has prompts without speech
        if match and path.is_file() and not path.is_symlink() and path.parent.name != "silence":
            stem = relative_path.split(f"/{match.group(1)}/", 1)[-1].rsplit(".", 1)[0]
            yield path, package.prefix + match.group(1), re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-")


def group_of(speaker: str) -> str | None:
    """Return the key of HELD_OUT_COUNTS for a held-out speaker, or None for a training speaker."""
    if speaker in HELD_OUT_SPEAKERS:
        return speaker
    language = speaker.rsplit("_", 1)[-1]
    return language if language in HELD_OUT_LANGUAGES and speaker.count("_") == 1 else None


def choose_held_out(folder: Path, seed: int) -> None:
    """Select the number of utterances in HELD_OUT_COUNTS for each group, at random by the seed. Delete the others."""
    groups: dict[str, list[Path]] = {name: [] for name in HELD_OUT_COUNTS}
    for path in sorted(folder.glob("*.flac")):
        groups[group_of(path.name.split("__")[0])].append(path)
    for name, paths in groups.items():
        chosen = sound.generator(seed, "held out", name).permutation(len(paths))[: HELD_OUT_COUNTS[name]]
        for index in set(range(len(paths))) - set(chosen.tolist()):
            paths[index].unlink()


# ---------------------------------------------------------------------------------------------------------------------
# One recording
# ---------------------------------------------------------------------------------------------------------------------


def _write_recording(folder: Path, seed: int, music: bool, path: Path, speaker: str, name: str) -> float:
    """Write the clips of one recording. Return its seconds, or 0 if it is not used."""
    waveform = read(path)
    if waveform is None:
        return 0.0
    waveform = waveform[: MUSIC_SECONDS * sound.SAMPLING_RATE] if music else trim(waveform)
    seconds = len(waveform) / sound.SAMPLING_RATE
    random = sound.generator(seed, speaker, name)
    if group_of(speaker):
        if HELD_OUT_SECONDS[0] <= seconds <= HELD_OUT_SECONDS[1]:
            soundfile.write(folder / "held_out_voices" / f"{speaker}__{name}.flac", waveform, sound.SAMPLING_RATE)
        return seconds
    if seconds < MIN_SECONDS or np.abs(waveform).max() < 0.003:
        return 0.0
    split = "validation" if random.random() < VALIDATION_SHARE else "training"
    versions = [("", sound.to_peak(waveform, -3.0))]
    if split == "training" and random.random() < AUGMENTED_SHARE:
        versions.append(("_b", augment(waveform, random)))
    for suffix, version in versions:
        num_clips = max(1, round(len(version) / sound.SAMPLING_RATE / MAX_SECONDS))
        for index, clip in enumerate(np.array_split(version, num_clips)):
            # WAV, since training reads each clip many times
            audio.save(folder / split / f"{speaker}__{name}{suffix}_{index}.wav", clip, sound.SAMPLING_RATE)
    return seconds


def read(path: Path) -> np.ndarray | None:
    """Return a mono waveform (T,) at 24 kHz, or None if the file has telephone quality or cannot be decoded."""
    try:
        if path.suffix == ".g722":
            command = ["ffmpeg", "-v", "error", "-f", "g722", "-i", str(path), "-f", "f32le", "-ac", "1", "-"]
            decoded = subprocess.run(command, capture_output=True, check=True).stdout
            waveform, rate = np.frombuffer(decoded, "<f4"), 16000
        else:
            waveform, rate = soundfile.read(path, dtype="float32", always_2d=True)
            waveform = waveform.mean(axis=1)
    except (subprocess.CalledProcessError, soundfile.LibsndfileError):
        return None
    if rate < MIN_SAMPLING_RATE or len(waveform) == 0:
        return None
    return soxr.resample(waveform, rate, sound.SAMPLING_RATE).astype(np.float32)


def trim(waveform: np.ndarray) -> np.ndarray:
    """Remove silence at both ends, except a short edge. Silence is 40 dB or more below the loudest 20 ms."""
    frame = sound.SAMPLING_RATE // 50
    count = len(waveform) // frame
    if count == 0:
        return waveform
    levels = np.square(waveform[: count * frame].reshape(count, frame)).mean(axis=1)
    (loud,) = np.nonzero(levels > levels.max() * 1e-4)
    edge = round(EDGE_SECONDS * sound.SAMPLING_RATE)
    return waveform[max(0, loud[0] * frame - edge) : (loud[-1] + 1) * frame + edge]


def augment(waveform: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Imitate another voice, microphone and room, at random."""
    # change speed and pitch together, as for a speaker of another size
    factor = 2 ** random.uniform(-0.35, 0.35)
    waveform = soxr.resample(waveform, sound.SAMPLING_RATE * factor, sound.SAMPLING_RATE).astype(np.float32)
    if random.random() < 0.7:
        waveform = sound.equalize(waveform, random)
    if random.random() < 0.25:
        waveform = sound.reverberate(waveform, random)
    if random.random() < 0.3:
        waveform = sound.mix(waveform, sound.noise(random), random.uniform(15, 45))
    return sound.to_peak(waveform, -3.0)


def summary(speakers: dict) -> dict:
    """Return hours, numbers of speakers and packages of training and held-out audio, from `make_recordings`."""
    seconds = {speaker: entry["seconds"] for speaker, entry in speakers.items() if entry["seconds"] > 0}
    held_out = {speaker for speaker in seconds if group_of(speaker)}
    training = seconds.keys() - held_out - {"hedgewars_Music"}
    return {
        "training_hours": round(sum(seconds[speaker] for speaker in seconds.keys() - held_out) / 3600, 2),
        "held_out_hours": round(sum(seconds[speaker] for speaker in held_out) / 3600, 2),
        "training_speakers": len(training),
        "held_out_speakers": len(held_out),
        "packages": sorted({entry["package"] for speaker, entry in speakers.items() if speaker in seconds}),
    }
