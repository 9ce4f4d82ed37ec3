"""Token folders of `tokenize` as an input: what they hold, their audio, and how good it is."""

import csv
import json

import numpy as np
import pytest
import soundfile
import torch
from bulk_corpus import save_model
from test_export_onnx import tiny
from token_folders import write_token_folder

from wavtokenizer_hf import WavTokenizerModel
from wavtokenizer_hf.bulk import tokenize
from wavtokenizer_hf.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    """A tiny model, three clips, and their tokens."""
    place = tmp_path_factory.mktemp("place")
    save_model(tiny(), place / "model")
    random = np.random.default_rng(0)
    for number in range(3):
        path = place / "clips" / "ab"[number % 2] / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, random.uniform(-0.5, 0.5, 9_600 + 7 * number), 24_000, subtype="FLOAT")
    tokenize(place / "clips", str(place / "model"), place / "tokens", num_processes=1)
    return place


@torch.inference_mode()
def expected_audio(place, id: str) -> np.ndarray:
    """What the model makes of a clip, encoded and decoded in memory."""
    model = WavTokenizerModel.from_pretrained(place / "model").eval()
    samples = soundfile.read(place / "clips" / id, dtype="float32")[0]
    codes = model.encode(torch.from_numpy(samples)[None, None]).audio_codes
    return model.decode(codes).audio_values[0, 0, : len(samples)].numpy()


def test_decode_takes_a_clip_by_its_id(place, tmp_path):
    command = ["decode", str(place / "tokens"), "-m", str(place / "model"), "--id", "b/1.wav"]
    assert main([*command, "-o", str(tmp_path / "one.wav")]) == 0
    found, rate = soundfile.read(tmp_path / "one.wav")
    assert rate == 24_000
    np.testing.assert_allclose(found, expected_audio(place, "b/1.wav").clip(-1, 1), atol=1e-4)  # 16 bits


def test_decode_takes_a_whole_token_folder_and_mirrors_its_ids(place, tmp_path):
    assert main(["decode", str(place / "tokens"), "-m", str(place / "model"), "-o", str(tmp_path / "all")]) == 0
    files = {path.relative_to(tmp_path / "all").as_posix() for path in (tmp_path / "all").rglob("*.wav")}
    assert files == {"a/0.wav", "a/2.wav", "b/1.wav"}
    for id in files:
        found = soundfile.read(tmp_path / "all" / id)[0]
        np.testing.assert_allclose(found, expected_audio(place, id).clip(-1, 1), atol=1e-4)


def test_info_says_what_a_token_folder_holds(place, capsys):
    assert main(["info", str(place / "tokens"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    samples = [9_600, 9_607, 9_614]
    assert facts["num_clips"] == 3 and facts["num_tokens"] == sum(-(-size // 16) for size in samples)
    assert facts["hours"] == pytest.approx(sum(samples) / 24_000 / 3600) and facts["complete"] is True
    model = WavTokenizerModel.from_pretrained(place / "model")
    assert facts["codebook_fingerprint"] == model.codebook_fingerprint and "audio_codes" in facts["columns"]


def test_evaluate_measures_the_tokens_as_it_measures_the_model(place, tmp_path):
    options = [
        "--audio",
        str(place / "clips"),
        "-m",
        str(place / "model"),
        "--metrics",
        "mel_distance",
        "--num-workers",
        "0",
    ]
    assert main(["evaluate", *options, "-o", str(tmp_path / "model")]) == 0
    assert main(["evaluate", *options, "--tokens", str(place / "tokens"), "-o", str(tmp_path / "tokens")]) == 0
    tables = []
    for name in ("model", "tokens"):
        with (tmp_path / name / "files.csv").open(newline="") as file:
            tables.append([{**row, "system": ""} for row in csv.DictReader(file)])
    assert len(tables[0]) == 3 and float(tables[0][0]["mel_distance"]) > 0
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{tokens}", "--id", "c/9.wav", "-o", "x.wav"],
            "has no row with the id 'c/9.wav'; the first of its 3 ids is",
        ),
        (["{tokens}", "-o", "-"], "Got 3 clips for standard output"),
        (["{tokens}", "--format", "npy", "-o", "x"], "Got --format npy for a token folder"),
        (["{clips}", "--id", "a", "-o", "x"], "Got --id without a token folder"),
        (["{other}", "-o", "x"], "were made with the codebook 0123456789abcdef"),
    ],
)
def test_what_cannot_be_decoded_is_refused(place, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_token_folder(tmp_path / "other", 2)
    names = {"tokens": place / "tokens", "clips": place / "clips", "other": tmp_path / "other"}
    assert main(["decode", *(text.format(**names) for text in arguments), "-m", str(place / "model")]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_id_that_leads_out_of_the_output_is_refused(place, tmp_path, capsys):
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "tokens"
    write_token_folder(folder, 1, fingerprint=WavTokenizerModel.from_pretrained(place / "model").codebook_fingerprint)
    path = next((folder / "data").glob("*.parquet"))
    table = parquet.read_table(path)
    parquet.write_table(table.set_column(0, "id", pyarrow.array(["../../evil.wav"])), path)
    assert main(["decode", str(folder), "-m", str(place / "model"), "-o", str(tmp_path / "out" / "deep")]) == 2
    assert "leads out of the output folder" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.wav"))
