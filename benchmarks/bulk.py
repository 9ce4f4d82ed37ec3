"""Bulk tokenization beside a plain loop over the same files, and how its memory grows with their number.

    python benchmarks/bulk.py [--clips 200] [--num-processes 2]       throughput, on a CPU or one GPU or several
    python benchmarks/bulk.py --memory 100 1000                       peak memory for so many clips

The loop reads, resamples and encodes one clip after the other with the torch threads of the machine: with our model,
and with `--checkout ../WavTokenizer` also with the original's, as people do it today. All work on the same files (1 to
15 s, 16 to 48 kHz, WAV and FLAC) in one run, in turns, and are counted with the loading of the model and of the
libraries. Then the loop alone tells where the time goes.
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
OUR_LOOP, THEIR_LOOP = "a plain loop", "a plain loop with the original's model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default 75)")
    parser.add_argument("--clips", type=int, default=200, help="number of clips (default 200)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default 3)")
    parser.add_argument("--num-processes", type=int, default=None, help="default: as the command does")
    parser.add_argument("--batch-seconds", type=float, nargs="+", default=[30, 120, 600])
    parser.add_argument("--checkout", help="of jishengpeng/WavTokenizer: its loop is measured too")
    parser.add_argument("--memory", type=int, nargs="+", metavar="CLIPS", help="peak memory for so many clips")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(ONE[arguments.one[0]](*arguments.one[1:])))
        return
    with tempfile.TemporaryDirectory() as place:
        (compare if not arguments.memory else memory)(Path(place), arguments)


def compare(place: Path, arguments) -> None:
    model = save_model(place, arguments.rate)
    hours = write_clips(place / "clips", arguments.clips) / 3600
    processes = arguments.num_processes or 0
    ways = {OUR_LOOP: ("loop", model, place / "clips")}
    if arguments.checkout:
        ways[THEIR_LOOP] = ("loop_original", arguments.checkout, arguments.rate, place / "clips")
    for seconds in arguments.batch_seconds:
        ways[f"bulk, {seconds:g} s in a batch"] = ("bulk", model, place / "clips", processes, seconds, place / "out")
    print(f"{arguments.clips} clips of 1 to 15 s, {hours:.2f} hours, {arguments.rate} tokens/s, random weights")
    results = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for way, command in ways.items():
            subprocess.run(["rm", "-rf", str(place / "out")], check=True)
            started = time.perf_counter()
            one = run_one(*command)
            results[way].append({**one, "all": time.perf_counter() - started})
    loops = [way for way in (OUR_LOOP, THEIR_LOOP) if way in ways]
    print(f"| way | hours per hour | {' | '.join(f'beside {way}' for way in loops)} | once started |")
    print("|---" * (len(loops) + 3) + "|")
    medians = {way: statistics.median(one["all"] for one in ones) for way, ones in results.items()}
    for way, ones in results.items():
        working = statistics.median(one["working"] for one in ones)
        ratios = " | ".join(f"{medians[loop] / medians[way]:.2f}" for loop in loops)
        print(f"| {way} | {hours * 3600 / medians[way]:.1f} | {ratios} | {hours * 3600 / working:.1f} |")
    shares = results[OUR_LOOP][-1]
    print(
        f"The loop: {shares['reading'] / shares['working']:.1%} of its working time reads and resamples, "
        f"{shares['encoding'] / shares['working']:.1%} encodes."
    )


def memory(place: Path, arguments) -> None:
    model = save_model(place, arguments.rate)
    print("| clips | hours | peak memory of the largest process |")
    print("|---|---|---|")
    for number in arguments.memory:
        hours = write_clips(place / str(number), number) / 3600
        one = run_one("bulk", model, place / str(number), 1, arguments.batch_seconds[0], place / f"out{number}")
        print(f"| {number} | {hours:.2f} | {one['peak'] / 1024:.0f} MB |", flush=True)


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


def loop_original(checkout: str, rate: str, clips: str) -> dict:
    import torch
    from fixtures import build_checkpoint, original

    import wavtokenizer_hf.audio  # noqa: F401  (before the empty torchaudio that `original` may put in, which transformers minds)

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

    first: list[float] = []

    class Watch(run.ClipProgress):  # notes when the first clips are done, and how many they are
        def __call__(self, summary):
            if not first:
                first.extend((time.perf_counter(), summary.num_samples))
            super().__call__(summary)

    run.ClipProgress = Watch
    options = TokenizeOptions(num_processes=int(processes) or None, batch_seconds=float(seconds), part_size=25)
    result = tokenize(clips, model, output, options)
    assert not result.failures
    done = result.done_now.num_samples
    working = (time.perf_counter() - first[0]) * done / (done - first[1])
    # not ru_maxrss, which begins with that of the process that started this one
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"working": working, "peak": int(peak)}


ONE = {"loop": loop, "loop_original": loop_original, "bulk": bulk}


def save_model(place: Path, rate: int) -> Path:
    import torch

    from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerFeatureExtractor, WavTokenizerModel

    torch.manual_seed(0)
    ratios = [8, 5, 4, 2] if rate == 75 else [6, 5, 5, 4]
    model = WavTokenizerModel(WavTokenizerConfig(upsampling_ratios=ratios))
    model.save_pretrained(place / "model")
    WavTokenizerFeatureExtractor(hop_length=model.config.hop_length).save_pretrained(place / "model")
    return place / "model"


def write_clips(folder: Path, number: int) -> float:
    """Pink-ish noise, 1 to 15 s; gives seconds in all."""
    import soundfile

    random, total = np.random.default_rng(0), 0.0
    folder.mkdir()
    for index in range(number):
        rate, seconds = RATES[index % len(RATES)], random.uniform(1, 15)
        values = np.cumsum(random.standard_normal(int(rate * seconds)).astype(np.float32))
        values = values - np.convolve(values, np.full(400, 1 / 400, np.float32), mode="same")
        ending = "flac" if index % 2 else "wav"
        soundfile.write(folder / f"{index:05d}.{ending}", 0.5 * values / np.abs(values).max(), rate)
        total += seconds
    return total


if __name__ == "__main__":
    main()
