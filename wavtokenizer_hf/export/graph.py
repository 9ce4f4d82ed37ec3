"""Build ONNX graphs of the encoder and the decoder, operator by operator, from the weights and the configuration.

Nothing is traced. So the graphs do not depend on an exporter, and all lengths are dynamic. The graphs use only
operators of opset 17 that onnxruntime, its web build, OpenVINO and TensorRT have in common. For example, they avoid
the DFT operator, which gives wrong audio in OpenVINO 2026.4. Shape letters are those of modeling_wavtokenizer.py.
"""

from collections import Counter
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from ..extras import require
from ..modeling_wavtokenizer import WavTokenizerAttention, WavTokenizerISTFTHead, WavTokenizerModel
from ..modeling_wavtokenizer_encoder import WavTokenizerConv1d, WavTokenizerEncoder


OPSET = 17  # the first with LayerNormalization
IR_VERSION = 8  # supported by every onnxruntime that supports opset 17

FLOAT, INT64 = 1, 7  # onnx.TensorProto.FLOAT, .INT64


class Graph:
    """Collect the nodes and weights of a graph. Methods take and return values by name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []  # onnx.NodeProto
        self.weights: list[Any] = []  # onnx.TensorProto
        self._names: Counter[str] = Counter()

    @overload
    def __call__(
        self, operator: str, *inputs: str, outputs: int, name: str | None = None, **attributes: Any
    ) -> list[str]: ...
    @overload
    def __call__(
        self, operator: str, *inputs: str, outputs: None = None, name: str | None = None, **attributes: Any
    ) -> str: ...
    def __call__(
        self, operator: str, *inputs: str, outputs: int | None = None, name: str | None = None, **attributes: Any
    ) -> str | list[str]:
        """Add a node. Return the name of its output, or a list of names if the number of `outputs` is given."""
        name = self._unique(name or operator.lower())
        names = [name] if outputs is None else [f"{name}_{index}" for index in range(outputs)]
        make_node = require("onnx", "onnx").helper.make_node
        self.nodes.append(make_node(operator, list(inputs), names, name=name, **attributes))
        return name if outputs is None else names

    def weight(self, values: torch.Tensor | ArrayLike, name: str = "constant") -> str:
        """Add a constant, as float32 if its values are floats, else as int64. Return its name."""
        array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        array = array.astype(np.float32 if np.issubdtype(array.dtype, np.floating) else np.int64)
        name = self._unique(name)
        self.weights.append(require("onnx", "onnx").numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def model(
        self,
        inputs: dict[str, tuple[int, list[Any]]],
        outputs: dict[str, tuple[int, list[Any]]],
        metadata: dict[str, str],
        version: str,
    ) -> Any:
        """
        Return the graph as a checked `onnx.ModelProto`.

        Args:
            inputs: Name -> element type and shape. A dimension is a number, or a name if it is dynamic.
            outputs: The same for the outputs.
            metadata: Metadata of the model.
            version: Version of this package.
        """
        onnx = require("onnx", "onnx")
        make_value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            self.nodes,
            "wavtokenizer",
            [make_value(name, kind, shape) for name, (kind, shape) in inputs.items()],
            [make_value(name, kind, shape) for name, (kind, shape) in outputs.items()],
            self.weights,
        )
        model = onnx.helper.make_model(
            graph,
            producer_name="wavtokenizer_hf",
            producer_version=version,
            ir_version=IR_VERSION,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        )
        onnx.helper.set_model_props(model, metadata)
        onnx.checker.check_model(model)
        return model

    def rename(self, value: str, name: str) -> None:
        """Give a value the name of a graph output."""
        self.nodes.append(require("onnx", "onnx").helper.make_node("Identity", [value], [name], name=name))

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name]}"

    # -----------------------------------------------------------------------------------------------------------------
    # Operators of both graphs
    # -----------------------------------------------------------------------------------------------------------------

    def size(self, value: str, axis: int) -> str:
        """Return the length of an axis, int64 (1,)."""
        return self("Shape", value, start=axis, end=axis + 1)

    def slice(self, value: str, start: str, end: str, axis: int) -> str:
        return self("Slice", value, start, end, self.weight([axis]))

    def linear(self, value: str, weight: torch.Tensor, bias: torch.Tensor, name: str) -> str:
        """Add a linear layer: (..., C) -> (..., C')."""
        product = self("MatMul", value, self.weight(weight.detach().t(), f"{name}.weight"), name=name)
        return self("Add", product, self.weight(bias, f"{name}.bias"))

    def convolution(self, value: str, conv: nn.Conv1d, name: str, padding: int = 0) -> str:
        """Add a convolution with zero padding: (B, C, N) -> (B, C', N')."""
        assert conv.bias is not None  # every convolution of the model has one
        return self(
            "Conv",
            value,
            self.weight(conv.weight, f"{name}.weight"),
            self.weight(conv.bias, f"{name}.bias"),
            name=name,
            kernel_shape=list(conv.kernel_size),
            strides=list(conv.stride),
            dilations=list(conv.dilation),
            pads=[padding, padding],
            group=conv.groups,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Encoder: input_values (B, 1, T) -> audio_codes (B, 1, L)
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encoder_graph(model: WavTokenizerModel, metadata: dict[str, str], version: str) -> Any:
    """
    Return the encoder and the quantizer as an `onnx.ModelProto`.

    Input: `input_values` (B, 1, T) float32, with any B and T from 1. Output: `audio_codes` (B, 1, L) int64.
    """
    graph = Graph()
    encoder, config = model.encoder_model.encoder, model.config
    hidden_states = _downsample(graph, encoder, "input_values")
    frames, _ = _lstm(graph, encoder.lstm.lstm, hidden_states, None)
    latents = _project(graph, encoder, frames)
    graph.rename(_codes(graph, model, latents), "audio_codes")
    return graph.model(
        {"input_values": (FLOAT, ["batch", config.audio_channels, "samples"])},
        {"audio_codes": (INT64, ["batch", 1, "codes"])},
        metadata,
        version,
    )


@torch.no_grad()
def encoder_stream_graph(model: WavTokenizerModel, metadata: dict[str, str], version: str) -> Any:
    """
    Return one step of streaming encoding as an `onnx.ModelProto`. `EncodeStream` of wavtokenizer_onnx.py runs it.

    Inputs:
        input_values: (B, 1, N), the new samples and the samples of their context.
        bounds: (4,), start and end of the new frames among those of `input_values`, then start and end of the complete
            codes, counted in `frames_out`.
        hidden, cell: (layers, B, C), the state of the LSTM.
        frames: (B, C, M), earlier frames that the last convolution still needs.

    Outputs:
        audio_codes: (B, 1, n), the complete codes.
        hidden_out, cell_out: (layers, B, C), the state of the LSTM after the step.
        frames_out: (B, C, M + new frames), `frames` and the new frames.
    """
    graph = Graph()
    encoder, config = model.encoder_model.encoder, model.config
    lstm = encoder.lstm.lstm
    bounds = [graph.slice("bounds", graph.weight([index]), graph.weight([index + 1]), axis=0) for index in range(4)]
    new_frames = graph.slice(_downsample(graph, encoder, "input_values"), bounds[0], bounds[1], axis=2)
    new_frames, state = _lstm(graph, lstm, new_frames, ("hidden", "cell"))
    assert state is not None  # a state was passed
    frames = graph("Concat", "frames", new_frames, axis=2)
    latents = _project(graph, encoder, frames)
    codes = _codes(graph, model, graph.slice(latents, bounds[2], bounds[3], axis=2))
    for value, name in (
        (codes, "audio_codes"),
        (state[0], "hidden_out"),
        (state[1], "cell_out"),
        (frames, "frames_out"),
    ):
        graph.rename(value, name)
    state_shape = [lstm.num_layers, "batch", lstm.hidden_size]
    return graph.model(
        {
            "input_values": (FLOAT, ["batch", config.audio_channels, "samples"]),
            "bounds": (INT64, [4]),
            "hidden": (FLOAT, state_shape),
            "cell": (FLOAT, state_shape),
            "frames": (FLOAT, ["batch", lstm.hidden_size, "frames"]),
        },
        {
            "audio_codes": (INT64, ["batch", 1, "codes"]),
            "hidden_out": (FLOAT, state_shape),
            "cell_out": (FLOAT, state_shape),
            "frames_out": (FLOAT, ["batch", lstm.hidden_size, "frames_after"]),
        },
        metadata,
        version,
    )


def _downsample(graph: Graph, encoder: WavTokenizerEncoder, value: str) -> str:
    """Add the layers before the LSTM: (B, 1, T) -> (B, C, ceil(T / hop))."""
    layers: Any = encoder.layers
    for index, layer in enumerate(layers):
        name = f"layers.{index}"
        if hasattr(layer, "lstm"):
            return value
        if isinstance(layer, nn.ELU):
            value = graph("Elu", value)
        elif hasattr(layer, "block"):
            inner = value
            for position, block_layer in enumerate(layer.block):
                if isinstance(block_layer, nn.ELU):
                    inner = graph("Elu", inner)
                else:
                    inner = _reflecting_convolution(graph, block_layer, inner, f"{name}.block.{position}")
            value = graph("Add", _reflecting_convolution(graph, layer.shortcut, value, f"{name}.shortcut"), inner)
        else:
            value = _reflecting_convolution(graph, layer, value, name)
    raise RuntimeError("The encoder has no LSTM. Please report this.")


def _project(graph: Graph, encoder: WavTokenizerEncoder, frames: str) -> str:
    """Add the layers after the LSTM: frames (B, C, L) -> latents (B, D, L)."""
    layers: Any = encoder.layers
    return _reflecting_convolution(graph, layers[-1], graph("Elu", frames), "layers.last")


def _reflecting_convolution(graph: Graph, layer: WavTokenizerConv1d, value: str, name: str) -> str:
    """Add a convolution with reflection padding: (B, C, N) -> (B, C', ceil(N / stride))."""
    if layer.left + layer.right + layer.stride > 1:
        value = _reflect(graph, value, layer.left, layer.right, layer.stride)
    return graph.convolution(value, layer.conv, name)


def _reflect(graph: Graph, value: str, left: int, right: int, stride: int) -> str:
    """
    Pad (B, C, N) by reflection at both ends, on the right until the last window is full.

    A signal that is too short to reflect is first extended by zeros. Up to `stride - 1` more steps than needed are
    added on the right, and they fill no window. The padding is built with Gather, since Pad cannot handle short
    signals. No operand of a division or modulo is negative, since ONNX truncates where Python floors.
    """
    length = graph.size(value, 2)
    one = graph.weight([1])
    right_padding = graph.weight([right])
    if stride > 1:
        num_windows = graph("Div", graph("Add", length, graph.weight([stride - 1])), graph.weight([stride]))
        missing = graph("Sub", graph("Mul", num_windows, graph.weight([stride])), length)
        right_padding = graph("Add", right_padding, missing)
    longest = graph("Max", right_padding, graph.weight([left]))
    extended = graph("Max", length, graph("Add", longest, one))  # (1,): the length after the extension by zeros
    left_source = graph.weight(np.arange(left, 0, -1))  # for each step of the padding, the step to copy
    position = graph("Add", length, graph.weight(np.arange(right + stride - 1)))
    right_source = graph("Sub", graph("Mul", graph("Sub", extended, one), graph.weight([2])), position)
    beyond_zeros = graph("Not", graph("Less", position, extended))
    is_real = graph(
        "Concat",
        graph("Less", left_source, length),
        graph("And", beyond_zeros, graph("Less", right_source, length)),
        axis=0,
    )
    index = graph("Concat", left_source, right_source, axis=0)
    index = graph("Min", graph("Max", index, graph.weight([0])), graph("Sub", length, one))
    padding = graph("Mul", graph("Gather", value, index, axis=2), graph("Cast", is_real, to=FLOAT))
    sizes = graph.weight([left, right + stride - 1])
    if left == 0:
        return graph("Concat", value, padding, axis=2)
    if right + stride == 1:
        return graph("Concat", padding, value, axis=2)
    start, end = graph("Split", padding, sizes, outputs=2, axis=2)
    return graph("Concat", start, value, end, axis=2)


def _lstm(
    graph: Graph, lstm: nn.RNNBase, value: str, state: tuple[str, str] | None
) -> tuple[str, tuple[str, str] | None]:
    """
    Add the LSTM, with its input added to its output.

    Args:
        graph: Graph to add to.
        lstm: The LSTM.
        value: Input (B, C, L).
        state: Hidden and cell state (layers, B, C) before the first frame. None: zeros.

    Returns:
        Output (B, C, L), and the state after the last frame, or None if no state was passed.
    """

    def reorder_gates(tensor: torch.Tensor) -> np.ndarray:
        """Reorder the gates from torch's order, i f g o, to that of ONNX, i o f c."""
        i, f, g, o = tensor.detach().chunk(4)
        return torch.cat([i, o, f, g])[None].numpy()

    output = graph("Transpose", value, perm=[2, 0, 1])  # (L, B, C)
    states: list[tuple[str, str]] = []
    for layer in range(lstm.num_layers):
        weights = [getattr(lstm, f"{kind}_l{layer}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        by_input, by_state, input_bias, state_bias = map(reorder_gates, weights)
        bias = np.concatenate([input_bias, state_bias], axis=1)
        operands = [graph.weight(values, f"lstm.{layer}") for values in (by_input, by_state, bias)]
        initial = []
        if state is not None:
            bounds = graph.weight([layer]), graph.weight([layer + 1])
            initial = ["", *(graph.slice(part, *bounds, axis=0) for part in state)]  # "": no sequence lengths
        output, hidden, cell = graph("LSTM", output, *operands, *initial, outputs=3, hidden_size=lstm.hidden_size)
        output = graph("Squeeze", output, graph.weight([1]))  # (L, directions, B, C)
        states.append((hidden, cell))
    new_state = None
    if state is not None:
        hidden, cell = (graph("Concat", *parts, axis=0) for parts in zip(*states, strict=True))
        new_state = (hidden, cell)
    return graph("Add", value, graph("Transpose", output, perm=[1, 2, 0])), new_state


def _codes(graph: Graph, model: WavTokenizerModel, latents: str) -> str:
    """Add the quantizer: latents (B, D, L) -> codes (B, 1, L). The nearest entry e maximizes x.e - |e|^2 / 2."""
    entries = model.encoder_model.quantizer.codebook.embed.float()
    bias = -0.5 * torch.linalg.vector_norm(entries, dim=1).square()
    scores = graph.linear(graph("Transpose", latents, perm=[0, 2, 1]), entries, bias, "codebook")
    return graph("Unsqueeze", graph("ArgMax", scores, axis=2, keepdims=0), graph.weight([1]))


# ---------------------------------------------------------------------------------------------------------------------
# Decoder: codes (B, L) -> waveform (B, L * hop)
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decoder_graph(model: WavTokenizerModel, metadata: dict[str, str], version: str) -> Any:
    """
    Return the decoder with `bandwidth_id` 0 as an `onnx.ModelProto`.

    Input: `codes` (B, L) int64, with any B and L from 1. Output: `waveform` (B, L * hop) float32.
    """
    graph = Graph()
    config, backbone = model.config, model.backbone
    entries = graph.weight(model.encoder_model.quantizer.codebook.embed.float(), "codebook")
    hidden_states = graph("Transpose", graph("Gather", entries, "codes", axis=0), perm=[0, 2, 1])
    hidden_states = graph.convolution(hidden_states, backbone.embed, "embed", padding=3)
    groups, eps = config.decoder_attention_num_groups, config.norm_eps
    pos_net: Any = backbone.pos_net  # a ModuleList does not know the class of each layer
    convnext: Any = backbone.convnext

    def group_norm(norm: nn.GroupNorm, value: str) -> str:
        grouped = graph("Reshape", value, graph.weight([0, groups, -1]))
        ones, zeros = graph.weight(np.ones(groups)), graph.weight(np.zeros(groups))
        grouped = graph("InstanceNormalization", grouped, ones, zeros, epsilon=eps)
        value = graph("Reshape", grouped, graph.weight([0, config.decoder_hidden_size, -1]))
        scaled = graph("Mul", value, graph.weight(norm.weight[:, None], "norm.weight"))
        return graph("Add", scaled, graph.weight(norm.bias[:, None], "norm.bias"))

    def layer_norm(scale: torch.Tensor, shift: torch.Tensor, value: str) -> str:
        weights = graph.weight(scale, "norm.weight"), graph.weight(shift, "norm.bias")
        return graph("LayerNormalization", value, *weights, axis=-1, epsilon=eps)

    def silu(value: str) -> str:
        return graph("Mul", value, graph("Sigmoid", value))

    for index, block in enumerate(pos_net):
        name = f"pos_net.{index}"
        if hasattr(block, "conv1"):
            inner = graph.convolution(silu(group_norm(block.norm1, hidden_states)), block.conv1, f"{name}.conv1", 1)
            inner = graph.convolution(silu(group_norm(block.norm2, inner)), block.conv2, f"{name}.conv2", 1)
            hidden_states = graph("Add", hidden_states, inner)
        elif hasattr(block, "proj_out"):
            normed = graph("Transpose", group_norm(block.norm, hidden_states), perm=[0, 2, 1])
            attended = _attention(graph, block, normed, name)
            hidden_states = graph("Add", hidden_states, graph("Transpose", attended, perm=[0, 2, 1]))
        else:
            hidden_states = group_norm(block, hidden_states)
    hidden_states = graph("Transpose", hidden_states, perm=[0, 2, 1])  # (B, L, H)
    hidden_states = layer_norm(backbone.norm.scale.weight[0], backbone.norm.shift.weight[0], hidden_states)
    for index, block in enumerate(convnext):
        name = f"convnext.{index}"
        inner = graph("Transpose", hidden_states, perm=[0, 2, 1])
        inner = graph.convolution(inner, block.dwconv, f"{name}.dwconv", padding=3)
        inner = graph("Transpose", inner, perm=[0, 2, 1])
        inner = layer_norm(block.norm.scale.weight[0], block.norm.shift.weight[0], inner)
        inner = _gelu(graph, graph.linear(inner, block.pwconv1.weight, block.pwconv1.bias, f"{name}.pwconv1"))
        gamma = block.gamma.float()  # folded into the weight
        weight, bias = block.pwconv2.weight * gamma[:, None], block.pwconv2.bias * gamma
        hidden_states = graph("Add", hidden_states, graph.linear(inner, weight, bias, f"{name}.pwconv2"))
    norm = backbone.final_layer_norm
    hidden_states = layer_norm(norm.weight, norm.bias, hidden_states)
    graph.rename(_inverse_stft(graph, model.head, hidden_states), "waveform")
    return graph.model(
        {"codes": (INT64, ["batch", "codes"])}, {"waveform": (FLOAT, ["batch", "samples"])}, metadata, version
    )


def _attention(graph: Graph, block: WavTokenizerAttention, value: str, name: str) -> str:
    """Add attention with one head and no mask: (B, L, H) -> (B, L, H). The scale is folded into the query's weight."""
    layers, channels = (block.q, block.k, block.v), block.q.out_channels
    scales = (channels**-0.5, 1, 1)
    weight = torch.cat([layer.weight[..., 0] * scale for layer, scale in zip(layers, scales, strict=True)])
    bias = torch.cat([layer.bias * scale for layer, scale in zip(layers, scales, strict=True)])
    joined = graph.linear(value, weight, bias, f"{name}.qkv")
    query, key, value = graph("Split", joined, graph.weight([channels] * 3), outputs=3, axis=2)
    weights = graph("Softmax", graph("MatMul", query, graph("Transpose", key, perm=[0, 2, 1])), axis=-1)
    # Multiply the transposes: with weights x value, OpenVINO 2026.4 gives wrong audio in each call that follows a call
    # with a single code.
    by_channel = graph(
        "MatMul", graph("Transpose", value, perm=[0, 2, 1]), graph("Transpose", weights, perm=[0, 2, 1])
    )
    attended = graph("Transpose", by_channel, perm=[0, 2, 1])
    assert block.proj_out.bias is not None
    return graph.linear(attended, block.proj_out.weight[..., 0], block.proj_out.bias, f"{name}.proj_out")


def _gelu(graph: Graph, value: str) -> str:
    erf = graph("Erf", graph("Div", value, graph.weight(np.sqrt(2.0))))
    return graph("Mul", graph("Mul", value, graph("Add", erf, graph.weight(1.0))), graph.weight(0.5))


def _inverse_stft(graph: Graph, head: WavTokenizerISTFTHead, hidden_states: str) -> str:
    """Add the head and the inverse STFT: (B, L, H) -> (B, L * hop). One matrix holds inverse DFT and window."""
    n_fft, hop = head.n_fft, head.hop_length
    num_bins, num_shifts = n_fft // 2 + 1, n_fft // hop
    predicted = graph.linear(hidden_states, head.linear.weight, head.linear.bias, "head")
    log_magnitude, phase = graph("Split", predicted, graph.weight([num_bins] * 2), outputs=2, axis=2)
    magnitude = graph("Min", graph("Exp", log_magnitude), graph.weight(100.0))
    parts = [graph("Mul", magnitude, graph(function, phase)) for function in ("Cos", "Sin")]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)  # Hann, periodic
    matrix = _inverse_dft(graph, n_fft, window)
    frames = graph("MatMul", graph("Concat", *parts, axis=2), matrix, name="inverse_dft")
    blocks = graph("Split", frames, graph.weight([hop] * num_shifts), outputs=num_shifts, axis=2)
    shifted = [
        graph("Pad", block, graph.weight([0, shift, 0, 0, num_shifts - 1 - shift, 0]))
        for shift, block in enumerate(blocks)
    ]
    total = graph("Sum", *shifted)  # (B, L + 3, hop)
    # Sum the squared windows in the same way: block j of the sum contains part s of frame j - s.
    length = graph("Squeeze", graph.size(hidden_states, 1))
    last = graph("Add", length, graph.weight(num_shifts - 1))
    block = graph("Range", graph.weight(0), last, graph.weight(1))
    frame = graph("Sub", graph("Unsqueeze", block, graph.weight([1])), graph.weight(np.arange(num_shifts)))
    exists = graph("And", graph("Not", graph("Less", frame, graph.weight(0))), graph("Less", frame, length))
    envelope = graph("MatMul", graph("Cast", exists, to=FLOAT), graph.weight((window**2).reshape(num_shifts, hop)))
    cut = (n_fft - hop) // 2
    bounds = graph.weight([cut]), graph.weight([cut - (num_shifts - 1) * hop])
    total = graph.slice(graph("Reshape", total, graph.weight([0, -1])), *bounds, axis=1)
    envelope = graph.slice(graph("Reshape", envelope, graph.weight([1, -1])), *bounds, axis=1)
    return graph("Div", total, envelope)


def _inverse_dft(graph: Graph, n_fft: int, window: np.ndarray) -> str:
    """
    Return the matrix (n_fft + 2, n_fft) from real and imaginary parts of half a spectrum to windowed samples.

    The graph computes it from one period of cosine and sine, which runtimes do once, at load. Stored, the matrix would
    take 7 to 23 MB of the file.
    """
    period = 2 * np.pi * np.arange(n_fft) / n_fft
    bins = np.arange(n_fft // 2 + 1)
    count = (
        np.where((bins == 0) | (bins == n_fft // 2), 1, 2)[:, None] / n_fft
    )  # other bins count twice, for their conjugates
    index = graph("Mul", graph.weight(bins[:, None]), graph.weight(np.arange(n_fft)[None]))
    index = graph("Mod", index, graph.weight(n_fft))
    halves = [
        graph("Mul", graph("Gather", graph.weight(table), index, axis=0), graph.weight(scale))
        for table, scale in ((np.cos(period), count), (np.sin(period), -count))
    ]
    return graph("Mul", graph("Concat", *halves, axis=0), graph.weight(window))
