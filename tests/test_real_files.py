"""Real folders and files, in every command: nothing passed over, changed or ended without a word."""

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

SOUND = voice()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> WavTokenizerModel:
    return saved_tiny_model(tmp_path_factory.mktemp("model"))


@torch.inference_mode()
def codes_alone(model, samples: np.ndarray) -> list[int]:
    return model.encode(torch.from_numpy(np.ascontiguousarray(samples))[None, None]).audio_codes[0, 0].tolist()


def failures_of(output) -> dict[str, str]:
    return {line["id"]: line["kind"] for line in map(json.loads, (output / "failures.jsonl").read_text().splitlines())}


# ---------------------------------------------------------------------------------------------------------------------
# Channels, and how loud
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
    sound = voice(channels=3)
    (tmp_path / "a.wav").write_bytes(float_wav(sound))
    codes = codes_alone(model, expected(sound))
    np.testing.assert_allclose(audio.load(tmp_path / "a.wav", channel=channel), expected(sound), atol=1e-7)
    line = ["-m", model.folder, "--channel", channel]
    assert main(["encode", str(tmp_path / "a.wav"), "-o", str(tmp_path / "a.json"), *line]) == 0
    assert TokenFile.load(tmp_path / "a.json").audio_codes.tolist() == codes
    assert main(["tokenize", str(tmp_path / "a.wav"), "-o", str(tmp_path / "out"), *line, "--num-processes", "1"]) == 0
    assert codes_of(tmp_path / "out")["a.wav"] == codes
    np.testing.assert_allclose(read_clip([str(tmp_path / "a.wav")], 0, RATE, channel), expected(sound), atol=1e-7)


def test_the_worst_clips_of_an_evaluation_are_of_the_channel_that_was_measured(model, tmp_path):
    sound = voice(channels=2)
    (tmp_path / "a.wav").write_bytes(float_wav(sound))
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
    np.testing.assert_allclose(worst, sound[:, 1], atol=1e-4)
    before = (tmp_path / "out" / "worst" / "00_original.wav").read_bytes()
    line[2] = str(tmp_path / "out" / "worst")
    assert main([*line, "-o", str(tmp_path / "out")]) == 2
    assert (tmp_path / "out" / "worst" / "00_original.wav").read_bytes() == before


@pytest.mark.parametrize("channel", ["both", "-1", "1.5", "", None, True])
def test_a_channel_that_makes_no_sense_is_refused(channel):
    with pytest.raises(ValueError, match="expected mean, left, right or a number from 0"):
        audio.check_channel(channel)


def test_a_channel_that_a_clip_lacks_is_that_clips_failure(model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "mono.wav").write_bytes(wav(SOUND))
    (tmp_path / "in" / "stereo.wav").write_bytes(wav(voice(channels=2)))
    tokenize(tmp_path / "in", model.folder, tmp_path / "out", TokenizeOptions(num_processes=1, channel="right"))
    assert failures_of(tmp_path / "out") == {"mono.wav": "no-channel"}
    assert rows_of(tmp_path / "out").keys() == {"stereo.wav"}


def test_rows_of_another_channel_do_not_go_into_the_same_folder(model, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(voice(channels=2)))
    tokenize(tmp_path / "a.wav", model.folder, tmp_path / "out", TokenizeOptions(num_processes=1))
    with pytest.raises(ValueError, match="channel 'mean', and this run has 'left'"):
        tokenize(tmp_path / "a.wav", model.folder, tmp_path / "out", TokenizeOptions(num_processes=1, channel="left"))


