"""Train the bundled model from scratch, evaluate it and write its card, in one command.

    python examples/bundled_model/make.py --output bundled_model                      # everything
    python examples/bundled_model/make.py --output more --model bundled --steps 5000  # further training
    python examples/bundled_model/make.py --output small_try --quick                  # all steps, in two minutes

It downloads recordings (recordings.py), generates synthetic audio (sound.py), and trains on both with recipe.yaml. It
evaluates the model on recorded utterances of held-out speakers and on synthetic ones. Then it draws the curves, and
writes the card from the measured values. The output folder holds:

    model/          last checkpoint, with its card as README.md; it becomes wavtokenizer_hf/bundled
    curves.csv, curves.png, report_voices/, report_synthetic/    results of training and evaluation
    sound/, run/    audio, and the training run with its TensorBoard log

Runs are resumable: after an interruption, run the same command again. Needs espeak-ng and the extras `training` and
`evaluation`. Recordings also need apt-get, dpkg and ffmpeg (Debian or Ubuntu); `--sound synthetic` does not.
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
SYNTHETIC_SHARE = 0.3  # share of the training clips if there are recordings; with less, synthetic speech gets worse
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""Makes glibc keep freed memory. Otherwise every training step returns it to the kernel and requests it again, with a
page fault per 4 kB; see benchmarks/training.py."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="output folder")
    parser.add_argument(
        "--sound",
        choices=("recorded", "synthetic"),
        default="recorded",
        help="recorded: voices and music of Debian packages, and synthetic audio; synthetic: synthetic audio only",
    )
    parser.add_argument("--hours", type=float, default=1.2, help="hours of synthetic training audio (default 1.2)")
    parser.add_argument("--model", help="model folder to start from, or `bundled` (default: random weights)")
    parser.add_argument("--steps", type=int, help="training steps (default: those of the recipe)")
    parser.add_argument("--seed", type=int, default=0, help="seed of audio and training (default 0)")
    parser.add_argument(
        "--quick", action="store_true", help="run every step with 0.02 hours of synthetic audio, 20 steps"
    )
    arguments = parser.parse_args()
    hours = 0.02 if arguments.quick else arguments.hours
    overrides = dict(QUICK) if arguments.quick else {}
    if arguments.model is not None:
        overrides |= {"model": arguments.model, "continuous_steps": 0}
    if arguments.steps is not None:
        overrides["steps"] = arguments.steps
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)

    kind = "synthetic" if arguments.quick else arguments.sound
    facts = make_audio(output / "sound", kind, hours, arguments.seed)
    settings = train(output, {**overrides, "seed": arguments.seed})
    model = WavTokenizerModel.from_pretrained(output / "run" / "last").eval()
    results = measure_all(output, model)
    points = read_curves(output / "run" / "log")
    write_curves(output, points)
    write_model(output, make_card(settings, facts, model, results, points))
    print(f"\n{output / 'model'} is ready.")


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def make_audio(folder: Path, kind: str, hours: float, seed: int) -> dict:
    """Create training, validation and held-out clips once. Return the facts about them, which sound.json stores."""
    requested = {"sound": kind, "hours": hours, "seed": seed, "espeak_ng": sound.espeak_version()}
    facts_file = folder / "sound.json"
    if facts_file.exists():
        facts = json.loads(facts_file.read_text())
        if {name: facts[name] for name in requested} != requested:
            raise SystemExit(f"{folder} was made with {facts}, but {requested} is requested. Choose another --output.")
        return facts
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
    workers = os.cpu_count() or 1
    facts = dict(requested)
    if kind == "recorded":
        facts |= recordings.summary(recordings.make_recordings(folder, seed, workers))
    sound.make_held_out(folder / "held_out_synthetic", seed)
    sound.make_clips(folder / "validation", min(hours, 0.05), seed, "validation", workers)
    sound.make_clips(folder / "training_synthetic", hours, seed, "training", workers)
    write_training_list(folder)
    partial = facts_file.with_suffix(".partial")
    partial.write_text(json.dumps(facts))
    os.replace(partial, facts_file)
    return facts


def write_training_list(folder: Path) -> None:
    """Write the list of training clips. Synthetic clips are repeated up to SYNTHETIC_SHARE of all clips."""
    recorded, synthetic = (sorted(folder.glob(f"{name}/*.wav")) for name in ("training", "training_synthetic"))
    num_synthetic = round(len(recorded) * SYNTHETIC_SHARE / (1 - SYNTHETIC_SHARE)) or len(synthetic)
    clips = [*recorded, *itertools.islice(itertools.cycle(synthetic), num_synthetic)]
    (folder / "training.txt").write_text("".join(f"{clip.relative_to(folder)}\n" for clip in clips), encoding="utf-8")


def train(output: Path, overrides: dict) -> Settings:
    """Run or resume `wavtokenizer train` in its own process, with glibc settings. Return the training settings."""
    run = output / "run"
    overrides |= {
        "train_data": str(output / "sound" / "training.txt"),
        "validation_data": str(output / "sound" / "validation"),
        "output": str(run),
    }
    command = [sys.executable, "-m", "wavtokenizer_hf", "train", str(RECIPE)]
    command += [f"--{name}={value}" for name, value in overrides.items()]
    if (run / "last").exists() or (run / "previous").exists():  # a kill between two renames leaves `previous`
        command.append("--resume")
    subprocess.run(command, check=True, env={**os.environ, **MALLOC_ENVIRONMENT})
    return Settings.load(str(RECIPE), overrides)


METRICS = ["pesq_wb", "stoi", "estoi", "si_sdr", "mel_distance", "stft_distance", "mcd"]
PITCH_METRICS = ["f0_error", "voicing_f1"]
CREPE = "tiny"
"""The full CREPE model takes half a minute on a CPU core for a second of audio."""


@dataclass
class HeldOutResult:
    """Results of the model on one held-out set."""

    report: Report
    agreement: float  # share of codes that stay the same after decoding and encoding again


def measure_all(output: Path, model: WavTokenizerModel) -> dict[str, HeldOutResult]:
    """Evaluate the model on each existing held-out set. Return the results by the name of the set."""
    folders = {name: output / "sound" / f"held_out_{name}" for name in ("voices", "synthetic")}
    return {
        name: measure(folder, output / f"report_{name}", model) for name, folder in folders.items() if folder.is_dir()
    }


def measure(held_out: Path, output: Path, model: WavTokenizerModel, name: str = "bundled model") -> HeldOutResult:
    """Evaluate a model on the clips of a folder, and save the report in `output`."""
    files = sorted(held_out.iterdir())
    report = evaluate(
        [(file, Path(file.name)) for file in files],
        [Model(name, model)],
        metrics=[metric for metric in METRICS + PITCH_METRICS if unavailable_reason(metric) is None],
        num_workers=os.cpu_count() or 1,
        crepe=CREPE,
    )
    report.save(output)
    shutil.rmtree(output / "worst", ignore_errors=True)  # do not publish other people's voices
    (output / "worst.md").unlink(missing_ok=True)
    print(report.table())
    num_same = num_codes = 0
    for file in files:
        waveform = torch.from_numpy(audio.load(file, model.config.sampling_rate))[None, None]
        with torch.inference_mode():
            first = model.encode(waveform).audio_codes
            second = model.encode(model.decode(first).audio_values[..., : waveform.shape[-1]]).audio_codes
        num_same += int((first == second).sum())
        num_codes += first.numel()
    print(f"encode, decode, encode: {num_same} of {num_codes} codes are the same")
    return HeldOutResult(report, num_same / num_codes)


CURVES = {
    "loss/mel": "mel loss, training",
    "validation/mel": "mel loss, validation",
    "validation/commitment": "commitment, validation",
    "validation/utilization": "codebook use, validation",
    "validation/perplexity": "perplexity, validation",
}


def read_curves(log: Path) -> list[dict[str, float]]:
    """Return a point for each validation: step, hours of training without interruptions, and the values of CURVES."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log), size_guidance={"scalars": 0}).Reload()
    times = sorted((event.step, event.wall_time) for event in events.Scalars("loss/mel"))
    gaps = [later - earlier for (_, earlier), (_, later) in itertools.pairwise(times)]
    median_gap = sorted(gaps)[len(gaps) // 2] if gaps else 0.0
    hours, elapsed = {times[0][0]: 0.0}, 0.0
    for (step, _), gap in zip(times[1:], gaps, strict=True):
        elapsed += gap if gap < 10 * median_gap + 60 else median_gap  # a long gap is an interruption
        hours[step] = elapsed / 3600
    values = {name: {event.step: event.value for event in events.Scalars(name)} for name in CURVES}
    steps = [step for step in values["validation/mel"] if step in hours]
    return [{"step": step, "hours": hours[step], **{name: values[name][step] for name in CURVES}} for step in steps]


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


def make_card(settings: Settings, facts: dict, model: WavTokenizerModel, results: dict, points: list[dict]) -> str:
    """Return the card. All its numbers were measured or set in this run."""
    threads = torch.get_num_threads()
    discriminators = used_discriminators(settings.loss_weights)
    template = string.Template((HERE / "card.md").read_text(encoding="utf-8"))
    return template.substitute(
        measured="\n\n".join(_metrics_table(name, result) for name, result in results.items()),
        codebook_size=model.config.codebook_size,
        frame_rate=f"{model.config.frame_rate:g}",
        bit_rate=f"{model.config.bit_rate:g}",
        parameters=f"{model.num_parameters() / 1e6:.2f}",
        fingerprint=model.codebook_fingerprint,
        recordings=_describe_recordings(facts),
        languages=len(texts.TRAINING_WORDS),
        variants=len(texts.TRAINING_VARIANTS),
        hours=f"{facts['hours']:g}",
        espeak=facts["espeak_ng"],
        seed=settings.seed,
        start=f" from {settings.model}" if settings.model else "",
        steps=settings.steps,
        discriminators=f"{', '.join(discriminators)} from step {settings.mel_only_steps} on"
        if discriminators
        else "none",
        training_hours=f"{points[-1]['hours']:.2f}",
        device=torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{threads} CPU thread{'s' * (threads > 1)}",
        torch=torch.__version__,
        version=__version__,
    )


SET_DESCRIPTIONS = {
    "voices": "recorded utterances of human speakers that were not in training:",
    "synthetic": "utterances of espeak-ng. The sentences and voice variants were not in training, nor were half of "
    "the languages:",
}


def _metrics_table(name: str, result: HeldOutResult) -> str:
    """Return the section of one held-out set for the card."""
    report = result.report.to_dict()
    system = report["systems"][0]
    lines = [f"On {report['num_files']} {SET_DESCRIPTIONS[name]}", "", "| | |", "|---|---|"]
    for metric, value in system["metrics"].items():
        if value["mean"] is None or metric.startswith("codebook"):
            continue
        unit = f" {report['units'][metric]}" if report["units"][metric] else ""
        interval = f" ({value['low']:.3f} to {value['high']:.3f})" if value["low"] is not None else ""
        files = f", {value['count']} files" if value["count"] < report["num_files"] else ""
        lines.append(f"| {ALL_METRICS[metric].title} | {value['mean']:.3f}{unit}{interval}{files} |")
    codes = system["all_codes"]
    lines += [
        "",
        f"All {codes['num_codes']} codes together use {codes['num_used']} entries "
        f"({codes['codebook_utilization']:.1%}). When the decoded audio is encoded again, {result.agreement:.1%} "
        "of the codes are the same.",
    ]
    return "\n".join(lines)


def _describe_recordings(facts: dict) -> str:
    """Return the description of the training recordings for the card."""
    if facts["sound"] != "recorded":
        return "It was trained on no recordings."
    packages = [package for package in recordings.PACKAGES if package.name in facts["packages"]]
    rows = "\n".join(f"| {package.name} | {package.licence} |" for package in packages)
    music = " and music" if any(package.music for package in packages) else ""
    return (
        f"{facts['training_hours']:.1f} hours of recordings of {facts['training_speakers']} human voices (counted by "
        f"package and language){music}, from Debian packages. {facts['held_out_speakers']} voices were held out. The "
        f"packages' copyright files name the speakers and musicians:\n\n| package | licence of its audio "
        f"|\n|---|---|\n{rows}"
    )


def write_model(output: Path, text: str) -> None:
    """Write the last checkpoint and its card to model/, without code, since the package has the code.

    The last checkpoint is used, not the one with the best validation score. The score includes the commitment loss,
    which grows while codes become easier to distinguish.
    """
    partial, model = output / "model.partial", output / "model"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    shutil.copy(output / "run" / "last" / "model.safetensors", partial)
    for name in ("config.json", "preprocessor_config.json"):
        values = json.loads((output / "run" / "last" / name).read_text())
        del values["auto_map"]  # names code files that are not in this folder
        (partial / name).write_text(json.dumps(values, indent=2) + "\n")
    (partial / "README.md").write_text(text, encoding="utf-8")
    shutil.rmtree(model, ignore_errors=True)
    os.replace(partial, model)


if __name__ == "__main__":
    main()
