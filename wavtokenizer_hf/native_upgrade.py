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
    """
    Replace a native WavTokenizer of transformers >= 5.24, or every one inside a larger model such as Apertus 1.5.

    The new model is exact in padded batches, faster on a CPU, and has chunks, streams and training. It shares the
    tensors, so nothing is copied, and device, dtype, `requires_grad` and training mode stay. Only the encoder and the
    norms of a model in bfloat16 or float16 are copied, to float32.

    Args:
        model (`nn.Module`): Native `WavTokenizerModel` or `WavTokenizerEncoderModel`, or a module that holds one.

    Returns:
        [`WavTokenizerModel`] or [`WavTokenizerEncoderModel`] for a native one, which stays usable. For a larger model
        `model` itself, changed in place. Models of this package are left as they are.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` holds no WavTokenizer, has a config that this package does not build, or has offloaded
            weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Got {type(model).__name__}, expected a model. Load it first, with from_pretrained.")
    if _is_native(model):
        return _ours(model)
    places = [  # every parent of a native model, but not a whole native model, whose encoder is inside
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if _is_native(child) and not _is_native(parent)
    ]
    if not places and not any(isinstance(m, (WavTokenizerModel, WavTokenizerEncoderModel)) for m in model.modules()):
        raise ValueError(
            f"Got {type(model).__name__}, which holds no WavTokenizer of transformers {transformers.__version__}. "
            "Pass a WavTokenizerModel or WavTokenizerEncoderModel of transformers >= 5.24, or a model that has one "
            "inside; folders of WavTokenizer load with wavtokenizer_hf.WavTokenizerModel.from_pretrained."
        )
    upgraded = {
        child: _ours(child) for _, _, child in places
    }  # build all before replacing one, since one may be refused
    for parent, name, child in places:
        setattr(parent, name, upgraded[child])
    return model


def _is_native(module: nn.Module) -> bool:
    return native is not None and type(module) in (native.WavTokenizerModel, native.WavTokenizerEncoderModel)


def _ours(model: Any) -> WavTokenizerModel | WavTokenizerEncoderModel:
    """Return our model with the tensors of a native one."""
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
        ours = model_class(WavTokenizerConfig(**fields))
    ours.config._name_or_path = model.config._name_or_path
    ours.half()
    rounded = []
    for name, template in ours.state_dict(keep_vars=True).items():
        tensor = tensors[name]
        template.requires_grad_(
            tensor.requires_grad
        )  # load_state_dict copies requires_grad from the template to the tensor
        if template.dtype == torch.float32 != tensor.dtype:  # ours computes with this tensor in float32 only
            rounded.append(name)
            tensors[name] = nn.Parameter(tensor.detach().float(), requires_grad=tensor.requires_grad)
    ours.load_state_dict(tensors, assign=True)
    if any(name.startswith(("encoder", "quantizer")) for name in rounded):
        logger.warning(
            f"The encoder of {type(model).__name__} is in {model.dtype}, so its weights are rounded and give other "
            "codes than the checkpoint's. Load the model in float32 and upgrade that; ours keeps its encoder in "
            "float32."
        )
    return ours.train(model.training)
