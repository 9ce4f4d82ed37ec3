"""The recorded sound that the bundled model is trained on: human speech and music out of Debian's packages, split by
speaker.

`make_recordings` downloads the packages by name (apt-get, no root), unpacks them (dpkg -x), and writes 24 kHz clips to
training/, validation/ and held_out_voices/. No sound of a held-out speaker is in the other two.
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
    """A Debian package with recorded sound."""

    name: str
    licence: str  # of the sound, by the package's copyright file
    pattern: str  # regular expression of the paths to take; its group names the speaker after `prefix`
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
"""
What is taken. Other sound of these packages is left out: effects, and hedgewars's voices, which are under the GFDL.
"""

HELD_OUT_SPEAKERS = ("it_IT_m_Carlo", "fr_CA_f_June")
HELD_OUT_LANGUAGES = ("da", "lt")
"""Of the last three packages of speech: nobody who speaks in one of them under these names is in training, since the
same volunteer may have recorded for several programs."""
HELD_OUT_COUNTS = {"it_IT_m_Carlo": 90, "fr_CA_f_June": 60, "da": 40, "lt": 40}  # utterances to evaluate on
HELD_OUT_SECONDS = (1.0, 8.0)
LOWEST_RATE = 16000  # Hz of a file: some are telephone sound
MUSIC_SECONDS = 60  # of a piece, so that music stays a small part
VALIDATION_SHARE = 0.01
SHORTEST, LONGEST = (
    0.35,
    4.0,
)  # seconds of a training clip; longer recordings are cut, since training reads whole clips
EDGE_SECONDS = 0.12  # of silence that is left at either end
AUGMENTED_SHARE = 0.6  # of the training recordings have a changed copy beside them


def make_recordings(folder: Path, seed: int, num_workers: int) -> dict:
    """
    Writes training/, validation/ and held_out_voices/ below `folder`.

    Returns:
        What was taken: by speaker, seconds, number of files and the package.

    Raises:
        RuntimeError: no apt-get, dpkg or ffmpeg, or a package cannot be downloaded; the message says which.
    """
    check_programs()
    for part in ("training", "validation", "held_out_voices"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    taken: dict[str, dict] = {}
    for package in PACKAGES:
        with tempfile.TemporaryDirectory(dir=folder) as unpacked:
            unpack(package.name, Path(unpacked))
            files = list(find(package, Path(unpacked)))
            if not files:
                raise RuntimeError(f"The package {package.name} has no sound where it used to be ({package.pattern}).")
            work = partial(_write, folder, seed, package.music)
            with ProcessPoolExecutor(num_workers) as executor:
                made = executor.map(work, *zip(*files, strict=True), chunksize=16)
                for (_, speaker, _), seconds in zip(
                    files, tqdm(made, total=len(files), desc=package.name), strict=True
                ):
                    entry = taken.setdefault(speaker, {"package": package.name, "files": 0, "seconds": 0.0})
                    entry["files"] += seconds > 0
                    entry["seconds"] = round(entry["seconds"] + seconds, 2)
    choose_held_out(folder / "held_out_voices", seed)
    return taken


def check_programs() -> None:
    """Raises RuntimeError if a program that is needed is missing."""
    for program, use in (("apt-get", "downloads"), ("dpkg", "unpacks"), ("ffmpeg", "decodes G.722 of")):
        if shutil.which(program) is None:
            raise RuntimeError(
                f"There is no program {program}, which {use} the packages of recorded sound. Install it, or train on "
                "synthetic sound alone with --sound synthetic."
            )


def unpack(name: str, folder: Path) -> None:
    """
    Downloads one Debian package and unpacks it into `folder`, as any user. Raises RuntimeError if it cannot be had.
    """
    command = ["apt-get", "download", "-q", name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    packages = list(folder.glob("*.deb"))
    if done.returncode or not packages:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(
            f"Cannot download the Debian package {name}: {reason}. Run `apt-get update` first, or train on synthetic "
            "sound alone with --sound synthetic."
        )
    subprocess.run(["dpkg", "-x", str(packages[0]), str(folder)], check=True, capture_output=True)
    packages[0].unlink()


def find(package: Package, folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Path, speaker and a name without slashes of each file to take, in order."""
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).as_posix()
        match = re.fullmatch(package.pattern, place)
        if match and path.is_file() and not path.is_symlink() and path.parent.name != "silence":  # prompts of nothing
            speaker = package.prefix + match.group(1)
            name = re.sub(r"[^A-Za-z0-9]+", "-", place.split(f"/{match.group(1)}/", 1)[-1].rsplit(".", 1)[0]).strip(
                "-"
            )
            yield path, speaker, name


