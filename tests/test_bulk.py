"""Bulk tokenization of files: the same rows however they are made, nothing lost or doubled, failures with reasons."""

import errno
import importlib.util
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pyarrow
import pytest
import soundfile
import torch
from bulk_corpus import DAMAGED, codes_alone, codes_of, rows_of, save_model, train_encoder, write_corpus
from conftest import REFERENCE, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from test_checkpoints import SINE_75
from tqdm.auto import tqdm

from wavtokenizer_hf import WavTokenizerModel, audio, worker_processes
from wavtokenizer_hf.bulk import TokenizeOptions, encoding, hub, output, sources, tokenize
from wavtokenizer_hf.bulk import run as bulk_run
from wavtokenizer_hf.bulk.progress import ClipProgress
from wavtokenizer_hf.cli import main
from wavtokenizer_hf.conversion import load_original
from wavtokenizer_hf.conversion.published import KnownAnswer, find


NUM_CLIPS = 26


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny layers gain nothing from threads; and processes that are forked here must not wait for any."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, another of the same shape, and a corpus."""
    place = tmp_path_factory.mktemp("bulk")
    for seed, name in ((0, "model"), (1, "other")):
        torch.manual_seed(seed)
        model = WavTokenizerModel(tiny_config()).eval()
        with torch.no_grad():
            latents = model.encode(torch.randn(1, 1, 64 * 16), output_latents=True).latents[0].T
            model.quantizer.codebook.embed.copy_(latents)
        save_model(model, place / name)
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


# ---------------------------------------------------------------------------------------------------------------------
# The same rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_seconds", [0.1, 1.7, 1000])
def test_rows_hold_the_codes_that_each_clip_gets_alone_whatever_the_batches(run, alone, tmp_path, batch_seconds):
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


def test_damaged_files_are_listed_with_a_reason_and_the_others_are_done(run, tmp_path):
    result = run()
    lines = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    failures = {line["id"]: encoding.Failure(line["reason"], line["kind"]) for line in map(json.loads, lines)}
    assert failures.keys() == DAMAGED.keys() and failures == result.failures
    assert "Cannot read" in failures["not_sound.flac"].reason and failures["empty.wav"].kind == "empty"
    assert result.total.num_clips == NUM_CLIPS and result.total.num_failures == len(DAMAGED)


def test_a_clip_for_which_there_is_too_little_memory_is_listed_too(run, alone, tmp_path, monkeypatch):
    read = sources.FileSource.read

    def header_of_an_exabyte(self, place):
        return np.zeros(2**57) if place[0].endswith("0007.wav") else read(self, place)

    monkeypatch.setattr(sources.FileSource, "read", header_of_an_exabyte)
    result = run()
    assert result.failures.keys() == {*DAMAGED, "b/0007.wav"} and result.failures["b/0007.wav"].kind == "memory"
    assert codes_of(tmp_path / "out") == {id: codes for id, codes in alone.items() if id != "b/0007.wav"}


