"""Exports of token folders: each consumer's own reader returns the rows, and interruptions change no byte."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import datasets
import filelock
import numpy as np
import pyarrow
import pytest
import torch
from conftest import ROOT, load_script
from language_models import byte_level, tiny_llama
from processes import used_by
from pyarrow import parquet
from token_folders import FINGERPRINT, write_token_folder
from transformers import AutoTokenizer

from wavtokenizer_hf.cli import main
from wavtokenizer_hf.export import formats, run
from wavtokenizer_hf.export.formats import JsonlFormat, LhotseFormat, MegatronFormat, WebDatasetFormat
from wavtokenizer_hf.export.run import export_tokens
from wavtokenizer_hf.export.sequences import Sequences
from wavtokenizer_hf.export.token_folder import TokenFolder
from wavtokenizer_hf.llm import AudioVocabulary, Template, TrainingRows


NUM_ROWS = 100
TEXTS = ["say hello", "to the world", "the lazy dog", "audio and text"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_level()
    AudioVocabulary.add_to(tokenizer, 64, codebook_fingerprint=FINGERPRINT)
    return tokenizer


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return AudioVocabulary.from_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def tokens_and_rows(tmp_path_factory):
    """Return a token folder, and its rows in the order of its files."""
    folder = tmp_path_factory.mktemp("tokens") / "tokens"
    columns = {
        "text": [TEXTS[number % 4] for number in range(NUM_ROWS)],
        "source_id": [f"talk {number * 7 % 10}" for number in range(NUM_ROWS)],
        "clip_num": [number * 37 % 101 for number in range(NUM_ROWS)],
    }
    rows = {row["id"]: row for row in write_token_folder(folder, NUM_ROWS, columns=columns)}
    order = [
        id for path in sorted((folder / "data").glob("*.parquet")) for id in parquet.read_table(path)["id"].to_pylist()
    ]
    assert len(order) == NUM_ROWS and order != sorted(order)
    return folder, [rows[id] for id in order]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(formats, "CHUNK_ROWS", 30)


def megatron(folder: Path, name: str = "tokens"):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="pip install megatron-core")
    return indexed.IndexedDataset(str(folder / name))


def sequences_of(folder: Path, name: str = "tokens") -> list[list[int]]:
    """Return the sequences from Megatron Core's own reader; each is a separate document."""
    dataset = megatron(folder, name)
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[number].tolist() for number in range(len(dataset))]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---------------------------------------------------------------------------------------------------------------------
# Megatron
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["audio", "text-to-audio", "audio-to-text", "both"])
def test_megatrons_reader_returns_the_templated_rows(tokens_and_rows, tokenizer, vocabulary, tmp_path, kind):
    folder, rows = tokens_and_rows
    result = export_tokens(
        folder, tmp_path / "out", MegatronFormat(Sequences(kind, vocabulary, tokenizer), loss_mask=True)
    )
    templates = {
        "audio": [Template("", "<s>{audio}</s>")],
        "text-to-audio": [Template("<s>{text}", "{audio}</s>")],
        "audio-to-text": [Template("<s>{audio}", "{text}</s>")],
        "both": [Template("<s>{text}", "{audio}</s>"), Template("<s>{audio}", "{text}</s>")],
    }[kind]
    batch = {"text": [row["text"] for row in rows], "audio_codes": [row["audio_codes"].tolist() for row in rows]}
    expected = TrainingRows(tokenizer, vocabulary, templates)(batch)
    assert sequences_of(tmp_path / "out") == expected["input_ids"]
    masks = [[int(label != -100) for label in labels] for labels in expected["labels"]]
    assert sequences_of(tmp_path / "out", "loss_mask") == masks
    if kind == "audio":  # written out by hand
        first = vocabulary.first_token_id
        span = [first + 64, *(first + code for code in rows[0]["audio_codes"].tolist()), first + 65]
        assert expected["input_ids"][0] == [tokenizer.bos_token_id, *span, tokenizer.eos_token_id]
    assert megatron(tmp_path / "out").index.dtype == np.uint16
    assert result.num_clips == NUM_ROWS and result.num_ids == sum(map(len, expected["input_ids"]))
    assert result.num_codes == sum(len(row["audio_codes"]) for row in rows)


