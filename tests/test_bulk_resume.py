"""Bulk runs that are killed, repeated, shared between processes, or started on the folder of another run."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pyarrow
import pytest
import torch
from bulk_corpus import DAMAGED, codes_of, train_encoder, write_corpus
from bulk_runs import (  # noqa: F401
    NUM_CLIPS,
    alone,
    model,
    num_parts,
    one_thread,
    run,
    workspace,
)
from pyarrow import parquet
from tqdm.auto import tqdm

from wavtokenizer_hf.bulk import TokenizeOptions, output, tokenize


def _run_on_a_slow_disk(arguments):
    # forks share tqdm's lock: one killed while it holds the lock would block all others
    tqdm.set_lock(threading.RLock())
    sync = os.fsync
    output.os.fsync = lambda descriptor: (time.sleep(0.015), sync(descriptor))
    torch.set_num_threads(1)
    tokenize(*arguments, TokenizeOptions(num_processes=1, part_size=1, num_readers=1, batch_seconds=2))


def test_a_run_killed_at_random_moments_and_resumed_equals_an_uninterrupted_run(workspace, run, tmp_path, alone):
    run(output=tmp_path / "whole", part_size=1)
    arguments = (workspace / "corpus", str(workspace / "model"), tmp_path / "killed")
    moments, kills = random.Random(0), 0
    while kills < 12:
        before = num_parts(tmp_path / "killed")
        process = multiprocessing.get_context("fork").Process(target=_run_on_a_slow_disk, args=(arguments,))
        process.start()
        deadline = time.monotonic() + 60
        # let every second process write a file: otherwise some make no progress
        while kills % 2 and process.is_alive() and num_parts(tmp_path / "killed") == before:
            assert time.monotonic() < deadline, "no part in 60 s"
            time.sleep(0.001)
        process.join(timeout=moments.uniform(0, 0.05))
        if not process.is_alive():
            assert process.exitcode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert kills >= 10 and num_parts(tmp_path / "killed") >= 5  # it made progress in between
    run(output=tmp_path / "killed", part_size=1)
    for part in (tmp_path / "whole" / "data").iterdir():
        assert part.read_bytes() == (tmp_path / "killed" / "data" / part.name).read_bytes()
    assert codes_of(tmp_path / "killed") == alone
    for name in ("failures.jsonl", "README.md", "manifest.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert not list((tmp_path / "killed").rglob("*.partial"))


def test_complete_files_are_left_alone_and_added_clips_are_tokenized(workspace, run, tmp_path):
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


def test_failed_clips_are_retried_on_request(run, tmp_path):
    corpus = tmp_path / "corpus"
    (good,) = write_corpus(corpus, 1, (0.01, 0.1))
    run(corpus)
    shutil.copy(corpus / good, corpus / "empty.wav")
    assert run(corpus).failures.keys() == DAMAGED.keys()
    assert run(corpus, retry_failed=True).failures.keys() == DAMAGED.keys() - {"empty.wav"}
    assert codes_of(tmp_path / "out").keys() == {good, "empty.wav"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["complete"] and manifest["num_clips"] == 2 and manifest["num_failures"] == 2


def test_shards_share_a_folder_and_tokenize_each_clip_once(run, alone, tmp_path):
    for index in range(3):
        result = run(shard=(index, 3), part_size=5)
        assert 0 < result.done_now.num_clips < NUM_CLIPS
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["complete"] == (index == 2)
    assert codes_of(tmp_path / "out") == alone


@pytest.mark.parametrize(("held", "asked"), [((0, 1), (0, 1)), ((1, 2), (0, 3))])
def test_a_folder_in_use_by_another_run_over_the_same_clips_is_refused(run, tmp_path, held, asked):
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
def test_a_folder_of_another_run_is_refused(workspace, run, tmp_path, change, message):
    shutil.copytree(workspace / "model", tmp_path / "model")
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 2, (0.01, 0.1))
    run(corpus, model=str(tmp_path / "model"))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    options = {"source": corpus, "model": str(tmp_path / "model")}
    if change == "model":
        options["model"] = str(workspace / "other")
    elif change == "codebook":
        shutil.rmtree(tmp_path / "model")
        shutil.copytree(workspace / "other", tmp_path / "model")
    elif change == "encoder":
        train_encoder(tmp_path / "model")
    else:
        options["source"] = str(corpus / "a")
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert {path: path.read_bytes() for path in before} == before


def test_another_source_of_the_same_name_is_refused(workspace, run, tmp_path, monkeypatch):
    for folder in ("one", "other"):
        write_corpus(tmp_path / folder / "corpus", 2, (0.01, 0.1))
    monkeypatch.chdir(tmp_path / "one")
    run("corpus")
    assert run("./corpus/").done_now.num_clips == run(tmp_path / "one" / "corpus").done_now.num_clips == 0
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(ValueError, match=r"made with source 'corpus .*, and this run has 'corpus "):
        run("corpus")


def test_a_folder_with_unrelated_files_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex and no manifest"):
        run()
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


def test_a_trailing_slash_does_not_change_the_source_folder(workspace, run, tmp_path):
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 1, (0.01, 0.1))
    run(f"{corpus}/", model=f"{workspace / 'model'}/")
    assert run(corpus).done_now.num_clips == 0


def test_partial_files_of_a_killed_run_are_removed(run, tmp_path):
    (tmp_path / "out" / "data").mkdir(parents=True)
    for name in ("manifest.json", "data/part-0.parquet"):
        path = tmp_path / "out" / name
        path.with_name(f".shard-0-of-1-host-1-{path.name}.partial").write_text("half")
    run()
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_foreign_parquet_files_in_the_output_are_named_and_not_called_damaged(run, tmp_path):
    run()
    parquet.write_table(pyarrow.table({"id": ["x"]}), tmp_path / "out" / "data" / "mine.parquet")
    with pytest.raises(ValueError, match=r"mine\.parquet is not of this command\. Move it away"):
        run()


def test_a_damaged_output_file_is_named(run, tmp_path):
    run()
    part = next((tmp_path / "out" / "data").iterdir())
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{part.name} is damaged .* Delete it"):
        run()
    part.unlink()
    assert run().done_now.num_clips == NUM_CLIPS


# ---------------------------------------------------------------------------------------------------------------------
# Slow: the command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_with_two_processes_resumes_after_kills(workspace, tmp_path, alone):
    command = [
        sys.executable, "-m", "wavtokenizer_hf", "tokenize", workspace / "corpus", "-m", workspace / "model",
        "-o", tmp_path / "out", "--num-processes", "2", "--part-size", "1",
    ]  # fmt: skip
    moments, finished = random.Random(1), []
    for _ in range(10):
        process = subprocess.Popen(
            command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        # Imports take seconds and the work less than one: wait for the first new file before the random delay.
        deadline = time.monotonic() + 300
        before = num_parts(tmp_path / "out")
        while num_parts(tmp_path / "out") == before and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.wait()
        assert _group_ends(process.pid)  # its workers too
        finished.append(num_parts(tmp_path / "out"))
    assert len(set(finished)) >= 4  # it was stopped at different points
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
def test_terminated_workers_leave_one_line_of_output(workspace, tmp_path):
    command = [sys.executable, "-m", "wavtokenizer_hf", "tokenize", workspace / "corpus", "-m", workspace / "model"]
    command += ["-o", tmp_path / "out", "--num-processes", "2", "--part-size", "2", "--on-error", "fail"]
    process = subprocess.run(command, capture_output=True, text=True)
    lines = [
        line for line in process.stderr.splitlines() if line and not line.startswith(("Loading weights", "Note: "))
    ]
    lines = [line for line in lines if not re.match(r"\d+ of \d+ clips", line)]  # progress, on a slow machine
    assert process.returncode == 2 and len(lines) == 1 and "Cannot read" in lines[0], process.stderr
