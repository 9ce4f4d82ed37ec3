"""Awkward files through every reader of the package: the same samples, or a refusal of the same kind."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import soxr
import torch
from bulk_corpus import rows_of, saved_tiny_model
from corpus.awkward import RATE, Case, cases
from pyarrow import parquet

from wavtokenizer_hf import WavTokenizerModel, audio, pipes
from wavtokenizer_hf.audio_errors import FAILURE_KINDS, WARNING_KINDS, failure_kind
from wavtokenizer_hf.bulk import TokenizeOptions, tokenize, tokenize_dataset
from wavtokenizer_hf.cli import main
from wavtokenizer_hf.evaluation import evaluate
from wavtokenizer_hf.find_files import utf8_name
from wavtokenizer_hf.token_file import TokenFile
from wavtokenizer_hf.training.data import open_clips, read_clip


pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {case.name: case for case in cases()}
IDS = [utf8_name(name) for name in CASES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with all files, and two more whose names are not those of audio files."""
    folder = tmp_path_factory.mktemp("awkward") / "files"
    folder.mkdir()
    for case in CASES.values():
        (folder / case.name).write_bytes(case.content)
    (folder / "notes.txt").write_text("no audio")
    (folder / "cover.jpg").write_bytes(b"no audio")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> WavTokenizerModel:
    return saved_tiny_model(tmp_path_factory.mktemp("model"))


