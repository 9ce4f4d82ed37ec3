"""Replace the native WavTokenizer of transformers >= 5.24 by the model of this package."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from .configuration_wavtokenizer import WavTokenizerConfig
from .modeling_wavtokenizer import WavTokenizerEncoderModel, WavTokenizerModel


try:
    from transformers.models.wavtokenizer import modeling_wavtokenizer as native
except ImportError:  # transformers < 5.24
    native = None

logger = logging.get_logger(__name__)


def upgrade(model: nn.Module) -> nn.Module:
    """Replace a native WavTokenizer of transformers >= 5.24, or every one inside a larger model such as Apertus 1.5.

    The new model is exact in padded batches, is faster on a CPU, and supports chunks, streams and training. It shares
    the tensors of the native model and keeps device, dtype, `requires_grad` and training mode. Only the encoder and
    the norms of a model in bfloat16 or float16 are copied, to float32.

    Args:
        model (`nn.Module`): Native `WavTokenizerModel` or `WavTokenizerEncoderModel`, or a module that contains one.

    Returns:
        [`WavTokenizerModel`] or [`WavTokenizerEncoderModel`] for a native one, which stays usable. For a larger model,
        `model` itself, changed in place. Models of this package are returned unchanged.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` contains no WavTokenizer, has a config that this package does not support, or has offloaded
            weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Got {type(model).__name__}, expected a model. Load it first, with from_pretrained.")
    if _is_native(model):
        return _upgrade_native(model)
    native_children = [  # without the encoder inside a native WavTokenizerModel, which is replaced as a whole
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if _is_native(child) and not _is_native(parent)
    ]
    has_upgraded = any(isinstance(child, (WavTokenizerModel, WavTokenizerEncoderModel)) for child in model.modules())
    if not native_children and not has_upgraded:
        raise ValueError(
            f"Got {type(model).__name__}, which contains no WavTokenizer of transformers {transformers.__version__}. "
            "Pass a WavTokenizerModel or WavTokenizerEncoderModel of transformers >= 5.24, or a model that contains "
            "one. Load folders of WavTokenizer with wavtokenizer_hf.WavTokenizerModel.from_pretrained."
        )
    # upgrade all before replacing any, since an upgrade may fail
    upgraded = {child: _upgrade_native(child) for _, _, child in native_children}
    for parent, name, child in native_children:
        setattr(parent, name, upgraded[child])
    return model


def _is_native(module: nn.Module) -> bool:
    return native is not None and type(module) in (native.WavTokenizerModel, native.WavTokenizerEncoderModel)


def _upgrade_native(model: Any) -> WavTokenizerModel | WavTokenizerEncoderModel:
    """Return a model of this package with the tensors of a native one."""
    tensors = model.state_dict(keep_vars=True)
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise ValueError(
            f"The weights of {type(model).__name__} are offloaded or spread over devices "
            f"({', '.join(sorted(map(str, devices)))}). Load it on one device, without a device_map that splits it."
        )
    fields = {name: value for name, value in model.config.to_dict().items() if name != "model_type"}
    model_class = WavTokenizerModel if isinstance(model, native.WavTokenizerModel) else WavTokenizerEncoderModel
    with torch.device("meta"):
        upgraded = model_class(WavTokenizerConfig(**fields))
    upgraded.config._name_or_path = model.config._name_or_path
    upgraded.half()  # leaves the modules that must stay in float32
    rounded = []
    for name, template in upgraded.state_dict(keep_vars=True).items():
        tensor = tensors[name]
        # load_state_dict copies requires_grad from the template to the tensor
        template.requires_grad_(tensor.requires_grad)
        if template.dtype == torch.float32 != tensor.dtype:  # this package uses the tensor in float32 only
            rounded.append(name)
            tensors[name] = nn.Parameter(tensor.detach().float(), requires_grad=tensor.requires_grad)
    upgraded.load_state_dict(tensors, assign=True)
    if any(name.startswith(("encoder", "quantizer")) for name in rounded):
        logger.warning(
            f"The encoder of {type(model).__name__} is in {model.dtype}. Its weights are rounded, so its codes differ "
            "from those of the checkpoint. Load the model in float32 and upgrade that; the upgraded model keeps its "
            "encoder in float32."
        )
    return upgraded.train(model.training)
