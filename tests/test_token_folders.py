"""Token folders of `tokenize` as input: their content, their audio, and its quality."""

import csv
import json
import re
import shutil

import numpy as np
import pyarrow
import pytest
import soundfile
import torch
from bulk_corpus import save_model
from pyarrow import parquet
from test_export_onnx import tiny
from token_folders import write_token_folder

from wavtokenizer_hf import WavTokenizerModel
from wavtokenizer_hf.bulk import TokenizeOptions, tokenize
from wavtokenizer_hf.cli import main


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, one_thread):
    """Return a folder with a tiny model, three clips, and their tokens."""
    workspace = tmp_path_factory.mktemp("workspace")
    save_model(tiny(), workspace / "model")
    random = np.random.default_rng(0)
    for number in range(3):
        path = workspace / "clips" / "ab"[number % 2] / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, random.uniform(-0.5, 0.5, 9_600 + 7 * number), 24_000, subtype="FLOAT")
    tokenize(workspace / "clips", str(workspace / "model"), workspace / "tokens", TokenizeOptions(num_processes=1))
    return workspace


@torch.inference_mode()
def expected_audio(workspace, id: str) -> np.ndarray:
    """Return a clip encoded and decoded by the model in memory."""
    model = WavTokenizerModel.from_pretrained(workspace / "model").eval()
    samples = soundfile.read(workspace / "clips" / id, dtype="float32")[0]
    codes = model.encode(torch.from_numpy(samples)[None, None]).audio_codes
    return model.decode(codes).audio_values[0, 0, : len(samples)].numpy()


def test_decode_accepts_a_clip_id(workspace, tmp_path):
    command = ["decode", str(workspace / "tokens"), "-m", str(workspace / "model"), "--id", "b/1.wav"]
    assert main([*command, "-o", str(tmp_path / "one.wav")]) == 0
    found, rate = soundfile.read(tmp_path / "one.wav")
    assert rate == 24_000
    np.testing.assert_allclose(found, expected_audio(workspace, "b/1.wav").clip(-1, 1), atol=1e-4)  # 16 bits


def test_decode_accepts_a_whole_token_folder_and_mirrors_its_ids(workspace, tmp_path):
    assert (
        main(["decode", str(workspace / "tokens"), "-m", str(workspace / "model"), "-o", str(tmp_path / "all")]) == 0
    )
    files = {path.relative_to(tmp_path / "all").as_posix() for path in (tmp_path / "all").rglob("*.wav")}
    assert files == {"a/0.wav", "a/2.wav", "b/1.wav"}
    for id in files:
        found = soundfile.read(tmp_path / "all" / id)[0]
        np.testing.assert_allclose(found, expected_audio(workspace, id).clip(-1, 1), atol=1e-4)


