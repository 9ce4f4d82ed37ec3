"""Count the codes that differ between a row alone and the same row in a padded batch.

    python benchmarks/near_ties.py [--rate 75] [--batches 20]

Random batches of 8 rows of 1 sample to 3 s, on the reference checkpoint. Rows are noise and the formula's speech-like
signal, padded left and right in turn. Also prints the largest relative gap between the nearest and the second-nearest
entry, among the codes that differ. A small gap is below the precision of float32.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from compare_with_original import reference_folder
from fixtures import formula

from wavtokenizer_hf import WavTokenizerFeatureExtractor, WavTokenizerModel
from wavtokenizer_hf.modeling_wavtokenizer_batching import TOGETHER_POLICY, default_policy


ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default 75)")
    parser.add_argument("--batches", type=int, default=20, help="batches of 8 rows (default 20)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--default-policy", action="store_true", help="batch rows by the model's default policy, not all together"
    )
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder for the checkpoint")
    arguments = parser.parse_args()
    model = WavTokenizerModel.from_pretrained(reference_folder(arguments.work, arguments.rate)).eval()
    model = model.to(arguments.device)
    entries = model.quantizer.codebook.embed.double()
    rng, speech = np.random.default_rng(0), formula.waveform("speechlike", 10)
    num_different, total, gap = 0, 0, 0.0
    for batch in range(arguments.batches):
        clips = []
        for row in range(8):
            length = int(rng.integers(1, 72001))
            start = int(rng.integers(0, len(speech) - length))
            noise = (0.1 * rng.standard_normal(length)).astype(np.float32)
            clips.append(noise if row % 2 else speech[start : start + length])
        extractor = WavTokenizerFeatureExtractor(padding_side="left" if batch % 2 else "right")
        inputs = extractor(clips, sampling_rate=24000, return_tensors="pt").to(arguments.device)
        with torch.inference_mode():
            policy = default_policy(inputs["input_values"]) if arguments.default_policy else TOGETHER_POLICY
            together = model.encoder_model._encode(**inputs, policy=policy)
            for row, clip in enumerate(clips):
                clip = torch.from_numpy(clip)[None, None].to(arguments.device)
                alone = model.encode(clip, output_latents=True)
                valid = together.audio_codes_mask[row, 0].bool()
                differs = together.audio_codes[row, 0][valid] != alone.audio_codes[0, 0]
                num_different, total = num_different + int(differs.sum()), total + differs.numel()
                if differs.any():
                    latents = alone.latents[0].T[differs].double()
                    nearest = torch.cdist(latents, entries).topk(2, largest=False).values
                    gap = max(gap, (1 - nearest[:, 0] / nearest[:, 1]).max().item())
    print(
        f"{arguments.rate} tokens/s, {arguments.device}: {num_different} of {total} codes differ, "
        f"largest gap {gap:.1e}"
    )


if __name__ == "__main__":
    main()
