"""Measure the latency and the real-time factor of audio that a language model generates.

    python benchmarks/streaming.py [--rate 75] [--seconds 10] [--model FOLDER] [--language-model FOLDER]

First audio: time from the call to the first block. Real-time factor: total time divided by the length of the audio;
below 1, audio can be played while it is generated. Values are medians of interleaved rounds. Without folders, the
models have random weights, which does not change the time: a WavTokenizer of the published shape, and a Llama like
that of examples/audio_lm.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerModel
from wavtokenizer_hf.llm import AudioSpanProcessor, AudioVocabulary, decode_spans, stream_audio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, choices=(40, 75), default=75, help="tokens per second (default 75)")
    parser.add_argument("--model", help="WavTokenizer to use instead of random weights")
    parser.add_argument(
        "--language-model",
        help="language model with an audio vocabulary in its tokenizer, to use instead of random weights",
    )
    parser.add_argument(
        "--seconds", type=float, default=10, help="length of the generated audio in seconds (default 10)"
    )
    parser.add_argument(
        "--windows", type=float, nargs="+", default=[0.5, 1, 3], help="window lengths in seconds (default 0.5 1 3)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant (default 3)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    codec = load_codec(arguments)
    model, vocabulary = load_language_model(arguments, codec)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec, model = codec.to(device), model.to(device)

    num_codes = round(arguments.seconds * codec.config.frame_rate)
    prompt = torch.tensor([[*range(20), vocabulary.begin_token_id]], device=device)
    generate = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "logits_processor": LogitsProcessorList([AudioSpanProcessor(vocabulary, num_codes, num_codes)]),
        "eos_token_id": vocabulary.end_token_id,
        "pad_token_id": vocabulary.end_token_id,
        "max_new_tokens": num_codes + 1,
        "do_sample": True,
    }

    def codes_only():
        model.generate(**generate)
        yield

    def decode_afterwards():
        spans, _ = vocabulary.find_spans(model.generate(**generate)[0])
        yield decode_spans(codec, vocabulary, spans)[0]

    variants = {"codes only": codes_only, "decoded afterwards": decode_afterwards}
    for window in arguments.windows:
        variants[f"streamed, windows of {window:g} s"] = lambda window=window: stream_audio(
            model, codec, vocabulary, window_seconds=window, overlap_seconds=min(0.25, window / 4), **generate
        )
    times = {name: [] for name in variants}
    for turn in range(arguments.rounds + 1):  # the first round is a warm-up
        for name, variant in variants.items():
            started, first = time.perf_counter(), None
            for _ in variant():
                first = first or time.perf_counter() - started
            if turn > 0:
                times[name].append((first, time.perf_counter() - started))

    sizes = [sum(parameter.numel() for parameter in module.parameters()) / 1e6 for module in (model, codec)]
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; a language model of {sizes[0]:.1f} "
        f"M weights, a WavTokenizer of {sizes[1]:.1f} M at {codec.config.frame_rate:g} tokens/s; "
        f"{arguments.seconds:g} s of audio"
    )
    print("| | first audio | real-time factor |\n|---|---|---|")
    for name, measured in times.items():
        first, total = (statistics.median(values) for values in zip(*measured, strict=True))
        latency = "" if name == "codes only" else f"{first:.2f} s"
        print(f"| {name} | {latency} | {total / arguments.seconds:.2f} |")


def load_codec(arguments) -> WavTokenizerModel:
    if arguments.model:
        return WavTokenizerModel.from_pretrained(arguments.model).eval()
    ratios = [8, 5, 4, 2] if arguments.rate == 75 else [6, 5, 5, 4]
    return WavTokenizerModel(WavTokenizerConfig(upsampling_ratios=ratios)).eval()


def load_language_model(arguments, codec: WavTokenizerModel):
    if arguments.language_model:
        tokenizer = AutoTokenizer.from_pretrained(arguments.language_model)
        model = AutoModelForCausalLM.from_pretrained(arguments.language_model)
        return model.eval(), AudioVocabulary.from_tokenizer(tokenizer)
    size = codec.config.codebook_size
    vocabulary = AudioVocabulary(50, size, 50 + size, 51 + size)
    config = LlamaConfig(
        vocab_size=52 + size, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), vocabulary


if __name__ == "__main__":
    main()
