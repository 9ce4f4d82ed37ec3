"""Train a language model on a token folder that is read as a stream, without a prepared copy.

    python examples/audio_lm/stream.py --language_model llm-with-audio --tokens tokens/ \\
        --output_dir trained --max_steps 1000

The tokenizer of `--language_model` must have the codes, for example from `AudioVocabulary.add_to`. The model learns to
continue audio. The program also takes every argument of transformers' TrainingArguments.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from wavtokenizer_hf.llm import AudioVocabulary, Template, TrainingRows


@dataclass
class Arguments:
    language_model: str = field(metadata={"help": "folder or Hub name of a model whose vocabulary has the codes"})
    tokens: str = field(metadata={"help": "output folder of `wavtokenizer tokenize`"})


def main(arguments: Arguments, settings: TrainingArguments) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(arguments.language_model)
    model = AutoModelForCausalLM.from_pretrained(arguments.language_model)
    template = Template("", f"{tokenizer.bos_token or ''}{{audio}}{tokenizer.eos_token}")
    rows = TrainingRows(tokenizer, AudioVocabulary.from_tokenizer(tokenizer), template)
    stream = load_dataset(arguments.tokens, split="train", streaming=True)
    stream = stream.shuffle(settings.seed, buffer_size=1000).map(
        rows, batched=True, remove_columns=stream.column_names
    )
    collator = DataCollatorForSeq2Seq(tokenizer)  # pads input ids and labels
    trainer = Trainer(model, settings, collator, train_dataset=stream, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses())
