"""Shared fixtures: checkpoints rebuilt by formula, converted folders, a tiny model."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach the network

import importlib.util
import sys
from pathlib import Path

import build_checkpoint
import pytest
import torch

from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerModel


ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
REFERENCE = FIXTURES / "reference"


@pytest.fixture(scope="module")
def one_thread():
    """Use one thread: tiny layers gain nothing from more, and are much slower with more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=[75, 40], ids=["75_per_s", "40_per_s"])
def rate(request) -> int:
    """Return the tokens per second of a published shape."""
    return request.param


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Return a function: rate -> path of the Lightning checkpoint behind the golden data. It is built on first use."""
    folder, built = tmp_path_factory.mktemp("checkpoints"), {}

    def checkpoint(rate: int) -> Path:
        if rate not in built:
            built[rate] = build_checkpoint.build(rate, folder / f"original_{rate}.ckpt")
        return built[rate]

    return checkpoint


@pytest.fixture(scope="session")
def folders(tmp_path_factory, checkpoints):
    """Return a function: rate -> converted folder of that checkpoint. It is converted on first use."""
    from wavtokenizer_hf.conversion.from_original import convert

    parent, converted = tmp_path_factory.mktemp("converted"), {}

    def folder(rate: int) -> Path:
        if rate not in converted:
            converted[rate] = convert(checkpoints(rate), parent / f"wavtokenizer-{rate}")
        return converted[rate]

    return folder


@pytest.fixture(scope="session")
def models(folders):
    """
    Return a function: rate -> converted model in eval mode. The models are shared, so tests must not change them.
    """
    loaded = {}

    def model(rate: int) -> WavTokenizerModel:
        if rate not in loaded:
            loaded[rate] = WavTokenizerModel.from_pretrained(folders(rate)).eval()
        return loaded[rate]

    return model


def load_script(path: Path):
    """Load a script of examples/ as a module by its path. Two of the scripts have the same name."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_config(**changes) -> WavTokenizerConfig:
    """Return the config of a WavTokenizer with a few thousand weights and 16 samples per code."""
    fields = {
        "num_filters": 4,
        "upsampling_ratios": [4, 2, 2],
        "hidden_size": 16,
        "codebook_size": 64,
        "codebook_dim": 16,
        "decoder_hidden_size": 16,
        "decoder_intermediate_size": 32,
        "decoder_num_layers": 2,
        "decoder_attention_num_groups": 4,
    }
    return WavTokenizerConfig(**{**fields, **changes})


@pytest.fixture
def tiny_model() -> WavTokenizerModel:
    """Return a tiny model with diverse codes: random weights, and a codebook drawn from its own latents."""
    torch.manual_seed(0)
    model = WavTokenizerModel(tiny_config()).eval()
    with torch.no_grad():
        latents = model.encode(torch.randn(1, 1, 64 * 16), output_latents=True).latents[0].T
        model.quantizer.codebook.embed.copy_(latents)
    return model
