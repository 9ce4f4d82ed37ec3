"""
Bulk tokenization of files gives the same rows in every mode, loses and doubles none, and reports failures with
reasons.
"""

import errno
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
import soundfile
import torch
from bulk_corpus import DAMAGED, codes_alone, codes_of, rows_of, save_model, write_corpus
from bulk_runs import (  # noqa: F401
    NUM_CLIPS,
    alone,
    forked,
    model,
    one_thread,
    run,
    workspace,
)
from conftest import REFERENCE
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from test_checkpoints import SINE_75

from wavtokenizer_hf import audio
from wavtokenizer_hf.bulk import TokenizeOptions, encoding, hub, output, sources, tokenize
from wavtokenizer_hf.bulk import run as bulk_run
from wavtokenizer_hf.bulk.progress import ClipProgress
from wavtokenizer_hf.cli import main
from wavtokenizer_hf.conversion import load_original
from wavtokenizer_hf.conversion.published import KnownAnswer, find


# ---------------------------------------------------------------------------------------------------------------------
# The same rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_seconds", [0.1, 1.7, 1000])
def test_rows_hold_the_codes_that_each_clip_gets_alone_for_every_batch_size(run, alone, tmp_path, batch_seconds):
    run(batch_seconds=batch_seconds, part_size=11)
    assert codes_of(tmp_path / "out") == alone


def test_two_processes_write_the_same_files_as_one(run, alone, tmp_path, forked):
    run(part_size=7)
    run(part_size=7, num_processes=2, num_readers=2, output=tmp_path / "two")
    assert codes_of(tmp_path / "two") == alone
    parts = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    assert len(parts) == 5 and parts == sorted(path.name for path in (tmp_path / "two" / "data").iterdir())
    for part in parts:
        assert (tmp_path / "out" / "data" / part).read_bytes() == (tmp_path / "two" / "data" / part).read_bytes()


def test_damaged_files_are_listed_with_a_reason_and_the_others_are_tokenized(run, tmp_path):
    result = run()
    lines = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    failures = {line["id"]: encoding.Failure(line["reason"], line["kind"]) for line in map(json.loads, lines)}
    assert failures.keys() == DAMAGED.keys() and failures == result.failures
    assert "Cannot read" in failures["not_sound.flac"].reason and failures["empty.wav"].kind == "empty"
    assert result.total.num_clips == NUM_CLIPS and result.total.num_failures == len(DAMAGED)


def test_a_clip_that_needs_too_much_memory_is_listed_as_a_failure(run, alone, tmp_path, monkeypatch):
    read = sources.FileSource.read

    def header_of_an_exabyte(self, locator):
        return np.zeros(2**57) if locator[0].endswith("0007.wav") else read(self, locator)

    monkeypatch.setattr(sources.FileSource, "read", header_of_an_exabyte)
    result = run()
    assert result.failures.keys() == {*DAMAGED, "b/0007.wav"} and result.failures["b/0007.wav"].kind == "memory"
    assert codes_of(tmp_path / "out") == {id: codes for id, codes in alone.items() if id != "b/0007.wav"}