def test_info_describes_a_token_folder(workspace, capsys):
    assert main(["info", str(workspace / "tokens"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    samples = [9_600, 9_607, 9_614]
    assert facts["num_clips"] == 3 and facts["num_tokens"] == sum(-(-size // 16) for size in samples)
    assert facts["hours"] == pytest.approx(sum(samples) / 24_000 / 3600) and facts["complete"] is True
    model = WavTokenizerModel.from_pretrained(workspace / "model")
    assert facts["codebook_fingerprint"] == model.codebook_fingerprint and "audio_codes" in facts["columns"]


def test_evaluating_tokens_gives_the_same_values_as_evaluating_the_model(workspace, tmp_path):
    options = [
        "--audio",
        str(workspace / "clips"),
        "-m",
        str(workspace / "model"),
        "--metrics",
        "mel_distance",
        "--num-workers",
        "0",
    ]
    assert main(["evaluate", *options, "-o", str(tmp_path / "model")]) == 0
    assert main(["evaluate", *options, "--tokens", str(workspace / "tokens"), "-o", str(tmp_path / "tokens")]) == 0
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
def test_invalid_decode_arguments_are_refused(workspace, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_token_folder(tmp_path / "other", 2)
    names = {"tokens": workspace / "tokens", "clips": workspace / "clips", "other": tmp_path / "other"}
    assert main(["decode", *(text.format(**names) for text in arguments), "-m", str(workspace / "model")]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_a_file_of_the_token_folder_is_not_accepted_as_output(kind, workspace, tmp_path, capsys):
    shutil.copytree(workspace / "tokens", tmp_path / "tokens")
    part, target = next((tmp_path / "tokens" / "data").glob("*.parquet")), tmp_path / "x.wav"
    before = part.read_bytes()
    target.symlink_to(part) if kind == "link" else target.hardlink_to(part)
    command = [
        "decode",
        str(tmp_path / "tokens"),
        "-m",
        str(workspace / "model"),
        "--id",
        "b/1.wav",
        "-o",
        str(target),
    ]
    assert main(command) == 2
    assert "would overwrite the input" in capsys.readouterr().err and part.read_bytes() == before


def test_an_id_that_escapes_the_output_folder_is_refused(workspace, tmp_path, capsys):
    folder = tmp_path / "tokens"
    write_token_folder(
        folder, 1, fingerprint=WavTokenizerModel.from_pretrained(workspace / "model").codebook_fingerprint
    )
    path = next((folder / "data").glob("*.parquet"))
    table = parquet.read_table(path)
    parquet.write_table(table.set_column(0, "id", pyarrow.array(["../../evil.wav"])), path)
    assert main(["decode", str(folder), "-m", str(workspace / "model"), "-o", str(tmp_path / "out" / "deep")]) == 2
    assert "leads out of the output folder" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.wav"))


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def one_part(folder):
    return next((folder / "data").glob("*.parquet"))


def one_bit_in_the_codes(folder):
    content, column = (
        bytearray(one_part(folder).read_bytes()),
        parquet.read_metadata(one_part(folder)).row_group(0).column(1),
    )
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    one_part(folder).write_bytes(content)


def setting(name, value):
    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["settings"][name] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def manifest(text):
    return lambda folder: (folder / "manifest.json").write_text(text)


def column(name, value, kind=None):
    """Return a function that replaces a column by one value in every row, as a faulty program would."""

    def damage(folder):
        with parquet.ParquetFile(one_part(folder)) as file:
            table = file.read()
        values = pyarrow.array([value] * len(table), kind or table.schema.field(name).type)
        changed = table.set_column(table.column_names.index(name), name, values)
        parquet.write_table(changed.replace_schema_metadata(table.schema.metadata), one_part(folder))

    return damage


DAMAGES = {
    "one bit in the codes": (one_bit_in_the_codes, r"is damaged \(.*CRC"),
    "a part gone": (lambda folder: one_part(folder).unlink(), "is missing, and manifest.json lists it"),
    "a manifest nested deep": (manifest("[" * 200_000), "nested more than 100 deep"),
    "a manifest that is a list": (manifest("[]"), "holds a list, expected a JSON object"),
    "a manifest of nothing": (manifest("{}"), "is damaged: its settings have"),
    "an infinite hop": (manifest('{"settings": {"hop_length": 1e999}}'), "expected finite numbers"),
    "a hop of 0": (setting("hop_length", 0), "is damaged: its settings have hop_length=0"),
    "a rate of text": (setting("sampling_rate", "fast"), "is damaged: its settings have sampling_rate='fast'"),
    "a length of null": (column("num_samples", None), "rows without num_samples"),
    "ids of null": (column("id", None), "rows without id"),
    "codes of text": (column("audio_codes", "1 2", pyarrow.string()), "audio_codes of type string"),
}  # fmt: skip


READ_BY = {  # not every command reads this column
    "a length of null": ("export", "info"),
    "ids of null": ("decode", "evaluate"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_token_folder_is_refused_in_one_line_by_every_command(case, workspace, tmp_path, capsys):
    damage, message = DAMAGES[case]
    shutil.copytree(workspace / "tokens", tmp_path / "tokens")
    damage(tmp_path / "tokens")
    folder, model, clips = str(tmp_path / "tokens"), str(workspace / "model"), str(workspace / "clips")
    commands = {
        "decode": [folder, "-m", model, "-o", str(tmp_path / "decoded")],
        "evaluate": ["--audio", clips, "-m", model, "--tokens", folder, "--metrics", "si_sdr", "--num-workers", "0"],
        "export": [folder, "--format", "jsonl", "-o", str(tmp_path / "exported")],
        "info": [folder],
    }
    commands = {name: commands[name] for name in READ_BY.get(case, commands)}
    for command, arguments in commands.items():
        code = main([command, *arguments])
        said = [line for line in capsys.readouterr().err.splitlines() if re.search(message, line)]
        assert (code, bool(said)) == (1 if said and ": failed: " in said[0] else 2, True), command
    assert not list(tmp_path.rglob("*.wav")) and not list(tmp_path.rglob("tokens-*.jsonl"))


@pytest.mark.parametrize(("name", "value"), [("hop_length", 32), ("sampling_rate", 8000)])
def test_tokens_of_another_rate_are_refused(name, value, workspace, tmp_path, capsys):
    shutil.copytree(workspace / "tokens", tmp_path / "tokens")
    setting(name, value)(tmp_path / "tokens")
    line = ["-m", str(workspace / "model")]
    assert main(["decode", str(tmp_path / "tokens"), *line, "-o", str(tmp_path / "out")]) == 2
    assert f"have {name}={value}, and the model has" in capsys.readouterr().err
    assert main(["evaluate", "--audio", str(workspace / "clips"), "--tokens", str(tmp_path / "tokens"), *line]) == 2
    assert f"have {name}={value}, and the model has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (column("num_samples", 10**15), "16 samples each for num_samples=1000000000000000"),
        (column("num_samples", -5), "16 samples each for num_samples=-5"),
        (column("audio_codes", [64] * 600), "codes"),
        (column("codebook_fingerprint", "f" * 16), "the codebook ffffffffffffffff"),
    ],
)
def test_an_inconsistent_row_is_neither_decoded_nor_exported(damage, message, workspace, tmp_path, capsys):
    shutil.copytree(workspace / "tokens", tmp_path / "tokens")
    damage(tmp_path / "tokens")
    line, clips = ["-m", str(workspace / "model")], str(workspace / "clips")
    assert main(["decode", str(tmp_path / "tokens"), *line, "-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count(message) >= 3 and not list(tmp_path.rglob("*.wav"))
    evaluate = ["evaluate", "--audio", clips, "--tokens", str(tmp_path / "tokens"), *line, "--metrics", "si_sdr"]
    assert main([*evaluate, "--num-workers", "0"]) == 2
    assert message in capsys.readouterr().err
    assert main(["export", str(tmp_path / "tokens"), "--format", "jsonl", "-o", str(tmp_path / "exported")]) == 2
    assert message in capsys.readouterr().err
    if "samples" in message:
        assert main(["info", str(tmp_path / "tokens")]) == 2
        assert message in capsys.readouterr().err
