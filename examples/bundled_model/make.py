"""The bundled model, in one command from nothing to its card.

    python examples/bundled_model/make.py --output bundled_model                      # the whole
    python examples/bundled_model/make.py --output more --model bundled --steps 5000  # from the weights in the
                                                                                      repository on
    python examples/bundled_model/make.py --output small_try --quick                  # every step of it in about two
                                                                                      minutes

It downloads recorded sound (recordings.py) and makes synthetic sound (sound.py), trains on both with recipe.yaml,
measures the model on recorded utterances of speakers that were held out and on synthetic ones, draws the curves, and
writes the card from what was measured. In the output folder:

    model/          the last checkpoint with its card as README.md: what becomes wavtokenizer_hf/bundled
    curves.csv, curves.png, report_voices/, report_synthetic/    what training and evaluation found
    sound/, run/    the sound, and the run with its TensorBoard log

Interrupted, the same command goes on where it was. Needs espeak-ng and the extras `training` and `evaluation`; for
recorded sound also apt-get, dpkg and ffmpeg (Debian or Ubuntu). `--sound synthetic` does without.
"""

import argparse
import csv
import itertools
import json
import os
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import recordings
import sound
import texts
import torch

from wavtokenizer_hf import WavTokenizerModel, __version__, audio
from wavtokenizer_hf.evaluation import METRICS as ALL_METRICS
from wavtokenizer_hf.evaluation import Model, Report, evaluate
from wavtokenizer_hf.evaluation.metrics import unavailable_reason
from wavtokenizer_hf.training import Settings
from wavtokenizer_hf.training.losses import used_discriminators


HERE = Path(__file__).parent


RECIPE = HERE / "recipe.yaml"
QUICK = {"steps": 20, "continuous_steps": 5, "kmeans_iterations": 5, "validate_every": 10, "log_every": 10}
SYNTHETIC_SHARE = 0.3  # of the clips of training, where there are recordings; with less, synthetic speech gets worse
MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""Tells glibc to keep memory that it once got. Else every step of training gives it back and asks for it again, at one
page fault for every 4 kB; see benchmarks/training.py."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for all that is made")
    parser.add_argument(
        "--sound",
        choices=("recorded", "synthetic"),
        default="recorded",
        help="recorded: human voices and music of Debian packages, and synthetic sound; synthetic: that alone",
    )
    parser.add_argument("--hours", type=float, default=1.2, help="of synthetic sound to train on (default 1.2)")
    parser.add_argument("--model", help="folder of a model to start from, or `bundled` (default: random weights)")
    parser.add_argument("--steps", type=int, help="of training; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0, help="of the sound and of training (default 0)")
    parser.add_argument(
        "--quick", action="store_true", help="a small try: 0.02 hours of synthetic sound alone, 20 steps"
    )
    arguments = parser.parse_args()
    hours = 0.02 if arguments.quick else arguments.hours
    changes = dict(QUICK) if arguments.quick else {}
    if arguments.model is not None:
        changes |= {"model": arguments.model, "continuous_steps": 0}
    if arguments.steps is not None:
        changes["steps"] = arguments.steps
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)

    kind = "synthetic" if arguments.quick else arguments.sound
    facts = make_sound(output / "sound", kind, hours, arguments.seed)
    settings = train(output, {**changes, "seed": arguments.seed})
    model = WavTokenizerModel.from_pretrained(output / "run" / "last").eval()
    reports = measure_all(output, model)
    points = read_curves(output / "run" / "log")
    write_curves(output, points)
    write_model(output, card(settings, facts, model, reports, points))
    print(f"\n{output / 'model'} is ready.")


# ---------------------------------------------------------------------------------------------------------------------
# The steps
# ---------------------------------------------------------------------------------------------------------------------


def make_sound(folder: Path, kind: str, hours: float, seed: int) -> dict:
    """
    Makes training, validation and held-out clips once; returns what they were made of, which sound.json remembers.
    """
    asked = {"sound": kind, "hours": hours, "seed": seed, "espeak_ng": sound.espeak_version()}
    remembered = folder / "sound.json"
    if remembered.exists():
        facts = json.loads(remembered.read_text())
        if {name: facts[name] for name in asked} != asked:
            raise SystemExit(f"{folder} was made with {facts}, and now {asked} is asked for. Choose another output.")
        return facts
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    workers = os.cpu_count() or 1
    facts = dict(asked)
    if kind == "recorded":
        facts |= recordings.summary(recordings.make_recordings(folder, seed, workers))
    sound.make_held_out(folder / "held_out_synthetic", seed)
    sound.make_clips(folder / "validation", min(hours, 0.05), seed, "validation", workers)
    sound.make_clips(folder / "training_synthetic", hours, seed, "training", workers)
    write_training_list(folder)
    partial = remembered.with_suffix(".partial")
    partial.write_text(json.dumps(facts))
    os.replace(partial, remembered)
    return facts