def test_a_row_describes_its_clip(run, workspace, tmp_path):
    run()
    rows = rows_of(tmp_path / "out")
    for name, row in rows.items():
        info = soundfile.info(workspace / "corpus" / name)
        assert row["source_sampling_rate"] == info.samplerate and row["source_channels"] == info.channels
        assert row["num_samples"] == len(audio.load(workspace / "corpus" / name))
        assert row["duration"] == row["num_samples"] / 24000
        assert len(row["audio_codes"]) == -(-row["num_samples"] // 16)
    assert {row["source_channels"] for row in rows.values()} == {1, 2}


def test_golden_codes_are_stored_unchanged_in_the_parquet_files(folders, tmp_path):
    import formula

    for kind, seconds in (("chirp", 1.37), ("noise", 0.5), ("speechlike", 3.0)):
        (tmp_path / "golden").mkdir(exist_ok=True)
        values = formula.waveform(kind, seconds)
        soundfile.write(tmp_path / "golden" / f"{kind}_{seconds}.wav", values, 24000, subtype="FLOAT")
    tokenize(tmp_path / "golden", str(folders(75)), tmp_path / "out", TokenizeOptions(num_processes=1))
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 3
    for name, row in rows.items():
        data = np.load(REFERENCE / f"{name.removesuffix('.wav')}_75.npz")
        clear = data["margin"] >= 1e-6  # below that, float32 cannot decide which entry is nearest
        np.testing.assert_array_equal(np.array(row["audio_codes"])[clear], data["codes"][0, clear])


def codes_of_sine(answer: KnownAnswer, model: str, tmp_path) -> list[int]:
    """Return the codes of a known answer's sine, by way of a WAV file and Parquet."""
    soundfile.write(tmp_path / "sine.wav", answer.audio()[0, 0].numpy(), 24000, subtype="FLOAT")
    tokenize(tmp_path / "sine.wav", model, tmp_path / "tokens", TokenizeOptions(num_processes=1))
    (row,) = rows_of(tmp_path / "tokens").values()
    return list(row["audio_codes"])


def test_the_reference_codes_of_a_440_hertz_sine_are_stored_in_the_parquet_files(folders, tmp_path):
    codes = codes_of_sine(SINE_75, str(folders(75)), tmp_path)
    assert (len(codes), codes[:10]) == (SINE_75.num_codes, SINE_75.first_codes)


@pytest.mark.slow
def test_the_known_codes_of_published_weights_are_stored_in_the_parquet_files(tmp_path):
    try:
        model = load_original("large-unify-40")
    except OSError as error:
        pytest.skip(f"large-unify-40 is not in the cache of the Hub: {error}")
    save_model(model, tmp_path / "model")
    (answer,) = find("large-unify-40").known_answers
    codes = codes_of_sine(answer, str(tmp_path / "model"), tmp_path)
    assert (len(codes), codes[:10]) == (answer.num_codes, answer.first_codes)


def test_the_peak_level_of_the_models_feature_extractor_is_applied(workspace, model, run, tmp_path):
    shutil.copytree(workspace / "model", tmp_path / "apertus")
    config = json.loads((tmp_path / "apertus" / "preprocessor_config.json").read_text())
    (tmp_path / "apertus" / "preprocessor_config.json").write_text(json.dumps({**config, "normalize_audio": True}))
    waveform = np.random.default_rng(0).uniform(-0.1, 0.1, 2000).astype(np.float32)
    soundfile.write(tmp_path / "quiet.wav", waveform, 24000, subtype="FLOAT")
    run(tmp_path / "quiet.wav", model=str(tmp_path / "apertus"))
    scaled = waveform * np.float32(10 ** (-3 / 20) / np.abs(waveform).max().item())
    with torch.no_grad():
        expected = model.encode(torch.from_numpy(scaled)[None, None]).audio_codes[0, 0].tolist()
        unscaled = model.encode(torch.from_numpy(waveform)[None, None]).audio_codes[0, 0].tolist()
    assert codes_of(tmp_path / "out")["quiet.wav"] == expected != unscaled


@given(st.lists(st.integers(1, 1000), max_size=50), st.integers(1, 3000))
def test_micro_batches_hold_each_clip_once_within_the_budget(lengths, budget):
    batches = encoding.micro_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


def _out_of_memory_on_a_gpu():
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("fail", [_out_of_memory_on_a_gpu, lambda: torch.empty(2**46)], ids=["gpu", "cpu"])
def test_a_batch_too_large_for_the_device_is_halved_and_a_clip_too_large_fails(monkeypatch, workspace, fail):
    encoder, feature_extractor = encoding.load_encoder(str(workspace / "model"), device="cpu")
    whole = encoding._encode_batch
    waveforms = [np.random.default_rng(n).uniform(-1, 1, 100 + n).astype(np.float32) for n in range(9)]
    waveforms.append(np.zeros(5000, np.float32))

    def small_device(encoder, feature_extractor, batch):
        if sum(map(len, batch)) > 350:
            fail()
        return whole(encoder, feature_extractor, batch)

    monkeypatch.setattr(encoding, "_encode_batch", small_device)
    *codes, failed = encoding.encode(encoder, feature_extractor, waveforms, batch_seconds=1000)
    assert "too little memory" in failed.reason
    for waveform, clip_codes in zip(waveforms, codes, strict=False):
        np.testing.assert_array_equal(clip_codes, whole(encoder, feature_extractor, [waveform])[0])


def test_reading_ahead_stops_at_the_limit(workspace):
    read = []
    clip = audio.AudioClip(np.zeros(100, np.float32), 24000, 1)

    def work(job):
        read.append(job)
        return clip

    with encoding.OrderedPrefetcher(work, range(50), limit=300, num_threads=2) as ahead:
        taken = iter(ahead)
        next(taken)
        time.sleep(0.2)
        assert len(read) <= 1 + 3 + 2  # taken, waiting, and one being read by each thread
        assert len(list(taken)) == 49
    assert read == sorted(read)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "empty").mkdir() or folder / "empty", "Found no audio"),
        (lambda folder: folder / "missing.wav", "There is no file or folder"),
        (lambda folder: _written(folder / "list.csv", "name,text\na.wav,b\n"), r"columns \['name', 'text'\]"),
        (lambda folder: _written(folder / "list.jsonl", '{"path": "a.wav"\n'), "Cannot read the list"),
        (lambda folder: _written(folder / "list.csv", 'path,text\na.wav,"' + 200_000 * "x"), "Cannot read the list"),
        (lambda folder: _written(folder / "list.csv", "path,text\na.wav,b\nc.wav,d,e\n"), "Row 2 .* than the 2 of"),
        (lambda folder: _written(folder / "list.jsonl", f'{{"path": "a.wav", "n": {10**30}}}\n'), "not of one type"),
        (lambda folder: _written(folder / "list.txt", "a.wav\na.wav\n"), "names two clips"),
        (lambda folder: _written(folder / "list.csv", "path,duration\na.wav,3\n"), "Rename it in the source"),
        (lambda folder: _written(folder / "x.parquet", "no Parquet"), "Cannot read .* as Parquet"),
        (lambda folder: _written(folder / "x.tar", "no tar" * 200), "Cannot read the shard"),
        (lambda folder: _written(folder / "a.wav", "") and _written(folder / "x.tar", "") and folder, "Choose one by"),
        (lambda folder: "someone/no-such-dataset", "cannot be loaded as a dataset of the Hub"),
        (lambda folder: _splits(), "Got a DatasetDict as the source"),
    ],
)
def test_a_source_without_clips_is_refused_with_a_reason(run, tmp_path, make, message):
    folder = tmp_path / "source"
    folder.mkdir()
    with pytest.raises((ValueError, OSError), match=message):
        run(make(folder))
    assert not (tmp_path / "out").exists()


