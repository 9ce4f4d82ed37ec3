"""Train a language model on a token folder that is read as a stream: no prepared copy is written, and no folder is too
large.

    python examples/audio_lm/stream.py --language_model llm-with-audio --tokens tokens/ --output_dir trained
    --max_steps 1000

`--language_model` is a model whose tokenizer has the codes, as `AudioVocabulary.add_to` makes it. It learns to
continue audio. Every argument of transformers' TrainingArguments is one of this program.
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
    language_model: str = field(metadata={"help": "folder, or name on the Hub, of a model that has the codes"})
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
    collator = DataCollatorForSeq2Seq(tokenizer)  # pads ids and labels
    trainer = Trainer(model, settings, collator, train_dataset=stream, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses())
