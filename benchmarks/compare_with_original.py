"""Compare the speed of encode and decode with the reference implementation, interleaved in one process.

    git clone https://github.com/jishengpeng/WavTokenizer ../WavTokenizer
    pip install einops scipy
    python benchmarks/compare_with_original.py ../WavTokenizer

Prints seconds of audio per second for both, and the ratio of ours to the reference (over 1: ours is faster), as
medians of several rounds. Also prints the differences: the codes that differ, and how many of these are no ties, where
the two nearest entries differ by at least 1e-6 of their distance. Nothing is downloaded: weights are random, as at the
start of training, or from the formula of the test fixtures.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from fixtures import build_checkpoint, formula, original

from wavtokenizer_hf import WavTokenizerModel
from wavtokenizer_hf.conversion.from_original import convert
from wavtokenizer_hf.conversion.mapping import original_name


ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="checkout of jishengpeng/WavTokenizer")
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default 75)")
    parser.add_argument("--weights", choices=("random", "formula"), default="random", help="default: random")
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[1, 3, 10, 30, 60], help="lengths of clips in seconds"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="clips per batch, of equal length (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each variant (default 5)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder for the checkpoint")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    reference, ours = load_models(arguments.checkout, arguments.rate, arguments.weights, arguments.work)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rate} tokens/s, float32")
    print(
        "| clip | encode: reference | ours | ratio | decode: reference | ours | ratio | codes that differ | no ties "
        "| audio differs by |"
    )
    print("|---" * 10 + "|")
    for seconds in arguments.seconds:
        audio = _clips(arguments.batch_size, seconds)
        with torch.inference_mode():
            codes = original.encode(reference, audio)
            encode = _median_times(
                arguments.rounds,
                partial(original.encode, reference, audio),
                partial(ours.encode, audio[:, None]),
            )
            decode = _median_times(
                arguments.rounds,
                partial(original.decode, reference, codes),
                partial(ours.decode, codes[:, None]),
            )
            encoded = ours.encode(audio[:, None], output_latents=True)
            differs = encoded.audio_codes[:, 0] != codes
            entries = ours.quantizer.codebook.embed.double()
            distances = torch.cdist(encoded.latents.transpose(1, 2)[differs].double(), entries)
            nearest = distances.topk(2, largest=False).values
            no_ties = int((nearest[:, 1] - nearest[:, 0] >= 1e-6 * nearest[:, 1]).sum())
            decoded = ours.decode(codes[:, None]).audio_values[:, 0]
            audio_difference = (decoded - original.decode(reference, codes)).abs().max().item()
        total = seconds * arguments.batch_size
        cells = [f"{seconds:g} s" if arguments.batch_size == 1 else f"{arguments.batch_size} of {seconds:g} s"]
        for reference_time, our_time, ratio in (encode, decode):
            cells += [f"{total / reference_time:.1f} x", f"{total / our_time:.1f} x", f"**{ratio:.2f}**"]
        cells += [f"{int(differs.sum())} of {codes.numel()}", str(no_ties), f"{audio_difference:.1e}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def load_models(checkout: str, rate: int, weights: str, work: Path) -> tuple[torch.nn.Module, WavTokenizerModel]:
    """Return the reference model and ours with the same weights: "random", or those of the "formula"."""
    ours = WavTokenizerModel.from_pretrained(reference_folder(work, rate)).eval()
    state = build_checkpoint.state_dict(rate)
    if weights == "random":
        torch.manual_seed(0)
        ours = WavTokenizerModel(ours.config).eval()
        ours.quantizer.codebook.inited.fill_(1)
        state.update({original_name(name): tensor for name, tensor in ours.state_dict().items()})
    return original.load_original(checkout, rate, state), ours


def _clips(count: int, seconds: float) -> torch.Tensor:
    """Return (count, T): the formula's speech-like signal, with another start in each row."""
    audio = torch.from_numpy(formula.waveform("speechlike", seconds))
    return torch.stack([audio.roll(7919 * row) for row in range(count)])


def reference_folder(work: Path, rate: int) -> Path:
    """Return the converted reference checkpoint for `rate` tokens/s, built on first use."""
    folder = work / f"wavtokenizer-{rate}"
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        checkpoint = build_checkpoint.build(rate, work / f"original-{rate}.ckpt")
        convert(checkpoint, folder)
        checkpoint.unlink()
    return folder


def _median_times(rounds: int, reference, ours) -> tuple[float, float, float]:
    """Return the medians of both times in seconds, and of the ratios within each round, which are more stable."""
    reference(), ours()
    pairs = []
    for _ in range(rounds):
        pair = []
        for function in (reference, ours):
            started = time.perf_counter()
            function()
            pair.append(time.perf_counter() - started)
        pairs.append(pair)
    reference_times, our_times = zip(*pairs, strict=True)
    ratios = [reference_time / our_time for reference_time, our_time in pairs]
    return statistics.median(reference_times), statistics.median(our_times), statistics.median(ratios)


if __name__ == "__main__":
    main()
