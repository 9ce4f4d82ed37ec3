"""Measure the cost of a batch: all rows together through the masks, or by other ways, with and without padding.

    python benchmarks/batches.py [--rate 75] [--device cuda]

All runs are interleaved in one process. "together" runs the whole batch through the model at once. "default or loop"
is the model's default for encoding on a CPU, and otherwise a loop over the rows without their padding. "padded" is the
same batch with rows of half to full length, marked in the mask. Each value is a time divided by the time of the
unpadded batch that runs together.
"""

import argparse
import statistics
import time
from functools import partial

import torch

from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerModel
from wavtokenizer_hf.modeling_wavtokenizer_batching import TOGETHER_POLICY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default 75)")
    parser.add_argument("--batch", type=int, default=8, help="number of rows (default 8)")
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[1, 3, 10], help="lengths of the longest row in seconds"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each variant (default 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ratios = [8, 5, 4, 2] if arguments.rate == 75 else [6, 5, 5, 4]
    model = WavTokenizerModel(WavTokenizerConfig(upsampling_ratios=ratios)).eval().to(arguments.device)
    hop = model.config.hop_length

    device_name = (
        torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {device_name}, {arguments.rate} tokens/s, {arguments.batch} rows, float32")
    print("| longest row | job | together | together, padded | default or loop | default or loop, padded |")
    print("|---|---|---|---|---|---|")
    for seconds in arguments.seconds:
        size = round(seconds * 24000)
        audio = 0.1 * torch.randn(arguments.batch, 1, size, device=arguments.device)
        lengths = torch.linspace(size / 2, size, arguments.batch).long()
        mask = (torch.arange(size) < lengths[:, None]).to(arguments.device)
        codes = torch.randint(
            model.config.codebook_size, (arguments.batch, 1, -(-size // hop)), device=arguments.device
        )
        codes_mask = (torch.arange(codes.shape[-1]) < -(-lengths[:, None] // hop))[:, None].to(arguments.device)
        jobs = {
            "encode": (model.encode, audio, {"padding_mask": mask}, lengths),
            "decode": (model.decode, codes, {"audio_codes_mask": codes_mask}, -(-lengths // hop)),
        }
        for job, (function, batch, masks, row_lengths) in jobs.items():
            rows = list(batch.split(1))
            trimmed_rows = [row[..., :length] for row, length in zip(rows, row_lengths.tolist(), strict=True)]
            together = partial(model.encoder_model._encode, policy=TOGETHER_POLICY) if job == "encode" else function
            variants = [partial(together, batch), partial(together, batch, **masks)]
            if job == "encode" and arguments.device == "cpu":
                variants += [partial(function, batch), partial(function, batch, **masks)]
            else:
                variants += [partial(_run_each_row, function, rows), partial(_run_each_row, function, trimmed_rows)]
            times = _median_times(arguments.rounds, variants)
            cells = [f"{arguments.batch * seconds / times[0]:.1f} x real time"]
            cells += [f"{time_ / times[0]:.2f}" for time_ in times[1:]]
            print(f"| {seconds:g} s | {job} | " + " | ".join(cells) + " |", flush=True)


def _run_each_row(function, rows) -> None:
    for row in rows:
        function(row)


def _median_times(rounds: int, variants) -> list[float]:
    """Return the median seconds of each variant, measured in turns."""
    times = [[] for _ in variants]
    with torch.inference_mode():
        for round_ in range(rounds + 1):
            for index, variant in enumerate(variants):
                started = time.perf_counter()
                variant()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if round_ > 0:  # the first round is a warm-up
                    times[index].append(time.perf_counter() - started)
    return [statistics.median(values) for values in times]


if __name__ == "__main__":
    main()
