"""Embeddings and output layer of a language model, resized for the codes."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel


def num_tokens(module: Any) -> int:
    """Tokens of an embedding or an output head. By its attributes, since a quantized weight has another shape."""
    return getattr(module, "num_embeddings", None) or getattr(module, "out_features", None) or len(module.weight)


def check_embeddings(model: PreTrainedModel, needed: int) -> None:
    embeddings: Any = model.get_input_embeddings()
    if embeddings.weight.device.type == "meta" or embeddings.weight.numel() == 0:  # offloaded, or DeepSpeed's ZeRO-3
        raise ValueError(
            "The model's embeddings are not in memory here. Add the tokens before it is moved or partitioned."
        )
    if num_tokens(embeddings) < needed:
        raise ValueError(
            f"The model has embeddings for {num_tokens(embeddings)} tokens, and the tokenizer has ids up to "
            f"{needed - 1}. Load the tokenizer that belongs to the model, or call "
            f"model.resize_token_embeddings({needed}) first."
        )


@torch.no_grad()
def add_embeddings(model: PreTrainedModel, first_new: int, needed: int, pad_to_multiple_of: int | None) -> None:
    """
    Add rows to the embeddings and the output layer for `needed` tokens. Rows from `first_new` on are the mean of those
    before.

    transformers' own mean_resizing takes the rows for new that lie beyond the old matrix, and all others into the
    mean. A matrix may be larger than its tokenizer, and then has rows in it that nobody ever trained.
    """
    old = [num_tokens(module) for module in _modules(model)]
    model.resize_token_embeddings(max(old[0], needed), pad_to_multiple_of, mean_resizing=False)
    for module, num_old in zip(_modules(model), old, strict=True):
        first = min(first_new, num_old)  # an output head may be smaller than the embeddings
        for parameter in (module.weight, getattr(module, "bias", None)):
            if parameter is not None:
                parameter[first:] = parameter[:first].float().mean(dim=0).to(parameter.dtype)


def _modules(model: PreTrainedModel) -> Sequence[Any]:
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [module for module in modules if module is not None]
