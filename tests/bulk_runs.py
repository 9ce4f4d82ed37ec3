"""
Fixtures and helpers for tests of bulk runs: a corpus, a tiny model, the expected codes, and a run over the corpus.
"""

import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch
from bulk_corpus import DAMAGED, codes_alone, rows_of, save_model, write_corpus
from conftest import tiny_config

from wavtokenizer_hf import WavTokenizerModel, worker_processes
from wavtokenizer_hf.bulk import TokenizeOptions, tokenize


NUM_CLIPS = 26


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """
    Use one thread: tiny layers gain nothing from more, and forked workers must not wait for threads of this process.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_two_models(folder: Path) -> None:
    """Save two models of the same shape with diverse codes as `model` and `other`."""
    for seed, name in ((0, "model"), (1, "other")):
        torch.manual_seed(seed)
        model = WavTokenizerModel(tiny_config()).eval()
        with torch.no_grad():
            latents = model.encode(torch.randn(1, 1, 64 * 16), output_latents=True).latents[0].T
            model.quantizer.codebook.embed.copy_(latents)
        save_model(model, folder / name)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Return a folder with a tiny model, another model of the same shape, and a corpus."""
    workspace = tmp_path_factory.mktemp("bulk")
    save_two_models(workspace)
    write_corpus(workspace / "corpus", NUM_CLIPS, (0.01, 0.8))
    return workspace


@pytest.fixture(scope="module")
def model(workspace):
    return WavTokenizerModel.from_pretrained(workspace / "model").eval()


@pytest.fixture(scope="module")
def alone(workspace, model):
    """Return the expected codes: those of each good clip, encoded alone."""
    files = {
        path.relative_to(workspace / "corpus").as_posix(): path
        for path in (workspace / "corpus").rglob("*.*")
        if path.name not in DAMAGED
    }
    codes = codes_alone(model, files)
    assert len(codes) == NUM_CLIPS and len({code for row in codes.values() for code in row}) > 20
    return codes


@pytest.fixture
def run(workspace, tmp_path):
    """Return a function that tokenizes the corpus in this process, into tmp_path/out by default."""

    def run(source=None, model=workspace / "model", output=tmp_path / "out", **options):
        options = TokenizeOptions(**{"num_processes": 1, **options})
        return tokenize(workspace / "corpus" if source is None else source, str(model), output, options)

    return run


@pytest.fixture
def forked(monkeypatch):
    """Fork the workers: they skip 4 s of imports each and see monkeypatches. The slow tests spawn them."""
    serve, fork = worker_processes._serve, multiprocessing.get_context("fork")

    def serve_as_spawned(connection, start, rank):
        serve(connection, pickle.loads(pickle.dumps(start)), rank)  # a plain fork would share the object

    monkeypatch.setattr(worker_processes.multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setattr(worker_processes, "_serve", serve_as_spawned)


@pytest.fixture
def clips(workspace, alone):
    """Return three good clips and a damaged one: name -> (path, text)."""
    names = [*sorted(alone)[:3], "empty.wav"]
    return {name: (workspace / "corpus" / name, f"text of {name}") for name in names}


def check_clips(result, output, clips, alone, ids=None, column="text"):
    """Check that each good clip has its own codes and text, and that the damaged one failed."""
    ids = ids or {name: name for name in clips}
    rows = rows_of(output)
    assert result.failures.keys() == {ids["empty.wav"]}
    assert {id: row["audio_codes"] for id, row in rows.items()} == {
        ids[name]: alone[name] for name in clips if name != "empty.wav"
    }
    if column is not None:
        assert all(rows[ids[name]][column] == text for name, (_, text) in clips.items() if name != "empty.wav")


def num_parts(folder):
    return len(list(folder.glob("data/*.parquet")))
