"""Compare speed and exactness with the native WavTokenizer of transformers (5.24 or later), interleaved.

    python benchmarks/compare_with_transformers.py [--rate 75] [--seconds 1 3 10 30 60]

Both models have the same weights: random ones, or those of a folder. Prints a table of single clips, with a last row
for a batch of equal clips. A second table counts the wrong codes of padded batches: codes that differ from those of
the clip alone. A ratio above 1 means that ours is faster. Times are medians over interleaved rounds. A ratio is the
median of the ratios within the rounds.
"""

import argparse
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from fixtures import formula

from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerModel


RATIOS = {75: [8, 5, 4, 2], 40: [6, 5, 5, 4]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of weights (default: random weights)")
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default: 75)")
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[1, 3, 10, 30, 60], help="lengths of clips in seconds"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="clips per batch (default: 8)")
    parser.add_argument(
        "--batch-seconds", type=float, default=10, help="length of clips in a batch, in seconds (default: 10)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each variant (default: 5)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    native, ours = load_models(arguments.model, arguments.rate)
    print(
        f"{processor()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads, {arguments.rate} tokens/s, float32"
    )
    print("| clip | encode: native | ours | ratio | decode: native | ours | ratio | codes that differ |")
    print("|---" * 8 + "|")
    lengths = [(1, seconds) for seconds in arguments.seconds]
    for count, seconds in [*lengths, (arguments.batch_size, arguments.batch_seconds)]:
        audio = clips(count, seconds)
        with torch.inference_mode():
            codes = native.encode(audio).audio_codes
            differ = int((codes != ours.encode(audio).audio_codes).sum())
            encode = times(arguments.rounds, partial(native.encode, audio), partial(ours.encode, audio))
            decode = times(arguments.rounds, partial(native.decode, codes), partial(ours.decode, codes))
        cells = [f"{seconds:g} s" if count == 1 else f"{count} of {seconds:g} s"]
        for native_time, our_time, ratio in (encode, decode):
            total = seconds * count
            cells += [f"{total / native_time:.1f} x", f"{total / our_time:.1f} x", f"**{ratio:.2f}**"]
        print("| " + " | ".join([*cells, f"{differ} of {codes.numel()}"]) + " |", flush=True)

    print("\n| padded batch | native: wrong codes | in rows | ours: wrong codes | in rows |\n|---|---|---|---|---|")
    for count, seconds in ((8, 3), (arguments.batch_size, arguments.batch_seconds)):
        cells = [f"{count} of {seconds / 2:g} to {seconds:g} s"]
        for model in (native, ours):
            wrong, rows, total = wrong_codes(model, ours, count, seconds)
            cells += [f"{wrong} of {total}", f"{rows} of {count}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def load_models(folder: str | None, rate: int) -> tuple[torch.nn.Module, WavTokenizerModel]:
    """Load the native model and ours with the same weights."""
    from transformers.models.wavtokenizer.modeling_wavtokenizer import WavTokenizerModel as NativeModel

    if folder is not None:
        return NativeModel.from_pretrained(folder).eval(), WavTokenizerModel.from_pretrained(folder).eval()
    torch.manual_seed(0)
    ours = WavTokenizerModel(WavTokenizerConfig(upsampling_ratios=RATIOS[rate])).eval()
    with tempfile.TemporaryDirectory() as saved:
        ours.save_pretrained(saved)
        return NativeModel.from_pretrained(saved).eval(), ours


def clips(count: int, seconds: float) -> torch.Tensor:
    """Return (count, 1, T): the formula's speech-like signal, with another start in each row."""
    audio = torch.from_numpy(formula.waveform("speechlike", seconds))
    return torch.stack([audio.roll(7919 * row) for row in range(count)])[:, None]


def times(rounds: int, native, ours) -> tuple[float, float, float]:
    """Return the medians of both times in seconds, and of the ratios within each round."""
    native(), ours()
    pairs = []
    for _ in range(rounds):
        pair = []
        for function in (native, ours):
            start = time.perf_counter()
            function()
            pair.append(time.perf_counter() - start)
        pairs.append(pair)
    native_times, our_times = zip(*pairs, strict=True)
    ratios = [native_time / our_time for native_time, our_time in pairs]
    return statistics.median(native_times), statistics.median(our_times), statistics.median(ratios)


@torch.inference_mode()
def wrong_codes(model, alone, count: int, seconds: float, device: str = "cpu") -> tuple[int, int, int]:
    """Count codes of a padded batch that differ from those of the clip alone: (wrong codes, wrong rows, all codes)."""
    audio, size = clips(count, seconds).to(device), round(seconds * 24000)
    lengths = [size // 2 + (size - size // 2) * row // (count - 1) for row in range(count)]
    mask = torch.arange(size, device=device) < torch.tensor(lengths, device=device)[:, None]
    together = model.encode(audio * mask[:, None], padding_mask=mask.long()).audio_codes
    wrong = total = rows = 0
    for row, length in enumerate(lengths):
        expected = alone.encode(audio[row : row + 1, :, :length]).audio_codes[0]
        differ = int((together[row, :, : expected.shape[-1]] != expected).sum())
        wrong, rows, total = wrong + differ, rows + (differ > 0), total + expected.numel()
    return wrong, rows, total


def processor() -> str:
    """Return the processor's name, and on Linux also its vector instructions."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "CPU")
    known = ("amx_tile", "avx512_fp16", "avx512_bf16", "avx512f", "avx2")
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return f"{name} ({', '.join(flag for flag in known if flag in flags) or 'no AVX2'})"


if __name__ == "__main__":
    main()
