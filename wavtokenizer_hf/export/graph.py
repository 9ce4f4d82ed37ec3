"""ONNX graphs of the encoder and the decoder, written operator by operator from the weights and the configuration.

Nothing is traced, so the graphs depend on no exporter, and every length is computed in the graph. Only operators of
opset 17 that onnxruntime, its web build, OpenVINO and TensorRT share are used: the DFT operator, for one, gives wrong
audio in OpenVINO 2026.4. Shape letters are those of modeling_wavtokenizer.py.
"""

from collections import Counter

import numpy as np
import torch
from torch import nn

from ..extras import require
from ..modeling_wavtokenizer import WavTokenizerModel


OPSET = 17  # the first with LayerNormalization
IR_VERSION = 8  # what onnxruntime has read since opset 17

FLOAT, INT64 = 1, 7  # onnx.TensorProto.FLOAT, .INT64


class Graph:
    """Collects the nodes and weights of a graph. A value is known by its name, a string."""

    def __init__(self):
        self.nodes, self.weights = [], []
        self._names = Counter()

    def __call__(self, operator: str, *inputs: str, outputs: int | None = None, name: str | None = None, **attributes):
        """Adds a node and returns the name of its output, or a list of names if `outputs` says how many."""
        name = self._unique(name or operator.lower())
        names = [name] if outputs is None else [f"{name}_{index}" for index in range(outputs)]
        make_node = require("onnx", "onnx").helper.make_node
        self.nodes.append(make_node(operator, list(inputs), names, name=name, **attributes))
        return name if outputs is None else names

    def weight(self, values, name: str = "constant") -> str:
        """Adds a constant: float32 if it is a float tensor or array, else int64."""
        values = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        values = values.astype(np.float32 if np.issubdtype(values.dtype, np.floating) else np.int64)
        name = self._unique(name)
        self.weights.append(require("onnx", "onnx").numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def model(self, inputs: dict, outputs: dict, metadata: dict[str, str], version: str):
        """
        The finished `onnx.ModelProto`. `inputs` and `outputs` are name -> (element type, shape); dimensions may be
        names.
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
        """Gives a value the name of a graph output."""
        self.nodes.append(require("onnx", "onnx").helper.make_node("Identity", [value], [name], name=name))

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name]}"

    # -----------------------------------------------------------------------------------------------------------------
    # What both graphs need
    # -----------------------------------------------------------------------------------------------------------------

    def size(self, value: str, axis: int) -> str:
        """Length of an axis, int64 (1,)."""
        return self("Shape", value, start=axis, end=axis + 1)

    def slice(self, value: str, start: str, end: str, axis: int) -> str:
        return self("Slice", value, start, end, self.weight([axis]))

    def linear(self, value: str, weight: torch.Tensor, bias: torch.Tensor, name: str) -> str:
        """(..., C) -> (..., C')"""
        product = self("MatMul", value, self.weight(weight.detach().t(), f"{name}.weight"), name=name)
        return self("Add", product, self.weight(bias, f"{name}.bias"))

    def convolution(self, value: str, conv: nn.Conv1d, name: str, padding: int = 0) -> str:
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
def encoder_graph(model: WavTokenizerModel, metadata: dict[str, str], version: str):
    """
    The encoder and the quantizer: `input_values` (B, 1, T) float32 -> `audio_codes` (B, 1, L) int64, any B and T from
    1.
    """
    graph = Graph()
    encoder, config = model.encoder_model.encoder, model.config
    hidden_states = _convolutions(graph, encoder, "input_values")
    frames, _ = _lstm(graph, _lstm_of(encoder), hidden_states, None)
    latents = _reflecting_convolution(graph, encoder.layers[-1], graph("Elu", frames), "layers.last")
    graph.rename(_codes(graph, model, latents), "audio_codes")
    return graph.model(
        {"input_values": (FLOAT, ["batch", config.audio_channels, "samples"])},
        {"audio_codes": (INT64, ["batch", 1, "codes"])},
        metadata,
        version,
    )


@torch.no_grad()
def encoder_stream_graph(model: WavTokenizerModel, metadata: dict[str, str], version: str):
    """One step of a stream; `EncodeStream` of wavtokenizer_onnx.py drives it.

    Inputs: `input_values` (B, 1, N), the new samples and those around them; `bounds` (4,): which frames of them are
    new (start, end), and which codes are complete (start, end, counted in `frames_out`); `hidden` and `cell` (layers,
    B, C), the LSTM's state; `frames` (B, C, M), what the last convolution still needs of the frames before. Outputs:
    `audio_codes` (B, 1, n), and the state after the step: `hidden_out`, `cell_out`, `frames_out` (B, C, M + new
    frames).
    """
    graph = Graph()
    encoder, config = model.encoder_model.encoder, model.config
    lstm = _lstm_of(encoder)
    bounds = [graph.slice("bounds", graph.weight([index]), graph.weight([index + 1]), axis=0) for index in range(4)]
    new_frames = graph.slice(_convolutions(graph, encoder, "input_values"), bounds[0], bounds[1], axis=2)
    new_frames, state = _lstm(graph, lstm, new_frames, ("hidden", "cell"))
    frames = graph("Concat", "frames", new_frames, axis=2)
    latents = _reflecting_convolution(graph, encoder.layers[-1], graph("Elu", frames), "layers.last")
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


def encoder_reach(encoder: nn.Module) -> dict[str, int]:
    """How many frames the layers before the LSTM reach back and ahead of a frame, audio mirrored at an end included,
    and how far the last convolution reaches to either side."""
    back = ahead = 0
    samples_per_step = 1
    for layer in encoder.layers[:-3]:
        for conv in layer.modules():
            if isinstance(conv, type(encoder.layers[-1])):
                mirrored = max(conv.left, conv.right + conv.stride - 1) * samples_per_step
                back, ahead = back + mirrored, ahead + mirrored
                samples_per_step *= conv.stride
    hop_length = samples_per_step
    return {
        "frames_back": -(-back // hop_length),
        "frames_ahead": -(-max(ahead + 1 - hop_length, 0) // hop_length),
        "last_reach": encoder.layers[-1].left,
    }


def _lstm_of(encoder: nn.Module) -> nn.RNNBase:
    return next(layer.lstm for layer in encoder.layers if hasattr(layer, "lstm"))


def _convolutions(graph: Graph, encoder: nn.Module, value: str) -> str:
    """The layers before the LSTM: (B, 1, T) -> (B, C, ceil(T / hop))."""
    for index, layer in enumerate(encoder.layers):
        name = f"layers.{index}"
        if hasattr(layer, "lstm"):
            return value
        if isinstance(layer, nn.ELU):
            value = graph("Elu", value)
        elif hasattr(layer, "block"):
            inner = value
            for position, part in enumerate(layer.block):
                if isinstance(part, nn.ELU):
                    inner = graph("Elu", inner)
                else:
                    inner = _reflecting_convolution(graph, part, inner, f"{name}.block.{position}")
            value = graph("Add", _reflecting_convolution(graph, layer.shortcut, value, f"{name}.shortcut"), inner)
        else:
            value = _reflecting_convolution(graph, layer, value, name)
    raise RuntimeError("The encoder has no LSTM. Please report this.")


def _reflecting_convolution(graph: Graph, layer: nn.Module, value: str, name: str) -> str:
    """A convolution with its padding: (B, C, N) -> (B, C', ceil(N / stride))."""
    if layer.left + layer.right + layer.stride > 1:
        value = _reflect(graph, value, layer.left, layer.right, layer.stride)
    return graph.convolution(value, layer.conv, name)


def _reflect(graph: Graph, value: str, left: int, right: int, stride: int) -> str:
    """Continues (B, C, N) by reflection at both ends, and on the right so far that the last window is full.

    A signal too short for that is first lengthened by zeros. `stride - 1` more steps than needed may be added on the
    right, which fill no window. What is added is gathered, since Pad cannot do the short case. No operand of a
    division or a modulo is negative, since ONNX truncates where Python floors.
    """
    length = graph.size(value, 2)
    one = graph.weight([1])
    own_right = graph.weight([right])
    if stride > 1:
        num_windows = graph("Div", graph("Add", length, graph.weight([stride - 1])), graph.weight([stride]))
        missing = graph("Sub", graph("Mul", num_windows, graph.weight([stride])), length)
        own_right = graph("Add", own_right, missing)
    reach = graph("Max", own_right, graph.weight([left]))
    extended = graph("Max", length, graph("Add", reach, one))  # (1,): the length after zeros were added
    before = graph.weight(np.arange(left, 0, -1))  # where each added step is mirrored from
    position = graph("Add", length, graph.weight(np.arange(right + stride - 1)))
    mirrored = graph("Sub", graph("Mul", graph("Sub", extended, one), graph.weight([2])), position)
    beyond_zeros = graph("Not", graph("Less", position, extended))
    real = graph(
        "Concat",
        graph("Less", before, length),
        graph("And", beyond_zeros, graph("Less", mirrored, length)),
        axis=0,
    )
    index = graph("Concat", before, mirrored, axis=0)
    index = graph("Min", graph("Max", index, graph.weight([0])), graph("Sub", length, one))
    added = graph("Mul", graph("Gather", value, index, axis=2), graph("Cast", real, to=FLOAT))
    parts = graph.weight([left, right + stride - 1])
    if left == 0:
        return graph("Concat", value, added, axis=2)
    if right + stride == 1:
        return graph("Concat", added, value, axis=2)
    start, end = graph("Split", added, parts, outputs=2, axis=2)
    return graph("Concat", start, value, end, axis=2)


def _lstm(graph: Graph, lstm: nn.RNNBase, value: str, state: tuple[str, str] | None) -> tuple[str, tuple[str, str]]:
    """(B, C, L) and the state (layers, B, C) before it -> the LSTM's output plus its input, and the state after it."""

    def gates(tensor: torch.Tensor) -> np.ndarray:
        """torch's order of the gates, i f g o, in ONNX's: i o f c."""
        i, f, g, o = tensor.detach().chunk(4)
        return torch.cat([i, o, f, g])[None].numpy()

    output, states = graph("Transpose", value, perm=[2, 0, 1]), []  # (L, B, C)
    for layer in range(lstm.num_layers):
        weights = [getattr(lstm, f"{kind}_l{layer}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        by_input, by_state, input_bias, state_bias = map(gates, weights)
        bias = np.concatenate([input_bias, state_bias], axis=1)
        operands = [graph.weight(values, f"lstm.{layer}") for values in (by_input, by_state, bias)]
        initial = []
        if state is not None:
            bounds = graph.weight([layer]), graph.weight([layer + 1])
            initial = ["", *(graph.slice(part, *bounds, axis=0) for part in state)]  # "": no lengths
        output, hidden, cell = graph("LSTM", output, *operands, *initial, outputs=3, hidden_size=lstm.hidden_size)
        output = graph("Squeeze", output, graph.weight([1]))  # (L, directions, B, C)
        states.append((hidden, cell))
    after = tuple(graph("Concat", *parts, axis=0) for parts in zip(*states, strict=True)) if state else None
    return graph("Add", value, graph("Transpose", output, perm=[1, 2, 0])), after


def _codes(graph: Graph, model: WavTokenizerModel, latents: str) -> str:
    """latents (B, D, L) -> (B, 1, L): the nearest entry, as the largest x.e - |e|^2 / 2."""
    entries = model.encoder_model.quantizer.codebook.embed.float()
    bias = -0.5 * torch.linalg.vector_norm(entries, dim=1).square()
    scores = graph.linear(graph("Transpose", latents, perm=[0, 2, 1]), entries, bias, "codebook")
    return graph("Unsqueeze", graph("ArgMax", scores, axis=2, keepdims=0), graph.weight([1]))


# ---------------------------------------------------------------------------------------------------------------------
# Decoder: codes (B, L) -> waveform (B, L * hop)
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decoder_graph(model: WavTokenizerModel, metadata: dict[str, str], version: str):
    """
    The decoder with `bandwidth_id` 0: `codes` (B, L) int64 -> `waveform` (B, L * hop) float32, any B and L from 1.
    """
    graph = Graph()
    config, backbone = model.config, model.backbone
    entries = graph.weight(model.encoder_model.quantizer.codebook.embed.float(), "codebook")
    hidden_states = graph("Transpose", graph("Gather", entries, "codes", axis=0), perm=[0, 2, 1])
    hidden_states = graph.convolution(hidden_states, backbone.embed, "embed", padding=3)
    groups, eps = config.decoder_attention_num_groups, config.norm_eps

    def group_norm(norm: nn.Module, value: str) -> str:
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

    for index, block in enumerate(backbone.pos_net):
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
    for index, block in enumerate(backbone.convnext):
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


def _attention(graph: Graph, block: nn.Module, value: str, name: str) -> str:
    """(B, L, H) -> (B, L, H): one head, no mask; the scale is folded into the query's weight."""
    layers, channels = (block.q, block.k, block.v), block.q.out_channels
    scales = (channels**-0.5, 1, 1)
    weight = torch.cat([layer.weight[..., 0] * scale for layer, scale in zip(layers, scales, strict=True)])
    bias = torch.cat([layer.bias * scale for layer, scale in zip(layers, scales, strict=True)])
    joined = graph.linear(value, weight, bias, f"{name}.qkv")
    query, key, value = graph("Split", joined, graph.weight([channels] * 3), outputs=3, axis=2)
    weights = graph("Softmax", graph("MatMul", query, graph("Transpose", key, perm=[0, 2, 1])), axis=-1)
    # as a product of transposes: with weights x value, OpenVINO 2026.4 gives wrong audio in each call after one of a
    # single code
    by_channel = graph(
        "MatMul", graph("Transpose", value, perm=[0, 2, 1]), graph("Transpose", weights, perm=[0, 2, 1])
    )
    attended = graph("Transpose", by_channel, perm=[0, 2, 1])
    return graph.linear(attended, block.proj_out.weight[..., 0], block.proj_out.bias, f"{name}.proj_out")


def _gelu(graph: Graph, value: str) -> str:
    erf = graph("Erf", graph("Div", value, graph.weight(np.sqrt(2.0))))
    return graph("Mul", graph("Mul", value, graph("Add", erf, graph.weight(1.0))), graph.weight(0.5))


def _inverse_stft(graph: Graph, head: nn.Module, hidden_states: str) -> str:
    """(B, L, H) -> (B, L * hop). The inverse DFT and the window are one matrix."""
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
    # the squared windows that lie over each block, counted alike: block j of the sum holds part s of frame j - s
    length = graph("Squeeze", graph.size(hidden_states, 1))
    last = graph("Add", length, graph.weight(num_shifts - 1))
    block = graph("Range", graph.weight(0), last, graph.weight(1))
    frame = graph("Sub", graph("Unsqueeze", block, graph.weight([1])), graph.weight(np.arange(num_shifts)))
    there = graph("And", graph("Not", graph("Less", frame, graph.weight(0))), graph("Less", frame, length))
    envelope = graph("MatMul", graph("Cast", there, to=FLOAT), graph.weight((window**2).reshape(num_shifts, hop)))
    cut = (n_fft - hop) // 2
    bounds = graph.weight([cut]), graph.weight([cut - (num_shifts - 1) * hop])
    total = graph.slice(graph("Reshape", total, graph.weight([0, -1])), *bounds, axis=1)
    envelope = graph.slice(graph("Reshape", envelope, graph.weight([1, -1])), *bounds, axis=1)
    return graph("Div", total, envelope)


def _inverse_dft(graph: Graph, n_fft: int, window: np.ndarray) -> str:
    """(n_fft + 2, n_fft): real and imaginary parts of half a spectrum -> windowed samples.

    Computed from one period of cosine and sine, which runtimes do once, at load: the matrix would be 7 to 23 MB of the
    file.
    """
    period = 2 * np.pi * np.arange(n_fft) / n_fft
    bins = np.arange(n_fft // 2 + 1)
    count = np.where((bins == 0) | (bins == n_fft // 2), 1, 2)[:, None] / n_fft  # all others stand for two bins
    index = graph("Mul", graph.weight(bins[:, None]), graph.weight(np.arange(n_fft)[None]))
    index = graph("Mod", index, graph.weight(n_fft))
    halves = [
        graph("Mul", graph("Gather", graph.weight(table), index, axis=0), graph.weight(scale))
        for table, scale in ((np.cos(period), count), (np.sin(period), -count))
    ]
    return graph("Mul", graph("Concat", *halves, axis=0), graph.weight(window))