def _splits():
    import datasets

    return datasets.DatasetDict(train=datasets.Dataset.from_dict({"audio": ["a.wav"]}))


def _written(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "INSIDE"}, "lies in the source"),
        ({"batch_seconds": 0}, "batch_seconds=0"),
        ({"part_size": 0}, "part_size=0"),
        ({"num_processes": 0}, "num_processes=0"),
        ({"shard": (2, 2)}, "shard 2/2"),
        ({"engine": "magic"}, "expected one of processes, ray"),
        ({"ray_address": "auto"}, "Ray address 'auto' for the engine 'processes'"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"model": "no/such-model"}, "Cannot load the model"),
        ({"model": "/no/such/folder"}, "there is no such folder"),
        ({"split": "test"}, "Got the split 'test'"),
        ({"column": "audio"}, "Got the column 'audio'"),
        ({"output": "FILE"}, "is a file, expected the name of a folder"),
        ({"device": "cuda:77"}, "Cannot use the device"),
    ],
)
def test_invalid_runs_are_refused_before_they_begin(run, workspace, tmp_path, options, message):
    (tmp_path / "file").write_text("")
    if "output" in options:
        options = {"output": workspace / "corpus" / "tokens" if options["output"] == "INSIDE" else tmp_path / "file"}
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_the_first_bad_file_stops_the_run_on_request(run, alone, tmp_path):
    with pytest.raises(ValueError, match=r"empty\.wav: Cannot read"):
        run(on_error="fail", part_size=1)
    assert set(rows_of(tmp_path / "out")) == {id for id in alone if id < "empty.wav"}  # those before it
    assert not (tmp_path / "out" / "failures.jsonl").read_text()


