"""Real folders and files, in every command: each skipped, changed or failed file is reported."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import datasets
import numpy as np
import pytest
import soundfile
import torch
from bulk_corpus import codes_of, rows_of, saved_tiny_model
from conftest import ROOT
from corpus.awkward import RATE, encoded, float_wav, integers, quantized, voice, wav

from wavtokenizer_hf import WavTokenizerModel, audio, pipes, worker_processes
from wavtokenizer_hf.audio_errors import FAILURE_KINDS, WARNING_KINDS, AudioError
from wavtokenizer_hf.bulk import AudioTokenizer, TokenizeOptions, sources, tokenize, tokenize_dataset
from wavtokenizer_hf.cli import main
from wavtokenizer_hf.evaluation import Model
from wavtokenizer_hf.find_files import describe_passed_over, find_files
from wavtokenizer_hf.token_file import TokenFile
from wavtokenizer_hf.training.data import open_clips, read_clip


pytestmark = pytest.mark.usefixtures("one_thread")

VOICE = voice()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> WavTokenizerModel:
    return saved_tiny_model(tmp_path_factory.mktemp("model"))


@torch.inference_mode()
def codes_alone(model, samples: np.ndarray) -> list[int]:
    return model.encode(torch.from_numpy(np.ascontiguousarray(samples))[None, None]).audio_codes[0, 0].tolist()


def failures_of(output) -> dict[str, str]:
    return {line["id"]: line["kind"] for line in map(json.loads, (output / "failures.jsonl").read_text().splitlines())}


# ---------------------------------------------------------------------------------------------------------------------
# Channels and levels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channel", "expected"),
    [
        ("mean", lambda s: s.mean(1)),
        ("left", lambda s: s[:, 0]),
        ("right", lambda s: s[:, 1]),
        ("2", lambda s: s[:, 2]),
    ],
)
def test_a_channel_is_chosen_in_every_command(channel, expected, model, tmp_path):
    clip = voice(channels=3)
    (tmp_path / "a.wav").write_bytes(float_wav(clip))
    codes = codes_alone(model, expected(clip))
    np.testing.assert_allclose(audio.load(tmp_path / "a.wav", channel=channel), expected(clip), atol=1e-7)
    line = ["-m", model.folder, "--channel", channel]
    assert main(["encode", str(tmp_path / "a.wav"), "-o", str(tmp_path / "a.json"), *line]) == 0
    assert TokenFile.load(tmp_path / "a.json").audio_codes.tolist() == codes
    assert main(["tokenize", str(tmp_path / "a.wav"), "-o", str(tmp_path / "out"), *line, "--num-processes", "1"]) == 0
    assert codes_of(tmp_path / "out")["a.wav"] == codes
    np.testing.assert_allclose(read_clip([str(tmp_path / "a.wav")], 0, RATE, channel), expected(clip), atol=1e-7)


def test_the_worst_clips_of_an_evaluation_are_of_the_channel_that_was_measured(model, tmp_path):
    clip = voice(channels=2)
    (tmp_path / "a.wav").write_bytes(float_wav(clip))
    line = [
        "evaluate",
        "--audio",
        str(tmp_path / "a.wav"),
        "-m",
        model.folder,
        "--metrics",
        "si_sdr",
        "--num-workers",
        "0",
    ]
    assert main([*line, "--channel", "right", "-o", str(tmp_path / "out")]) == 0
    worst = audio.load(tmp_path / "out" / "worst" / "00_original.wav")
    np.testing.assert_allclose(worst, clip[:, 1], atol=1e-4)
    before = (tmp_path / "out" / "worst" / "00_original.wav").read_bytes()
    line[2] = str(tmp_path / "out" / "worst")
    assert main([*line, "-o", str(tmp_path / "out")]) == 2
    assert (tmp_path / "out" / "worst" / "00_original.wav").read_bytes() == before


@pytest.mark.parametrize("channel", ["both", "-1", "1.5", "", None, True])
def test_an_invalid_channel_is_refused(channel):
    with pytest.raises(ValueError, match="expected mean, left, right or a number from 0"):
        audio.check_channel(channel)


def test_a_missing_channel_is_a_failure_of_that_clip(model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "mono.wav").write_bytes(wav(VOICE))
    (tmp_path / "in" / "stereo.wav").write_bytes(wav(voice(channels=2)))
    tokenize(tmp_path / "in", model.folder, tmp_path / "out", TokenizeOptions(num_processes=1, channel="right"))
    assert failures_of(tmp_path / "out") == {"mono.wav": "no-channel"}
    assert rows_of(tmp_path / "out").keys() == {"stereo.wav"}


def test_rows_of_another_channel_do_not_go_into_the_same_folder(model, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(voice(channels=2)))
    tokenize(tmp_path / "a.wav", model.folder, tmp_path / "out", TokenizeOptions(num_processes=1))
    with pytest.raises(ValueError, match="channel 'mean', and this run has 'left'"):
        tokenize(tmp_path / "a.wav", model.folder, tmp_path / "out", TokenizeOptions(num_processes=1, channel="left"))


def test_clip_warnings_are_printed_by_encode_and_stored_by_tokenize(model, tmp_path, capsys, caplog):
    opposite = np.concatenate([VOICE, -VOICE], 1)
    (tmp_path / "a.wav").write_bytes(wav(opposite))
    assert main(["encode", str(tmp_path / "a.wav"), "-m", model.folder, "-o", str(tmp_path / "a.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == ["cancelled"]
    assert "the channels cancel each other in their mean, to silence; choose one with channel='left'" in caplog.text
    tokenize(tmp_path / "a.wav", model.folder, tmp_path / "out", TokenizeOptions(num_processes=1))
    assert rows_of(tmp_path / "out")["a.wav"]["warnings"] == ["cancelled"]


@pytest.mark.parametrize(("level", "is_reported"), [(0.05, False), (0.02, True)])  # 26 and 34 dB
def test_cancelling_channels_are_reported_from_thirty_decibels_on(level, is_reported):
    clip = np.concatenate([VOICE * (1 + level), VOICE * (level - 1)], 1)
    assert ("cancelled" in audio.decode(float_wav(clip)).warnings) == is_reported


@pytest.fixture
def apertus(model, tmp_path):
    """Return the model with a feature extractor that scales each clip to a peak of -3 dBFS."""
    shutil.copytree(model.folder, tmp_path / "apertus")
    path = tmp_path / "apertus" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalize_audio": True, "target_peak_dB_FS": -3}))
    return str(tmp_path / "apertus")


def test_the_peak_level_of_a_model_applies_in_every_command(model, apertus, tmp_path, monkeypatch, capsys):
    quiet = (0.02 * VOICE).astype(np.float32)
    (tmp_path / "a.wav").write_bytes(float_wav(quiet))
    scaled = quiet[:, 0] / np.abs(quiet).max() * np.float32(10 ** (-3 / 20))
    codes = codes_alone(model, scaled)
    assert codes != codes_alone(model, quiet[:, 0])
    tokenize(tmp_path / "a.wav", apertus, tmp_path / "out", TokenizeOptions(num_processes=1))
    assert codes_of(tmp_path / "out")["a.wav"] == codes
    assert main(["encode", str(tmp_path / "a.wav"), "-m", apertus, "-o", str(tmp_path / "a.json")]) == 0
    assert TokenFile.load(tmp_path / "a.json").audio_codes.tolist() == codes
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BufferedReader(io.BytesIO(float_wav(quiet)))}))
    assert main(["encode", "-", "-m", apertus, "-o", str(tmp_path / "pipe.json")]) == 0
    assert TokenFile.load(tmp_path / "pipe.json").audio_codes.tolist() == codes
    assert "read to its end first, since each clip is scaled to a peak of -3 dBFS" in capsys.readouterr().err
    assert main(["reconstruct", str(tmp_path / "a.wav"), "-m", apertus, "-o", str(tmp_path / "again.wav")]) == 0
    with torch.inference_mode():
        decoded = model.decode(torch.tensor(codes)[None, None]).audio_values[0, 0, : len(quiet)].numpy()
    np.testing.assert_allclose(audio.load(tmp_path / "again.wav"), np.clip(decoded, -1, 1), atol=1e-4)
    estimate, _ = Model("apertus", model, -3).reconstruct(tmp_path / "a.wav", quiet[:, 0])
    np.testing.assert_allclose(estimate, decoded * np.abs(quiet).max() / 10 ** (-3 / 20), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    """
    Return a folder with audio files, one of them behind a link and one of a format that may be unreadable, and other
    files.
    """
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (corpus / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    (corpus / "deep" / "A.WAV").write_bytes(wav(VOICE))
    (elsewhere / "b.wav").write_bytes(wav(VOICE))
    (corpus / "linked").symlink_to(elsewhere)
    (corpus / "deep" / "circle").symlink_to(corpus)
    (corpus / "talk.m4a").write_bytes(b"\0\0\0\x18ftypM4A \0\0\0\0no more of it")
    (corpus / "gone.wav").symlink_to(corpus / "nothing")
    (corpus / "notes.txt").write_text("no audio")
    os.mkfifo(corpus / "pipe.wav")
    return corpus


FOUND = ["deep/A.WAV", "linked/b.wav", "talk.m4a"]
PASSED_OVER = "passed over 3 other files (.wav 2, .txt 1)"


def test_the_file_finder_follows_links_and_names_skipped_files(corpus):
    found = find_files(corpus, audio.SUFFIXES)
    assert [os.path.relpath(file, corpus) for file in found.files] == FOUND
    assert [os.path.relpath(file, corpus) for file in found.passed_over] == ["gone.wav", "notes.txt", "pipe.wav"]
    assert describe_passed_over(found.passed_over).startswith(PASSED_OVER)


@pytest.mark.parametrize("command", ["encode", "reconstruct", "tokenize"])
def test_commands_agree_on_the_audio_files_of_a_folder(command, corpus, model, tmp_path, capsys):
    assert main([command, str(corpus), "-m", model.folder, "-o", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "talk.m4a: failed: " in err and PASSED_OVER in err
    if command == "tokenize":
        assert rows_of(tmp_path / "out").keys() == {"deep/A.WAV", "linked/b.wav"}
    else:
        names = {
            path.relative_to(tmp_path / "out").with_suffix("").as_posix() for path in (tmp_path / "out").rglob("*.*")
        }
        assert names == {"deep/A", "linked/b"}


def test_training_and_evaluation_find_the_same_files(corpus, model, capsys, caplog):
    assert [os.path.relpath(clip, corpus) for clip in open_clips(corpus)] == FOUND
    assert PASSED_OVER in caplog.text
    line = [
        "evaluate",
        "--audio",
        str(corpus),
        "-m",
        model.folder,
        "--metrics",
        "si_sdr",
        "--num-workers",
        "0",
        "--json",
    ]
    assert main(line) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["num_files"] == len(FOUND)
    assert PASSED_OVER in captured.err and "talk.m4a" in captured.err


@pytest.mark.parametrize(
    "line",
    [
        ["encode", "", "-o", "x"],
        ["encode", "a.wav", "-o", ""],
        ["tokenize", "", "-o", "x"],
        ["tokenize", "a.wav", "-o", ""],
        ["encode", "a.wav", "", "-o", "x"],
    ],
)
def test_an_empty_argument_is_not_the_current_folder(line, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(wav(VOICE))
    assert main([*line, "-m", model.folder]) == 2
    assert "Got an empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_a_list_may_contain_file_names_that_are_not_utf8(model, tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    (tmp_path / name).write_bytes(wav(VOICE))
    (tmp_path / "list.csv").write_bytes(b"path,speaker\ncaf\xe9.wav,anna\n")
    tokenize(tmp_path / "list.csv", model.folder, tmp_path / "out", TokenizeOptions(num_processes=1))
    (row,) = rows_of(tmp_path / "out").values()
    assert row["id"] == r"caf\xe9.wav" and row["speaker"] == "anna"
    assert row["audio_codes"] == codes_alone(model, quantized(VOICE)[:, 0])


def test_a_truncated_file_gives_exit_code_1_and_the_codes_of_the_remaining_audio(model, tmp_path, capsys):
    (tmp_path / "a.wav").write_bytes(wav(VOICE)[:-2000])
    line = ["encode", str(tmp_path / "a.wav"), "-m", model.folder, "-o", str(tmp_path / "a.json"), "--json"]
    assert main(line) == 1
    assert json.loads(capsys.readouterr().out)["kind"] == "truncated"
    assert TokenFile.load(tmp_path / "a.json").num_samples == len(VOICE) - 1000


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def test_names_in_shards_may_contain_dots(model, tmp_path):
    members = {
        "Track 2.0 (clean).wav": wav(VOICE),
        "Track 2.1 (clean).wav": wav(0.5 * VOICE),
        "Track 2.0 (clean).json": b"{}",
        "talk1_1.10-1.19.wav": wav(VOICE),
        "talk1_1.10-1.19.json": b"[1]",
        "talk1_1.10-1.19.words.txt": b"hello",
        "README.md": b"of no clip",
    }
    result = tokenize(
        write_tar(tmp_path / "s.tar", members), model.folder, tmp_path / "out", TokenizeOptions(num_processes=1)
    )
    rows = rows_of(tmp_path / "out")
    assert rows.keys() == {"s.tar/Track 2.0 (clean)", "s.tar/Track 2.1 (clean)", "s.tar/talk1_1.10-1.19"}
    talk = rows["s.tar/talk1_1.10-1.19"]
    assert talk["json"] == "[1]" and talk["words.txt"] == "hello" and rows["s.tar/Track 2.1 (clean)"]["json"] is None
    assert result.passed_over == ["s.tar/README.md"]


def test_the_key_rule_of_webdataset_is_an_option(model, tmp_path):
    members = {"a.close.wav": wav(VOICE), "a.json": b"{}"}
    write_tar(tmp_path / "s.tar", members)
    assert main(["tokenize", str(tmp_path / "s.tar"), "-m", model.folder, "-o", str(tmp_path / "out"), "--tar-names",
                 "webdataset", "--num-processes", "1"]) == 0  # fmt: skip
    assert rows_of(tmp_path / "out")["s.tar/a"]["json"] == "{}"
    by_ending = sources.open_source(tmp_path / "s.tar")
    assert [item.id for item in by_ending.items] == ["s.tar/a.close"] and by_ending.passed_over == ["s.tar/a.json"]
    with pytest.raises(ValueError, match="expected one of ending, webdataset"):
        sources.open_source(tmp_path / "s.tar", tar_names="last")


# ---------------------------------------------------------------------------------------------------------------------
# One bad clip
# ---------------------------------------------------------------------------------------------------------------------


def rows_of_a_dataset():
    good = [float(x) for x in VOICE[:, 0]]
    return datasets.Dataset.from_dict(
        {
            "audio": [
                {"array": good, "sampling_rate": RATE},
                {"array": good, "sampling_rate": 0},
                {"array": good, "sampling_rate": None},
                {"array": good, "sampling_rate": float("nan")},
                {"array": [], "sampling_rate": RATE},
                {"array": [*good, float("nan")], "sampling_rate": RATE},
                None,
            ],
            "text": list("abcdefg"),
        }
    )


KINDS = [None, "sampling-rate", "sampling-rate", "sampling-rate", "empty", "not-finite", "no-audio"]


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "3", '{"_data_files": 3}'])
def test_a_saved_dataset_with_hostile_json_is_refused_in_one_line(content, tmp_path):
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text(content)
    for open_it in (sources.open_source, open_clips):
        with pytest.raises(ValueError, match="Cannot read") as error:
            open_it(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", [None, "arrow", "numpy", "pandas"])
def test_bad_rows_fail_alone_in_every_format_of_a_dataset(format, model):
    rows = tokenize_dataset(rows_of_a_dataset().with_format(format), model.folder).with_format(None)
    assert list(rows["failure_kind"]) == KINDS and list(rows["text"]) == list("abcdefg")
    assert rows["audio_codes"][0] == codes_alone(model, VOICE[:, 0])


@pytest.mark.parametrize("format", [None, "arrow", "numpy"])
def test_bad_rows_fail_alone_in_bulk(format, model, tmp_path):
    tokenize(rows_of_a_dataset().with_format(format), model.folder, tmp_path / "out", TokenizeOptions(num_processes=1))
    assert failures_of(tmp_path / "out") == {f"{n:09d}": kind for n, kind in enumerate(KINDS) if kind}
    assert codes_of(tmp_path / "out")["000000000"] == codes_alone(model, VOICE[:, 0])


def test_any_exception_while_reading_a_clip_is_a_failure_of_that_clip(model, tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.wav").write_bytes(wav(VOICE))
    read = sources.FileSource.read

    def unlucky(self, locator):
        return {"b.wav": lambda: 1 / 0, "c.wav": lambda: {}["key"]}.get(locator[0][-5:], lambda: read(self, locator))()

    monkeypatch.setattr(sources.FileSource, "read", unlucky)
    result = tokenize(tmp_path / "in", model.folder, tmp_path / "out", TokenizeOptions(num_processes=1))
    assert failures_of(tmp_path / "out") == {"b.wav": "error", "c.wav": "error"}
    assert result.failures["b.wav"].reason == "ZeroDivisionError: division by zero"


def test_a_clip_that_the_model_refuses_fails_alone(model, tmp_path, monkeypatch):
    encode = type(model.encoder_model).encode

    def strict(self, input_values, *arguments, **options):
        if input_values.abs().max() > 0.9:
            raise ValueError("The latents are not finite.")
        return encode(self, input_values, *arguments, **options)

    monkeypatch.setattr(type(model.encoder_model), "encode", strict)
    clips = {"a": VOICE, "b": VOICE * 0.99 / np.abs(VOICE).max(), "c": VOICE}
    for name, clip in clips.items():
        soundfile.write(tmp_path / f"{name}.wav", clip, RATE, subtype="FLOAT")
    tokenize(f"{tmp_path}/*.wav", model.folder, tmp_path / "out", TokenizeOptions(num_processes=1))
    assert failures_of(tmp_path / "out") == {"b.wav": "not-finite"}
    assert rows_of(tmp_path / "out").keys() == {"a.wav", "c.wav"}


def test_clips_longer_than_the_limit_fail(model, tmp_path):
    (tmp_path / "short.wav").write_bytes(wav(VOICE[:1000]))
    (tmp_path / "long.wav").write_bytes(wav(VOICE))
    line = [
        "tokenize",
        f"{tmp_path}/*.wav",
        "-m",
        model.folder,
        "-o",
        str(tmp_path / "out"),
        "--max-clip-seconds",
        "0.05",
    ]
    assert main(line) == 1
    assert failures_of(tmp_path / "out") == {"long.wav": "too-long"}
    with pytest.raises(ValueError, match="max_clip_seconds=0"):
        AudioTokenizer(model.folder, max_clip_seconds=0)


def test_failure_kinds_survive_pickling_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(AudioError("why", "empty")))
    assert (str(error), error.kind) == ("why", "empty")


def test_every_failure_kind_is_documented():
    text = (ROOT / "docs" / "bulk.md").read_text()
    for kind in (*FAILURE_KINDS, *WARNING_KINDS):
        assert f"`{kind}`" in text


# ---------------------------------------------------------------------------------------------------------------------
# Formats that libsndfile cannot read
# ---------------------------------------------------------------------------------------------------------------------


def m4a(tmp_path):
    if not shutil.which("ffmpeg"):
        pytest.skip("needs ffmpeg to write the file, which is not installed here")
    (tmp_path / "a.wav").write_bytes(wav(voice(0.5)))
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", tmp_path / "talk one.m4a"], check=True)
    return tmp_path / "talk one.m4a"


def test_an_m4a_file_is_read_by_torchcodec(tmp_path):
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchcodec does not import: {str(error).splitlines()[0]}")
    path = m4a(tmp_path)
    decoded = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", path, "-f", "f32le", "-"], check=True, capture_output=True
    )
    expected = np.frombuffer(decoded.stdout, np.float32)
    for samples in (
        audio.load(path), audio.decode(path.read_bytes()).audio, np.concatenate(list(audio.read_blocks(path))),
    ):  # fmt: skip
        assert abs(len(samples) - len(expected)) <= 1024
        np.testing.assert_allclose(samples[: len(expected)], expected[: len(samples)], atol=1e-4)


def test_without_torchcodec_the_pipe_to_type_is_named(tmp_path, monkeypatch, model, capsys):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    path = tmp_path / "talk one.m4a"
    path.write_bytes(b"\0\0\0\x18ftypM4A \0\0\0\0isommp42")
    assert main(["encode", str(path), "-m", model.folder, "-o", str(tmp_path / "a.json")]) == 2
    err = capsys.readouterr().err
    assert "pip install 'wavtokenizer_hf[codecs]'" in err
    assert f"ffmpeg -i '{path}' -f wav - | wavtokenizer encode - --model MODEL --output OUTPUT" in err


# ---------------------------------------------------------------------------------------------------------------------
# Pipes
# ---------------------------------------------------------------------------------------------------------------------


class LongChunk(io.RawIOBase):
    """A WAV header whose LIST chunk has 4 GiB, followed by its samples."""

    def __init__(self, start: bytes, num_zeros: int, end: bytes):
        self.parts, self.num_zeros, self.zeros = [io.BytesIO(start), io.BytesIO(end)], num_zeros, bytes(2**20)

    def read(self, size=-1):
        content = self.parts[0].read(size)
        if content or not self.num_zeros:
            return content or self.parts[1].read(size)
        size = min(size, self.num_zeros, 2**20)
        self.num_zeros -= size
        return self.zeros if size == 2**20 else bytes(size)

    read1 = read


def test_a_chunk_of_four_gigabytes_in_a_pipe_takes_no_memory():
    import tracemalloc

    whole = wav(VOICE)
    start = whole[:36] + b"LIST" + (2**32 - 16).to_bytes(4, "little")
    tracemalloc.start()
    samples = np.concatenate(list(pipes.read_audio(LongChunk(start, 2**32 - 16, whole[36:]))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(samples, quantized(VOICE)[:, 0])
    assert peak < 8 * 2**20


@pytest.mark.parametrize("rate", [0, 1, 999, 768001, 10**30, -24000])
def test_raw_samples_of_an_invalid_rate_are_refused(rate):
    with pytest.raises(AudioError, match="expected a whole number from 1,000 to 768,000 Hz"):
        next(pipes.read_audio(io.BytesIO(bytes(1000)), raw_rate=rate))


@pytest.mark.parametrize("format", ["FLAC", "OGG", "MP3", "GSM"])
def test_other_formats_can_be_piped_too(format, tmp_path):
    options = {"format": "WAV", "subtype": "GSM610", "rate": 8000} if format == "GSM" else {"format": format}
    content = encoded(VOICE, **options)
    (tmp_path / "a").write_bytes(content)
    stream = io.BufferedReader(io.BytesIO(content))
    np.testing.assert_array_equal(np.concatenate(list(pipes.read_audio(stream))), audio.load(tmp_path / "a"))


def test_a_pipe_of_nothing_but_zeros_is_refused_at_once():
    with pytest.raises(AudioError, match="expected a WAV file"), open("/dev/zero", "rb") as zeros:
        next(pipes.read_audio(zeros))


# ---------------------------------------------------------------------------------------------------------------------
# Scripts
# ---------------------------------------------------------------------------------------------------------------------


class Ended:
    """A worker process that has ended."""

    def __init__(self, exitcode):
        self.exitcode = exitcode

    def join(self, timeout):
        pass


@pytest.mark.parametrize(
    ("exit_code", "had_begun", "message"),
    [
        (worker_processes.UNGUARDED_EXIT_CODE, False, 'outside of `if __name__ == "__main__":`'),
        (1, False, "before it started"),
        (1, True, "memory"),
        (-9, False, "killed by signal 9"),
    ],
)
def test_the_exit_status_of_a_worker_is_reported(exit_code, had_begun, message):
    assert message in str(worker_processes._worker_error(Ended(exit_code), had_begun, "use fewer processes"))


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_refused_with_the_missing_line(model, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.wav").write_bytes(wav(VOICE))
    script = tmp_path / "script.py"
    script.write_text(
        f"from wavtokenizer_hf.bulk import TokenizeOptions, tokenize\n"
        f"options = TokenizeOptions(num_processes=2, part_size=1)\n"
        f"tokenize({str(tmp_path / '*.wav')!r}, {model.folder!r}, {str(tmp_path / 'out')!r}, options)\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 1 and 'outside of `if __name__ == "__main__":`' in run.stderr
    assert run.stderr.count("Traceback") == 1 and "memory" not in run.stderr


def test_float_files_of_integer_samples_are_reported_with_their_peak(caplog, tmp_path):
    (tmp_path / "a.wav").write_bytes(float_wav(integers(VOICE, 16).astype(np.float32)))
    audio.load(tmp_path / "a.wav")
    assert "out-of-range: the largest sample is" in caplog.text and "divide them" in caplog.text