def test_a_row_says_what_the_clip_was(run, place, tmp_path):
    run()
    rows = rows_of(tmp_path / "out")
    for name, row in rows.items():
        info = soundfile.info(place / "corpus" / name)
        assert row["source_sampling_rate"] == info.samplerate and row["source_channels"] == info.channels
        assert row["num_samples"] == len(audio.load(place / "corpus" / name))
        assert row["duration"] == row["num_samples"] / 24000
        assert len(row["audio_codes"]) == -(-row["num_samples"] // 16)
    assert {row["source_channels"] for row in rows.values()} == {1, 2}


def test_golden_codes_come_out_of_the_parquet_unchanged(folders, tmp_path):
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
        clear = data["margin"] >= 1e-6  # below that, float32 does not tell which entry is nearest
        np.testing.assert_array_equal(np.array(row["audio_codes"])[clear], data["codes"][0, clear])


def codes_of_sine(answer: KnownAnswer, model: str, tmp_path) -> list[int]:
    """The codes of a known answer's sine, by way of a WAV file and Parquet."""
    soundfile.write(tmp_path / "sine.wav", answer.audio()[0, 0].numpy(), 24000, subtype="FLOAT")
    tokenize(tmp_path / "sine.wav", model, tmp_path / "tokens", TokenizeOptions(num_processes=1))
    (row,) = rows_of(tmp_path / "tokens").values()
    return list(row["audio_codes"])


def test_the_originals_codes_of_a_sine_of_440_hertz_come_out_of_the_parquet(folders, tmp_path):
    codes = codes_of_sine(SINE_75, str(folders(75)), tmp_path)
    assert (len(codes), codes[:10]) == (SINE_75.num_codes, SINE_75.first_codes)


@pytest.mark.slow
def test_the_known_answer_of_published_weights_comes_out_of_the_parquet(tmp_path):
    try:
        model = load_original("large-unify-40")
    except OSError as error:
        pytest.skip(f"large-unify-40 is not in the cache of the Hub: {error}")
    save_model(model, tmp_path / "model")
    (answer,) = find("large-unify-40").known_answers
    codes = codes_of_sine(answer, str(tmp_path / "model"), tmp_path)
    assert (len(codes), codes[:10]) == (answer.num_codes, answer.first_codes)


def test_the_peak_level_that_the_model_asks_for_is_kept(place, model, run, tmp_path):
    shutil.copytree(place / "model", tmp_path / "apertus")
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
def test_micro_batches_hold_each_clip_once_and_stay_within_the_budget(lengths, budget):
    batches = encoding.micro_batches(lengths, budget)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= budget


def _out_of_memory_on_a_gpu():
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("fail", [_out_of_memory_on_a_gpu, lambda: torch.empty(2**46)], ids=["gpu", "cpu"])
def test_a_batch_too_large_for_the_device_is_halved_and_a_clip_too_large_fails(monkeypatch, place, fail):
    encoder, feature_extractor = encoding.load_encoder(str(place / "model"), device="cpu")
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


def test_reading_ahead_stops_at_the_limit(place):
    read = []
    sound = audio.Sound(np.zeros(100, np.float32), 24000, 1)

    def work(job):
        read.append(job)
        return sound

    with encoding.OrderedPrefetcher(work, range(50), limit=300, num_threads=2) as ahead:
        taken = iter(ahead)
        next(taken)
        time.sleep(0.2)
        assert len(read) <= 1 + 3 + 2  # taken, waiting, and one in the hands of each thread
        assert len(list(taken)) == 49
    assert read == sorted(read)


# ---------------------------------------------------------------------------------------------------------------------
# Again, and again
# ---------------------------------------------------------------------------------------------------------------------


def _num_parts(folder):
    return len(list(folder.glob("data/*.parquet")))


def _run_on_a_slow_disk(arguments):
    # a fork shares the lock of tqdm, and one that is killed while it holds it would hold it for all others
    tqdm.set_lock(threading.RLock())
    sync = os.fsync
    output.os.fsync = lambda descriptor: (time.sleep(0.015), sync(descriptor))
    torch.set_num_threads(1)
    tokenize(*arguments, TokenizeOptions(num_processes=1, part_size=1, num_readers=1, batch_seconds=2))


def test_killed_at_random_moments_and_run_again_gives_what_an_uninterrupted_run_gives(place, run, tmp_path, alone):
    run(output=tmp_path / "whole", part_size=1)
    arguments = (place / "corpus", str(place / "model"), tmp_path / "killed")
    moments, kills = random.Random(0), 0
    while kills < 12:
        before = _num_parts(tmp_path / "killed")
        process = multiprocessing.get_context("fork").Process(target=_run_on_a_slow_disk, args=(arguments,))
        process.start()
        deadline = time.monotonic() + 60
        while kills % 2 and process.is_alive() and _num_parts(tmp_path / "killed") == before:  # else some get nowhere
            assert time.monotonic() < deadline, "no part in 60 s"
            time.sleep(0.001)
        process.join(timeout=moments.uniform(0, 0.05))
        if not process.is_alive():
            assert process.exitcode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert kills >= 10 and _num_parts(tmp_path / "killed") >= 5  # it got somewhere in between
    run(output=tmp_path / "killed", part_size=1)
    for part in (tmp_path / "whole" / "data").iterdir():
        assert part.read_bytes() == (tmp_path / "killed" / "data" / part.name).read_bytes()
    assert codes_of(tmp_path / "killed") == alone
    for name in ("failures.jsonl", "README.md", "manifest.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert not list((tmp_path / "killed").rglob("*.partial"))


def test_what_is_complete_is_left_alone_and_what_was_added_is_done(place, run, tmp_path):
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 6, (0.01, 0.1))
    run(corpus, part_size=4)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    shutil.copy(corpus / "a" / "0000.wav", corpus / "a" / "0000_again.wav")
    result = run(corpus, part_size=3)
    assert result.done_now.num_clips == 1 and result.total.num_clips == 7
    assert {path: path.stat().st_mtime_ns for path in before} == before
    codes = codes_of(tmp_path / "out")
    assert codes["a/0000.wav"] == codes["a/0000_again.wav"]


def test_failed_clips_are_tried_again_when_asked_to(run, tmp_path):
    corpus = tmp_path / "corpus"
    (good,) = write_corpus(corpus, 1, (0.01, 0.1))
    run(corpus)
    shutil.copy(corpus / good, corpus / "empty.wav")
    assert run(corpus).failures.keys() == DAMAGED.keys()
    assert run(corpus, retry_failed=True).failures.keys() == DAMAGED.keys() - {"empty.wav"}
    assert codes_of(tmp_path / "out").keys() == {good, "empty.wav"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["complete"] and manifest["num_clips"] == 2 and manifest["num_failures"] == 2


def test_shards_share_a_folder_and_make_each_clip_once(run, alone, tmp_path):
    for index in range(3):
        result = run(shard=(index, 3), part_size=5)
        assert 0 < result.done_now.num_clips < NUM_CLIPS
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["complete"] == (index == 2)
    assert codes_of(tmp_path / "out") == alone


@pytest.mark.parametrize(("held", "asked"), [((0, 1), (0, 1)), ((1, 2), (0, 3))])
def test_a_folder_at_which_another_run_works_on_the_same_clips_is_refused(run, tmp_path, held, asked):
    from filelock import FileLock

    (tmp_path / "out" / "data").mkdir(parents=True)
    with (
        FileLock(tmp_path / "out" / f".shard-{held[0]}-of-{held[1]}.lock"),
        pytest.raises(OSError, match="process is at work"),
    ):
        run(shard=asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model", "made with model .*model'.*other"),
        ("codebook", "codebook_fingerprint"),
        ("encoder", "encoder_fingerprint"),
        ("source", "made with source"),
    ],
)
def test_a_folder_of_another_run_is_refused(place, run, tmp_path, change, message):
    shutil.copytree(place / "model", tmp_path / "model")
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 2, (0.01, 0.1))
    run(corpus, model=str(tmp_path / "model"))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    options = {"source": corpus, "model": str(tmp_path / "model")}
    if change == "model":
        options["model"] = str(place / "other")
    elif change == "codebook":
        shutil.rmtree(tmp_path / "model")
        shutil.copytree(place / "other", tmp_path / "model")
    elif change == "encoder":
        train_encoder(tmp_path / "model")
    else:
        options["source"] = str(corpus / "a")
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert {path: path.read_bytes() for path in before} == before


