"""Resize the embeddings and the output layer of a language model for the codes."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel


def num_tokens(module: Any) -> int:
    """Return the number of tokens of an embedding or an output layer."""
    # the attributes come first, since a quantized weight has another shape
    return getattr(module, "num_embeddings", None) or getattr(module, "out_features", None) or len(module.weight)


def check_embeddings(model: PreTrainedModel, min_tokens: int) -> None:
    """Raise ValueError unless the embeddings are in memory and have at least `min_tokens` rows."""
    embeddings: Any = model.get_input_embeddings()
    if embeddings.weight.device.type == "meta" or embeddings.weight.numel() == 0:  # offloaded, or DeepSpeed's ZeRO-3
        raise ValueError(
            "The model's embeddings are not in memory here. Add the tokens before it is moved or partitioned."
        )
    if num_tokens(embeddings) < min_tokens:
        raise ValueError(
            f"The model has embeddings for {num_tokens(embeddings)} tokens, and the tokenizer has ids up to "
            f"{min_tokens - 1}. Load the tokenizer that belongs to the model, or call "
            f"model.resize_token_embeddings({min_tokens}) first."
        )


@torch.no_grad()
def add_embeddings(model: PreTrainedModel, first_new_id: int, min_tokens: int, pad_to_multiple_of: int | None) -> None:
    """
    Grow the embeddings and the output layer to at least `min_tokens` rows. Set the rows from `first_new_id` on to the
    mean of the rows before.

    transformers' own mean_resizing sets only the rows beyond the old matrix, and averages all others. A matrix may be
    larger than its tokenizer. Its last rows were then never trained, and must not enter the mean.
    """
    sizes_before = [num_tokens(module) for module in _modules(model)]
    model.resize_token_embeddings(max(sizes_before[0], min_tokens), pad_to_multiple_of, mean_resizing=False)
    for module, size_before in zip(_modules(model), sizes_before, strict=True):
        first = min(first_new_id, size_before)  # an output layer may be smaller than the embeddings
        for parameter in (module.weight, getattr(module, "bias", None)):
            if parameter is not None:
                parameter[first:] = parameter[:first].float().mean(dim=0).to(parameter.dtype)


def _modules(model: PreTrainedModel) -> Sequence[Any]:
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [module for module in modules if module is not None]
