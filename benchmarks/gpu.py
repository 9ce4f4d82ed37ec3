"""Compare throughput on one GPU with the WavTokenizer of transformers: hours of audio per hour, by batch size.

    python benchmarks/gpu.py [--seconds 10] [--batch-sizes 1 8 32 64]
    python benchmarks/gpu.py --device cpu --quick      # checks that the script runs

It takes less than 10 minutes. Rows of the table:
    encode, decode          ours, whole batches; decode in float32 and bfloat16; with and without torch.compile
    native, one by one      the native model in a loop over the clips, which gives exact codes
    native, padded batch    the native model on the batch, where shorter rows get wrong codes
Weights are random. Peak memory includes the weights. Wrong codes are codes that differ from those of the clip alone.
"""

import argparse
import copy
import time
from functools import partial

import torch
import transformers
from compare_with_transformers import clips, load_models, processor, wrong_codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default: 75)")
    parser.add_argument("--seconds", type=float, default=10, help="length of the clips in seconds (default: 10)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 64], help="default: 1 8 32 64")
    parser.add_argument("--budget", type=float, default=4, help="time per measurement in seconds (default: 4)")
    parser.add_argument("--quick", action="store_true", help="one clip of 1 s and one batch of 2, measured once")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.batch_sizes, arguments.budget = 1, [1, 2], 0
    device = torch.device(arguments.device)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    print(
        f"{device_name}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{arguments.rate} tokens/s, clips of {arguments.seconds:g} s"
    )

    native, ours = load_models(None, arguments.rate)
    bfloat16 = copy.deepcopy(ours).to(torch.bfloat16)
    native, ours, bfloat16 = (model.to(device) for model in (native, ours, bfloat16))
    compiled_encode, compiled_decode = torch.compile(ours.encode), torch.compile(ours.decode)
    print("| job | " + " | ".join(f"batch of {size}" for size in arguments.batch_sizes) + " |")
    print("|---" * (len(arguments.batch_sizes) + 1) + "|")
    jobs = {
        "encode": lambda audio, codes: partial(ours.encode, audio),
        "encode, native one by one": lambda audio, codes: partial(one_by_one, native.encode, audio),
        "encode, native padded batch": lambda audio, codes: partial(native.encode, audio),
        "decode": lambda audio, codes: partial(ours.decode, codes),
        "decode, bfloat16": lambda audio, codes: partial(bfloat16.decode, codes),
        "decode, native one by one": lambda audio, codes: partial(one_by_one, native.decode, codes),
        "decode, native batch": lambda audio, codes: partial(native.decode, codes),
    }
    if not arguments.quick:
        jobs["encode, compiled"] = lambda audio, codes: partial(compiled_encode, audio)
        jobs["decode, compiled"] = lambda audio, codes: partial(compiled_decode, codes)
    for job, build in jobs.items():
        cells = [measure(build, size, arguments, device) for size in arguments.batch_sizes]
        print(f"| {job} | " + " | ".join(cells) + " |", flush=True)

    print("\n| padded batch | native: wrong codes | in rows | ours: wrong codes | in rows |\n|---|---|---|---|---|")
    for count in (size for size in arguments.batch_sizes if size > 1):
        cells = [f"{count} of {arguments.seconds / 2:g} to {arguments.seconds:g} s"]
        for model in (native, ours):
            wrong, rows, total = wrong_codes(model, ours, count, arguments.seconds, device)
            cells += [f"{wrong} of {total}", f"{rows} of {count}"]
        print("| " + " | ".join(cells) + " |", flush=True)


@torch.inference_mode()
def measure(build, size: int, arguments: argparse.Namespace, device: torch.device) -> str:
    """Return hours of audio per hour and peak memory of the job that `build` returns, or "out of memory"."""
    audio = clips(size, arguments.seconds).to(device)
    hop = 320 if arguments.rate == 75 else 600
    codes = torch.randint(4096, (size, 1, -(-audio.shape[-1] // hop)), device=device)
    function = build(audio, codes)
    try:
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(1 if arguments.quick else 3):  # warm-up, compilation included
            function()
        synchronize(device)
        start, runs = time.perf_counter(), 0
        while runs == 0 or time.perf_counter() - start < arguments.budget:
            function()
            synchronize(device)
            runs += 1
        speed = runs * size * arguments.seconds / (time.perf_counter() - start)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    return f"{speed:,.0f} h/h{memory}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def one_by_one(function, batch: torch.Tensor) -> None:
    for row in batch.split(1):
        function(row)


if __name__ == "__main__":
    main()
