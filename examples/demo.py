"""Encode speech to a token file and decode it again, with a picture and a table. `make demo` runs this.

The default speech is a voice that was not in training (speech.LICENSE.txt). The default model is the small bundled one
(wavtokenizer_hf/bundled/README.md shows its quality). Published checkpoints are far better: `--model FOLDER`.
"""

import argparse
import time
from pathlib import Path

import torch

from wavtokenizer_hf import WavTokenizerFeatureExtractor, WavTokenizerModel, audio, bundled_model
from wavtokenizer_hf.evaluation.metrics import METRICS, Clip, score, unavailable_reason
from wavtokenizer_hf.plots import plot_reconstruction
from wavtokenizer_hf.token_file import TokenFile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="output folder")
    parser.add_argument(
        "--model", default=bundled_model(), help="folder of a converted checkpoint, or name on the Hub"
    )
    parser.add_argument("--audio", type=Path, default=Path(__file__).parent / "speech.flac", help="audio file")
    arguments = parser.parse_args()
    output = arguments.output
    if arguments.audio.parent.resolve() == output.resolve():
        parser.error(f"{arguments.audio} is in the output folder. Name another --output.")
    output.mkdir(parents=True, exist_ok=True)

    model = WavTokenizerModel.from_pretrained(arguments.model).eval()
    feature_extractor = WavTokenizerFeatureExtractor.from_pretrained(arguments.model)

    waveform = audio.load(arguments.audio, sampling_rate=feature_extractor.sampling_rate)
    inputs = feature_extractor(waveform, sampling_rate=feature_extractor.sampling_rate, return_tensors="pt")
    with torch.inference_mode():
        model.decode(model.encode(**inputs).audio_codes)  # warm-up
        start = time.perf_counter()
        audio_codes = model.encode(**inputs).audio_codes
        encode_end = time.perf_counter()
        audio_values = model.decode(audio_codes).audio_values
        decode_end = time.perf_counter()

    tokens = TokenFile(
        audio_codes=audio_codes[0, 0].numpy(),
        model=str(arguments.model),
        codebook_fingerprint=model.codebook_fingerprint,
        sampling_rate=model.config.sampling_rate,
        hop_length=model.config.hop_length,
        num_samples=len(waveform),
    )
    token_file = tokens.save(output / f"{arguments.audio.stem}.safetensors")
    reconstruction = audio_values[0, 0, : tokens.num_samples].numpy()
    audio_file = audio.save(output / f"{arguments.audio.stem}.wav", reconstruction, model.config.sampling_rate)
    picture = plot_reconstruction(
        output / f"{arguments.audio.stem}.png",
        waveform,
        reconstruction,
        tokens.audio_codes,
        model.config.sampling_rate,
        arguments.audio.name,
    )

    # leave out metrics whose packages (of the extra `evaluation`) are not installed
    names = [
        name
        for name in ("stoi", "pesq_wb")
        if model.config.sampling_rate == 24000 and unavailable_reason(name) is None
    ]
    values, _ = score(Clip(waveform), Clip(reconstruction), names)

    seconds = len(waveform) / model.config.sampling_rate
    encode_time, decode_time = encode_end - start, decode_end - encode_end
    rows = [
        ("duration", f"{seconds:.2f} s"),
        ("tokens", f"{len(tokens.audio_codes)}"),
        ("tokens per second", f"{model.config.frame_rate:g}"),
        ("bit rate", f"{model.config.bit_rate:g} bit/s"),
        ("real-time factor, encode", f"{encode_time / seconds:.3f}  ({seconds / encode_time:.0f} x real time)"),
        ("real-time factor, decode", f"{decode_time / seconds:.3f}  ({seconds / decode_time:.0f} x real time)"),
        *((METRICS[name].title, f"{value:.2f}") for name, value in values.items() if value is not None),
        ("codebook fingerprint", model.codebook_fingerprint),
        ("token file", token_file),
        ("audio", audio_file),
        ("picture", picture),
    ]
    print()
    for name, value in rows:
        print(f"{name:<26}{value}")


if __name__ == "__main__":
    main()