def test_interleaved_sequences_hold_the_clips_of_a_recording_in_order(
    tokens_and_rows, tokenizer, vocabulary, tmp_path
):
    folder, rows = tokens_and_rows
    export_tokens(folder, tmp_path / "out", MegatronFormat(Sequences("interleaved", vocabulary, tokenizer)))
    expected = []
    for source in sorted({row["source_id"] for row in rows}):
        ids = []
        for row in sorted((row for row in rows if row["source_id"] == source), key=lambda row: row["clip_num"]):
            ids += [*tokenizer(row["text"], add_special_tokens=False).input_ids, *vocabulary.span(row["audio_codes"])]
        expected.append([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id])
    assert len(expected) == 10 and sequences_of(tmp_path / "out") == expected


def test_clip_numbers_from_a_csv_list_are_sorted_numerically(tokenizer, vocabulary, tmp_path):
    """Columns of a CSV list are text, and as text 10 sorts before 9."""
    columns = {"source_id": ["talk"] * 12, "clip_num": [str(number) for number in range(12)]}
    rows = write_token_folder(tmp_path / "tokens", 12, rows_per_part=5, columns=columns)
    sequences = Sequences("interleaved", vocabulary, tokenizer, text_column=None)
    export_tokens(tmp_path / "tokens", tmp_path / "out", MegatronFormat(sequences))
    (sequence,) = sequences_of(tmp_path / "out")
    expected = sorted(rows, key=lambda row: int(row["clip_num"]))
    assert sequence[1:-1] == [id for row in expected for id in vocabulary.span(row["audio_codes"])]
    columns["clip_num"][3] = "third"
    write_token_folder(tmp_path / "bad", 12, columns=columns)
    with pytest.raises(ValueError, match="Got 'third' in the column 'clip_num', expected a number"):
        export_tokens(tmp_path / "bad", tmp_path / "out of bad", MegatronFormat(sequences))
    assert not (tmp_path / "out of bad").exists()


def test_interleaved_sequences_are_cut_between_clips_at_the_length(tokens_and_rows, tokenizer, vocabulary, tmp_path):
    folder, _ = tokens_and_rows
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    export_tokens(folder, whole, MegatronFormat(Sequences("interleaved", vocabulary, tokenizer)))
    export_tokens(folder, cut, MegatronFormat(Sequences("interleaved", vocabulary, tokenizer, max_length=120)))
    sequences = sequences_of(cut)
    assert max(map(len, sequences)) <= 120 and len(sequences) > 30
    joined = [id for sequence in sequences for id in sequence[1:-1]]
    assert joined == [id for sequence in sequences_of(whole) for id in sequence[1:-1]]
    spans = [vocabulary.find_spans(sequence) for sequence in sequences]
    assert sum(len(good) for good, _ in spans) == NUM_ROWS and not any(bad for _, bad in spans)


def test_packed_sequences_hold_every_example_once_and_have_one_length(
    tokens_and_rows, tokenizer, vocabulary, tmp_path
):
    folder, rows = tokens_and_rows
    format = MegatronFormat(
        Sequences("text-to-audio", vocabulary, tokenizer, pack=128, pad_token_id=tokenizer.pad_token_id),
        loss_mask=True,
    )
    export_tokens(folder, tmp_path / "out", format)
    packs, masks = sequences_of(tmp_path / "out"), sequences_of(tmp_path / "out", "loss_mask")
    assert {len(pack) for pack in packs} == {128} and len(packs) < NUM_ROWS
    found = [tuple(span.audio_codes.tolist()) for pack in packs for span in vocabulary.find_spans(pack)[0]]
    assert sorted(found) == sorted(tuple(row["audio_codes"].tolist()) for row in rows)
    for pack, mask in zip(packs, masks, strict=True):
        assert not any(bit for id, bit in zip(pack, mask, strict=True) if id == tokenizer.pad_token_id)
        assert all(bit for id, bit in zip(pack, mask, strict=True) if vocabulary.is_audio([id])[0])


