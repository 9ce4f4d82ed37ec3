"""Annotations that transformers lacks, so that type checkers and editors know what the methods of a model return.

This file is copied unchanged into every Hub repository that we write. It imports the standard library, torch,
transformers and nothing else.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import generic


Method = TypeVar("Method", bound=Callable)
Model = TypeVar("Model", bound=PreTrainedModel)
Module = TypeVar("Module", bound=nn.Module)


def can_return_tuple(method: Method) -> Method:
    """
    Let a method return `output.to_tuple()` for `return_dict=False`, an argument that its annotations do not show.
    """
    return generic.can_return_tuple(method)


class TypedModel(nn.Module):
    """Mixin with the annotations of nn.Module for methods that transformers overrides without. It does nothing.

    mypy finds `cuda` and `to` incompatible with transformers' own, which are wrapped: hence an ignored error for each
    class.
    """

    if TYPE_CHECKING:

        def cuda(self: Module, *args: Any, **kwargs: Any) -> Module: ...
        def eval(self: Module) -> Module: ...
        def float(self: Module, *args: Any) -> Module: ...
        def half(self: Module, *args: Any) -> Module: ...
        def to(self: Module, *args: Any, **kwargs: Any) -> Module: ...
        def train(self: Module, mode: bool = True) -> Module: ...