def test_another_source_of_the_same_name_is_refused(place, run, tmp_path, monkeypatch):
    for folder in ("one", "other"):
        write_corpus(tmp_path / folder / "corpus", 2, (0.01, 0.1))
    monkeypatch.chdir(tmp_path / "one")
    run("corpus")
    assert run("./corpus/").done_now.num_clips == run(tmp_path / "one" / "corpus").done_now.num_clips == 0
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(ValueError, match=r"made with source 'corpus .*, and this run has 'corpus "):
        run("corpus")


def test_a_folder_with_other_things_in_it_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex and no manifest"):
        run()
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


def test_a_folder_is_the_same_with_a_slash_at_its_end(place, run, tmp_path):
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 1, (0.01, 0.1))
    run(f"{corpus}/", model=f"{place / 'model'}/")
    assert run(corpus).done_now.num_clips == 0


def test_half_written_files_of_a_killed_run_are_removed(run, tmp_path):
    (tmp_path / "out" / "data").mkdir(parents=True)
    for name in ("manifest.json", "data/part-0.parquet"):
        path = tmp_path / "out" / name
        path.with_name(f".shard-0-of-1-host-1-{path.name}.partial").write_text("half")
    run()
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_strange_parquet_beside_the_parts_is_named_and_not_called_damaged(run, tmp_path):
    run()
    parquet.write_table(pyarrow.table({"id": ["x"]}), tmp_path / "out" / "data" / "mine.parquet")
    with pytest.raises(ValueError, match=r"mine\.parquet is not of this command\. Move it away"):
        run()


