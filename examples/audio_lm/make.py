"""Train a language model that speaks, from scratch and in one command.

    python examples/audio_lm/make.py --output audio_lm                      # everything, on two cores
    python examples/audio_lm/make.py --output small_try --quick             # every step, in minutes

espeak-ng speaks sentences of a small grammar (sentences.py). Bulk tokenization turns the audio into codes. A Llama
with a few million weights learns from scratch to generate the codes of a text. Then it speaks held-out sentences. The
output folder holds:

    said.wav, said.png      one of these sentences as a stream, and its spectrogram below that of espeak-ng's audio
    spoken/                 audio of all of these sentences
    result.json             loss and entropy on held-out sentences, lengths, and number of recognized sentences
    language_model/         model and tokenizer
    speech/, tokens/, run/  training audio, its codes, and the training run

Runs are resumable: after an interruption, run the same command again. Needs espeak-ng and the extras `training`,
`bulk` and `evaluation`.
"""

import argparse
import json
import math
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from sentences import sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from wavtokenizer_hf import WavTokenizerModel, audio, bulk, bundled_model
from wavtokenizer_hf.llm import (
    AudioVocabulary,
    PackedRows,
    Template,
    TrainingRows,
    decode_spans,
    span_arguments,
    stream_audio,
)


@dataclass
class Size:
    """Sizes of data, model and training. `--quick` uses smaller ones."""

    sentences: int = 4000
    validation: int = 200
    spoken: int = 20
    hidden_size: int = 256
    num_layers: int = 6
    row_size: int = 1024
    batch_size: int = 8
    steps: int = 1500
    learning_rate: float = 1e-3


QUICK = Size(
    sentences=60,
    validation=8,
    spoken=3,
    hidden_size=64,
    num_layers=2,
    row_size=512,
    batch_size=4,
    steps=150,
    learning_rate=3e-3,
)
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 50}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="output folder")
    parser.add_argument("--model", help="WavTokenizer: folder, or name on the Hub (default: the bundled model)")
    parser.add_argument("--steps", type=int, help=f"training steps (default {Size.steps})")
    parser.add_argument("--seed", type=int, default=0, help="seed of sentences, weights and sampling (default 0)")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16, where the hardware is faster with it")
    parser.add_argument("--quick", action="store_true", help="run every step with small sizes")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else Size()
    size.steps = arguments.steps or size.steps
    output, model = arguments.output, arguments.model or str(bundled_model())

    texts = make_speech(output / "speech", size, arguments.seed)
    options = bulk.TokenizeOptions(on_error="fail")
    bulk.tokenize(output / "speech", model, output / "tokens", options, progress=True)
    codec = WavTokenizerModel.from_pretrained(model).eval()
    tokenizer = make_tokenizer(texts.values())
    vocabulary = AudioVocabulary.add_to(tokenizer, codec.config.codebook_size, codec.codebook_fingerprint)
    rows = TrainingRows(tokenizer, vocabulary, Template("<s>{text}", "{audio}</s>"))
    tokens = read_tokens(output / "tokens", texts)
    set_seed(arguments.seed)
    language_model = train(output / "run", size, tokenizer, rows, tokens, arguments.bf16)
    language_model.save_pretrained(output / "language_model")
    tokenizer.save_pretrained(output / "language_model")

    result = {"steps": size.steps, "codebook_fingerprint": codec.codebook_fingerprint}
    result |= validate(language_model, vocabulary, pack_rows(tokens["validation"], rows, size, tokenizer))
    result |= speak(output, language_model, codec, tokenizer, rows, tokens["spoken"])
    result |= stream(output, language_model, codec, tokenizer, rows, tokens["spoken"])
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def make_speech(folder: Path, size: Size, seed: int) -> dict[str, str]:
    """Write espeak-ng's speech, in one voice and rate. Return the texts by the path of their file in the folder."""
    counts = {"train": size.sentences, "validation": size.validation, "spoken": size.spoken}
    all_sentences = sentences(sum(counts.values()), seed)
    texts, start = {}, 0
    for split, count in counts.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        split_sentences = all_sentences[start : start + count]
        texts |= {f"{split}/{index:05d}.wav": text for index, text in enumerate(split_sentences)}
        start += count
    save_texts(folder, texts)

    def say(name: str) -> None:
        if not (folder / name).exists():
            partial = folder / f"{name}.partial"
            subprocess.run(["espeak-ng", "-v", "en-us", "-s", "160", "-w", str(partial), texts[name]], check=True)
            os.replace(partial, folder / name)

    try:
        with ThreadPoolExecutor() as threads:
            list(threads.map(say, texts))
    except FileNotFoundError as error:
        raise SystemExit(
            "The program espeak-ng is missing. Install it, for example: apt-get install espeak-ng"
        ) from error
    return texts