def test_what_is_strange_about_a_clip_is_said_by_encode_and_written_by_tokenize(model, tmp_path, capsys, caplog):
    opposite = np.concatenate([SOUND, -SOUND], 1)
    (tmp_path / "a.wav").write_bytes(wav(opposite))
    assert main(["encode", str(tmp_path / "a.wav"), "-m", model.folder, "-o", str(tmp_path / "a.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == ["cancelled"]
    assert "the channels cancel each other in their mean, to silence; choose one with channel='left'" in caplog.text
    tokenize(tmp_path / "a.wav", model.folder, tmp_path / "out", TokenizeOptions(num_processes=1))
    assert rows_of(tmp_path / "out")["a.wav"]["warnings"] == ["cancelled"]


@pytest.mark.parametrize(("level", "is_reported"), [(0.05, False), (0.02, True)])  # 26 and 34 dB
def test_channels_that_cancel_are_reported_from_thirty_decibels_on(level, is_reported):
    sound = np.concatenate([SOUND * (1 + level), SOUND * (level - 1)], 1)
    assert ("cancelled" in audio.decode(float_wav(sound)).warnings) == is_reported


@pytest.fixture
def apertus(model, tmp_path):
    """The model, with a feature extractor that scales each clip to a peak of -3 dBFS."""
    shutil.copytree(model.folder, tmp_path / "apertus")
    path = tmp_path / "apertus" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalize_audio": True, "target_peak_dB_FS": -3}))
    return str(tmp_path / "apertus")


def test_the_peak_level_of_a_model_counts_in_every_command(model, apertus, tmp_path, monkeypatch, capsys):
    quiet = (0.02 * SOUND).astype(np.float32)
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
    """Sound in a folder, behind a link, in a format that may not be readable, and other things."""
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (corpus / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    (corpus / "deep" / "A.WAV").write_bytes(wav(SOUND))
    (elsewhere / "b.wav").write_bytes(wav(SOUND))
    (corpus / "linked").symlink_to(elsewhere)
    (corpus / "deep" / "circle").symlink_to(corpus)
    (corpus / "talk.m4a").write_bytes(b"\0\0\0\x18ftypM4A \0\0\0\0no more of it")
    (corpus / "gone.wav").symlink_to(corpus / "nothing")
    (corpus / "notes.txt").write_text("no audio")
    os.mkfifo(corpus / "pipe.wav")
    return corpus


FOUND = ["deep/A.WAV", "linked/b.wav", "talk.m4a"]
PASSED_OVER = "passed over 3 other files (.wav 2, .txt 1)"


def test_one_finder_follows_links_and_names_what_it_passes_over(corpus):
    found = find_files(corpus, audio.SUFFIXES)
    assert [os.path.relpath(file, corpus) for file in found.files] == FOUND
    assert [os.path.relpath(file, corpus) for file in found.passed_over] == ["gone.wav", "notes.txt", "pipe.wav"]
    assert describe_passed_over(found.passed_over).startswith(PASSED_OVER)


@pytest.mark.parametrize("command", ["encode", "reconstruct", "tokenize"])
def test_commands_agree_on_what_a_folder_holds(command, corpus, model, tmp_path, capsys):
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


def test_training_and_evaluation_agree_with_them(corpus, model, capsys, caplog):
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


@pytest.mark.parametrize("line", [["encode", "", "-o", "x"], ["encode", "a.wav", "-o", ""], ["tokenize", "", "-o", "x"],
                                  ["tokenize", "a.wav", "-o", ""], ["encode", "a.wav", "", "-o", "x"]])  # fmt: skip
def test_an_empty_argument_is_not_the_current_folder(line, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(wav(SOUND))
    assert main([*line, "-m", model.folder]) == 2
    assert "Got an empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_a_list_may_name_files_whose_names_are_no_utf8(model, tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    (tmp_path / name).write_bytes(wav(SOUND))
    (tmp_path / "list.csv").write_bytes(b"path,speaker\ncaf\xe9.wav,anna\n")
    tokenize(tmp_path / "list.csv", model.folder, tmp_path / "out", TokenizeOptions(num_processes=1))
    (row,) = rows_of(tmp_path / "out").values()
    assert row["id"] == r"caf\xe9.wav" and row["speaker"] == "anna"
    assert row["audio_codes"] == codes_alone(model, quantized(SOUND)[:, 0])


def test_a_cut_file_gives_exit_code_1_and_the_codes_of_what_is_left(model, tmp_path, capsys):
    (tmp_path / "a.wav").write_bytes(wav(SOUND)[:-2000])
    line = ["encode", str(tmp_path / "a.wav"), "-m", model.folder, "-o", str(tmp_path / "a.json"), "--json"]
    assert main(line) == 1
    assert json.loads(capsys.readouterr().out)["kind"] == "truncated"
    assert TokenFile.load(tmp_path / "a.json").num_samples == len(SOUND) - 1000


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


def test_names_in_shards_may_hold_dots(model, tmp_path):
    members = {
        "Track 2.0 (clean).wav": wav(SOUND), "Track 2.1 (clean).wav": wav(0.5 * SOUND), "Track 2.0 (clean).json": b"{}",
        "talk1_1.10-1.19.wav": wav(SOUND), "talk1_1.10-1.19.json": b"[1]", "talk1_1.10-1.19.words.txt": b"hello",
        "README.md": b"of no clip",
    }  # fmt: skip
    result = tokenize(
        write_tar(tmp_path / "s.tar", members), model.folder, tmp_path / "out", TokenizeOptions(num_processes=1)
    )
    rows = rows_of(tmp_path / "out")
    assert rows.keys() == {"s.tar/Track 2.0 (clean)", "s.tar/Track 2.1 (clean)", "s.tar/talk1_1.10-1.19"}
    talk = rows["s.tar/talk1_1.10-1.19"]
    assert talk["json"] == "[1]" and talk["words.txt"] == "hello" and rows["s.tar/Track 2.1 (clean)"]["json"] is None
    assert result.passed_over == ["s.tar/README.md"]


def test_webdatasets_rule_is_an_option(model, tmp_path):
    members = {"a.close.wav": wav(SOUND), "a.json": b"{}"}
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
    good = [float(x) for x in SOUND[:, 0]]
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
    assert rows["audio_codes"][0] == codes_alone(model, SOUND[:, 0])


@pytest.mark.parametrize("format", [None, "arrow", "numpy"])
def test_bad_rows_fail_alone_in_bulk(format, model, tmp_path):
    tokenize(rows_of_a_dataset().with_format(format), model.folder, tmp_path / "out", TokenizeOptions(num_processes=1))
    assert failures_of(tmp_path / "out") == {f"{n:09d}": kind for n, kind in enumerate(KINDS) if kind}
    assert codes_of(tmp_path / "out")["000000000"] == codes_alone(model, SOUND[:, 0])


def test_any_exception_of_reading_a_clip_is_that_clips_failure(model, tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.wav").write_bytes(wav(SOUND))
    read = sources.FileSource.read

    def unlucky(self, place):
        return {"b.wav": lambda: 1 / 0, "c.wav": lambda: {}["key"]}.get(place[0][-5:], lambda: read(self, place))()

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
    clips = {"a": SOUND, "b": SOUND * 0.99 / np.abs(SOUND).max(), "c": SOUND}
    for name, sound in clips.items():
        soundfile.write(tmp_path / f"{name}.wav", sound, RATE, subtype="FLOAT")
    tokenize(f"{tmp_path}/*.wav", model.folder, tmp_path / "out", TokenizeOptions(num_processes=1))
    assert failures_of(tmp_path / "out") == {"b.wav": "not-finite"}
    assert rows_of(tmp_path / "out").keys() == {"a.wav", "c.wav"}


def test_clips_longer_than_the_limit_fail(model, tmp_path):
    (tmp_path / "short.wav").write_bytes(wav(SOUND[:1000]))
    (tmp_path / "long.wav").write_bytes(wav(SOUND))
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


def test_kinds_survive_the_way_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(AudioError("why", "empty")))
    assert (str(error), error.kind) == ("why", "empty")


def test_every_kind_is_in_the_documentation():
    text = (ROOT / "docs" / "bulk.md").read_text()
    for kind in (*FAILURE_KINDS, *WARNING_KINDS):
        assert f"`{kind}`" in text


# ---------------------------------------------------------------------------------------------------------------------
# Formats that libsndfile does not know
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
    """A WAV header whose LIST chunk has 4 GiB, and then its samples."""

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

    whole = wav(SOUND)
    start = whole[:36] + b"LIST" + (2**32 - 16).to_bytes(4, "little")
    tracemalloc.start()
    samples = np.concatenate(list(pipes.read_audio(LongChunk(start, 2**32 - 16, whole[36:]))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(samples, quantized(SOUND)[:, 0])
    assert peak < 8 * 2**20


@pytest.mark.parametrize("rate", [0, 1, 999, 768001, 10**30, -24000])
def test_raw_samples_of_no_real_rate_are_refused(rate):
    with pytest.raises(AudioError, match="expected a whole number from 1,000 to 768,000 Hz"):
        next(pipes.read_audio(io.BytesIO(bytes(1000)), raw_rate=rate))


@pytest.mark.parametrize("format", ["FLAC", "OGG", "MP3", "GSM"])
def test_other_formats_come_through_a_pipe_too(format, tmp_path):
    options = {"format": "WAV", "subtype": "GSM610", "rate": 8000} if format == "GSM" else {"format": format}
    content = encoded(SOUND, **options)
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
        (worker_processes.UNGUARDED, False, 'outside of `if __name__ == "__main__":`'),
        (1, False, "before it began"),
        (1, True, "memory"),
        (-9, False, "killed by signal 9"),
    ],
)
def test_how_a_worker_ended_is_told(exit_code, had_begun, message):
    assert message in str(worker_processes._ended(Ended(exit_code), had_begun, "use fewer processes"))


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_the_line_that_it_lacks(model, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.wav").write_bytes(wav(SOUND))
    script = tmp_path / "script.py"
    script.write_text(
        f"from wavtokenizer_hf.bulk import TokenizeOptions, tokenize\n"
        f"options = TokenizeOptions(num_processes=2, part_size=1)\n"
        f"tokenize({str(tmp_path / '*.wav')!r}, {model.folder!r}, {str(tmp_path / 'out')!r}, options)\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 1 and 'outside of `if __name__ == "__main__":`' in run.stderr
    assert run.stderr.count("Traceback") == 1 and "memory" not in run.stderr


def test_integers_in_float_files_are_reported_with_their_peak(caplog, tmp_path):
    (tmp_path / "a.wav").write_bytes(float_wav(integers(SOUND, 16).astype(np.float32)))
    audio.load(tmp_path / "a.wav")
    assert "out-of-range: the largest sample is" in caplog.text and "divide them" in caplog.text