def test_a_damaged_part_is_named(run, tmp_path):
    run()
    part = next((tmp_path / "out" / "data").iterdir())
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{part.name} is damaged .* Delete it"):
        run()
    part.unlink()
    assert run().done_now.num_clips == NUM_CLIPS


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl"])
def test_a_list_file_is_read_with_its_further_columns(run, clips, alone, tmp_path, place, ending):
    os.symlink(place / "corpus", tmp_path / "sounds")
    rows = [(f"sounds/{name}", text, index) for index, (name, (_, text)) in enumerate(clips.items())]
    lines = {
        "txt": [path for path, _, _ in rows],
        "csv": ["path,text,number", *(f"{path},{text},{number}" for path, text, number in rows)],
        "jsonl": [json.dumps({"path": path, "text": text, "number": number}) for path, text, number in rows],
    }[ending]
    # spreadsheets write a mark of UTF-8 before the first column's name
    (tmp_path / f"list.{ending}").write_text("\n".join(lines) + "\n", "utf-8-sig" if ending == "csv" else "utf-8")
    result = run(tmp_path / f"list.{ending}")
    ids = {name: f"sounds/{name}" for name in clips}
    check_clips(result, tmp_path / "out", clips, alone, ids, None if ending == "txt" else "text")
    if ending == "jsonl":
        assert sorted(row["number"] for row in rows_of(tmp_path / "out").values()) == [0, 1, 2]


def test_a_glob_takes_what_it_names(run, alone, place, tmp_path):
    run(str(place / "corpus" / "a" / "*.flac"))
    expected = {name[2:]: codes for name, codes in alone.items() if name.startswith("a/") and name.endswith(".flac")}
    assert codes_of(tmp_path / "out") == expected != {}


def test_links_to_folders_are_followed_but_not_in_a_circle(run, alone, place, tmp_path):
    (tmp_path / "corpus").mkdir()
    os.symlink(place / "corpus" / "a", tmp_path / "corpus" / "link")
    os.symlink(tmp_path / "corpus", tmp_path / "corpus" / "circle")
    run(tmp_path / "corpus")
    expected = {f"link/{name[2:]}": codes for name, codes in alone.items() if name.startswith("a/")}
    assert codes_of(tmp_path / "out") == expected != {}


def test_sounds_of_an_unknown_format_are_listed_and_not_left_out(run, tmp_path):
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 1, (0.01, 0.1))
    (corpus / "phone.m4a").write_bytes(b"\0\0\0\x1cftypM4A ")
    assert "ffmpeg -i" in run(corpus).failures["phone.m4a"].reason


def test_tar_shards_are_read_with_what_lies_beside_the_sounds(run, clips, alone, tmp_path):
    ids, pixels = {}, bytes(range(256))
    (tmp_path / "pixels").write_bytes(pixels)
    (tmp_path / "shards").mkdir()
    for number, (name, (path, text)) in enumerate(clips.items()):
        with tarfile.open(tmp_path / "shards" / f"{number % 2}.tar", "a") as shard:
            (tmp_path / "text").write_text(text)
            shard.add(path, f"clip{number}{path.suffix}")
            shard.add(tmp_path / "text", f"clip{number}.txt")
            shard.add(tmp_path / "pixels", f"clip{number}.jpg")
        ids[name] = f"{number % 2}.tar/clip{number}"
    check_clips(run(tmp_path / "shards"), tmp_path / "out", clips, alone, ids, column="txt")
    assert all(row["jpg"] == pixels for row in rows_of(tmp_path / "out").values())


