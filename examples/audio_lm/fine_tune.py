"""Fine-tune an existing language model on text and speech codes, on one or more GPUs. See FINE_TUNING.md.

    accelerate launch --num_processes 8 examples/audio_lm/fine_tune.py \\
        --language_model meta-llama/Llama-3.2-1B --tokens tokens/ --task speak --output_dir tuned \\
        --bf16 --max_steps 20000

`--tokens` is the output folder of `wavtokenizer tokenize`, with a text column. The program also takes every argument
of transformers' TrainingArguments.
"""

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from wavtokenizer_hf.llm import APERTUS_1_5, AudioVocabulary, PackedRows, Template, TrainingRows


TASKS = {"speak": ["speak"], "transcribe": ["transcribe"], "both": ["speak", "transcribe"]}
LAYOUTS = {"added": None, "apertus_1_5": APERTUS_1_5}


@dataclass
class Arguments:
    language_model: str = field(metadata={"help": "folder or Hub name of a causal language model"})
    tokens: str = field(metadata={"help": "output folder of `wavtokenizer tokenize`, with a text column"})
    task: str = field(
        default="speak", metadata={"choices": list(TASKS), "help": "text to audio, audio to text, or both"}
    )
    layout: str = field(
        default="added", metadata={"choices": list(LAYOUTS), "help": "add new tokens, or use an existing range"}
    )
    text_column: str = field(default="text", metadata={"help": "name of the text column"})
    row_size: int = field(default=2048, metadata={"help": "tokens per row; several examples are packed into a row"})
    validation_share: float = field(default=0.01, metadata={"help": "share of the clips that is held out"})


def main() -> None:
    arguments, settings = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO if settings.process_index == 0 else logging.WARNING)
    set_seed(settings.seed)  # new embedding rows must be the same in every process
    tokenizer = AutoTokenizer.from_pretrained(arguments.language_model)
    model = AutoModelForCausalLM.from_pretrained(arguments.language_model)
    check_attention(model, settings)
    vocabulary = add_audio(arguments, tokenizer, model)
    rows = TrainingRows(
        tokenizer, vocabulary, [make_template(task, tokenizer, arguments) for task in TASKS[arguments.task]]
    )
    with settings.main_process_first():  # the other processes read its cache
        train_rows, validation_rows = pack_rows(arguments, rows, settings.seed)
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        data_collator=default_data_collator,
        processing_class=tokenizer,  # saved with every checkpoint, including its audio vocabulary
    )
    has_output = Path(settings.output_dir).is_dir()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(settings.output_dir) if has_output else None)
    metrics = trainer.evaluate()
    model.config.use_cache = True  # Trainer switched it off, and generation needs it
    trainer.save_model()
    trainer.save_metrics("eval", {**metrics, "num_processes": settings.world_size})


def check_attention(model, settings: TrainingArguments) -> None:
    """Raise ValueError for FlashAttention with several packed rows per device.

    It separates packed examples only in a batch of one row (`_is_packed_sequence` of transformers).
    """
    max_rows = max(settings.per_device_train_batch_size, settings.per_device_eval_batch_size)
    implementation = model.config._attn_implementation
    if "flash" in implementation and max_rows > 1:
        raise ValueError(
            f"Got {implementation} and {max_rows} packed rows per device: their examples would see each other. Use "
            "--per_device_train_batch_size 1 --per_device_eval_batch_size 1, or load the model with sdpa."
        )


def add_audio(arguments: Arguments, tokenizer, model) -> AudioVocabulary:
    """Return the vocabulary for the codes in `--tokens`: from the tokenizer, new tokens, or an existing range."""
    token_settings = json.loads((Path(arguments.tokens) / "manifest.json").read_text())["settings"]
    fingerprint = token_settings["codebook_fingerprint"]
    if "audio_vocabulary" in tokenizer.init_kwargs:
        vocabulary = AudioVocabulary.from_tokenizer(tokenizer)
        vocabulary.check_codebook_fingerprint(fingerprint)
    elif LAYOUTS[arguments.layout] is None:
        vocabulary = AudioVocabulary.add_to(
            tokenizer, token_settings["codebook_size"], fingerprint, model=model, pad_to_multiple_of=64
        )
    else:
        vocabulary = replace(LAYOUTS[arguments.layout], codebook_fingerprint=fingerprint)
        if token_settings["codebook_size"] != vocabulary.codebook_size:
            raise ValueError(
                f"Got codes of a codebook of {token_settings['codebook_size']}, and the layout {arguments.layout} has "
                f"{vocabulary.codebook_size}. Tokenize with the WavTokenizer of this layout."
            )
        vocabulary.attach(tokenizer)
    vocabulary.check_model(model, writes=arguments.task != "transcribe")
    return vocabulary


def make_template(task: str, tokenizer, arguments: Arguments) -> Template:
    """Return the template of a task, from the tokenizer's chat template if it has one."""
    text = "{" + arguments.text_column + "}"
    question, answer = (f"Say: {text}", "{audio}") if task == "speak" else ("Write down: {audio}", text)
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Template.from_chat(tokenizer, messages)
    if tokenizer.eos_token is None:
        raise ValueError("The tokenizer has no eos_token, so no answer can end. Set one, and save the tokenizer.")
    return Template(f"{tokenizer.bos_token or ''}{question}\n", answer + tokenizer.eos_token)


def pack_rows(arguments: Arguments, rows: TrainingRows, seed: int):
    """Return packed rows for training, and packed rows that are held out."""
    dataset = datasets.load_dataset(arguments.tokens, split="train")
    pad_token_id = rows.tokenizer.eos_token_id if rows.tokenizer.pad_token_id is None else rows.tokenizer.pad_token_id
    pack = PackedRows(arguments.row_size, pad_token_id, too_long="drop")
    splits = dataset.train_test_split(arguments.validation_share, seed=seed)
    examples = splits.map(rows, batched=True, remove_columns=dataset.column_names)
    packed = examples.map(pack, batched=True, remove_columns=["input_ids", "labels"])
    return packed["train"], packed["test"]


if __name__ == "__main__":
    main()
