"""What the tests of bulk runs share: a corpus, a tiny model, the true codes, and a run over them."""

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
    """Tiny layers gain nothing from threads; and processes that are forked here must not wait for any."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_two_models(folder: Path) -> None:
    """Two models of one shape, `model` and `other`, whose codes are diverse."""
    for seed, name in ((0, "model"), (1, "other")):
        torch.manual_seed(seed)
        model = WavTokenizerModel(tiny_config()).eval()
        with torch.no_grad():
            latents = model.encode(torch.randn(1, 1, 64 * 16), output_latents=True).latents[0].T
            model.quantizer.codebook.embed.copy_(latents)
        save_model(model, folder / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, another of the same shape, and a corpus."""
    place = tmp_path_factory.mktemp("bulk")
    save_two_models(place)
    write_corpus(place / "corpus", NUM_CLIPS, (0.01, 0.8))
    return place


@pytest.fixture(scope="module")
def model(place):
    return WavTokenizerModel.from_pretrained(place / "model").eval()


@pytest.fixture(scope="module")
def alone(place, model):
    """The truth: codes of each good clip, encoded alone."""
    files = {
        path.relative_to(place / "corpus").as_posix(): path
        for path in (place / "corpus").rglob("*.*")
        if path.name not in DAMAGED
    }
    codes = codes_alone(model, files)
    assert len(codes) == NUM_CLIPS and len({code for row in codes.values() for code in row}) > 20
    return codes


@pytest.fixture
def run(place, tmp_path):
    """Tokenizes the corpus in this process into tmp_path/out, unless told otherwise."""

    def run(source=None, model=place / "model", output=tmp_path / "out", **options):
        options = TokenizeOptions(**{"num_processes": 1, **options})
        return tokenize(place / "corpus" if source is None else source, str(model), output, options)

    return run


@pytest.fixture
def forked(monkeypatch):
    """Workers that need no imports, 4 s of a processor each, and know of patches. The slow tests have spawned ones."""
    serve, fork = worker_processes._serve, multiprocessing.get_context("fork")

    def serve_as_spawned(connection, start, rank):
        serve(connection, pickle.loads(pickle.dumps(start)), rank)  # a fork alone would share it

    monkeypatch.setattr(worker_processes.multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setattr(worker_processes, "_serve", serve_as_spawned)


@pytest.fixture
def clips(place, alone):
    """Three good clips and a damaged one: name -> (path, text); and the codes of the good ones."""
    names = [*sorted(alone)[:3], "empty.wav"]
    return {name: (place / "corpus" / name, f"text of {name}") for name in names}


def check_clips(result, output, clips, alone, ids=None, column="text"):
    """The good clips have their own codes and texts, in whatever way they were read; the damaged one failed."""
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