def test_reasons_of_failures_are_the_same_in_every_run(run, tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"no sound")
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        shard.add(tmp_path / "noise.wav", "noise.wav")
    first, again = (run(tmp_path / "x.tar", output=tmp_path / name).failures for name in ("first", "again"))
    assert first == again and first["x.tar/noise"].kind == "unreadable"
    assert first["x.tar/noise"].reason.startswith("Cannot read the content as sound: Format not recognised. ")


def test_a_link_in_a_shard_is_refused(run, clips, tmp_path):
    path, _ = next(iter(clips.values()))
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        shard.add(path, "a.wav")
        shard.add(path, "b.wav")
        link = tarfile.TarInfo("link.wav")
        link.type, link.linkname = tarfile.LNKTYPE, "a.wav"
        shard.addfile(link)
    with pytest.raises(ValueError, match=r"x\.tar holds 'link\.wav' as a link"):
        run(tmp_path / "x.tar")


@pytest.mark.parametrize("pattern", ["corpus/**/*.wav", "corpus/*/*.wav", "corpus/a*/*"])
def test_a_folder_that_a_glob_cannot_look_into_is_said(run, tmp_path, monkeypatch, pattern):
    write_corpus(tmp_path / "corpus", 4, (0.01, 0.1))
    (tmp_path / "corpus" / "a" / "deeper").mkdir()
    (tmp_path / "corpus" / ".hidden").mkdir()
    scandir = os.scandir  # tests may run as root, for whom nothing is locked

    def locked(path="."):
        if os.path.basename(os.fspath(path)) in (("a", ".hidden") if "**" not in pattern else ("deeper", ".hidden")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    run(str(tmp_path / pattern))
    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(PermissionError, match=r"a|deeper"):
        run(str(tmp_path / pattern))


@pytest.mark.parametrize("fault", ["joined", "damaged"])
def test_a_shard_of_which_a_part_would_be_passed_over_is_refused(run, clips, tmp_path, fault):
    shard = tmp_path / "x.tar"
    with tarfile.open(shard, "w") as file:
        for path, _ in clips.values():
            file.add(path, path.name)
        start = file.offset
        file.add(path, "last.wav")
    content = bytearray(shard.read_bytes())
    content[start] ^= 255  # in the header of the last member
    shard.write_bytes(content if fault == "damaged" else shard.read_bytes() * 2)
    with pytest.raises(ValueError, match=r"x\.tar goes on after the end of the archive"):
        run(shard)


def _table(clips):
    sounds = [{"bytes": path.read_bytes(), "path": path.name} for path, _ in clips.values()]
    return {"id": list(clips), "audio": sounds, "text": [text for _, text in clips.values()]}


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_workers_are_told_of_tables_by_pickling(clips, tmp_path, kind):
    import datasets

    table = pyarrow.table(_table(clips))
    parquet.write_table(table, tmp_path / "x.parquet")
    source = sources.open_source(tmp_path / "x.parquet" if kind == "parquet" else datasets.Dataset(table))
    places = [item.locator for item in source.items]
    source.read(places[0])  # so that it holds something that it could send along
    told = pickle.loads(pickle.dumps(source.without_items()))
    assert [told.read(place)["bytes"] for place in places] == [path.read_bytes() for path, _ in clips.values()]
    assert [told.extra_columns(place)["text"] for place in places] == [text for _, text in clips.values()]


@pytest.mark.parametrize("with_ids", [True, False])
def test_parquet_is_read_row_group_by_row_group(run, clips, alone, tmp_path, with_ids):
    (tmp_path / "tables").mkdir()
    table = pyarrow.table(_table(clips))
    parquet.write_table(
        table if with_ids else table.drop_columns("id"), tmp_path / "tables" / "x.parquet", row_group_size=3
    )
    ids = None if with_ids else {name: f"x.parquet/{row}" for row, name in enumerate(clips)}
    check_clips(run(tmp_path / "tables", num_readers=3), tmp_path / "out", clips, alone, ids)


@pytest.mark.parametrize("kind", ["on disk", "of splits", "in memory"])
def test_datasets_are_read_undecoded_and_keep_the_meaning_of_their_columns(run, clips, alone, tmp_path, kind):
    import datasets

    table = pyarrow.table({**_table(clips), "speaker": [index % 2 for index in range(len(clips))]})
    dataset = datasets.Dataset(
        table
    )  # from Arrow: given Python objects, the library would want torchcodec to encode them
    dataset = dataset.cast_column("audio", datasets.Audio())
    dataset = dataset.cast_column("speaker", datasets.ClassLabel(names=["anna", "bert"]))
    if kind == "on disk":
        dataset.save_to_disk(tmp_path / "dataset")
    elif kind == "of splits":
        datasets.DatasetDict(test=dataset).save_to_disk(tmp_path / "dataset")
    source = dataset if kind == "in memory" else tmp_path / "dataset"
    result = run(source, split="test" if kind == "of splits" else None, num_readers=2)
    check_clips(result, tmp_path / "out", clips, alone)
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["speaker"].names == ["anna", "bert"]
    assert loaded.features["audio_codes"].feature.dtype == "uint16"


@pytest.mark.parametrize("streaming", [False, True])
def test_the_output_is_read_by_load_dataset_as_it_is(run, alone, tmp_path, streaming):
    import datasets

    run(part_size=2)  # one part holds but failures
    loaded = datasets.load_dataset(
        str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"), streaming=streaming
    )
    assert {row["id"]: row["audio_codes"] for row in loaded} == alone


def test_load_dataset_tells_folders_of_one_name_apart_and_sees_them_grow(run, place, alone, tmp_path):
    """With `configs` in the card, datasets 5.2 took what it had read of another folder of that name."""
    import datasets

    def ids(folder) -> set[str]:
        loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
        return set(loaded["id"])

    clips = [place / "corpus" / clip for clip in sorted(alone)[:2]]
    for name, clip in zip(("one", "other"), clips, strict=True):
        (tmp_path / name / "corpus").mkdir(parents=True)
        shutil.copy(clip, tmp_path / name / "corpus")
        run(tmp_path / name / "corpus", output=tmp_path / name / "tokens")
    first, second = (clip.name for clip in clips)
    assert (ids(tmp_path / "one" / "tokens"), ids(tmp_path / "other" / "tokens")) == ({first}, {second})
    shutil.copy(clips[1], tmp_path / "one" / "corpus")
    run(tmp_path / "one" / "corpus", output=tmp_path / "one" / "tokens")
    assert ids(tmp_path / "one" / "tokens") == {first, second}


def test_the_schema_says_what_the_codes_are(run, place, model, tmp_path):
    run()
    part = next((tmp_path / "out" / "data").iterdir())
    settings = json.loads(parquet.read_schema(part).metadata[output.METADATA])["settings"]
    assert settings["codebook_fingerprint"] == model.codebook_fingerprint
    assert settings["model"] == "model" and settings["hop_length"] == 16
    assert "revision" in settings


def test_card_and_settings_name_no_folder_of_this_machine(run, place, tmp_path):
    run(model="bundled")
    package = os.path.dirname(os.path.dirname(bulk_run.__file__))
    for name in ("README.md", "manifest.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "bundled" in text and "corpus (path " in text and str(place) not in text and package not in text
    assert 'detokenize_dataset(tokens, "bundled")' in (tmp_path / "out" / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "empty").mkdir() or folder / "empty", "Found no sound"),
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
        (lambda folder: _written(folder / "a.wav", "") and _written(folder / "x.tar", "") and folder, "Say which by"),
        (lambda folder: "someone/no-such-dataset", "cannot be loaded as a dataset of the Hub"),
        (lambda folder: _splits(), "Got a DatasetDict as the source"),
    ],
)
def test_a_source_without_clips_is_refused_with_the_reason(run, tmp_path, make, message):
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
def test_what_cannot_be_done_is_refused_before_it_begins(run, place, tmp_path, options, message):
    (tmp_path / "file").write_text("")
    if "output" in options:
        options = {"output": place / "corpus" / "tokens" if options["output"] == "INSIDE" else tmp_path / "file"}
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_the_first_bad_file_stops_the_run_when_asked_to(run, alone, tmp_path):
    with pytest.raises(ValueError, match=r"empty\.wav: Cannot read"):
        run(on_error="fail", part_size=1)
    assert set(rows_of(tmp_path / "out")) == {id for id in alone if id < "empty.wav"}  # those before it
    assert not (tmp_path / "out" / "failures.jsonl").read_text()


