"""Fixtures that several test files share: checkpoints rebuilt by formula, converted folders, a tiny model."""

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
    """Use one thread: tiny layers do not gain from more, and are much slower with more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=[75, 40], ids=["75_per_s", "40_per_s"])
def rate(request) -> int:
    """Tokens per second of a published shape."""
    return request.param


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """rate -> path of the original's Lightning checkpoint that the golden data was made with; built on first use."""
    folder, built = tmp_path_factory.mktemp("checkpoints"), {}

    def checkpoint(rate: int) -> Path:
        if rate not in built:
            built[rate] = build_checkpoint.build(rate, folder / f"original_{rate}.ckpt")
        return built[rate]

    return checkpoint


@pytest.fixture(scope="session")
def folders(tmp_path_factory, checkpoints):
    """rate -> folder that conversion made of that checkpoint; converted on first use."""
    from wavtokenizer_hf.conversion.from_original import convert

    parent, converted = tmp_path_factory.mktemp("converted"), {}

    def folder(rate: int) -> Path:
        if rate not in converted:
            converted[rate] = convert(checkpoints(rate), parent / f"wavtokenizer-{rate}")
        return converted[rate]

    return folder


@pytest.fixture(scope="session")
def models(folders):
    """rate -> the converted model, in eval mode; shared, so tests must not change it."""
    loaded = {}

    def model(rate: int) -> WavTokenizerModel:
        if rate not in loaded:
            loaded[rate] = WavTokenizerModel.from_pretrained(folders(rate)).eval()
        return loaded[rate]

    return model


def load_script(path: Path):
    """Load a script of examples/ as a module, by its path, since two of them have the same name."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_config(**changes) -> WavTokenizerConfig:
    """A WavTokenizer of a few thousand weights and 16 samples per code."""
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
    """A tiny model whose codes are diverse: random weights, and a codebook drawn from its own latents."""
    torch.manual_seed(0)
    model = WavTokenizerModel(tiny_config()).eval()
    with torch.no_grad():
        latents = model.encode(torch.randn(1, 1, 64 * 16), output_latents=True).latents[0].T
        model.quantizer.codebook.embed.copy_(latents)
    return model
