"""Compare bulk tokenization with a plain loop over the same files, and measure its peak memory.

    python benchmarks/bulk.py [--clips 200] [--num-processes 2]       throughput on a CPU, one GPU or several GPUs
    python benchmarks/bulk.py --memory 100 1000                       peak memory for 100 and for 1000 clips

The loop reads, resamples and encodes one clip after the other with all torch threads of the machine. It uses our
model, and with `--checkout ../WavTokenizer` also the reference implementation. All variants process the same files (1
to 15 s, 16 to 48 kHz, WAV and FLAC) in interleaved rounds. Times include loading the model and the libraries. The
last line shows how the loop spends its time.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


RATES = (16000, 22050, 24000, 48000)
OUR_LOOP, REFERENCE_LOOP = "a plain loop", "a plain loop with the reference model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default 75)")
    parser.add_argument("--clips", type=int, default=200, help="number of clips (default 200)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant (default 3)")
    parser.add_argument(
        "--num-processes", type=int, default=None, help="number of processes (default: that of the command)"
    )
    parser.add_argument("--batch-seconds", type=float, nargs="+", default=[30, 120, 600], help="audio per batch")
    parser.add_argument("--checkout", help="checkout of jishengpeng/WavTokenizer, to measure its loop too")
    parser.add_argument(
        "--memory", type=int, nargs="+", metavar="CLIPS", help="measure peak memory for these clip counts"
    )
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)  # one measurement in its own process
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(ONE[arguments.one[0]](*arguments.one[1:])))
        return
    with tempfile.TemporaryDirectory() as folder:
        (compare if not arguments.memory else memory)(Path(folder), arguments)


def compare(folder: Path, arguments) -> None:
    model = save_model(folder, arguments.rate)
    hours = write_clips(folder / "clips", arguments.clips) / 3600
    processes = arguments.num_processes or 0
    variants = {OUR_LOOP: ("loop", model, folder / "clips")}
    if arguments.checkout:
        variants[REFERENCE_LOOP] = ("loop_reference", arguments.checkout, arguments.rate, folder / "clips")
    for seconds in arguments.batch_seconds:
        name = f"bulk, {seconds:g} s in a batch"
        variants[name] = ("bulk", model, folder / "clips", processes, seconds, folder / "out")
    print(f"{arguments.clips} clips of 1 to 15 s, {hours:.2f} hours, {arguments.rate} tokens/s, random weights")
    results = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, command in variants.items():
            subprocess.run(["rm", "-rf", str(folder / "out")], check=True)
            started = time.perf_counter()
            result = run_one(*command)
            results[name].append({**result, "all": time.perf_counter() - started})
    loops = [name for name in (OUR_LOOP, REFERENCE_LOOP) if name in variants]
    print(f"| variant | hours per hour | {' | '.join(f'over {name}' for name in loops)} | after start-up |")
    print("|---" * (len(loops) + 3) + "|")
    medians = {name: statistics.median(run["all"] for run in runs) for name, runs in results.items()}
    for name, runs in results.items():
        working = statistics.median(run["working"] for run in runs)
        ratios = " | ".join(f"{medians[loop] / medians[name]:.2f}" for loop in loops)
        print(f"| {name} | {hours * 3600 / medians[name]:.1f} | {ratios} | {hours * 3600 / working:.1f} |")
    loop_times = results[OUR_LOOP][-1]
    print(
        f"The loop: {loop_times['reading'] / loop_times['working']:.1%} of its working time reads and resamples, "
        f"{loop_times['encoding'] / loop_times['working']:.1%} encodes."
    )


def memory(folder: Path, arguments) -> None:
    model = save_model(folder, arguments.rate)
    print("| clips | hours | peak memory of the largest process |")
    print("|---|---|---|")
    for count in arguments.memory:
        clips = folder / str(count)
        hours = write_clips(clips, count) / 3600
        result = run_one("bulk", model, clips, 1, arguments.batch_seconds[0], folder / f"out{count}")
        print(f"| {count} | {hours:.2f} | {result['peak'] / 1024:.0f} MB |", flush=True)


def run_one(*command) -> dict:
    process = subprocess.run(
        [sys.executable, __file__, "--one", *map(str, command)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(process.stdout.splitlines()[-1])


def loop(model: str, clips: str) -> dict:
    import torch

    from wavtokenizer_hf import WavTokenizerEncoderModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = WavTokenizerEncoderModel.from_pretrained(model).eval().to(device)
    return _loop(lambda waveform: encoder.encode(waveform[None].to(device)).audio_codes.cpu(), clips)


def loop_reference(checkout: str, rate: str, clips: str) -> dict:
    import torch
    from fixtures import build_checkpoint, original

    import wavtokenizer_hf.audio  # noqa: F401  (first: transformers fails with the torchaudio stub of `original`)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = original.load_original(checkout, int(rate), build_checkpoint.state_dict(int(rate))).to(device)
    return _loop(lambda waveform: original.encode(model, waveform.to(device)).cpu(), clips)


def _loop(encode, clips: str) -> dict:
    import torch

    from wavtokenizer_hf import audio

    started, reading = time.perf_counter(), 0.0
    with torch.inference_mode():
        for path in sorted(Path(clips).iterdir()):
            before = time.perf_counter()
            waveform = torch.from_numpy(audio.load(path))[None]
            reading += time.perf_counter() - before
            encode(waveform)
    working = time.perf_counter() - started
    return {"working": working, "reading": reading, "encoding": working - reading}


def bulk(model: str, clips: str, processes: str, seconds: str, output: str) -> dict:
    from wavtokenizer_hf.bulk import TokenizeOptions, run, tokenize

    first_progress: list[float] = []  # time, and number of samples done

    class RecordingProgress(run.ClipProgress):
        def __call__(self, summary):
            if not first_progress:
                first_progress.extend((time.perf_counter(), summary.num_samples))
            super().__call__(summary)

    run.ClipProgress = RecordingProgress
    options = TokenizeOptions(num_processes=int(processes) or None, batch_seconds=float(seconds), part_size=25)
    result = tokenize(clips, model, output, options)
    assert not result.failures
    num_samples = result.done_now.num_samples
    working = (time.perf_counter() - first_progress[0]) * num_samples / (num_samples - first_progress[1])
    # not ru_maxrss, which starts at the value of the parent process
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"working": working, "peak": int(peak)}


ONE = {"loop": loop, "loop_reference": loop_reference, "bulk": bulk}


def save_model(folder: Path, rate: int) -> Path:
    import torch

    from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerFeatureExtractor, WavTokenizerModel

    torch.manual_seed(0)
    ratios = [8, 5, 4, 2] if rate == 75 else [6, 5, 5, 4]
    model = WavTokenizerModel(WavTokenizerConfig(upsampling_ratios=ratios))
    model.save_pretrained(folder / "model")
    WavTokenizerFeatureExtractor(hop_length=model.config.hop_length).save_pretrained(folder / "model")
    return folder / "model"


def write_clips(folder: Path, count: int) -> float:
    """Write clips of low-frequency noise, 1 to 15 s each. Return their total seconds."""
    import soundfile

    random, total = np.random.default_rng(0), 0.0
    folder.mkdir()
    for index in range(count):
        rate, seconds = RATES[index % len(RATES)], random.uniform(1, 15)
        values = np.cumsum(random.standard_normal(int(rate * seconds)).astype(np.float32))
        values = values - np.convolve(values, np.full(400, 1 / 400, np.float32), mode="same")
        suffix = "flac" if index % 2 else "wav"
        soundfile.write(folder / f"{index:05d}.{suffix}", 0.5 * values / np.abs(values).max(), rate)
        total += seconds
    return total


if __name__ == "__main__":
    main()