@pytest.mark.parametrize(("first", "kind"), [(65_498 - 65, "uint16"), (65_499 - 65, "int32"), (262_344, "int32")])
def test_token_ids_have_the_dtype_that_megatron_chooses(tokens_and_rows, tmp_path, first, kind):
    folder, rows = tokens_and_rows
    vocabulary = AudioVocabulary(first, 64, first + 64, first + 65)
    export_tokens(folder, tmp_path / "out", MegatronFormat(Sequences("audio", vocabulary)))
    dataset = megatron(tmp_path / "out")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    assert dataset.index.dtype == np.dtype(kind).type == indexed.DType.optimal_dtype(first + 66)
    assert sequences_of(tmp_path / "out") == [vocabulary.span(row["audio_codes"]) for row in rows]


def test_the_vocabulary_saved_with_the_files_configures_the_next_export(
    tokens_and_rows, tokenizer, vocabulary, tmp_path
):
    folder, _ = tokens_and_rows
    export_tokens(folder, tmp_path / "one", MegatronFormat(Sequences("audio", vocabulary, tokenizer)))
    written = json.loads((tmp_path / "one" / "vocabulary.json").read_text())
    assert AudioVocabulary(**written["vocabulary"]) == vocabulary
    assert written["codebook_fingerprint"] == FINGERPRINT and written["vocab_size"] == len(tokenizer)
    command = [
        "export",
        str(folder),
        "--format",
        "megatron",
        "--vocabulary",
        str(tmp_path / "one" / "vocabulary.json"),
    ]
    assert main([*command, "-o", str(tmp_path / "two")]) == 0
    inner = [sequence[1:-1] for sequence in sequences_of(tmp_path / "one")]  # no tokenizer, so no BOS and EOS
    assert sequences_of(tmp_path / "two") == inner


def test_a_megatron_file_is_read_back_in_a_training_loop(
    tokens_and_rows, tokenizer, vocabulary, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="pip install megatron-core")
    loop = load_script(ROOT / "examples" / "audio_lm" / "megatron_loop.py")
    folder, rows = tokens_and_rows
    torch.manual_seed(0)
    for each in (tokenizer, tiny_llama(len(tokenizer))):
        each.save_pretrained(tmp_path / "llm")
    sequences = Sequences("text-to-audio", vocabulary, tokenizer)
    export_tokens(folder, tmp_path / "out", MegatronFormat(sequences, loss_mask=True))
    batch = {"text": [row["text"] for row in rows], "audio_codes": [row["audio_codes"].tolist() for row in rows]}
    expected = TrainingRows(tokenizer, vocabulary, sequences.templates)(batch)
    found = loop.MegatronRows(tmp_path / "out")
    for name in ("input_ids", "labels"):
        assert [row[name].tolist() for row in (found[index] for index in range(len(found)))] == expected[name]
    command = f"loop --language_model {tmp_path}/llm --tokens {tmp_path}/out --output {tmp_path}/trained"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--steps", "10", "--learning_rate", "0.01"])
    loop.main()
    first, last = map(float, re.findall(r"\d\.\d+", capsys.readouterr().out))
    assert last < first - 0.5
    AudioVocabulary.from_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "trained"))


