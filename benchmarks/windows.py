"""Compare windowed with exact decoding, by window and overlap, and measure the first-audio latency of a stream.

    python benchmarks/windows.py --model MODEL --audio FOLDER

The files are joined to one clip (default: up to two minutes) and encoded. Its codes are decoded whole and in windows.
Prints for each window and overlap:
    SNR                     signal-to-noise ratio of windowed against exact audio
    mel distance            mean difference of log mel magnitudes, as in training: windowed to exact audio, and
                            windowed to original audio, which shows the cost for a listener
    speed                   time of exact decoding divided by the time in windows
    first audio             computing time of a `DecodeStream` up to its first audio, without waiting for codes
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from wavtokenizer_hf import WavTokenizerModel, audio
from wavtokenizer_hf.long_audio import DecodeStream
from wavtokenizer_hf.training.losses import MelLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder, or name on the Hub")
    parser.add_argument("--audio", required=True, type=Path, help="folder of audio files")
    parser.add_argument("--seconds", type=float, default=120, help="length of audio to use, in seconds (default 120)")
    parser.add_argument("--windows", type=float, nargs="+", default=[1, 2, 3, 5, 10, 20], help="in seconds")
    parser.add_argument("--overlaps", type=float, nargs="+", default=[0, 0.1, 0.25, 0.5, 1, 2], help="in seconds")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant (default 3)")
    arguments = parser.parse_args()
    model = WavTokenizerModel.from_pretrained(arguments.model).eval()
    rate = model.config.sampling_rate
    files = sorted(file for file in arguments.audio.rglob("*") if file.suffix.lower() in audio.SUFFIXES)
    waveform = np.concatenate([audio.load(file, rate) for file in files])[: round(arguments.seconds * rate)]
    real = torch.from_numpy(waveform)[None, None]
    mel = MelLoss(rate)
    with torch.inference_mode():
        codes = model.encode(real).audio_codes
        exact_time, exact = _median_time(
            arguments.rounds, lambda: model.decode(codes).audio_values[..., : real.shape[-1]]
        )
        to_real = mel(exact[:, 0], real[:, 0]).item()
        print(f"{len(waveform) / rate:.0f} s of {len(files)} files, {model.config.frame_rate:g} tokens/s")
        print(f"exact decode: mel distance to the original audio {to_real:.4f}\n")
        print(
            "| window | overlap | SNR | mel distance to exact | to the original | speed over exact | first audio "
            "after |"
        )
        print("|---" * 7 + "|")
        for window in arguments.windows:
            for overlap in arguments.overlaps:
                if 2 * overlap > window:
                    continue
                options = {"window_seconds": window, "overlap_seconds": overlap}
                windowed_time, windowed = _median_time(
                    arguments.rounds,
                    lambda options=options: model.decode(codes, **options).audio_values[..., : real.shape[-1]],
                )
                noise = (windowed - exact).square().mean()
                snr = 10 * torch.log10(exact.square().mean() / noise).item()
                cells = [f"{window:g} s", f"{overlap:g} s", f"{snr:.1f} dB"]
                cells += [
                    f"{mel(windowed[:, 0], exact[:, 0]).item():.4f}",
                    f"{mel(windowed[:, 0], real[:, 0]).item():.4f}",
                ]
                cells += [
                    f"{exact_time / windowed_time:.2f}",
                    f"{1000 * _first_audio_time(model, codes[0, 0], window, overlap):.0f} ms",
                ]
                print("| " + " | ".join(cells) + " |", flush=True)


def _median_time(rounds: int, function) -> tuple[float, torch.Tensor]:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - started)
    return statistics.median(times), result


def _first_audio_time(model: WavTokenizerModel, codes: torch.Tensor, window: float, overlap: float) -> float:
    """Return the computing time of the first audio in seconds, after its codes have arrived."""
    stream = DecodeStream(model, window, overlap)
    stream.push(codes[: stream.delay - 1])
    started = time.perf_counter()
    assert len(stream.push(codes[stream.delay - 1 : stream.delay])) > 0
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