def write_training_list(folder: Path) -> None:
    """Lists the clips of training. Synthetic ones are repeated until they are SYNTHETIC_SHARE of all."""
    recorded, synthetic = (sorted(folder.glob(f"{name}/*.wav")) for name in ("training", "training_synthetic"))
    wanted = round(len(recorded) * SYNTHETIC_SHARE / (1 - SYNTHETIC_SHARE)) or len(synthetic)
    clips = [*recorded, *itertools.islice(itertools.cycle(synthetic), wanted)]
    (folder / "training.txt").write_text("".join(f"{clip.relative_to(folder)}\n" for clip in clips), encoding="utf-8")


def train(output: Path, changes: dict) -> Settings:
    """`wavtokenizer train` in a process of its own, whose memory glibc keeps; goes on from a run that is there."""
    run = output / "run"
    changes |= {
        "train_data": str(output / "sound" / "training.txt"),
        "validation_data": str(output / "sound" / "validation"),
        "output": str(run),
    }
    command = [sys.executable, "-m", "wavtokenizer_hf", "train", str(RECIPE)]
    command += [f"--{name}={value}" for name, value in changes.items()]
    if (run / "last").exists() or (run / "previous").exists():  # the latter after a kill between two renames
        command.append("--resume")
    subprocess.run(command, check=True, env={**os.environ, **MEMORY})
    return Settings.load(str(RECIPE), changes)


METRICS = ["pesq_wb", "stoi", "estoi", "si_sdr", "mel_distance", "stft_distance", "mcd"]
PITCH_METRICS = ["f0_error", "voicing_f1"]
CREPE = "tiny"
"""The full CREPE takes half a minute on a CPU core for a second of sound."""


@dataclass
class Measured:
    """What one held-out set said of the model."""

    report: Report
    agreement: float  # share of codes that a second pass gives again


def measure_all(output: Path, model: WavTokenizerModel) -> dict[str, Measured]:
    """Measures the model on each held-out set that there is, by its name."""
    folders = {name: output / "sound" / f"held_out_{name}" for name in ("voices", "synthetic")}
    return {
        name: measure(folder, output / f"report_{name}", model) for name, folder in folders.items() if folder.is_dir()
    }


def measure(held_out: Path, output: Path, model: WavTokenizerModel, name: str = "bundled model") -> Measured:
    """Measures a model on the clips of a folder; the report is saved in `output`."""
    files = sorted(held_out.iterdir())
    report = evaluate(
        [(file, Path(file.name)) for file in files],
        [Model(name, model)],
        metrics=[each for each in METRICS + PITCH_METRICS if unavailable_reason(each) is None],
        num_workers=os.cpu_count() or 1,
        crepe=CREPE,
    )
    report.save(output)
    shutil.rmtree(output / "worst", ignore_errors=True)  # other people's voices: kept out of the repository
    (output / "worst.md").unlink(missing_ok=True)
    print(report.table())
    same = count = 0
    for file in files:
        waveform = torch.from_numpy(audio.load(file, model.config.sampling_rate))[None, None]
        with torch.inference_mode():
            first = model.encode(waveform).audio_codes
            second = model.encode(model.decode(first).audio_values[..., : waveform.shape[-1]]).audio_codes
        same += int((first == second).sum())
        count += first.numel()
    print(f"encode, decode, encode: {same} of {count} codes are the same")
    return Measured(report, same / count)


CURVES = {
    "loss/mel": "mel loss, training",
    "validation/mel": "mel loss, validation",
    "validation/commitment": "commitment, validation",
    "validation/utilization": "codebook use, validation",
    "validation/perplexity": "perplexity, validation",
}