def group_of(speaker: str) -> str | None:
    """The key of HELD_OUT_COUNTS under which a speaker is held out; None for those to train on."""
    if speaker in HELD_OUT_SPEAKERS:
        return speaker
    language = speaker.rsplit("_", 1)[-1]
    return language if language in HELD_OUT_LANGUAGES and speaker.count("_") == 1 else None


def choose_held_out(folder: Path, seed: int) -> None:
    """
    Keeps as many utterances of each held-out group as HELD_OUT_COUNTS says, drawn by the seed; the others are deleted.
    """
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


def _write(folder: Path, seed: int, music: bool, path: Path, speaker: str, name: str) -> float:
    """Writes the clips of one recording; returns its seconds, 0 for one that is not taken."""
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
    if seconds < SHORTEST or np.abs(waveform).max() < 0.003:
        return 0.0
    part = "validation" if random.random() < VALIDATION_SHARE else "training"
    versions = [("", sound.to_peak(waveform, -3.0))]
    if part == "training" and random.random() < AUGMENTED_SHARE:
        versions.append(("_b", augment(waveform, random)))
    for suffix, version in versions:
        pieces = max(1, round(len(version) / sound.SAMPLING_RATE / LONGEST))
        for index, piece in enumerate(np.array_split(version, pieces)):
            # WAV, since training reads each clip again and again
            audio.save(folder / part / f"{speaker}__{name}{suffix}_{index}.wav", piece, sound.SAMPLING_RATE)
    return seconds


def read(path: Path) -> np.ndarray | None:
    """Mono waveform (T,) at 24 kHz; None for one of telephone quality or one that cannot be decoded."""
    try:
        if path.suffix == ".g722":
            command = ["ffmpeg", "-v", "error", "-f", "g722", "-i", str(path), "-f", "f32le", "-ac", "1", "-"]
            waveform, rate = (
                np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, "<f4"),
                16000,
            )
        else:
            waveform, rate = soundfile.read(path, dtype="float32", always_2d=True)
            waveform = waveform.mean(axis=1)
    except (subprocess.CalledProcessError, soundfile.LibsndfileError):
        return None
    if rate < LOWEST_RATE or len(waveform) == 0:
        return None
    return soxr.resample(waveform, rate, sound.SAMPLING_RATE).astype(np.float32)


def trim(waveform: np.ndarray) -> np.ndarray:
    """The waveform without the silence at its ends: what is 40 dB below the loudest 20 ms, but for a short edge."""
    frame = sound.SAMPLING_RATE // 50
    count = len(waveform) // frame
    if count == 0:
        return waveform
    levels = np.square(waveform[: count * frame].reshape(count, frame)).mean(axis=1)
    (loud,) = np.nonzero(levels > levels.max() * 1e-4)
    edge = round(EDGE_SECONDS * sound.SAMPLING_RATE)
    return waveform[max(0, loud[0] * frame - edge) : (loud[-1] + 1) * frame + edge]


def augment(waveform: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The same words by another voice, through another microphone, in another room."""
    # speed and pitch together: a speaker with another size of head
    factor = 2 ** random.uniform(-0.35, 0.35)
    waveform = soxr.resample(waveform, sound.SAMPLING_RATE * factor, sound.SAMPLING_RATE).astype(np.float32)
    if random.random() < 0.7:
        waveform = sound.equalize(waveform, random)
    if random.random() < 0.25:
        waveform = sound.reverberate(waveform, random)
    if random.random() < 0.3:
        waveform = sound.mix(waveform, sound.noise(random), random.uniform(15, 45))
    return sound.to_peak(waveform, -3.0)


def summary(taken: dict) -> dict:
    """Hours to train on and hours held out, and the number of speakers of each, by package and language."""
    heard = {speaker: entry["seconds"] for speaker, entry in taken.items() if entry["seconds"] > 0}
    held_out = {speaker for speaker in heard if group_of(speaker)}
    training = heard.keys() - held_out - {"hedgewars_Music"}
    return {
        "training_hours": round(sum(heard[speaker] for speaker in heard.keys() - held_out) / 3600, 2),
        "held_out_hours": round(sum(heard[speaker] for speaker in held_out) / 3600, 2),
        "training_speakers": len(training),
        "held_out_speakers": len(held_out),
        "packages": sorted({entry["package"] for speaker, entry in taken.items() if speaker in heard}),
    }