def test_a_full_disk_is_reported_and_finished_files_stay_valid(run, alone, tmp_path, monkeypatch):
    write, calls = parquet.write_table, []

    def full_at_the_third(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments, **options)

    monkeypatch.setattr(parquet, "write_table", full_at_the_third)
    with pytest.raises(OSError, match=r"No space left on device.*run again to go on"):
        run(part_size=5)
    assert sorted(rows_of(tmp_path / "out")) == sorted(alone)[: 2 * 5]
    assert not list((tmp_path / "out").rglob("*.partial"))
    run(part_size=5)
    assert codes_of(tmp_path / "out") == alone


def test_a_killed_worker_is_reported_and_finished_files_stay_valid(run, alone, tmp_path, monkeypatch, forked):
    read = sources.FileSource.read

    def short_of_memory(self, locator):
        if locator[0].endswith("0021.flac"):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, locator)

    with monkeypatch.context() as patch:
        patch.setattr(sources.FileSource, "read", short_of_memory)
        with pytest.raises(ChildProcessError, match=r"killed by signal 9.*run again to go on"):
            run(part_size=1, num_processes=2)
    assert 0 < len(rows_of(tmp_path / "out")) < NUM_CLIPS
    assert multiprocessing.active_children() == []
    run(part_size=1)
    assert codes_of(tmp_path / "out") == alone


# ---------------------------------------------------------------------------------------------------------------------
# The command, progress, and the Hub
# ---------------------------------------------------------------------------------------------------------------------


def test_progress_shows_hours_of_audio_speed_failures_and_time_left():
    progress = ClipProgress(num_clips=1000, sampling_rate=24000, shown=False)
    progress.started -= 60
    progress(output.Summary(num_clips=190, num_failures=10, num_samples=2 * 3600 * 24000))
    # 200 of 1000 clips and 2 hours in 60 s: 120 hours per hour, 800 clips at 200 a minute
    assert progress.progress.line(60) == (
        "200 of 1,000 clips, about 0:04:00 left, hours of audio 2.00, hours per hour 120.0, failed 10"
    )


def test_the_command_returns_exit_codes_and_prints_json(workspace, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 3, (0.01, 0.1))
    options = ["-m", str(workspace / "model"), "-o", str(tmp_path / "out"), "--num-processes", "1", "--json"]
    assert main(["tokenize", str(corpus), *options]) == 1
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert facts["clips"] == 3 and facts["clips_failed"] == len(DAMAGED) and facts["hours_per_hour"] > 0
    assert "empty.wav: failed: empty: Cannot read" in printed.err and "3 clips failed" in printed.err
    assert main(["tokenize", str(corpus / "a"), *options]) == 2
    assert "made with source" in capsys.readouterr().err
    for name in DAMAGED:
        (corpus / name).unlink()
    assert main(["tokenize", str(corpus), *options[:3], str(tmp_path / "good"), "--shard", "0/1"]) == 0
    assert main(["tokenize", str(corpus), *options, "--shard", "1"]) == 2
    assert "expected I/N" in capsys.readouterr().err


def test_no_repository_is_created_if_the_folder_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk_run.hub, "create_repo", lambda name: pytest.fail("made a repository"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="no manifest"):
        run(push_to_hub="someone/tokens")


def test_only_finished_files_are_uploaded(run, tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append(("create", name, options["repo_type"], sorted(tmp_path.glob("out/data/*"))))

        def upload_folder(self, folder_path, allow_patterns, **options):
            files = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
            sent = [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)]
            calls.append(("upload", options["repo_id"], options["repo_type"], sorted(sent)))

        def upload_file(self, path_or_fileobj, path_in_repo, **options):
            assert path_in_repo == "README.md" and path_or_fileobj.startswith(b"---\nconfigs:\n")
            calls.append(("card", options["repo_id"], options["repo_type"]))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    run(push_to_hub="me/tokens")
    (_, *created), (_, *uploaded), card = calls
    assert card == ("card", "me/tokens", "dataset")
    assert created == ["me/tokens", "dataset", []]  # before the work
    assert uploaded[:2] == ["me/tokens", "dataset"]
    part = next((tmp_path / "out" / "data").iterdir()).name
    assert uploaded[2] == [f"data/{part}", "failures.jsonl", "manifest.json"]


