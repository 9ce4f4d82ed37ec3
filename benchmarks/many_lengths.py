"""Compare encode and decode speed with the reference implementation on clips of different lengths, as in a corpus.

    python benchmarks/many_lengths.py ../WavTokenizer

CPU libraries compile code for each new size. So a loop over a corpus is slower than a loop over one clip. After one
clip as a warm-up, random clips of 1 to 15 s run once through both models, in turns. Prints seconds of audio per
second, and the ratio of ours to the reference (over 1: ours is faster), for each quarter of the clips. Weights are
random, as at the start of training. For the checkout, see compare_with_original.py.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from compare_with_original import load_models
from fixtures import formula, original


ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="checkout of jishengpeng/WavTokenizer")
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default 75)")
    parser.add_argument("--clips", type=int, default=80, help="number of clips (default 80)")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder for the checkpoint")
    arguments = parser.parse_args()

    reference, ours = load_models(arguments.checkout, arguments.rate, "random", arguments.work)
    speech = torch.from_numpy(formula.waveform("speechlike", 20))
    draw = random.Random(0)
    sizes = [24000] + [draw.randint(24000, 15 * 24000) for _ in range(arguments.clips)]
    times = []
    with torch.inference_mode():
        for size in sizes:
            audio = speech[None, :size]
            reference_encode, codes = _timed(original.encode, reference, audio)
            our_encode, output = _timed(ours.encode, audio[:, None])
            reference_decode, _ = _timed(original.decode, reference, codes)
            our_decode, _ = _timed(ours.decode, output.audio_codes)
            times.append((size / 24000, reference_encode, our_encode, reference_decode, our_decode))

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rate} tokens/s, float32")
    print("| clips | encode: reference | ours | ratio | decode: reference | ours | ratio |")
    print("|---" * 7 + "|")
    quarter = arguments.clips // 4
    for first in range(1, 4 * quarter, quarter):
        seconds, *sums = (sum(column) for column in zip(*times[first : first + quarter], strict=True))
        cells = [f"{first} to {first + quarter - 1}"]
        for reference_time, our_time in (sums[:2], sums[2:]):
            cells += [
                f"{seconds / reference_time:.1f} x",
                f"{seconds / our_time:.1f} x",
                f"**{reference_time / our_time:.2f}**",
            ]
        print("| " + " | ".join(cells) + " |")


def _timed(function, *arguments):
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