def read_curves(log: Path) -> list[dict[str, float]]:
    """
    One point for each validation: step, hours of training so far without interruptions, and the figures of CURVES.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log), size_guidance={"scalars": 0}).Reload()
    times = sorted((event.step, event.wall_time) for event in events.Scalars("loss/mel"))
    gaps = [later - earlier for (_, earlier), (_, later) in itertools.pairwise(times)]
    usual = sorted(gaps)[len(gaps) // 2] if gaps else 0.0
    hours, elapsed = {times[0][0]: 0.0}, 0.0
    for (step, _), gap in zip(times[1:], gaps, strict=True):
        elapsed += gap if gap < 10 * usual + 60 else usual  # a run that was resumed did not train in between
        hours[step] = elapsed / 3600
    found = {name: {event.step: event.value for event in events.Scalars(name)} for name in CURVES}
    steps = [step for step in found["validation/mel"] if step in hours]
    return [{"step": step, "hours": hours[step], **{name: found[name][step] for name in CURVES}} for step in steps]


def write_curves(output: Path, points: list[dict[str, float]]) -> None:
    from matplotlib.figure import Figure

    partial = output / "curves.csv.partial"
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(points[0]))
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in point.items()} for point in points)
    os.replace(partial, output / "curves.csv")
    figure = Figure(figsize=(10, 3), layout="constrained")
    panels = (["loss/mel", "validation/mel"], ["validation/utilization"], ["validation/commitment"])
    for axes, names in zip(figure.subplots(1, 3), panels, strict=True):
        for name in names:
            axes.plot([point["hours"] for point in points], [point[name] for point in points], label=CURVES[name])
        axes.set_xlabel("hours of training")
        axes.legend()
    figure.savefig(output / "curves.partial", format="png", dpi=100)
    os.replace(output / "curves.partial", output / "curves.png")


def card(settings: Settings, facts: dict, model: WavTokenizerModel, measured: dict, points: list[dict]) -> str:
    """The card, every number of which was measured or set in this run."""
    threads = torch.get_num_threads()
    used = used_discriminators(settings.loss_weights)
    template = string.Template((HERE / "card.md").read_text(encoding="utf-8"))
    return template.substitute(
        measured="\n\n".join(_table(name, each) for name, each in measured.items()),
        codebook_size=model.config.codebook_size,
        frame_rate=f"{model.config.frame_rate:g}",
        bit_rate=f"{model.config.bit_rate:g}",
        parameters=f"{model.num_parameters() / 1e6:.2f}",
        fingerprint=model.codebook_fingerprint,
        sound=_sound(facts),
        languages=len(texts.TRAINING_WORDS),
        variants=len(texts.TRAINING_VARIANTS),
        hours=f"{facts['hours']:g}",
        espeak=facts["espeak_ng"],
        seed=settings.seed,
        start=f" from {settings.model}" if settings.model else "",
        steps=settings.steps,
        discriminators=f"{', '.join(used)} from step {settings.mel_only_steps} on" if used else "none",
        training_hours=f"{points[-1]['hours']:.2f}",
        device=torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{threads} CPU thread{'s' * (threads > 1)}",
        torch=torch.__version__,
        version=__version__,
    )


SETS = {
    "voices": "recorded utterances of human speakers that were not in training:",
    "synthetic": "utterances of espeak-ng. The sentences and voice variants were not in training, nor were half of "
    "the languages:",
}


def _table(name: str, measured: Measured) -> str:
    """One held-out set's part of the card."""
    report = measured.report.to_dict()
    result = report["systems"][0]
    lines = [f"On {report['num_files']} {SETS[name]}", "", "| | |", "|---|---|"]
    for metric, figure in result["metrics"].items():
        if figure["mean"] is None or metric.startswith("codebook"):
            continue
        unit = f" {report['units'][metric]}" if report["units"][metric] else ""
        low = f" ({figure['low']:.3f} to {figure['high']:.3f})" if figure["low"] is not None else ""
        lines.append(f"| {ALL_METRICS[metric].title} | {figure['mean']:.3f}{unit}{low} |")
    codes = result["all_codes"]
    lines += [
        "",
        f"All {codes['num_codes']} codes together use {codes['num_used']} entries "
        f"({codes['codebook_utilization']:.1%}). When the decoded audio is encoded again, {measured.agreement:.1%} "
        "of the codes are the same.",
    ]
    return "\n".join(lines)


def _sound(facts: dict) -> str:
    """What recorded sound the model heard, for the card."""
    if facts["sound"] != "recorded":
        return "It was trained on no recordings."
    heard = [package for package in recordings.PACKAGES if package.name in facts["packages"]]
    rows = "\n".join(f"| {package.name} | {package.licence} |" for package in heard)
    music = " and music" if any(package.music for package in heard) else ""
    return (
        f"{facts['training_hours']:.1f} hours of recordings of {facts['training_speakers']} human voices (counted by "
        f"package and language){music}, from Debian packages. {facts['held_out_speakers']} voices were held out. The "
        f"packages' copyright files name the speakers and musicians:\n\n| package | licence of its audio "
        f"|\n|---|---|\n{rows}"
    )


def write_model(output: Path, text: str) -> None:
    """The last checkpoint and its card, beside it first, then in its place; without the code, which it lies beside.

    Not the best by the validation score: that counts the commitment loss, which grows while codes become easier to
    tell apart.
    """
    partial, model = output / "model.partial", output / "model"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    shutil.copy(output / "run" / "last" / "model.safetensors", partial)
    for name in ("config.json", "preprocessor_config.json"):
        values = json.loads((output / "run" / "last" / name).read_text())
        del values["auto_map"]  # where the code would be
        (partial / name).write_text(json.dumps(values, indent=2) + "\n")
    (partial / "README.md").write_text(text, encoding="utf-8")
    shutil.rmtree(model, ignore_errors=True)
    os.replace(partial, model)


if __name__ == "__main__":
    main()