def test_a_full_disk_is_said_and_what_is_finished_stays_valid(run, alone, tmp_path, monkeypatch):
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


def test_a_worker_that_is_killed_is_said_and_what_is_finished_stays_valid(run, alone, tmp_path, monkeypatch, forked):
    read = sources.FileSource.read

    def short_of_memory(self, place):
        if place[0].endswith("0021.flac"):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(sources.FileSource, "read", short_of_memory)
        with pytest.raises(ChildProcessError, match=r"killed by signal 9.*run again to go on"):
            run(part_size=1, num_processes=2)
    assert 0 < len(rows_of(tmp_path / "out")) < NUM_CLIPS
    assert multiprocessing.active_children() == []
    run(part_size=1)
    assert codes_of(tmp_path / "out") == alone


# ---------------------------------------------------------------------------------------------------------------------
# Around it
# ---------------------------------------------------------------------------------------------------------------------


def test_progress_shows_hours_speed_failures_and_time_left():
    progress = ClipProgress(num_clips=1000, sampling_rate=24000, shown=False)
    progress.started -= 60
    progress(output.Summary(num_clips=190, num_failures=10, num_samples=2 * 3600 * 24000))
    # 200 of 1000 clips and 2 hours in 60 s: 120 hours per hour, 800 clips at 200 a minute
    assert progress.progress.line(60) == (
        "200 of 1,000 clips, about 0:04:00 left, hours of audio 2.00, hours per hour 120.0, failed 10"
    )


