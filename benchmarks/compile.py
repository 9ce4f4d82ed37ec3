"""Measure the gain of torch.compile for clips of one length, and its warm-up time.

    python benchmarks/compile.py [--rate 75] [--seconds 3] [--device cpu]

Compares full graphs of fixed shapes with the uncompiled model, interleaved. A ratio over 1 means that the compiled
model is faster. Weights are random.
"""

import argparse
import statistics
import time

import torch

from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default 75)")
    parser.add_argument("--seconds", type=float, default=3, help="length of the clip in seconds (default 3)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each variant (default 7)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ratios = [8, 5, 4, 2] if arguments.rate == 75 else [6, 5, 5, 4]
    model = WavTokenizerModel(WavTokenizerConfig(upsampling_ratios=ratios)).eval().to(arguments.device)
    audio = 0.1 * torch.randn(1, 1, round(24000 * arguments.seconds), device=arguments.device)
    with torch.inference_mode():
        codes = model.encode(audio).audio_codes
        print(
            f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads, "
            f"{arguments.seconds:g} s"
        )
        print("| | warm-up | ratio | results differ by |\n|---|---|---|---|")
        for name, function, argument in (("encode", model.encode, audio), ("decode", model.decode, codes)):
            compiled = torch.compile(function, fullgraph=True, dynamic=False)
            started = time.perf_counter()
            compiled_result, expected = compiled(argument)[0], function(argument)[0]
            if arguments.device != "cpu":
                torch.accelerator.synchronize()
            warm_up = time.perf_counter() - started
            pairs = [(_time(function, argument), _time(compiled, argument)) for _ in range(arguments.rounds)]
            ratio = statistics.median(plain_time / compiled_time for plain_time, compiled_time in pairs)
            if name == "encode":
                difference = f"{int((compiled_result != expected).sum())} codes"
            else:
                difference = f"{(compiled_result - expected).abs().max():.1e}"
            print(f"| {name} | {warm_up:.1f} s | **{ratio:.2f}** | {difference} |", flush=True)


def _time(function, argument: torch.Tensor) -> float:
    started = time.perf_counter()
    function(argument)
    if argument.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
