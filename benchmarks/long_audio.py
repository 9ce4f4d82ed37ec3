"""What chunks, windows and streams do to the speed and the memory of long audio.

    python benchmarks/long_audio.py [--job encode] [--rate 75] [--seconds 30 60 300]
    python benchmarks/long_audio.py --without-first --rounds 1 --seconds 60 900 3600      an hour, in little memory

Encode: whole, in automatic chunks, and as a stream. Decode: exact, in windows, and as a stream. Memory is anonymous
memory above that of the loaded model, at its peak, each in a process of its own; speeds are those of interleaved
rounds in one process.
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
    parser.add_argument("--job", choices=("encode", "decode"), default="encode")
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default 75)")
    parser.add_argument("--seconds", type=float, nargs="+", default=[30, 60, 300], help="lengths of clips")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default 3)")
    parser.add_argument("--without-first", action="store_true", help="leave out the first way, whose memory grows")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ratios = [8, 5, 4, 2] if arguments.rate == 75 else [6, 5, 5, 4]
    config = WavTokenizerConfig(upsampling_ratios=ratios)
    model_class, ways_of = (
        (WavTokenizerEncoderModel, _encode_ways) if arguments.job == "encode" else (WavTokenizerModel, _decode_ways)
    )
    model = model_class(config).eval()
    if arguments.memory_of:
        print(_peak_memory(ways_of(model, arguments.seconds[0])[arguments.memory_of]))
        return
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, {arguments.rate} tokens/s, float32")
    for index, seconds in enumerate(arguments.seconds):
        ways = ways_of(model, seconds)
        if arguments.without_first:
            del ways[next(iter(ways))]
        first, *others = ways
        if index == 0:
            memory = " | ".join(["memory: " + first, *others])
            last = "codes that differ" if arguments.job == "encode" else "stream equals windows"
            print(f"| clip | {' | '.join(ways)} | {memory} | {last} |")
            print("|---" * (2 * len(ways) + 2) + "|")
        times, results = {name: [] for name in ways}, {}
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                results[name] = way()
                times[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(values) for name, values in times.items()}
        cells = [f"{seconds:g} s", f"{seconds / medians[first]:.1f} x real time"]
        cells += [f"{medians[first] / medians[name]:.2f}" for name in others]
        cells += [f"{_memory_in_a_process(arguments, seconds, name):,.0f} MB" for name in ways]
        if arguments.job == "encode":
            differ = max(int((results[name] != results[first]).sum()) for name in others)
            cells.append(f"{differ} of {results[first].numel()}")
        else:
            cells.append(str(torch.equal(*(results[name] for name in list(ways)[-2:]))))
        print("| " + " | ".join(cells) + " |", flush=True)


def _encode_ways(model: WavTokenizerEncoderModel, seconds: float) -> dict:
    audio = 0.1 * torch.randn(1, 1, round(24000 * seconds))

    def stream():
        encode = EncodeStream(model)
        return torch.cat([*(encode.push(block) for block in audio[0, 0].split(24000)), encode.flush()])

    def encode(chunk_seconds):
        with torch.inference_mode():
            return model.encode(audio, chunk_seconds=chunk_seconds).audio_codes[0, 0]

    return {"whole": lambda: encode(seconds + 1), "chunks": lambda: encode(None), "stream of 1 s": stream}


def _decode_ways(model: WavTokenizerModel, seconds: float) -> dict:
    config = model.config
    codes = torch.randint(config.codebook_size, (1, 1, round(config.frame_rate * seconds)))

    def stream():
        decode = DecodeStream(model)
        return torch.cat(
            [*(decode.push(piece) for piece in codes[0, 0].split(round(config.frame_rate))), decode.flush()]
        )

    def decode(window_seconds):
        with torch.inference_mode():
            return model.decode(codes, window_seconds=window_seconds).audio_values[0, 0]

    return {"exact": lambda: decode(None), "windows of 3 s": lambda: decode(3.0), "stream of 1 s": stream}


def _memory_in_a_process(arguments, seconds: float, name: str) -> float:
    command = [sys.executable, __file__, "--job", arguments.job, "--rate", str(arguments.rate)]
    command += ["--seconds", str(seconds), "--memory-of", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _peak_memory(function) -> float:
    """Megabytes of anonymous memory at the peak of `function`, above those before it."""
    before, peak, done = _anonymous(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return peak[0] - before


def _anonymous() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1000
    raise SystemExit("Memory is read from /proc, which only Linux has.")


if __name__ == "__main__":
    main()
