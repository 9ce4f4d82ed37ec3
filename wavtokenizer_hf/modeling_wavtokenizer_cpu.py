"""Fast inference on a CPU: the expensive layers of WavTokenizer by oneDNN's operators, with packed weights.

This file is optional. Each function below returns None if the fast way is not available, and its caller then runs the
plain layers. The results differ from the plain ones only in the order of float32 sums.

    fast_linear(layer, inputs)                          nn.Linear, or nn.Conv1d of kernel size 1, on (..., C)
    fast_feed_forward(first, second, inputs)            two linear layers with a GELU between
    fast_depthwise(layer, inputs)                       depthwise convolution of (B, N, C)
    fast_convolve(layers, signal)                       the encoder's convolutions, ELUs and residual blocks
    fast_lstm(layer, inputs, state)                     LSTM of (N, B, C)
    fast_scores(quantizer, frames, entries, bias)       product with the codebook

The fast way needs inference on a CPU: no gradients, no autocast, no tracing or compiling. It also needs plain layers,
since it reads their weights without calling them: no hooks, no quantized or offloaded weights, no replaced modules.

oneDNN's operators in torch are private. So each is tried once per process and dtype on a small input, and left out if
it is missing, raises or disagrees with the plain result. `WAVTOKENIZER_FAST_CPU=0`, or `enabled = False` in this
module, switches all of them off.

This file is copied unchanged into every Hub repository that we write. It imports the standard library, torch,
transformers and nothing else.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

enabled = os.environ.get("WAVTOKENIZER_FAST_CPU", "1") != "0"


# ---------------------------------------------------------------------------------------------------------------------
# When the fast way is available
# ---------------------------------------------------------------------------------------------------------------------


Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


class EncoderConvolution(Protocol):
    """What `fast_convolve` needs of a WavTokenizerConv1d, whose file imports this one."""

    conv: nn.Conv1d
    stride: int
    left: int
    right: int


def _optional(function: Callable[Arguments, Value]) -> Callable[Arguments, Value | None]:
    """Make a function of this module return None, instead of raising, where it cannot run."""

    @functools.wraps(function)
    def attempt(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Value | None:
        if not enabled:
            return None
        try:
            return function(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            _log_once(f"{function.__name__} runs without oneDNN: {error}")
            return None

    return attempt


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def _is_inference(values: torch.Tensor) -> bool:
    return (
        type(values) is torch.Tensor
        and values.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and _dispatch_modes() == 0  # FLOP counters, fake tensors and the like see public operators only
    )


_module_hooks = [  # of all modules in the process
    getattr(nn.modules.module, name, {})
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_forward_hooks_always_called")
]


def _is_plain(*layers: nn.Module) -> bool:
    """Whether each layer computes what its class says from plain weights on a CPU, and nobody watches it."""
    if any(_module_hooks):
        return False
    return all(
        type(layer).forward in _PLAIN_FORWARDS
        and "forward" not in vars(layer)  # accelerate replaces it on the instance
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and all(type(weight) is nn.Parameter and weight.device.type == "cpu" for weight in layer.parameters())
        for layer in layers
    )


_PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.ELU.forward)


def _linear_operator(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    add: torch.Tensor | None = None,
    gelu: bool = False,
) -> torch.Tensor:
    if add is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(inputs, add, weight, bias, "add")
    activation, algorithm = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, activation, [], algorithm)


def _pack_linear(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def _pack_lstm(by_input: torch.Tensor, by_state: torch.Tensor, hidden_size: int) -> list[torch.Tensor]:
    return torch.ops.mkldnn._reorder_mkldnn_rnn_layer_weight(by_input, by_state, hidden_size, False, True, False)


_ONEDNN_LSTM = 2  # its number among the kinds of recurrent layers


def _lstm_operator(
    inputs: torch.Tensor,
    packed: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    hidden: torch.Tensor,
    cell: torch.Tensor,
    hidden_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ops.aten.mkldnn_rnn_layer(
        inputs, *packed, *biases, hidden, cell, False, [], _ONEDNN_LSTM, hidden_size, 1, True, False, False, False
    )[:3]


def _wave(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return numbers between -0.5 and 0.5 that need no random generator."""
    steps = torch.arange(math.prod(shape), dtype=torch.float32, device="cpu")
    return (0.5 * torch.sin(12.9898 * steps)).reshape(shape).to(dtype)


