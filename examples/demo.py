"""The main job, end to end: speech -> token file -> speech, with a picture and a table. `make demo` runs this.

Until a trained model is bundled, the model is the reference checkpoint of the tests, rebuilt by formula and converted:
every step is real, but its weights were never trained, so what comes out is noise.
"""

import argparse
import sys
import time
from pathlib import Path

import torch


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fixtures")]

import build_checkpoint  # a script beside the golden data

from conversion.convert import convert
from wavtokenizer_hf import WavTokenizerFeatureExtractor, WavTokenizerModel, audio
from wavtokenizer_hf.plots import plot_reconstruction
from wavtokenizer_hf.token_file import TokenFile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for what is made")
    parser.add_argument(
        "--model", help="a converted checkpoint or a name on the Hub, instead of the reference checkpoint"
    )
    parser.add_argument("--audio", type=Path, default=ROOT / "examples" / "speech.flac", help="a sound file")
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)

    folder = arguments.model or reference_model(output)
    model = WavTokenizerModel.from_pretrained(folder).eval()
    feature_extractor = WavTokenizerFeatureExtractor.from_pretrained(folder)

    waveform = audio.load(arguments.audio, sampling_rate=feature_extractor.sampling_rate)
    inputs = feature_extractor(waveform, sampling_rate=feature_extractor.sampling_rate, return_tensors="pt")
    with torch.inference_mode():
        model.decode(model.encode(**inputs).audio_codes)  # once unmeasured: the first call sets things up
        started = time.perf_counter()
        audio_codes = model.encode(**inputs).audio_codes
        encoded = time.perf_counter()
        audio_values = model.decode(audio_codes).audio_values
        decoded = time.perf_counter()

    tokens = TokenFile(
        audio_codes=audio_codes[0, 0].numpy(),
        model=str(folder),
        codebook_fingerprint=model.codebook_fingerprint,
        sampling_rate=model.config.sampling_rate,
        hop_length=model.config.hop_length,
        num_samples=len(waveform),
    )
    token_file = tokens.save(output / "speech.safetensors")
    reconstruction = audio_values[0, 0, : tokens.num_samples].numpy()
    sound_file = audio.save(output / "speech.wav", reconstruction, model.config.sampling_rate)
    picture = plot_reconstruction(
        output / "speech.png",
        waveform,
        reconstruction,
        tokens.audio_codes,
        model.config.sampling_rate,
        arguments.audio.name,
    )

    seconds = len(waveform) / model.config.sampling_rate
    rows = [
        ("duration", f"{seconds:.2f} s"),
        ("tokens", f"{len(tokens.audio_codes)}"),
        ("tokens per second", f"{model.config.frame_rate:g}"),
        ("bit rate", f"{model.config.bit_rate:g} bit/s"),
        (
            "real-time factor, encode",
            f"{(encoded - started) / seconds:.3f}  ({seconds / (encoded - started):.0f} x real time)",
        ),
        (
            "real-time factor, decode",
            f"{(decoded - encoded) / seconds:.3f}  ({seconds / (decoded - encoded):.0f} x real time)",
        ),
        ("codebook fingerprint", model.codebook_fingerprint),
        ("token file", token_file),
        ("sound", sound_file),
        ("picture", picture),
    ]
    print()
    for name, value in rows:
        print(f"{name:<26}{value}")
    if arguments.model is None:
        print("\nThe weights of this model were never trained (see above): the sound means nothing, the numbers do.")


def reference_model(output: Path) -> Path:
    """The reference checkpoint for 40 tokens/s, rebuilt and converted on first use."""
    folder = output / "reference-model-40"
    if not (folder / "model.safetensors").exists():
        print("No trained model is bundled yet: rebuilding the reference checkpoint by formula (330 MB, not trained).")
        checkpoint = build_checkpoint.build(40, output / "reference-40.ckpt")
        convert(checkpoint, folder)
        checkpoint.unlink()
    return folder


if __name__ == "__main__":
    main()
