"""Compare the reconstruction of an audio file with the reference implementation, from process start to the WAV file.

    python benchmarks/reconstruct.py ../WavTokenizer

Ours is `wavtokenizer reconstruct` on a converted folder, exact (`--window-seconds 0`) and in windows. The reference
loads its checkpoint as in its README, encodes, decodes, and writes with the same library. Each run is its own process,
interleaved, with the files in the system's cache. Prints the median of the ratios (over 1: ours is faster) and the
peak memory.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).parent.parent

REFERENCE_SCRIPT = """
import original, soundfile, torch
model = original.load_checkpoint({checkout!r}, {rate}, {checkpoint!r})
audio, _ = soundfile.read({source!r}, dtype="float32")
with torch.inference_mode():
    codes = original.encode(model, torch.from_numpy(audio)[None])
    soundfile.write({target!r}, original.decode(model, codes)[0, : len(audio)].numpy(), 24000)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="checkout of jishengpeng/WavTokenizer")
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default 75)")
    parser.add_argument("--seconds", type=float, default=60, help="length of the file in seconds (default 60)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant (default 3)")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder for the checkpoint")
    arguments = parser.parse_args()

    from compare_with_original import reference_folder
    from fixtures import build_checkpoint, formula

    from wavtokenizer_hf import audio

    folder = reference_folder(arguments.work, arguments.rate)
    checkpoint = build_checkpoint.build(arguments.rate, arguments.work / f"original-{arguments.rate}.ckpt")
    source = audio.save(arguments.work / "source.wav", formula.waveform("speechlike", arguments.seconds))
    reference = REFERENCE_SCRIPT.format(
        checkout=arguments.checkout, rate=arguments.rate, checkpoint=str(checkpoint),
        source=str(source), target=str(arguments.work / "reference.wav"),
    )  # fmt: skip
    ours = [sys.executable, "-m", "wavtokenizer_hf", "reconstruct", str(source), "-m", str(folder)]
    ours += ["-o", str(arguments.work / "ours.wav"), "--window-seconds"]
    variants = {
        "reference": [sys.executable, "-c", reference],
        "ours, exact": [*ours, "0"],
        "ours, windows of 10 s": [*ours, "10"],
    }
    times, memory = {name: [] for name in variants}, {}
    for _ in range(arguments.rounds):
        for name, command in variants.items():
            seconds, memory[name] = _run(command)
            times[name].append(seconds)
    checkpoint.unlink()
    print(
        f"{arguments.seconds:g} s of audio, {arguments.rate} tokens/s\n\n| | time | ratio | peak memory "
        "|\n|---|---|---|---|"
    )
    for name, seconds in times.items():
        pairs = zip(times["reference"], seconds, strict=True)
        ratio = statistics.median(reference_time / our_time for reference_time, our_time in pairs)
        print(f"| {name} | {statistics.median(seconds):.1f} s | **{ratio:.2f}** | {memory[name]:,.0f} MB |")


def _run(command: list[str]) -> tuple[float, float]:
    """Return the run time in seconds and the peak memory in megabytes.

    Memory is polled every 10 ms, since the peak that wait4 returns starts at the value of this process.
    """
    paths = os.pathsep.join([str(ROOT / "tests" / "fixtures"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        peak = max(peak, int(found[1]) if found else 0)  # no match after the process ended
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} … failed")
    return seconds, peak / 1000


if __name__ == "__main__":
    main()
