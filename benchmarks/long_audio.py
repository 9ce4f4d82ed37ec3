"""What chunks do to the speed and the memory of encoding: whole, in automatic chunks, and as a stream.

    python benchmarks/long_audio.py [--rate 75] [--seconds 30 60 300]

Each figure is from a process of its own for memory (anonymous memory above that of the loaded model, at its peak), and the
ratio of speeds is that of interleaved rounds in one process.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerEncoderModel
from wavtokenizer_hf.long_audio import EncodeStream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default 75)")
    parser.add_argument("--seconds", type=float, nargs="+", default=[30, 60, 300], help="lengths of clips")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default 3)")
    parser.add_argument("--memory-of", choices=("whole", "chunks", "stream"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ratios = [8, 5, 4, 2] if arguments.rate == 75 else [6, 5, 5, 4]
    model = WavTokenizerEncoderModel(WavTokenizerConfig(upsampling_ratios=ratios)).eval()
    if arguments.memory_of:
        print(_peak_memory(_ways(model, arguments.seconds[0])[arguments.memory_of]))
        return
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, {arguments.rate} tokens/s, float32")
    print("| clip | whole | chunks | stream of 1 s | memory: whole | chunks | stream | codes that differ |")
    print("|---|---|---|---|---|---|---|---|")
    for seconds in arguments.seconds:
        ways = _ways(model, seconds)
        times = {name: [] for name in ways}
        codes = {}
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                codes[name] = way()
                times[name].append(time.perf_counter() - started)
        whole = statistics.median(times["whole"])
        memory = {name: _memory_in_a_process(arguments.rate, seconds, name) for name in ways}
        differ = max(int((codes[name] != codes["whole"]).sum()) for name in ("chunks", "stream"))
        print(
            f"| {seconds:g} s | {seconds / whole:.1f} x real time | "
            + " | ".join(f"{whole / statistics.median(times[name]):.2f}" for name in ("chunks", "stream"))
            + " | "
            + " | ".join(f"{megabytes:,.0f} MB" for megabytes in memory.values())
            + f" | {differ} of {codes['whole'].numel()} |",
            flush=True,
        )


def _ways(model: WavTokenizerEncoderModel, seconds: float) -> dict:
    audio = 0.1 * torch.randn(1, 1, round(24000 * seconds))

    def stream():
        encode = EncodeStream(model)
        return torch.cat([*(encode.push(block) for block in audio[0, 0].split(24000)), encode.flush()])

    def encode(chunk_seconds):
        with torch.inference_mode():
            return model.encode(audio, chunk_seconds=chunk_seconds).audio_codes[0, 0]

    return {"whole": lambda: encode(seconds + 1), "chunks": lambda: encode(5), "stream": stream}


def _memory_in_a_process(rate: int, seconds: float, name: str) -> float:
    command = [sys.executable, __file__, "--rate", str(rate), "--seconds", str(seconds), "--memory-of", name]
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