def save_texts(folder: Path, texts: dict[str, str]) -> None:
    """Save the texts of the audio files. Exit if the folder has audio of other texts, since names are the same."""
    path = folder / "texts.json"
    same = json.loads(path.read_text()) == texts if path.exists() else not any(folder.rglob("*.wav"))
    if not same:
        raise SystemExit(
            f"{folder} has speech of other sentences, for example of another --seed or of --quick. Choose another "
            "--output."
        )
    partial = folder / "texts.json.partial"
    partial.write_text(json.dumps(texts, indent=1) + "\n")
    os.replace(partial, path)


def read_tokens(folder: Path, texts: dict[str, str]) -> datasets.DatasetDict:
    """Read the token folder, add the text of each clip, and split it by the folders of the clips."""
    dataset = datasets.load_dataset(str(folder), split="train", cache_dir=str(folder.parent / "cache"))
    dataset = dataset.select_columns(["id", "audio_codes", "duration", "codebook_fingerprint"]).sort("id")
    dataset = dataset.add_column("text", [texts[name] for name in dataset["id"]])
    splits = {name.split("/")[0] for name in texts}
    return datasets.DatasetDict(
        {split: dataset.filter(lambda row, split=split: row["id"].startswith(split + "/")) for split in splits}
    )


def make_tokenizer(texts) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per letter."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = [*special.values(), *sorted(set("".join(texts)))]
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def pack_rows(dataset: datasets.Dataset, rows: TrainingRows, size: Size, tokenizer) -> datasets.Dataset:
    examples = dataset.map(rows, batched=True, remove_columns=dataset.column_names)
    pack = PackedRows(size.row_size, tokenizer.pad_token_id)
    return examples.map(pack, batched=True, batch_size=1000, remove_columns=examples.column_names)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(
    folder: Path, size: Size, tokenizer, rows: TrainingRows, tokens: datasets.DatasetDict, bf16: bool
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=3 * size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=size.row_size,
        tie_word_embeddings=True,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=size.steps,
        per_device_train_batch_size=size.batch_size,
        per_device_eval_batch_size=size.batch_size,
        learning_rate=size.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=size.steps // 15,
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=bf16,
        use_cpu=not torch.accelerator.is_available(),  # explicit, else bf16 requires a GPU
        eval_strategy="steps",
        eval_steps=max(1, size.steps // 10),
        save_steps=max(1, size.steps // 10),
        save_total_limit=1,
        logging_steps=max(1, size.steps // 60),
        report_to="none",
    )
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=settings,
        train_dataset=pack_rows(tokens["train"], rows, size, tokenizer),
        eval_dataset=pack_rows(tokens["validation"], rows, size, tokenizer),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    trainer.model.config.use_cache = True  # Trainer switched it off, and generation needs it
    return trainer.model.eval()


@torch.inference_mode()
def validate(model: LlamaForCausalLM, vocabulary: AudioVocabulary, dataset: datasets.Dataset) -> dict:
    """Return the loss per code on held-out sentences, and the entropy of these codes without context, both in nats."""
    total, all_labels = 0.0, []
    for row in dataset:
        batch = {name: value.to(model.device) for name, value in default_data_collator([row]).items()}
        labels = batch.pop("labels")[0, 1:]
        is_code = vocabulary.is_audio(labels)
        logits = model(**batch, use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits[is_code], labels[is_code], reduction="sum").item()
        all_labels.append(labels[is_code].cpu().numpy())
    counts = np.unique(np.concatenate(all_labels), return_counts=True)[1]
    shares = counts / counts.sum()
    entropy = -(shares * np.log(shares)).sum()
    print(
        f"validation loss {total / counts.sum():.3f}, unigram entropy {entropy:.3f} nats per code, {counts.sum()} "
        "codes"
    )
    return {"validation_loss": total / counts.sum(), "unigram_entropy": entropy, "validation_codes": int(counts.sum())}


# ---------------------------------------------------------------------------------------------------------------------
# Speaking
# ---------------------------------------------------------------------------------------------------------------------


def max_num_codes(text: str, codec: WavTokenizerModel) -> int:
    """Return the maximum length of an audio span in codes.

    espeak-ng needs 0.06 s per letter on average and 0.08 s at most; this allows 0.15 s.
    """
    return math.ceil(0.15 * len(text) * codec.config.frame_rate)


def speak(
    output: Path,
    model: LlamaForCausalLM,
    codec: WavTokenizerModel,
    tokenizer,
    rows: TrainingRows,
    spoken: datasets.Dataset,
) -> dict:
    """Speak all held-out texts in one batch. Return lengths relative to espeak-ng, and the number recognized."""
    prompts = [rows.prompt({"text": text}) for text in spoken["text"]]
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    max_codes = max(max_num_codes(text, codec) for text in spoken["text"])
    arguments = span_arguments(rows.vocabulary, tokenizer, max_codes=max_codes)
    generated = model.generate(**batch, **arguments, **SAMPLING, max_new_tokens=max_codes + 1)
    spans = [rows.vocabulary.find_spans(row)[0][0] for row in generated]
    waveforms = [waveform.numpy() for waveform in decode_spans(codec, rows.vocabulary, spans)]
    (output / "spoken").mkdir(exist_ok=True)
    for name, waveform in zip(spoken["id"], waveforms, strict=True):
        audio.save(output / "spoken" / Path(name).name, waveform, codec.config.sampling_rate)
    references = [audio.load(output / "speech" / name, codec.config.sampling_rate) for name in spoken["id"]]
    ratios = [len(waveform) / len(reference) for waveform, reference in zip(waveforms, references, strict=True)]
    return {
        "length_over_espeak": {"mean": float(np.mean(ratios)), "least": min(ratios), "most": max(ratios)},
        "recognized": count_recognized(waveforms, references, codec.config.sampling_rate),
        "spoken": len(waveforms),
    }


def count_recognized(waveforms: list[np.ndarray], references: list[np.ndarray], sampling_rate: int) -> int:
    """Count the waveforms that are nearer to espeak-ng's audio of their own text than to that of any other text.

    The distance is dynamic time warping of cepstra. Unlike a speech recognizer, it needs no weights.
    """
    import librosa

    def compute_cepstra(waveform: np.ndarray) -> np.ndarray:
        mfcc = librosa.feature.mfcc(y=waveform, sr=sampling_rate, n_mfcc=13, hop_length=sampling_rate // 50)[1:]
        return (mfcc - mfcc.mean(1, keepdims=True)) / (mfcc.std(1, keepdims=True) + 1e-6)

    def distance(left: np.ndarray, right: np.ndarray) -> float:
        costs, path = librosa.sequence.dtw(left, right)
        return costs[-1, -1] / len(path)

    targets = [compute_cepstra(reference) for reference in references]
    nearest = [
        int(np.argmin([distance(compute_cepstra(waveform), target) for target in targets])) for waveform in waveforms
    ]
    return sum(index == nearest_index for index, nearest_index in enumerate(nearest))


def stream(
    output: Path,
    model: LlamaForCausalLM,
    codec: WavTokenizerModel,
    tokenizer,
    rows: TrainingRows,
    spoken: datasets.Dataset,
) -> dict:
    """Speak the first held-out text again, as a stream that is written while it is generated."""
    text, name = spoken["text"][0], spoken["id"][0]
    arguments = span_arguments(rows.vocabulary, tokenizer, max_codes=max_num_codes(text, codec))
    prompt = torch.tensor([rows.prompt({"text": text})], device=model.device)
    blocks, started, first = [], time.perf_counter(), None
    with audio.writing(output / "said.wav", codec.config.sampling_rate) as write:
        for block in stream_audio(
            model, codec, rows.vocabulary,
            input_ids=prompt, attention_mask=torch.ones_like(prompt), **arguments, **SAMPLING,
            max_new_tokens=arguments["logits_processor"][0].max_codes + 1,
        ):  # fmt: skip
            first = first or time.perf_counter() - started
            write(block.numpy())
            blocks.append(block.numpy())
    seconds = time.perf_counter() - started
    said = np.concatenate(blocks)
    reference = audio.load(output / "speech" / name, codec.config.sampling_rate)
    draw(output / "said.png", text, {"espeak-ng": reference, "the language model": said}, codec.config.sampling_rate)
    return {
        "said": text,
        "said_seconds": len(said) / codec.config.sampling_rate,
        "espeak_seconds": len(reference) / codec.config.sampling_rate,
        "seconds_to_first_sound": first,
        "real_time_factor": seconds * codec.config.sampling_rate / len(said),
    }


def draw(path: Path, title: str, waveforms: dict[str, np.ndarray], sampling_rate: int) -> None:
    """Draw the spectrograms of several waveforms above each other, on one time axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(len(waveforms), 1, sharex=True)
    for axes, (name, waveform) in zip(panels, waveforms.items(), strict=True):
        noise = 1e-6 * np.random.default_rng(0).standard_normal(len(waveform))  # digital silence has no logarithm
        axes.specgram(waveform + noise, NFFT=1024, noverlap=768, Fs=sampling_rate, vmin=-150, vmax=-40, cmap="magma")
        axes.set(title=name, ylabel="Hz", facecolor="black")
    axes.set(xlabel="seconds")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
