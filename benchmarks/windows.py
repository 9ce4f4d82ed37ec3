"""How far windowed decode is from exact, by window and overlap, and how soon a stream gives its first audio.

    python benchmarks/windows.py --model MODEL --audio FOLDER

The files are joined to one clip (default: up to two minutes), encoded, and its codes decoded whole and in windows.
Prints the signal-to-noise ratio of the windowed audio against the exact one; the mel distance (mean difference of log
mel magnitudes, as in training) between the two, and of each to the original sound, which says what windows cost a
listener; how fast windows are beside exact decoding; and the time from the first code to the first audio of a
`DecodeStream`, without waiting for codes.
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
    parser.add_argument("--model", required=True, help="name on the Hub, or folder")
    parser.add_argument("--audio", required=True, type=Path, help="folder of sound files")
    parser.add_argument("--seconds", type=float, default=120, help="of sound, at most (default 120)")
    parser.add_argument("--windows", type=float, nargs="+", default=[1, 2, 3, 5, 10, 20])
    parser.add_argument("--overlaps", type=float, nargs="+", default=[0, 0.1, 0.25, 0.5, 1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each time (default 3)")
    arguments = parser.parse_args()
    model = WavTokenizerModel.from_pretrained(arguments.model).eval()
    rate = model.config.sampling_rate
    files = sorted(file for file in arguments.audio.rglob("*") if file.suffix.lower() in audio.SUFFIXES)
    sound = np.concatenate([audio.load(file, rate) for file in files])[: round(arguments.seconds * rate)]
    real = torch.from_numpy(sound)[None, None]
    mel = MelLoss(rate)
    with torch.inference_mode():
        codes = model.encode(real).audio_codes
        exact_time, exact = _time(arguments.rounds, lambda: model.decode(codes).audio_values[..., : real.shape[-1]])
        to_real = mel(exact[:, 0], real[:, 0]).item()
        print(f"{len(sound) / rate:.0f} s of {len(files)} files, {model.config.frame_rate:g} tokens/s")
        print(f"exact decode: mel distance to the original sound {to_real:.4f}\n")
        print(
            "| window | overlap | SNR | mel distance to exact | to the original | speed beside exact | first audio "
            "after |"
        )
        print("|---" * 7 + "|")
        for window in arguments.windows:
            for overlap in arguments.overlaps:
                if 2 * overlap > window:
                    continue
                _, windowed = taken = _time(
                    arguments.rounds,
                    lambda w=window, o=overlap: model.decode(codes, window_seconds=w, overlap_seconds=o).audio_values[
                        ..., : real.shape[-1]
                    ],
                )
                noise = (windowed - exact).square().mean()
                decibel = 10 * torch.log10(exact.square().mean() / noise).item()
                cells = [f"{window:g} s", f"{overlap:g} s", f"{decibel:.1f} dB"]
                cells += [
                    f"{mel(windowed[:, 0], exact[:, 0]).item():.4f}",
                    f"{mel(windowed[:, 0], real[:, 0]).item():.4f}",
                ]
                cells += [
                    f"{exact_time / taken[0]:.2f}",
                    f"{1000 * _first_audio(model, codes[0, 0], window, overlap):.0f} ms",
                ]
                print("| " + " | ".join(cells) + " |", flush=True)


def _time(rounds: int, function) -> tuple[float, torch.Tensor]:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - started)
    return statistics.median(times), result


def _first_audio(model: WavTokenizerModel, codes: torch.Tensor, window: float, overlap: float) -> float:
    """Seconds of computing until the first audio is there, once its codes are."""
    stream = DecodeStream(model, window, overlap)
    stream.push(codes[: stream.delay - 1])
    started = time.perf_counter()
    assert len(stream.push(codes[stream.delay - 1 : stream.delay])) > 0
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