def _try_linear(dtype: torch.dtype) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    for rows, inner, outer in ((1, 16, 32), (80, 256, 160)):
        inputs, weight = _wave(rows, inner, dtype=dtype), _wave(outer, inner, dtype=dtype)
        bias = _wave(outer, dtype=dtype)
        expected = F.linear(inputs.float(), weight.float(), bias.float())
        yield _linear_operator(inputs, weight, bias), expected
        yield _linear_operator(inputs, weight, bias, gelu=True), F.gelu(expected)


def _try_packed_linear(dtype: torch.dtype) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    for rows, inner, outer in ((1, 16, 32), (80, 256, 160)):
        inputs, weight = _wave(rows, inner, dtype=dtype), _wave(outer, inner, dtype=dtype)
        add = _wave(rows, outer, dtype=dtype)
        expected = F.linear(inputs.float(), weight.float())
        yield _linear_operator(inputs, _pack_linear(weight), None), expected
        yield _linear_operator(inputs, _pack_linear(weight), None, add=add), expected + add


def _try_lstm(dtype: torch.dtype) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    size = 32
    by_input, by_state = _wave(4 * size, size, dtype=dtype), _wave(4 * size, size, dtype=dtype).flip(0)
    biases = [_wave(4 * size, dtype=dtype), _wave(4 * size, dtype=dtype).flip(0)]
    for rows in (1, 3):
        inputs, state = _wave(5, rows, size, dtype=dtype), _wave(1, rows, size, dtype=dtype)
        output, hidden, cell = torch.lstm(
            inputs, (state, state.flip(-1)), [by_input, by_state, *biases], True, 1, 0.0, False, False, False
        )
        fast = _lstm_operator(inputs, _pack_lstm(by_input, by_state, size), biases, state, state.flip(-1), size)
        yield from zip(fast, (output, hidden, cell), strict=True)


_TRIALS = {"linear": _try_linear, "packed_linear": _try_packed_linear, "lstm": _try_lstm}
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@functools.cache
def _works(operator: str, dtype: torch.dtype) -> bool:
    """Whether a private operator exists, runs in this dtype on this processor and agrees with the public one."""
    if dtype not in _TOLERANCES:
        return False
    try:
        for output, expected in _TRIALS[operator](dtype):
            torch.testing.assert_close(output.float(), expected.float(), atol=_TOLERANCES[dtype], rtol=0)
    except Exception as error:  # of a private operator anything may come
        logger.info(f"oneDNN's {operator} in {dtype} is not used on this machine: {error}")
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Values computed from weights
# ---------------------------------------------------------------------------------------------------------------------

_cache: WeakKeyDictionary[object, tuple[Any, torch.Tensor, Any]] = (
    WeakKeyDictionary()
)  # module -> (state of its weights, value computed from them)


def cached_by_weights(module: object, weights: Sequence[torch.Tensor], compute: Callable[[], Value]) -> Value:
    """Return `compute()`, computed anew when a weight has changed.

    A change through `.data`, or by a fused optimizer, does not count in a tensor's version. So a number of each row of
    a weight is compared as well.
    """
    versions = [(weight.data_ptr(), None if weight.is_inference() else weight._version) for weight in weights]
    sample = torch.cat([weight.detach().flatten()[:: max(1, weight[0].numel() - 1)] for weight in weights])
    entry = _cache.get(module)
    if entry is None or entry[0] != versions or not torch.equal(entry[1], sample):
        entry = _cache[module] = versions, sample, compute()
    return entry[2]


# ---------------------------------------------------------------------------------------------------------------------
# Decoder
# ---------------------------------------------------------------------------------------------------------------------


