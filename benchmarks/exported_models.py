"""Compare our model with its exports in onnxruntime and OpenVINO on a CPU, interleaved in one run.

    pip install '.[onnx]' openvino
    python benchmarks/exported_models.py MODEL [--threads 2] [--seconds 1 10 30] [--runs 5]
    python benchmarks/exported_models.py bundled --quick    # a few seconds, to check that it works

Prints times of encoder and decoder, ratios to ours, the number of codes that differ, and the largest difference of the
audio.
"""

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from wavtokenizer_hf import WavTokenizerModel
from wavtokenizer_hf.export import export_onnx
from wavtokenizer_hf.export.onnx_export import check_signals
from wavtokenizer_hf.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, name on the Hub, or bundled")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each runtime")
    parser.add_argument("--seconds", type=float, nargs="+", default=[1, 10, 30], help="lengths of clips in seconds")
    parser.add_argument("--runs", type=int, default=5, help="measurements of each runtime, for the median")
    parser.add_argument("--quick", action="store_true", help="one run with a clip of 1 s")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.runs = [1], 1
    torch.set_num_threads(arguments.threads)
    model = load_model(WavTokenizerModel, arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder, "onnx"), arguments.model)
        runtimes = {
            "ours": _ours(model),
            "onnxruntime": _onnxruntime(Path(folder, "onnx"), arguments.threads),
            "OpenVINO": _openvino(Path(folder, "onnx"), arguments.threads),
        }
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino"))
        print(
            f"{platform.processor() or platform.machine()}, {arguments.threads} threads, {packages}, float32, "
            f"{arguments.model}"
        )
        print(
            "seconds of audio | part | "
            + " | ".join(f"{name} ms" for name in runtimes)
            + " | ratios to ours | differences"
        )
        audio = check_signals(model.config.sampling_rate)["30 s of audio"]
        for seconds in arguments.seconds:
            samples = np.resize(audio, round(seconds * model.config.sampling_rate))[None, None]
            _measure(runtimes, samples, seconds, arguments.runs)


def _measure(runtimes: dict, samples: np.ndarray, seconds: float, runs: int) -> None:
    codes = runtimes["ours"][0](samples)
    for part, inputs in ((0, samples), (1, codes)):
        results = {name: runtime[part](inputs) for name, runtime in runtimes.items()}  # also the warm-up
        times = {name: [] for name in runtimes}
        for _ in range(runs):
            for name, runtime in runtimes.items():
                started = time.perf_counter()
                runtime[part](inputs)
                times[name].append(time.perf_counter() - started)
        medians = {name: float(np.median(values)) for name, values in times.items()}
        if part == 0:
            differences = {name: f"{(result != results['ours']).sum()} codes" for name, result in results.items()}
        else:
            differences = {name: f"{np.abs(result - results['ours']).max():.0e}" for name, result in results.items()}
        print(
            f"{seconds:g} | {('encoder', 'decoder')[part]} | "
            + " | ".join(f"{1000 * median:.1f}" for median in medians.values())
            + " | "
            + ", ".join(f"{name} {median / medians['ours']:.2f}" for name, median in medians.items() if name != "ours")
            + f" | {json.dumps({name: text for name, text in differences.items() if name != 'ours'})}",
            flush=True,
        )


def _ours(model: WavTokenizerModel) -> tuple:
    @torch.inference_mode()
    def encode(samples: np.ndarray) -> np.ndarray:
        return model.encode(torch.from_numpy(samples)).audio_codes.numpy()

    @torch.inference_mode()
    def decode(codes: np.ndarray) -> np.ndarray:
        return model.decode(torch.from_numpy(codes)).audio_values[:, 0].numpy()

    return encode, decode


def _onnxruntime(folder: Path, threads: int) -> tuple:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    encoder, decoder = (
        onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        for name in ("encoder", "decoder")
    )
    return (
        lambda samples: encoder.run(None, {"input_values": samples})[0],
        lambda codes: decoder.run(None, {"codes": codes[:, 0]})[0],
    )


def _openvino(folder: Path, threads: int) -> tuple:
    import openvino

    # on processors with bfloat16, OpenVINO would use it, and that changes most codes
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    core = openvino.Core()
    encoder, decoder = (
        core.compile_model(str(folder / f"{name}.onnx"), "CPU", settings) for name in ("encoder", "decoder")
    )
    return lambda samples: encoder([samples])[0].copy(), lambda codes: decoder([codes[:, 0]])[0].copy()


if __name__ == "__main__":
    main()
