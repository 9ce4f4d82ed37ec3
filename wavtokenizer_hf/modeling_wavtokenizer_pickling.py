"""Pickling of WavTokenizer models, for torch.save(model), spawned workers and Ray objects.

This file is copied unchanged into every Hub repository that we write. It imports the standard library, torch and
nothing else.
"""

import copy
from pickle import PicklingError
from typing import Any, SupportsIndex

import torch
from torch import nn


class PicklableModel(nn.Module):
    """Mixin that pickles a model as its config and tensors, since torch refuses to pickle layers with weight norm."""

    config: Any

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        with torch.device("meta"):
            unchanged = type(self)(self.config).state_dict()
        tensors = self.state_dict()
        if {name: tensor.shape for name, tensor in tensors.items()} != {n: t.shape for n, t in unchanged.items()}:
            raise PicklingError(
                f"Got a {type(self).__name__} whose layers were replaced or resized; only its own layers can be "
                "pickled. Use save_pretrained, and from_pretrained where the model is needed."
            )
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        return _unpickle, (type(self), self.config, tensors, frozen, self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy all attributes, as copy.deepcopy does for modules without `__reduce_ex__`."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied


def _unpickle(
    model_class: type[PicklableModel], config: Any, tensors: dict[str, torch.Tensor], frozen: list[str], training: bool
) -> PicklableModel:
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(tensors, assign=True)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return model.train(training)