@_optional
def fast_linear(layer: nn.Linear | nn.Conv1d, inputs: torch.Tensor) -> torch.Tensor | None:
    """(..., C) -> (..., C'), by an nn.Linear or an nn.Conv1d of kernel size 1."""
    if not (_is_inference(inputs) and _is_plain(layer) and _works("linear", inputs.dtype)):
        return None
    return _linear_operator(inputs, layer.weight.flatten(1), layer.bias)


@_optional
def fast_feed_forward(first: nn.Linear, second: nn.Linear, inputs: torch.Tensor) -> torch.Tensor | None:
    """(..., C) -> (..., C'): a linear layer with its GELU in one operator, then another linear layer."""
    if not (_is_inference(inputs) and _is_plain(first, second) and _works("linear", inputs.dtype)):
        return None
    return _linear_operator(_linear_operator(inputs, first.weight, first.bias, gelu=True), second.weight, second.bias)


@_optional
def fast_depthwise(layer: nn.Conv1d, inputs: torch.Tensor) -> torch.Tensor | None:
    """(B, N, C) -> (B, N, C): sums of shifted frames cost less here than transposing for a convolution and back."""
    if not (_is_inference(inputs) and _is_plain(layer)) or layer.bias is None:
        return None
    length = inputs.shape[1]
    padded = F.pad(inputs, (0, 0, *2 * layer.padding))
    taps = layer.weight[:, 0].t()  # (K, C)
    output = torch.addcmul(layer.bias, padded[:, :length], taps[0])
    for shift, tap in enumerate(taps[1:], start=1):
        output.addcmul_(padded[:, shift : shift + length], tap)
    return output


# ---------------------------------------------------------------------------------------------------------------------
# Encoder
# ---------------------------------------------------------------------------------------------------------------------