def test_a_refusal_by_the_hub_is_reported_before_the_work_begins(run, tmp_path):
    with pytest.raises(OSError, match="Cannot upload to the dataset 'not a name'"):
        hub.create_repo("not a name")


@pytest.mark.parametrize("of", ["path", "content"])
@pytest.mark.parametrize("ending", ["flac", "mp3", "ogg"])
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (24000, 2), (44100, 2)])
def test_decoding_bytes_gives_the_same_samples_as_load(tmp_path, rate, channels, ending, of):
    noise = np.random.default_rng(0).uniform(-1, 1, (5001, channels))
    path = tmp_path / f"noise.{ending}"
    soundfile.write(path, noise, rate)
    clip = audio.decode(path.read_bytes() if of == "content" else path)
    np.testing.assert_array_equal(clip.audio, audio.load(path))
    assert (clip.source_sampling_rate, clip.source_channels) == (rate, channels)


# ---------------------------------------------------------------------------------------------------------------------
# Slow: all at once
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hundred_clips_give_the_same_rows_in_every_engine(workspace, model, tmp_path):
    names = write_corpus(tmp_path / "corpus", 200, (0.1, 20))
    alone = codes_alone(model, {name: tmp_path / "corpus" / name for name in names})
    ways = [{"num_processes": 1, "batch_seconds": seconds} for seconds in (1, 30, 600)]
    ways += [{"num_processes": 2}, *([{"engine": "ray"}] if importlib.util.find_spec("ray") else [])]
    for number, way in enumerate(ways):
        output = tmp_path / str(number)
        result = tokenize(tmp_path / "corpus", str(workspace / "model"), output, TokenizeOptions(part_size=25, **way))
        assert codes_of(output) == alone, way
        assert result.failures.keys() == DAMAGED.keys(), way
        assert result.done_now.num_clips == 200 and result.done_now.num_failures == len(DAMAGED), way


@pytest.mark.slow
def test_ray_gives_up_on_a_clip_that_kills_its_actors(workspace, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="pip install 'wavtokenizer_hf[ray]'")

    class Deadly(sources.FileSource):
        def read(self, locator):
            os.kill(os.getpid(), signal.SIGKILL)

    deadly = Deadly([sources.Item("a.wav", ("a.wav", {}))])
    monkeypatch.setattr(bulk_run, "open_source", lambda *arguments: deadly)
    with pytest.raises(OSError, match=r"Ray has stopped the work.*run again to go on"):
        tokenize("a.wav", str(workspace / "model"), tmp_path / "out", TokenizeOptions(engine="ray"))


@pytest.mark.slow
def test_ray_reports_what_went_wrong(workspace, tmp_path):
    pytest.importorskip("ray", reason="pip install 'wavtokenizer_hf[ray]'")
    with pytest.raises(ValueError, match="Cannot read"):
        tokenize(
            workspace / "corpus",
            str(workspace / "model"),
            tmp_path / "out",
            TokenizeOptions(engine="ray", on_error="fail"),
        )


def test_a_dry_run_reports_the_planned_work_and_writes_nothing(workspace, run, tmp_path, capsys):
    command = [
        "tokenize",
        str(workspace / "corpus"),
        "-m",
        str(workspace / "model"),
        "-o",
        str(tmp_path / "dry"),
        "--json",
    ]
    assert main([*command, "--dry-run"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "dry").exists()
    total = run().total  # the sample is the whole of such a small corpus
    assert facts["clips"] == NUM_CLIPS + len(DAMAGED) and facts["clips_failed"] == len(DAMAGED)
    assert facts["tokens"] == total.num_codes and facts["hours"] == pytest.approx(total.num_samples / 24_000 / 3600)
    assert facts["hours_of_one_process"] > 0
    # options that decide which clips can be read apply here too
    for options in (["--max-clip-seconds", "1e-6"], ["--channel", "5"]):
        assert main([*command, "--dry-run", *options]) == 2
        assert "No clip of a sample" in capsys.readouterr().err