def expected_samples(case: Case) -> np.ndarray:
    """Return the mean of the case's channels at 24 kHz."""
    samples = case.expected.mean(axis=1, dtype=np.float32) if case.expected.shape[1] > 1 else case.expected[:, 0]
    if case.rate == RATE:
        return samples
    size = -(-len(samples) * RATE // case.rate)
    samples = soxr.resample(samples, case.rate, RATE)[:size]
    return np.pad(samples, (0, size - len(samples)))


def outcome(read) -> np.ndarray | str:
    """Return the samples, or the kind of the refusal."""
    try:
        return read()
    except (ValueError, OSError) as error:
        return failure_kind(error)


# ---------------------------------------------------------------------------------------------------------------------
# Readers that give samples
# ---------------------------------------------------------------------------------------------------------------------


def by_load(folder, model):
    return {name: outcome(lambda name=name: audio.load(folder / name)) for name in CASES}


def by_blocks(folder, model):
    def read(name):
        return np.concatenate(list(audio.read_blocks(folder / name, block_seconds=0.05)))

    return {name: outcome(lambda name=name: read(name)) for name in CASES}


def by_content(folder, model):
    return {name: outcome(lambda name=name: audio.decode(CASES[name].content).audio) for name in CASES}


def by_pipe(folder, model):
    def read(name):
        stream = io.BufferedReader(io.BytesIO(CASES[name].content))
        return np.concatenate(list(pipes.read_audio(stream)))

    return {name: outcome(lambda name=name: read(name)) for name in CASES}


def by_training(folder, model):
    clips = open_clips(folder)
    read = {Path(clips[i]).name: outcome(lambda i=i: read_clip(clips, i, RATE)) for i in range(len(clips))}
    assert read.keys() == CASES.keys()
    return read


def by_training_from_rows(folder, model):
    rows = [{"audio": {"bytes": case.content, "path": None}} for case in CASES.values()]
    return {name: outcome(lambda i=i: read_clip(rows, i, RATE)) for i, name in enumerate(CASES)}


class Recorder:
    """A system under evaluation that records its input."""

    name, gives_codes = "recorder", False

    def __init__(self):
        self.waveforms = {}

    def describe(self):
        return {}

    def reconstruct(self, locator, waveform):
        self.waveforms[locator.name] = waveform
        return waveform, None


def by_evaluation(folder, model):
    recorder = Recorder()
    references = [(folder / name, Path(name)) for name in CASES]
    report = evaluate(references, [recorder], metrics=["si_sdr"])
    reasons = {result.file: result.reasons for result in report.systems[0].files}
    kinds = {name: outcome(lambda name=name: audio.load(folder / name)) for name in CASES}  # the report has no kinds
    for name in CASES.keys() - recorder.waveforms.keys():
        assert reasons[utf8_name(name)]["si_sdr"], name
    return {name: recorder.waveforms.get(name, kinds[name]) for name in CASES}


SAMPLE_READERS = [by_load, by_blocks, by_content, by_pipe, by_training, by_training_from_rows, by_evaluation]
ONLY_BY_FILES = {
    "joined.wav",  # a pipe is not read past the end of its samples
    "unfinished.wav", "no_samples.wav",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Readers that give codes
# ---------------------------------------------------------------------------------------------------------------------


def by_encode(folder, model):
    output = folder.parent / "encoded"
    lines = io.StringIO()
    stdout, sys.stdout = sys.stdout, lines
    try:
        assert main(["encode", str(folder), "-m", model.folder, "-o", str(output), "--json"]) == 1
    finally:
        sys.stdout = stdout
    found = {}
    for line in map(json.loads, lines.getvalue().splitlines()):
        name = Path(line["input"]).name
        codes = line.get("kind")
        found[name] = TokenFile.load(line["output"]).audio_codes.tolist() if codes is None else codes
    return found


def rows_and_kinds(source, model, name_of=lambda id: id, **options):
    output = Path(model.folder).parent / f"tokens-{len(os.listdir(Path(model.folder).parent))}"
    result = tokenize(source, model.folder, output, TokenizeOptions(num_processes=1, **options))
    assert result.silent == []
    found = {name_of(id): row["audio_codes"] for id, row in rows_of(output).items()}
    for line in map(json.loads, (output / "failures.jsonl").read_text().splitlines()):
        assert line["reason"] and "\n" not in line["reason"]
        found[name_of(line["id"])] = line["kind"]
    by_id = {utf8_name(name): name for name in CASES}
    return {by_id[name]: value for name, value in found.items()}


def by_tokenize_of_a_folder(folder, model):
    return rows_and_kinds(folder, model)


def by_tokenize_of_a_list(folder, model):
    path = folder.parent / "list.txt"
    path.write_text("".join(f"files/{name}\n" for name in CASES), encoding="utf-8", errors="surrogateescape")
    return rows_and_kinds(path, model, lambda id: id.removeprefix("files/"))


def by_tokenize_of_a_shard(folder, model):
    path = folder.parent / "shard.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as shard:
        for case in CASES.values():
            stem, ending = os.path.splitext(case.name)
            name = f"{stem} ({ending[1:]}){ending}"  # audio files in one folder must differ in their stems
            member = tarfile.TarInfo(name)
            member.size = len(case.content)
            shard.addfile(member, io.BytesIO(case.content))

    def name_of(id):
        stem, _, ending = id.removeprefix("shard.tar/").rpartition(" (")
        return f"{stem}.{ending[:-1]}"

    return rows_and_kinds(path, model, name_of)


def table():
    rows = [{"bytes": case.content, "path": None} for case in CASES.values()]
    return pyarrow.table({"id": IDS, "audio": rows})


def by_tokenize_of_parquet(folder, model):
    parquet.write_table(table(), folder.parent / "table.parquet", row_group_size=17)
    return rows_and_kinds(folder.parent / "table.parquet", model)


def by_tokenize_of_a_dataset(folder, model):
    return rows_and_kinds(datasets.Dataset(table()), model)


def by_tokenize_dataset(folder, model):
    rows = tokenize_dataset(datasets.Dataset(table()), model.folder)
    return {
        name: row["failure_kind"] or row["audio_codes"]
        for name, row in zip(CASES, rows.with_format(None), strict=True)
    }


CODE_READERS = [
    by_encode, by_tokenize_of_a_folder, by_tokenize_of_a_list, by_tokenize_of_a_shard, by_tokenize_of_parquet,
    by_tokenize_of_a_dataset, by_tokenize_dataset,
]  # fmt: skip


@pytest.fixture(scope="module")
def results(folder, model):
    """Return reader -> file -> samples, codes or kind of refusal. Each reader reads every file once."""
    return {reader: reader(folder, model) for reader in (*SAMPLE_READERS, *CODE_READERS)}


@pytest.mark.parametrize("name", CASES, ids=IDS)
def test_every_reader_gives_the_same_samples_or_the_same_error(name, results, model):
    case, loaded = CASES[name], results[by_load][name]
    if case.kind is not None:
        for reader, of in results.items():
            if not (reader is by_pipe and name in ONLY_BY_FILES):
                assert of[name] is not None and of[name] == case.kind, reader.__name__
        return
    assert not isinstance(loaded, str), f"refused: {loaded}"
    expected = expected_samples(case)
    assert abs(len(loaded) - len(expected)) <= case.slack * RATE / case.rate
    size = min(len(loaded), len(expected))
    np.testing.assert_allclose(loaded[:size], expected[:size], rtol=0, atol=case.tolerance)
    for reader in SAMPLE_READERS:
        np.testing.assert_array_equal(results[reader][name], loaded, err_msg=reader.__name__)
    with torch.inference_mode():
        codes = model.encode(torch.from_numpy(loaded)[None, None]).audio_codes[0, 0].tolist()
    for reader in CODE_READERS:
        assert results[reader][name] == codes, reader.__name__


def test_the_corpus_has_at_least_sixty_files_and_many_are_readable():
    assert len(CASES) >= 60 and sum(case.kind is None for case in CASES.values()) >= 40


def test_every_reported_kind_is_documented():
    assert {case.kind for case in CASES.values()} - {None} <= FAILURE_KINDS.keys()
    assert {kind for case in CASES.values() for kind in case.warnings} == WARNING_KINDS.keys()


@pytest.mark.parametrize("name", [case.name for case in CASES.values() if case.kind is None], ids=utf8_name)
def test_each_file_gets_exactly_its_expected_warnings(name):
    assert tuple(audio.decode(CASES[name].content).warnings) == CASES[name].warnings


# ---------------------------------------------------------------------------------------------------------------------
# The command over all files, and the samples against ffmpeg
# ---------------------------------------------------------------------------------------------------------------------


def decoded_by_ffmpeg(paths: list[Path], folder: Path) -> list[np.ndarray]:
    """Return the channels (T, C) of each file, float32, at its own rate, from one run of ffmpeg."""
    inputs = [word for path in paths for word in ("-i", str(path))]
    outputs = []
    for number in range(len(paths)):
        outputs += ["-map", f"{number}:a:0", "-f", "f32le", str(folder / str(number))]
    subprocess.run(["ffmpeg", "-v", "error", "-y", *inputs, *outputs], check=True, capture_output=True)
    return [np.fromfile(folder / str(number), np.float32) for number in range(len(paths))]


def test_tokenize_gives_every_file_a_row_or_a_reason(folder, model, tmp_path, capsys):
    assert main(["tokenize", str(folder), "-m", model.folder, "-o", str(tmp_path / "out"), "--json"]) == 1
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    lines = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    failures = {line["id"]: line["kind"] for line in map(json.loads, lines)}
    rows = rows_of(tmp_path / "out")
    assert rows.keys() == {utf8_name(case.name) for case in CASES.values() if case.kind is None}
    assert failures == {utf8_name(case.name): case.kind for case in CASES.values() if case.kind is not None}
    assert facts["clips"] == len(rows) and facts["clips_failed"] == len(failures) and facts["silent"] == 0
    assert " 0 silent" in captured.err
    assert facts["files_passed_over"] == 2 and "passed over 2 other files (.jpg 1, .txt 1)" in captured.err
    for case in CASES.values():
        if case.kind is None:
            assert tuple(rows[utf8_name(case.name)]["warnings"]) == case.warnings
    assert facts["clips_with_warnings"] == sum(bool(case.warnings) for case in CASES.values())


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg, which is not installed here")
def test_samples_equal_those_that_ffmpeg_decodes(folder, tmp_path):
    readable = [case for case in CASES.values() if case.kind is None and case.decoded_by_others]
    silent = {}
    for case, theirs in zip(
        readable, decoded_by_ffmpeg([folder / case.name for case in readable], tmp_path), strict=True
    ):
        ours, num_channels = native_samples(folder / case.name)
        theirs = theirs.reshape(-1, num_channels).mean(axis=1)
        size = min(len(ours), len(theirs))
        error = np.abs(ours[:size] - theirs[:size]).max() / max(1.0, np.abs(theirs).max())
        if abs(len(ours) - len(theirs)) > case.slack or error > 1e-4:
            silent[case.name] = (len(ours), len(theirs), error)
    assert len(readable) >= 40 and not silent


def native_samples(path: Path) -> tuple[np.ndarray, int]:
    """Return the samples of `audio.load` before it resamples, and the number of channels that it averages."""
    with audio.AudioReader(path, quiet=True) as reader:
        rate = reader.source_sampling_rate
    with audio.AudioReader(path, rate, quiet=True) as reader:
        return reader.read(), reader.source_channels