def test_the_command_gives_exit_codes_and_json(place, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 3, (0.01, 0.1))
    options = ["-m", str(place / "model"), "-o", str(tmp_path / "out"), "--num-processes", "1", "--json"]
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


def test_nothing_is_made_on_the_hub_if_the_folder_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk_run.hub, "prepare", lambda name: pytest.fail("made a repository"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="no manifest"):
        run(push_to_hub="someone/tokens")


def test_only_what_is_finished_is_uploaded(run, tmp_path, monkeypatch):
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

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    run(push_to_hub="me/tokens")
    (_, *created), (_, *uploaded) = calls
    assert created == ["me/tokens", "dataset", []]  # before the work
    assert uploaded[:2] == ["me/tokens", "dataset"]
    part = next((tmp_path / "out" / "data").iterdir()).name
    assert uploaded[2] == ["README.md", f"data/{part}", "failures.jsonl", "manifest.json"]


def test_a_hub_that_refuses_is_said_before_the_work(run, tmp_path):
    with pytest.raises(OSError, match="Cannot upload to the dataset 'not a name'"):
        hub.prepare("not a name")


@pytest.mark.parametrize("of", ["path", "content"])
@pytest.mark.parametrize("ending", ["flac", "mp3", "ogg"])
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (24000, 2), (44100, 2)])
def test_decoding_gives_the_samples_of_load(tmp_path, rate, channels, ending, of):
    noise = np.random.default_rng(0).uniform(-1, 1, (5001, channels))
    path = tmp_path / f"noise.{ending}"
    soundfile.write(path, noise, rate)
    sound = audio.decode(path.read_bytes() if of == "content" else path)
    np.testing.assert_array_equal(sound.audio, audio.load(path))
    assert (sound.source_sampling_rate, sound.source_channels) == (rate, channels)


# ---------------------------------------------------------------------------------------------------------------------
# Slow: all at once, as the command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hundred_clips_give_the_same_rows_in_every_way(place, model, tmp_path):
    names = write_corpus(tmp_path / "corpus", 200, (0.1, 20))
    alone = codes_alone(model, {name: tmp_path / "corpus" / name for name in names})
    ways = [{"num_processes": 1, "batch_seconds": seconds} for seconds in (1, 30, 600)]
    ways += [{"num_processes": 2}, *([{"engine": "ray"}] if importlib.util.find_spec("ray") else [])]
    for number, way in enumerate(ways):
        output = tmp_path / str(number)
        result = tokenize(tmp_path / "corpus", str(place / "model"), output, TokenizeOptions(part_size=25, **way))
        assert codes_of(output) == alone, way
        assert result.failures.keys() == DAMAGED.keys(), way
        assert result.done_now.num_clips == 200 and result.done_now.num_failures == len(DAMAGED), way


