"""Train a language model in a plain torch loop on a Megatron file, read by Megatron Core's own reader.

pip install megatron-core
wavtokenizer export tokens/ --format megatron --tokenizer llm-with-audio --loss-mask --output megatron/
python examples/audio_lm/megatron_loop.py --language_model llm-with-audio --tokens megatron/ --output trained
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from wavtokenizer_hf.export.sequences import load_vocabulary


NO_LOSS = -100


class MegatronRows(Dataset):
    """Sequences of a Megatron file: `input_ids` and `labels`, int64 (L,). Labels are -100 where loss_mask.bin has a 0.

    Args:
        folder: Folder that `wavtokenizer export --format megatron` wrote.
    """

    def __init__(self, folder: Path):
        self.tokens = IndexedDataset(str(folder / "tokens"))
        has_mask = (folder / "loss_mask.idx").exists()
        self.loss_mask = IndexedDataset(str(folder / "loss_mask")) if has_mask else None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        input_ids = torch.from_numpy(self.tokens[index].astype(np.int64))
        if self.loss_mask is None:
            return {"input_ids": input_ids, "labels": input_ids}
        has_loss = torch.from_numpy(self.loss_mask[index] == 1)
        return {"input_ids": input_ids, "labels": input_ids.where(has_loss, NO_LOSS)}


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pad rows on the right, and return tensors (B, L)."""
    input_ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=NO_LOSS)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    attention_mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask.long()}


def train(model, rows: MegatronRows, steps: int, batch_size: int, learning_rate: float) -> list[float]:
    """Train the model. Return the loss of each step."""
    loader = DataLoader(rows, batch_size, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    losses = []
    for batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps):
        loss = model(**{name: values.to(model.device) for name, values in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--language_model", required=True, help="folder or Hub name of a model whose vocabulary has the codes"
    )
    parser.add_argument("--tokens", type=Path, required=True, help="folder of the Megatron file")
    parser.add_argument("--output", required=True, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default 1000)")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per batch (default 8)")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="default 1e-4")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.language_model).train()
    load_vocabulary(arguments.tokens / "vocabulary.json").check_model(model)
    losses = train(
        model, MegatronRows(arguments.tokens), arguments.steps, arguments.batch_size, arguments.learning_rate
    )
    print(f"loss {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")
    model.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.language_model).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
