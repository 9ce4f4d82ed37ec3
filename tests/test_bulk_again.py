"""Bulk tokenization of a corpus that changes, and of a damaged output: every change is reported."""

import json
import os

import numpy as np
import pyarrow
import pytest
import soundfile
import torch
from bulk_corpus import codes_alone, codes_of, rows_of, save_model
from conftest import tiny_config
from pyarrow import parquet

from wavtokenizer_hf import WavTokenizerModel
from wavtokenizer_hf.bulk import TokenizeOptions, output, tokenize, verify
from wavtokenizer_hf.cli import main


pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [f"{number}.wav" for number in range(8)]


def write_sound(path, seed):
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.9, 0.9, 900), 24000)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    model = WavTokenizerModel(tiny_config()).eval()
    with torch.no_grad():
        latents = model.encode(torch.randn(1, 1, 64 * 16), output_latents=True).latents[0].T
        model.quantizer.codebook.embed.copy_(latents)
    return save_model(model, tmp_path_factory.mktemp("again") / "model")


@pytest.fixture
def corpus(tmp_path):
    """Return a folder with eight clips and one unreadable file."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        write_sound(folder / name, seed)
    (folder / "broken.flac").write_bytes(b"fLaC and then nothing")
    return folder


@pytest.fixture
def run(corpus, model, tmp_path):
    def run(source=None, **options):
        options = {"num_processes": 1, "part_size": 3, **options}
        return tokenize(corpus if source is None else source, model, tmp_path / "out", TokenizeOptions(**options))

    return run


def truth(corpus, model):
    model = WavTokenizerModel.from_pretrained(model).eval()
    return codes_alone(model, {path.name: path for path in corpus.iterdir() if path.suffix == ".wav"})


# ---------------------------------------------------------------------------------------------------------------------
# Sources that change
# ---------------------------------------------------------------------------------------------------------------------


def test_rows_record_size_and_modification_time_of_their_files(run, corpus, tmp_path):
    run()
    for name, row in rows_of(tmp_path / "out").items():
        status = (corpus / name).stat()
        assert (row["source_size"], row["source_mtime_ns"]) == (status.st_size, status.st_mtime_ns)


def test_changed_files_are_counted_and_tokenized_again_with_refresh(run, corpus, model, tmp_path):
    run()
    before = codes_of(tmp_path / "out")
    write_sound(corpus / "2.wav", seed=100)  # of the same size
    os.utime(corpus / "2.wav", ns=(1, 1))
    write_sound(corpus / "broken.flac", seed=101)
    result = run()
    assert sorted(result.changed) == ["2.wav", "broken.flac"] and result.done_now.num_clips == 0
    assert codes_of(tmp_path / "out") == before
    result = run(refresh=True)
    assert sorted(result.changed) == ["2.wav", "broken.flac"] and result.done_now.num_clips == 2
    got = codes_of(tmp_path / "out")
    assert got.pop("broken.flac") and got == truth(corpus, model) and got["2.wav"] != before["2.wav"]
    assert not result.failures and not (tmp_path / "out" / "failures.jsonl").read_text()
    assert verify(tmp_path / "out").problems == [] and run(refresh=True).changed == []


def test_a_kill_between_dropping_rows_and_writing_them_again_loses_nothing(run, corpus, model, tmp_path, monkeypatch):
    run()
    for seed, name in enumerate(NAMES):
        write_sound(corpus / name, seed=200 + seed)
        os.utime(corpus / name, ns=(1, 1))

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output.OutputFolder, "write_file", killed)
        with pytest.raises(KeyboardInterrupt):
            run(refresh=True)
    assert run().done_now.num_clips == len(NAMES)  # without --refresh: they no longer have rows
    assert codes_of(tmp_path / "out") == truth(corpus, model) and verify(tmp_path / "out").problems == []


def test_clips_whose_source_is_gone_are_named_and_keep_their_rows(run, corpus, tmp_path):
    run()
    (corpus / "3.wav").unlink()
    result = run(refresh=True)
    assert result.without_source == ["3.wav"] and result.changed == []
    assert "3.wav" in rows_of(tmp_path / "out")


def test_a_deleted_file_of_a_list_is_reported(run, corpus, tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"corpus/{name}\n" for name in NAMES))
    run(tmp_path / "list.txt")
    (corpus / "3.wav").unlink()
    assert run(tmp_path / "list.txt", refresh=True).without_source == ["corpus/3.wav"]


def test_each_shard_refreshes_its_own_clips(run, corpus, model, tmp_path):
    run()
    for seed, name in enumerate(NAMES):
        write_sound(corpus / name, seed=300 + seed)
        os.utime(corpus / name, ns=(1, 1))
    changed = [run(refresh=True, shard=(index, 3)).changed for index in range(3)]
    assert sorted(name for names in changed for name in names) == NAMES
    assert codes_of(tmp_path / "out") == truth(corpus, model) and verify(tmp_path / "out").problems == []


# ---------------------------------------------------------------------------------------------------------------------
# Output that is damaged
# ---------------------------------------------------------------------------------------------------------------------


def test_the_manifest_holds_size_and_checksum_of_every_file(run, tmp_path):
    run()
    files = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    parts = {path.name: path for path in (tmp_path / "out" / "data").iterdir()}
    assert files.keys() == parts.keys() and len(parts) == 3
    assert all(files[name]["size"] == path.stat().st_size for name, path in parts.items())
    assert all(files[name]["sha256"] == output.sha256_of(path) for name, path in parts.items())


def first_part(folder):
    return min((folder / "data").iterdir(), key=lambda path: parquet.read_metadata(path).num_rows == 0)


def flip_60_bytes(folder):
    path = first_part(folder)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 60] = bytes(byte ^ 0xFF for byte in content[middle : middle + 60])
    path.write_bytes(content)


def one_bit_in_the_codes(folder):
    path = first_part(folder)
    content = bytearray(path.read_bytes())
    column = parquet.read_metadata(path).row_group(0).column(1)
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)


def change_rows(change):
    """Change the rows of a file but keep its metadata, as a faulty program would."""

    def damage(folder):
        path = first_part(folder)
        with parquet.ParquetFile(path) as file:
            table = file.read()
        parquet.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)

    return damage


def with_code(code):
    def change(table):
        codes = table["audio_codes"].to_pylist()
        codes[0][0] = code
        column = pyarrow.array(codes, table.schema.field("audio_codes").type)
        return table.set_column(1, "audio_codes", column)

    return change


DAMAGES = {
    "60 bytes flipped": (flip_60_bytes, "sha256|cannot be read"),
    "one bit flipped": (one_bit_in_the_codes, "sha256"),
    "a part gone": (lambda folder: first_part(folder).unlink(), "missing, and listed"),
    "a part cut": (lambda folder: os.truncate(first_part(folder), 300), "manifest.json says"),
    "a row lost": (change_rows(lambda table: table.slice(1)), "do not fit their digest"),
    "a row twice": (
        change_rows(lambda table: pyarrow.concat_tables([table, table.slice(0, 1)])),
        "which another row has too",
    ),
    "another code": (change_rows(with_code(1)), "do not fit their digest"),
    "a code beyond the codebook": (change_rows(with_code(64)), "has the code 64, expected codes below 64"),
    "a column lost": (change_rows(lambda table: table.drop_columns(["duration"])), "has the columns"),
    "failures nested deep": (
        lambda folder: (folder / "failures.jsonl").write_text("[" * 10**5),
        "failures.jsonl: cannot be",
    ),
    "failures lost": (lambda folder: (folder / "failures.jsonl").write_text(""), "does not list the 1 clips"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_verify_finds_damage(case, run, tmp_path, capsys):
    damage, message = DAMAGES[case]
    run()
    assert main(["tokenize", "--verify", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == 0
    damage(tmp_path / "out")
    assert main(["tokenize", "--verify", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert any(word in said for word in message.split("|")), said
    assert "Traceback" not in said


def test_a_run_refuses_a_file_whose_size_differs_from_the_manifest(run, tmp_path):
    run()
    path = first_part(tmp_path / "out")
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(8) + content[4:])  # its footer is intact
    with pytest.raises(ValueError, match=rf"{path.name} is damaged .*Delete it"):
        run()


@pytest.mark.parametrize("content", ["[1]", "{", '{"settings": 3}', '{"settings": {}, "files": [1]}', "[" * 5000])
def test_a_damaged_manifest_is_refused_in_one_line(content, run, corpus, model, tmp_path, capsys):
    run()
    (tmp_path / "out" / "manifest.json").write_text(content)
    for arguments in (["--verify", str(tmp_path / "out")], [str(corpus), "-m", model, "-o", str(tmp_path / "out")]):
        assert main(["tokenize", *arguments]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("wavtokenizer tokenize: ")]
        assert len(said) == 1 and "manifest.json" in said[0]


@pytest.mark.parametrize("arguments", [["--verify", "out", "corpus"], ["corpus"], ["corpus", "-m", "x"], []])
def test_verify_takes_no_other_options_of_a_run(arguments, capsys):
    assert main(["tokenize", *arguments]) == 2
    assert "--verify OUTPUT" in capsys.readouterr().err