@_optional
def fast_convolve(layers: nn.ModuleList, signal: torch.Tensor) -> torch.Tensor | None:
    """(1, C, N) -> (1, C', ceil(N / strides)): ELUs, convolutions and residual blocks of the encoder, for one clip.

    The signal lies in memory step after step (N, C), so that a block of `stride` steps is one row of a matrix. A
    window of a convolution is a few blocks, and the convolution is one matrix product per block of the window.
    """
    if not _is_inference(signal) or len(signal) != 1 or signal.dtype != torch.float32:
        return None
    if not (_works("linear", torch.float32) and _works("packed_linear", torch.float32)):
        return None
    for layer in layers:
        modules = (layer, *layer.modules())
        plain = [module for module in modules if isinstance(module, (nn.Conv1d, nn.ELU))]
        outer = [module for module in modules if not isinstance(module, (nn.Conv1d, nn.ELU))]
        if any(module._forward_hooks or module._forward_pre_hooks for module in outer) or not _is_plain(*plain):
            return None
    length = signal.shape[-1]
    steps = signal[0].t()  # (N, C)
    if steps.shape[1] == 1:  # audio: fill it up to one of few lengths
        steps = F.pad(steps, (0, 0, 0, _bucket_length(length) - length))
    elu = False
    block: Any  # the attributes of an nn.Module have no types of their own
    for block in layers:
        if isinstance(block, nn.ELU):
            elu = True  # computed by the next convolution, while it copies its input
            continue
        if hasattr(block, "shortcut"):
            _, narrow, _, widen = block.block
            shortcut = _convolve(block.shortcut, steps, length)
            inner = _convolve(narrow, steps, length, elu=True)
            output = (
                None if shortcut is None or inner is None else _convolve(widen, inner, length, elu=True, add=shortcut)
            )
        else:
            output = _convolve(block, steps, length, elu)
            length = -(-length // block.stride)
        if output is None:
            return None
        steps, elu = output, False
    return steps[:length].t()[None]


def _convolve(
    layer: EncoderConvolution, steps: torch.Tensor, length: int, elu: bool = False, add: torch.Tensor | None = None
) -> torch.Tensor | None:
    """One convolution of the first `length` of the steps (N, C) -> (ceil(N / stride), C'), after an ELU of its input.

    Steps after `length` hold anything, in the input and in the output. Returns None for a signal that is too short to
    be reflected, and for dilated convolutions.
    """
    stride, channels = layer.stride, steps.shape[1]
    right = layer.right + -length % stride
    if length <= max(layer.left, right) or layer.conv.dilation != (1,):
        return None
    padded = steps.contiguous()
    if elu or layer.left + right > 0:
        size = (-(-len(steps) // stride) - 1) * stride + layer.conv.kernel_size[0]
        padded = steps.new_empty(size, channels)
        before, valid, after, unused = padded.split([layer.left, length, right, size - layer.left - length - right])
        torch.ops.aten.elu.out(steps[:length], out=valid) if elu else valid.copy_(steps[:length])
        before.copy_(valid[1 : 1 + layer.left].flip(0))
        after.copy_(valid[-1 - right : -1].flip(0))
        unused.zero_()
    if channels == 1:  # windows this small are worth a copy
        blocks = padded[:, 0].unfold(0, layer.conv.kernel_size[0], stride)
    else:
        blocks = padded.view(-1, stride * channels)
    taps = _packed_taps(layer)
    num_windows = len(blocks) - len(taps) + 1
    output = _linear_operator(blocks[:num_windows], taps[0], layer.conv.bias, add)
    for shift, tap in enumerate(taps[1:], start=1):
        output = _linear_operator(blocks[shift : shift + num_windows], tap, None, output)
    return output


def _packed_taps(layer: EncoderConvolution) -> list[torch.Tensor]:
    """The weight (C', C, K) without weight norm, cut into packed blocks of `stride` steps (C', stride * C)."""

    def pack() -> list[torch.Tensor]:
        weight = layer.conv.weight.transpose(1, 2)  # (C', K, C)
        size = weight.shape[1] if weight.shape[2] == 1 else layer.stride
        return [_pack_linear(tap.flatten(1).contiguous()) for tap in weight.split(size, dim=1)]

    return cached_by_weights(layer, list(layer.conv.parameters()), pack)


def _bucket_length(length: int) -> int:
    """The next length of those that are an eighth of an octave apart, at most an eighth and one longer.

    oneDNN generates code for each new length, which takes as long as encoding a second of audio.
    """
    octave = 6000 * 2.0 ** math.floor(math.log2(length / 6000))  # a quarter of a second, times a power of two
    return math.ceil(octave * math.ceil(8 * length / octave) / 8)


@_optional
def fast_lstm(
    layer: nn.RNNBase, inputs: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None:
    """(N, B, C) -> (N, B, C) and the state: what torch.lstm calls on a CPU, with weights that are packed once."""
    weights: list[torch.Tensor] = [weight for of_layer in layer.all_weights for weight in of_layer]
    if inputs.dtype != torch.float32 or not (_is_inference(inputs) and _works("lstm", torch.float32)):
        return None
    if not all(type(weight) is nn.Parameter and weight.device.type == "cpu" for weight in weights):
        return None

    def pack() -> list[tuple[list[torch.Tensor], list[nn.Parameter]]]:
        return [
            (_pack_lstm(by_input, by_state, layer.hidden_size), biases)
            for by_input, by_state, *biases in layer.all_weights
        ]

    inputs, states = inputs.contiguous(), []
    for index, (packed, biases) in enumerate(cached_by_weights(layer, weights, pack)):
        hidden, cell = (values[index : index + 1].contiguous() for values in state)
        inputs, hidden, cell = _lstm_operator(inputs, packed, biases, hidden, cell, layer.hidden_size)
        states.append((hidden, cell))
    hidden, cell = (torch.cat(values) for values in zip(*states, strict=True))
    return inputs, (hidden, cell)


@_optional
def fast_scores(
    quantizer: nn.Module, frames: torch.Tensor, entries: torch.Tensor, bias: Callable
) -> torch.Tensor | None:
    """Frames (..., D) x entries (K, D) transposed + bias -> (..., K). `bias` computes (K,) from the entries."""
    if frames.dtype != torch.float32 or not _is_inference(frames) or entries.device.type != "cpu":
        return None
    if not (_works("linear", torch.float32) and _works("packed_linear", torch.float32)):
        return None
    packed, values = cached_by_weights(quantizer, [entries], lambda: (_pack_linear(entries), bias(entries)))
    return _linear_operator(frames, packed, values)