def test_the_command_line_writes_what_the_function_writes(tokens_and_rows, tokenizer, vocabulary, tmp_path, capsys):
    folder, _ = tokens_and_rows
    tokenizer.save_pretrained(tmp_path / "llm")
    command = ["export", str(folder), "--format", "megatron", "--tokenizer", str(tmp_path / "llm"), "--json"]
    command += ["--sequences", "both", "--loss-mask"]
    assert main([*command, "-o", str(tmp_path / "out")]) == 0
    facts = json.loads(capsys.readouterr().out)
    export_tokens(
        folder, tmp_path / "expected", MegatronFormat(Sequences("both", vocabulary, tokenizer), loss_mask=True)
    )
    for name in ("tokens.bin", "tokens.idx", "loss_mask.bin", "loss_mask.idx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert facts["sequences"] == 2 * NUM_ROWS
    own = ["--prompt", "Say: {text}", "--response", "{audio}"]
    assert main([*command[:7], *own, "-o", str(tmp_path / "own")]) == 0
    assert len(sequences_of(tmp_path / "own")) == NUM_ROWS


# ---------------------------------------------------------------------------------------------------------------------
# WebDataset, JSON lines, Lhotse
# ---------------------------------------------------------------------------------------------------------------------


def test_webdatasets_reader_returns_the_rows(tokens_and_rows, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")
    folder, rows = tokens_and_rows
    export_tokens(folder, tmp_path / "out", WebDatasetFormat(shard_size=50_000))
    shards = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    assert len(shards) > 2 and max(Path(shard).stat().st_size for shard in shards) < 70_000
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode())
    assert len({sample["__key__"] for sample in samples}) == NUM_ROWS
    for sample, row in zip(samples, rows, strict=True):
        assert sample["codes.npy"].dtype == np.uint16
        np.testing.assert_array_equal(sample["codes.npy"], row["audio_codes"])
        for name in ("id", "text", "source_id", "num_samples"):
            assert sample["json"][name] == row[name]
        assert sample["json"]["codebook_fingerprint"] == FINGERPRINT and sample["json"]["hop_length"] == 16
    with tarfile.open(shards[0]) as tar:
        assert {(member.mtime, member.uid) for member in tar} == {(0, 0)}


def test_json_lines_hold_the_rows(tokens_and_rows, tmp_path):
    folder, rows = tokens_and_rows
    export_tokens(folder, tmp_path / "out", JsonlFormat(shard_size=20_000))
    files = sorted(str(path) for path in (tmp_path / "out").glob("*.jsonl"))
    assert len(files) > 1
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    for line, row in zip(loaded, rows, strict=True):
        assert line["audio_codes"] == row["audio_codes"].tolist() and line["id"] == row["id"]
        assert line["text"] == row["text"] and line["sampling_rate"] == 24_000


def test_lhotses_reader_returns_the_rows(tokens_and_rows, tmp_path):
    lhotse = pytest.importorskip("lhotse", reason="pip install lhotse")
    folder, rows = tokens_and_rows
    export_tokens(folder, tmp_path / "out", LhotseFormat(shard_size=100_000))
    assert len(list((tmp_path / "out" / "shar").glob("cuts.*.jsonl.gz"))) > 1
    cuts = list(lhotse.CutSet.from_shar(in_dir=tmp_path / "out" / "shar"))
    for cut, row in zip(cuts, rows, strict=True):
        codes = cut.load_audio_codes()
        assert codes.dtype == np.uint16 and cut.id == row["id"] and cut.supervisions[0].text == row["text"]
        np.testing.assert_array_equal(codes, row["audio_codes"])
        assert cut.duration == pytest.approx(row["num_samples"] / 24_000)
        assert cut.audio_codes.frame_shift == 16 / 24_000 and cut.custom["source_id"] == row["source_id"]


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------------------------------


def every_format(tokenizer, vocabulary) -> dict:
    return {
        "megatron": MegatronFormat(Sequences("both", vocabulary, tokenizer), loss_mask=True),
        "webdataset": WebDatasetFormat(shard_size=20_000),
        "jsonl": JsonlFormat(shard_size=10_000),
    }


@pytest.mark.parametrize("name", ["megatron", "webdataset", "jsonl"])
def test_an_export_interrupted_at_every_write_has_the_same_bytes(
    tokens_and_rows, tokenizer, vocabulary, tmp_path, monkeypatch, name
):
    folder, _ = tokens_and_rows
    format = every_format(tokenizer, vocabulary)[name]
    export_tokens(folder, tmp_path / "whole", format)
    expected = files_of(tmp_path / "whole")
    assert not any(file.startswith(".") for file in expected)
    real = os.replace
    for attempt in itertools.count(1):  # the first run ends before its first rename, the second before its second
        left = iter(range(attempt - 1))

        def interrupt(*arguments, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(*arguments)

        monkeypatch.setattr(os, "replace", interrupt)
        try:
            export_tokens(folder, tmp_path / "out", format)
            break
        except KeyboardInterrupt:
            pass
    monkeypatch.setattr(os, "replace", real)
    assert attempt > 4
    assert files_of(tmp_path / "out") == expected
    before = (tmp_path / "out" / "export.json").stat().st_mtime_ns
    export_tokens(folder, tmp_path / "out", format)  # the next run has nothing to do
    assert (tmp_path / "out" / "export.json").stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Return a folder with a token folder of 100,000 rows and a vocabulary for it."""
    workspace = tmp_path_factory.mktemp("large")
    write_token_folder(workspace / "tokens", 100_000, (75, 675), 2000, 4096, 320)
    (workspace / "vocabulary.json").write_text(json.dumps({"first_token_id": 300, "codebook_size": 4096}))
    return workspace


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads times and memory as Linux gives them")
@pytest.mark.parametrize("num_processes", [1, 2])
def test_100_000_rows_export_in_a_minute_and_a_gigabyte_and_survive_five_kills(large, tmp_path, num_processes):
    """The minute is processor time, since other programs may slow down the machine."""
    command = [sys.executable, "-m", "wavtokenizer_hf", "export", large / "tokens", "--format", "megatron"]
    command += ["--vocabulary", large / "vocabulary.json", "--num-processes", str(num_processes)]
    process = subprocess.Popen([*command, "-o", tmp_path / "whole"])
    seconds, memory = used_by(process)
    print(f"{num_processes} processes: {seconds:.1f} s of processors, {memory:.0f} MB")
    assert process.returncode == 0 and seconds / num_processes < 60 and memory < 1000
    for kill in itertools.count():
        process = subprocess.Popen([*command, "-o", tmp_path / "out"])
        finished = len(list((tmp_path / "out" / ".parts").glob("0*.json")))
        while process.poll() is None and len(list((tmp_path / "out" / ".parts").glob("0*.json"))) <= finished:
            time.sleep(0.01)
        if kill == 5 or process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kill == 5 and process.wait() == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tokens_and_rows, tokenizer, vocabulary, tmp_path):
    folder, _ = tokens_and_rows
    for name, format in every_format(tokenizer, vocabulary).items():
        export_tokens(folder, tmp_path / name / "one", format)
        export_tokens(folder, tmp_path / name / "two", format, num_processes=2)
        assert files_of(tmp_path / name / "one") == files_of(tmp_path / name / "two")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input and dry runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tokens_and_rows, tmp_path):
    """Return a copy of the folder in which one row has no codes, and the id of that row."""
    folder, _ = tokens_and_rows
    shutil.copytree(folder, tmp_path / "damaged")
    path = sorted((tmp_path / "damaged" / "data").glob("*.parquet"))[0]
    table = parquet.read_table(path)
    codes = table["audio_codes"].to_pylist()
    codes[3] = None
    column = pyarrow.array(codes, table.schema.field("audio_codes").type)
    parquet.write_table(table.set_column(table.column_names.index("audio_codes"), "audio_codes", column), path)
    return tmp_path / "damaged", table["id"][3].as_py()


@pytest.mark.parametrize("name", ["megatron", "webdataset", "jsonl"])
def test_a_row_without_codes_is_named_or_listed(damaged, tokenizer, vocabulary, tmp_path, name):
    folder, id = damaged
    format = every_format(tokenizer, vocabulary)[name]
    with pytest.raises(ValueError, match=f"The row '{id}' cannot be exported: it has no codes"):
        export_tokens(folder, tmp_path / "out", format)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".parts"]
    result = export_tokens(folder, tmp_path / "skip", format, on_error="skip")
    assert (result.num_clips, result.num_skipped) == (NUM_ROWS - 1, 1)
    assert json.loads((tmp_path / "skip" / "skipped.jsonl").read_text()) == {"id": id, "reason": "it has no codes"}


def test_a_row_that_is_longer_than_the_sequence_is_named_or_listed(tokens_and_rows, tokenizer, vocabulary, tmp_path):
    folder, rows = tokens_and_rows
    for number, limit in enumerate(({"max_length": 50}, {"pack": 50, "pad_token_id": 0})):
        format = MegatronFormat(Sequences("audio", vocabulary, tokenizer, **limit))
        with pytest.raises(ValueError, match=r"it makes a sequence of \d+ ids, and 50 is the limit"):
            export_tokens(folder, tmp_path / f"fail {number}", format)
        result = export_tokens(folder, tmp_path / f"skip {number}", format, on_error="skip")
        assert result.num_skipped == sum(len(row["audio_codes"]) + 4 > 50 for row in rows) > 0


def test_codes_of_another_codebook_are_refused(tokens_and_rows, tokenizer, vocabulary, tmp_path):
    folder, _ = tokens_and_rows
    other = tmp_path / "other"
    write_token_folder(other, 5, fingerprint="f" * 16, columns={"text": TEXTS + TEXTS})
    with pytest.raises(ValueError, match="Got codes of the codebook ffffffffffffffff"):
        export_tokens(other, tmp_path / "out", MegatronFormat(Sequences("audio", vocabulary, tokenizer)))
    with pytest.raises(ValueError, match=r"for 32 codes, and .* a codebook of 64"):
        export_tokens(folder, tmp_path / "out", MegatronFormat(Sequences("audio", AudioVocabulary(0, 32))))
    path = next((other / "data").glob("*.parquet"))  # a file of another run in the folder
    (folder_copy := tmp_path / "mixed").mkdir()
    shutil.copytree(folder, folder_copy, dirs_exist_ok=True)
    shutil.copy(path, folder_copy / "data" / "zzz.parquet")
    with pytest.raises(ValueError, match="has rows of the codebook ffffffffffffffff"):
        export_tokens(folder_copy, tmp_path / "out", JsonlFormat())
    assert not list(tmp_path.glob("out/tokens*"))


def test_a_dtype_too_small_for_the_vocabulary_is_refused(tokens_and_rows):
    with pytest.raises(ValueError, match="ids of type uint16, which end at 65535, and the vocabulary needs 65536"):
        MegatronFormat(Sequences("audio", AudioVocabulary(65_536 - 63, 64)), ids_type="uint16")


def test_an_output_folder_with_unrelated_files_is_refused(tokens_and_rows, vocabulary, tokenizer, tmp_path, capsys):
    folder, _ = tokens_and_rows
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis\.txt, which is not of this command"):
        export_tokens(folder, tmp_path / "mine", JsonlFormat())
    with pytest.raises(ValueError, match="is a file"):
        export_tokens(folder, tmp_path / "mine" / "thesis.txt", JsonlFormat())
    export_tokens(folder, tmp_path / "out", JsonlFormat())
    before = files_of(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds an export with other settings \(format\.name"):
        export_tokens(folder, tmp_path / "out", WebDatasetFormat())
    with pytest.raises(ValueError, match=r"other settings \(format\.shard_size\)"):
        export_tokens(folder, tmp_path / "out", JsonlFormat(shard_size=5))
    assert files_of(tmp_path / "out") == before and os.listdir(tmp_path / "mine") == ["thesis.txt"]
    with pytest.raises(ValueError, match="is not a token folder"):
        export_tokens(tmp_path / "mine", tmp_path / "new", JsonlFormat())
    assert main(["export", str(tmp_path / "mine"), "--format", "jsonl", "-o", str(tmp_path / "new")]) == 2
    assert "is not a token folder" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_invalid_sequence_options_are_refused(tokens_and_rows, tokenizer, vocabulary, tmp_path):
    folder, _ = tokens_and_rows
    with pytest.raises(ValueError, match=r"hold text\. Name the tokenizer"):
        Sequences("text-to-audio", vocabulary)
    with pytest.raises(ValueError, match="expected one of audio, text-to-audio"):
        Sequences("video", vocabulary)
    with pytest.raises(ValueError, match="Name one, or a tokenizer"):
        Sequences("audio", vocabulary, pack=10)
    sequences = Sequences("text-to-audio", vocabulary, tokenizer, "transcript")
    with pytest.raises(ValueError, match="has no column 'transcript', but id, audio_codes"):
        export_tokens(folder, tmp_path / "out", MegatronFormat(sequences))


def test_a_dry_run_reports_the_planned_work_and_writes_nothing(tokens_and_rows, tokenizer, tmp_path, capsys):
    folder, rows = tokens_and_rows
    tokenizer.save_pretrained(tmp_path / "llm")
    command = ["export", str(folder), "--format", "megatron", "--tokenizer", str(tmp_path / "llm"), "--json"]
    command += ["-o", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["clips"] == NUM_ROWS and facts["codes"] == sum(len(row["audio_codes"]) for row in rows)
    assert facts["seconds_of_one_process"] >= 0 and not (tmp_path / "out").exists()
    assert main(command) == 0
    real = json.loads(capsys.readouterr().out)
    for name in ("clips", "hours", "codes"):
        assert facts[name] == real[name]
    assert facts["ids"] == pytest.approx(real["ids"], rel=0.3) and facts["mib"] == pytest.approx(real["mib"], rel=0.5)


def test_rows_are_exported_in_the_requested_order(tokens_and_rows):
    folder, rows = tokens_and_rows
    tokens = TokenFolder(folder)
    numbers = np.random.default_rng(0).permutation(NUM_ROWS)[:50]
    found = tokens.read(tokens.index(), numbers, ["id", "audio_codes"])
    assert [row["id"] for row in found] == [rows[number]["id"] for number in numbers]
    assert all(
        np.array_equal(row["audio_codes"], rows[n]["audio_codes"]) for row, n in zip(found, numbers, strict=True)
    )
    assert [row["id"] for row in tokens.iter_rows(["id"])] == [row["id"] for row in rows]


def test_a_concurrent_export_to_the_same_folder_is_refused(tokens_and_rows, tmp_path):
    folder, _ = tokens_and_rows
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out" / ".lock"), pytest.raises(OSError, match="Another process is exporting"):
        export_tokens(folder, tmp_path / "out", JsonlFormat())
    assert run.EXPORT not in os.listdir(tmp_path / "out")


def test_a_file_system_without_fsync_can_be_exported_to(tokens_and_rows, tmp_path, monkeypatch):
    def no_fsync(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", no_fsync)
    assert export_tokens(tokens_and_rows[0], tmp_path / "out", JsonlFormat()).num_clips == NUM_ROWS


@pytest.mark.parametrize("content", ["[" * 200_000, "[]", "{}", '{"settings": {}, "totals": 3}', " " * 2**21])
def test_a_damaged_export_or_vocabulary_is_refused_in_one_line(content, tokens_and_rows, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    for path in (tmp_path / "out" / "export.json", tmp_path / "vocabulary.json"):
        path.write_text(content)
    line = ["export", str(tokens_and_rows[0]), "-o", str(tmp_path / "out"), "--format"]
    for format in (["jsonl"], ["megatron", "--vocabulary", str(tmp_path / "vocabulary.json")]):
        assert main([*line, *format]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert (".json" in said) and len(said) < 800