@pytest.mark.slow
def test_the_command_with_two_processes_is_killed_and_run_again(place, tmp_path, alone):
    command = [
        sys.executable, "-m", "wavtokenizer_hf", "tokenize", place / "corpus", "-m", place / "model", "-o", tmp_path / "out",
        "--num-processes", "2", "--part-size", "1",
    ]  # fmt: skip
    moments, finished = random.Random(1), []
    for _ in range(10):
        process = subprocess.Popen(
            command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        # the imports take seconds and the work less than one: wait for the first new part before the dice are rolled
        deadline = time.monotonic() + 300
        before = _num_parts(tmp_path / "out")
        while _num_parts(tmp_path / "out") == before and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.wait()
        assert _group_ends(process.pid)  # its workers too
        finished.append(_num_parts(tmp_path / "out"))
    assert len(set(finished)) >= 4  # it was stopped at different places
    assert (
        subprocess.run(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode == 1
    )  # damaged files
    assert codes_of(tmp_path / "out") == alone


def _group_ends(group):
    for _ in range(12_000):  # a worker that is importing torch ends after that; a busy machine takes a minute
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.slow
def test_workers_that_are_ended_leave_one_line(place, tmp_path):
    command = [sys.executable, "-m", "wavtokenizer_hf", "tokenize", place / "corpus", "-m", place / "model"]
    command += ["-o", tmp_path / "out", "--num-processes", "2", "--part-size", "2", "--on-error", "fail"]
    process = subprocess.run(command, capture_output=True, text=True)
    lines = [
        line for line in process.stderr.splitlines() if line and not line.startswith(("Loading weights", "Note: "))
    ]
    lines = [line for line in lines if not re.match(r"\d+ of \d+ clips", line)]  # progress, on a slow machine
    assert process.returncode == 2 and len(lines) == 1 and "Cannot read" in lines[0], process.stderr


@pytest.mark.slow
def test_ray_gives_up_a_clip_that_kills_its_actors(place, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="pip install 'wavtokenizer_hf[ray]'")

    class Deadly(sources.FileSource):
        def read(self, locator):
            os.kill(os.getpid(), signal.SIGKILL)

    deadly = Deadly([sources.Item("a.wav", ("a.wav", {}))])
    monkeypatch.setattr(bulk_run, "open_source", lambda *arguments: deadly)
    with pytest.raises(OSError, match=r"Ray has stopped the work.*run again to go on"):
        tokenize("a.wav", str(place / "model"), tmp_path / "out", TokenizeOptions(engine="ray"))


@pytest.mark.slow
def test_ray_says_what_went_wrong(place, tmp_path):
    pytest.importorskip("ray", reason="pip install 'wavtokenizer_hf[ray]'")
    with pytest.raises(ValueError, match="Cannot read"):
        tokenize(
            place / "corpus", str(place / "model"), tmp_path / "out", TokenizeOptions(engine="ray", on_error="fail")
        )


def test_a_dry_run_tells_what_comes_and_writes_nothing(place, run, tmp_path, capsys):
    command = ["tokenize", str(place / "corpus"), "-m", str(place / "model"), "-o", str(tmp_path / "dry"), "--json"]
    assert main([*command, "--dry-run"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "dry").exists()
    total = run().total  # the sample is all of a corpus as small as this
    assert facts["clips"] == NUM_CLIPS + len(DAMAGED) and facts["clips_failed"] == len(DAMAGED)
    assert facts["tokens"] == total.num_codes and facts["hours"] == pytest.approx(total.num_samples / 24_000 / 3600)
    assert facts["hours_of_one_process"] > 0
    # what decides which clips can be read counts here, too
    for options in (["--max-clip-seconds", "1e-6"], ["--channel", "5"]):
        assert main([*command, "--dry-run", *options]) == 2
        assert "No clip of a sample" in capsys.readouterr().err
