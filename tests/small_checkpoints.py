"""Shared fixtures for tests of conversion: checkpoints with the names of a real one and few channels."""

import copy
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import formula
import pytest
import safetensors.torch
import torch
import yaml
from conftest import REFERENCE, ROOT

from wavtokenizer_hf import WavTokenizerModel
from wavtokenizer_hf.conversion.from_original import convert


ENCODER = "feature_extractor.encodec.encoder.model."
CODEBOOK = "feature_extractor.encodec.quantizer.vq.layers.0._codebook."


CHANNELS = {16: 2, 32: 4, 64: 8, 128: 16, 256: 32, 512: 64, 2048: 256, 768: 32, 2304: 48, 4096: 128}


def small_tensors(rate: int = 75) -> dict[str, torch.Tensor]:
    manifest = json.loads((REFERENCE / f"manifest_{rate}.json").read_text())
    shapes = {
        # Kernel sizes, on axis 2, stay. So do the window and the head's rows, which CHANNELS does not list.
        name: tuple(CHANNELS.get(size, size) if axis < 2 else size for axis, size in enumerate(shape))
        for name, shape in manifest.items()
    }
    return {name: torch.from_numpy(formula.fill(name, shape)) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def originals():
    return {rate: small_tensors(rate) for rate in (75, 40)}


@pytest.fixture
def tensors(originals):
    """Return a small checkpoint at 75 codes/s by reference names. Each test gets its own copy."""
    return copy.deepcopy(originals[75])


@pytest.fixture
def save(tmp_path):
    """Return a function that writes the given tensors as a Lightning checkpoint and returns its path."""

    def save(tensors, name="model.ckpt", **others):
        torch.save({"epoch": 3, "state_dict": tensors, **others}, tmp_path / name)
        return tmp_path / name

    return save


def small_yaml(rate: int = 75) -> dict:
    """Return the content of the YAML file of such a checkpoint, structured like the published ones."""
    ratios = {75: [8, 5, 4, 2], 40: [6, 5, 5, 4]}[rate]
    feature_extractor = {
        "encodec_model": "encodec_24khz",
        "bandwidths": [6.6, 6.6, 6.6, 6.6],
        "train_codebooks": True,
        "num_quantizers": 1,
        "dowmsamples": ratios,
        "vq_bins": 128,
        "vq_kmeans": 200,
    }
    backbone = {"input_channels": 64, "dim": 32, "intermediate_dim": 48, "num_layers": 12, "adanorm_num_embeddings": 4}
    head = {"dim": 32, "n_fft": 4 * math.prod(ratios), "hop_length": math.prod(ratios), "padding": "same"}
    parts = {
        "feature_extractor": ("decoder.feature_extractors.EncodecFeatures", feature_extractor),
        "backbone": ("decoder.models.VocosBackbone", backbone),
        "head": ("decoder.heads.ISTFTHead", head),
    }
    model = {"sample_rate": 24000, "initial_learning_rate": 2e-4, "mel_loss_coeff": 45}
    model |= {part: {"class_path": path, "init_args": values} for part, (path, values) in parts.items()}
    return {
        "seed_everything": 3407,
        "data": {"class_path": "decoder.dataset.VocosDataModule", "init_args": {"train_params": {"batch_size": 40}}},
        "model": {"class_path": "decoder.experiment.WavTokenizer", "init_args": model},
        "trainer": {"max_steps": 2000000},
    }


@pytest.fixture
def save_yaml(tmp_path):
    def save_yaml(content, name="model.yaml"):
        (tmp_path / name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return tmp_path / name

    return save_yaml


def new_name(name: str) -> str:
    """Return the name that architecture.md gives for a reference name."""
    name = name.replace("feature_extractor.encodec.encoder.model.", "encoder_model.encoder.layers.")
    name = name.replace(
        "feature_extractor.encodec.quantizer.vq.layers.0._codebook.", "encoder_model.quantizer.codebook."
    )
    name = name.replace(".conv.conv.weight_g", ".conv.parametrizations.weight.original0")
    name = name.replace(".conv.conv.weight_v", ".conv.parametrizations.weight.original1")
    return name.replace(".conv.conv.bias", ".conv.bias").replace("head.out.", "head.linear.")


def is_kept(name: str) -> bool:
    return not name.startswith("feature_extractor.encodec.decoder.") and name != "head.istft.window"


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype == torch.float32 and torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.fixture(scope="module")
def small_folder(originals, tmp_path_factory):
    parent = tmp_path_factory.mktemp("small")
    torch.save({"state_dict": originals[75]}, parent / "source.ckpt")
    return convert(parent / "source.ckpt", parent / "small-wavtokenizer")


@pytest.fixture
def after_saving(monkeypatch):
    """Return a function that registers a callback. It is called with the folder once the model was written there."""

    def after_saving(function):
        save_pretrained = WavTokenizerModel.save_pretrained

        def replacement(self, folder):
            save_pretrained(self, folder)
            function(folder)

        monkeypatch.setattr(WavTokenizerModel, "save_pretrained", replacement)

    return after_saving


def stop(error):
    def function(folder):
        raise error

    return function


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


class PeakMemory:
    """Largest anonymous memory of another process in bytes, sampled every few milliseconds.

    ru_maxrss would also count pages of mapped files, which the kernel can reclaim at any time.
    """

    def __init__(self, process: int):
        self.status = Path(f"/proc/{process}/status")
        self.peak, self.done = self.now(), threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def now(self) -> int:
        found = dict(re.findall(r"(RssAnon|RssShmem):\s+(\d+) kB", self.status.read_text()))
        return 1024 * sum(map(int, found.values()))

    def watch(self):
        while not self.done.is_set():
            self.peak = max(self.peak, self.now())
            time.sleep(0.003)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def large_checkpoint(checkpoint: Path, path: Path) -> Path:
    """Return a checkpoint with optimizer states, as large as the published ones."""
    content = torch.load(checkpoint, mmap=True, weights_only=True)
    content["optimizer_states"] = [{"state": {i: {"exp_avg": torch.zeros(10**7)} for i in range(36)}}]
    torch.save(content, path)
    assert path.stat().st_size > 1.75e9
    return path


def memory_and_seconds(arguments: list, **environment: str) -> tuple[int, float]:
    """Convert in a separate process. Return its peak memory above that of the imports, in bytes, and its seconds."""
    program = """
import sys, torch, transformers
from wavtokenizer_hf.conversion.command import main
print("ready", flush=True)
sys.stdin.readline()
code = main(sys.argv[1:])
print("done", flush=True)
sys.stdin.readline()
sys.exit(code)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        before, start = (memory := PeakMemory(process.pid)).peak, time.perf_counter()
        with memory:
            process.stdin.write("\n")
            process.stdin.flush()
            while process.stdout.readline() not in ("done\n", ""):
                pass
        seconds = time.perf_counter() - start
        process.stdin.write("\n")
    assert process.returncode == 0
    assert before > 50e6  # the memory of torch itself; less would mean that nothing was measured
    print(f"peak {(memory.peak - before) / 1e6:.0f} MB above the imports, {seconds:.1f} s")
    return memory.peak - before, seconds
