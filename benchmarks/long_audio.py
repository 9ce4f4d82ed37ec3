"""Measure speed and memory of chunks, windows and streams on long audio.

    python benchmarks/long_audio.py [--job encode] [--rate 75] [--seconds 30 60 300]
    python benchmarks/long_audio.py --without-first --rounds 1 --seconds 60 900 3600      an hour in little memory

Encode: whole, in automatic chunks, and as a stream. Decode: exact, in windows, and as a stream. Memory is the peak of
anonymous memory above that of the loaded model, each in its own process. Speeds are medians of interleaved rounds in
one process.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerEncoderModel, WavTokenizerModel
from wavtokenizer_hf.long_audio import DecodeStream, EncodeStream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=("encode", "decode"), default="encode", help="default encode")
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default 75)")
    parser.add_argument("--seconds", type=float, nargs="+", default=[30, 60, 300], help="lengths of clips in seconds")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant (default 3)")
    parser.add_argument("--without-first", action="store_true", help="leave out the first variant, whose memory grows")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ratios = [8, 5, 4, 2] if arguments.rate == 75 else [6, 5, 5, 4]
    config = WavTokenizerConfig(upsampling_ratios=ratios)
    if arguments.job == "encode":
        model_class, make_variants = WavTokenizerEncoderModel, _encode_variants
    else:
        model_class, make_variants = WavTokenizerModel, _decode_variants
    model = model_class(config).eval()
    if arguments.memory_of:
        print(_peak_memory(make_variants(model, arguments.seconds[0])[arguments.memory_of]))
        return
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, {arguments.rate} tokens/s, float32")
    for index, seconds in enumerate(arguments.seconds):
        variants = make_variants(model, seconds)
        if arguments.without_first:
            del variants[next(iter(variants))]
        first, *others = variants
        if index == 0:
            memory = " | ".join(["memory: " + first, *others])
            last_column = "codes that differ" if arguments.job == "encode" else "stream equals windows"
            print(f"| clip | {' | '.join(variants)} | {memory} | {last_column} |")
            print("|---" * (2 * len(variants) + 2) + "|")
        times, results = {name: [] for name in variants}, {}
        for _ in range(arguments.rounds):
            for name, variant in variants.items():
                started = time.perf_counter()
                results[name] = variant()
                times[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(values) for name, values in times.items()}
        cells = [f"{seconds:g} s", f"{seconds / medians[first]:.1f} x real time"]
        cells += [f"{medians[first] / medians[name]:.2f}" for name in others]
        cells += [f"{_measure_memory(arguments, seconds, name):,.0f} MB" for name in variants]
        if arguments.job == "encode":
            num_different = max(int((results[name] != results[first]).sum()) for name in others)
            cells.append(f"{num_different} of {results[first].numel()}")
        else:
            cells.append(str(torch.equal(*(results[name] for name in list(variants)[-2:]))))
        print("| " + " | ".join(cells) + " |", flush=True)


def _encode_variants(model: WavTokenizerEncoderModel, seconds: float) -> dict:
    audio = 0.1 * torch.randn(1, 1, round(24000 * seconds))

    def stream():
        encode = EncodeStream(model)
        return torch.cat([*(encode.push(block) for block in audio[0, 0].split(24000)), encode.flush()])

    def encode(chunk_seconds):
        with torch.inference_mode():
            return model.encode(audio, chunk_seconds=chunk_seconds).audio_codes[0, 0]

    return {"whole": lambda: encode(seconds + 1), "chunks": lambda: encode(None), "stream of 1 s": stream}


def _decode_variants(model: WavTokenizerModel, seconds: float) -> dict:
    config = model.config
    codes = torch.randint(config.codebook_size, (1, 1, round(config.frame_rate * seconds)))

    def stream():
        decode = DecodeStream(model)
        return torch.cat(
            [*(decode.push(block) for block in codes[0, 0].split(round(config.frame_rate))), decode.flush()]
        )

    def decode(window_seconds):
        with torch.inference_mode():
            return model.decode(codes, window_seconds=window_seconds).audio_values[0, 0]

    return {"exact": lambda: decode(None), "windows of 3 s": lambda: decode(3.0), "stream of 1 s": stream}


def _measure_memory(arguments, seconds: float, name: str) -> float:
    command = [sys.executable, __file__, "--job", arguments.job, "--rate", str(arguments.rate)]
    command += ["--seconds", str(seconds), "--memory-of", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _peak_memory(function) -> float:
    """Return the peak of anonymous memory while `function` runs, in megabytes above that before the call."""
    before, peak, done = _anonymous_memory(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], _anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return peak[0] - before


def _anonymous_memory() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1000
    raise SystemExit("Memory is read from /proc/self/status, which only Linux has.")


if __name__ == "__main__":
    main()
