"""The command line, run as a user runs it, with a tiny model in a folder."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open

import wavtokenizer_hf.progress as progress_module
from wavtokenizer_hf import WavTokenizerFeatureExtractor, WavTokenizerModel, __version__, audio, pipes
from wavtokenizer_hf.cli import _parsers, main
from wavtokenizer_hf.commands import transcode
from wavtokenizer_hf.commands.transcode import iter_codes
from wavtokenizer_hf.loading import load_model
from wavtokenizer_hf.progress import Progress
from wavtokenizer_hf.token_file import TokenFile


@pytest.fixture
def model_folder(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def audio_path(tmp_path):
    """Return an audio file of 1003 samples, not a multiple of the tiny model's 16 samples per token."""
    path = tmp_path / "sound.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 1003).astype(np.float32), 24000, subtype="FLOAT")
    return path


@pytest.fixture
def corpus(tmp_path, audio_path):
    """Return a folder with two audio files, one of them in a sub-folder, a damaged one, and a text file."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for position in ("a.wav", "deep/b.wav"):
        (folder / position).write_bytes(audio_path.read_bytes())
    (folder / "broken.flac").write_bytes(b"fLaC and then nothing")
    (folder / "notes.md").write_text("not sound")
    return folder


def expected_codes(model_folder, path):
    model = WavTokenizerModel.from_pretrained(model_folder).eval()
    return model.encode(torch.from_numpy(audio.load(path))[None, None]).audio_codes[0, 0].numpy()


def test_a_token_file_holds_the_codes_and_what_decoding_needs(model_folder, audio_path, tmp_path, tiny_model):
    assert main(["encode", str(audio_path), "-m", model_folder, "-o", str(tmp_path / "out.safetensors")]) == 0
    with safe_open(tmp_path / "out.safetensors", framework="numpy") as file:
        codes, metadata = file.get_tensor("audio_codes"), file.metadata()
    assert codes.dtype == np.uint16 and len(np.unique(codes)) > 5
    np.testing.assert_array_equal(codes, expected_codes(model_folder, audio_path))
    assert metadata == {
        "model": model_folder,
        "codebook_fingerprint": tiny_model.codebook_fingerprint,
        "sampling_rate": "24000",
        "hop_length": "16",
        "num_samples": "1003",
    }


@pytest.mark.parametrize("format", ["safetensors", "json"])
def test_decode_restores_exactly_the_original_length(model_folder, audio_path, tmp_path, format):
    tokens, decoded = str(tmp_path / f"tokens.{format}"), tmp_path / "decoded.wav"
    assert main(["encode", str(audio_path), "-m", model_folder, "-o", tokens]) == 0
    assert main(["decode", tokens, "-m", model_folder, "-o", str(decoded)]) == 0
    assert soundfile.info(decoded).frames == 1003
    again = tmp_path / "again.wav"
    assert main(["reconstruct", str(audio_path), "-m", model_folder, "-o", str(again), "--plot"]) == 0
    np.testing.assert_array_equal(audio.load(again), audio.load(decoded))
    assert again.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("format", ["npy", "txt"])
def test_bare_codes_decode_to_whole_frames_with_a_note_on_the_missing_check(
    model_folder, audio_path, tmp_path, format, capsys
):
    tokens = tmp_path / f"tokens.{format}"
    assert main(["encode", str(audio_path), "-m", model_folder, "-o", str(tokens)]) == 0
    codes = np.load(tokens) if format == "npy" else np.array(tokens.read_text().split(), int)
    np.testing.assert_array_equal(codes, expected_codes(model_folder, audio_path))
    assert main(["decode", str(tokens), "-m", model_folder, "-o", str(tmp_path / "decoded.wav")]) == 0
    assert soundfile.info(tmp_path / "decoded.wav").frames == 63 * 16
    assert "decoded unchecked" in capsys.readouterr().err


def test_a_folder_is_mirrored_and_a_damaged_file_does_not_stop_the_others(model_folder, corpus, tmp_path, capsys):
    output = tmp_path / "tokens"
    assert main(["encode", str(corpus), "-m", model_folder, "-o", str(output), "--json"]) == 1
    assert sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()) == [
        "a.safetensors",
        "deep/b.safetensors",
    ]
    printed = capsys.readouterr()
    results = {result["input"]: result for result in map(json.loads, _json_lines(printed))}
    assert len(results) == 3
    assert "Cannot read" in results[str(corpus / "broken.flac")]["error"]
    good = results[str(corpus / "a.wav")]
    assert good["num_tokens"] == 63 and good["num_samples"] == 1003 and good["times_real_time"] > 0
    assert "1 of 3 files failed" in printed.err


def _json_lines(printed):
    return [line for stream in printed for line in stream.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("format", "read"), [("txt", str.split), ("json", lambda text: json.loads(text)["audio_codes"])]
)
def test_codes_are_written_to_standard_output_for_pipes(model_folder, audio_path, format, read):
    process = subprocess.run(
        [
            sys.executable, "-m", "wavtokenizer_hf", "encode", audio_path, "-m", model_folder,
            "-o", "-", "--format", format,
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    np.testing.assert_array_equal(np.array(read(process.stdout), int), expected_codes(model_folder, audio_path))


def test_codes_of_another_codebook_are_refused_with_both_fingerprints(
    model_folder, audio_path, tmp_path, tiny_model, capsys
):
    tokens = str(tmp_path / "tokens.safetensors")
    main(["encode", str(audio_path), "-m", model_folder, "-o", tokens])
    own = tiny_model.codebook_fingerprint
    tiny_model.quantizer.codebook.embed.data.add_(1)
    tiny_model.save_pretrained(tmp_path / "other")
    assert main(["decode", tokens, "-m", str(tmp_path / "other"), "-o", str(tmp_path / "decoded.wav")]) == 2
    printed = capsys.readouterr().err
    assert own in printed and tiny_model.codebook_fingerprint in printed
    assert not (tmp_path / "decoded.wav").exists()


def test_the_device_and_the_dtype_are_obeyed(model_folder, audio_path, tmp_path):
    outputs = {}
    for dtype in ("float32", "bfloat16"):
        outputs[dtype] = tmp_path / f"{dtype}.wav"
        arguments = ["--device", "cpu", "--dtype", dtype, "-o", str(outputs[dtype])]
        assert main(["reconstruct", str(audio_path), "-m", model_folder, *arguments]) == 0
    assert not np.array_equal(audio.load(outputs["float32"]), audio.load(outputs["bfloat16"]))


def test_info_describes_exported_files_and_bulk_work_asks_for_the_torch_model(audio_path, tmp_path, capsys):
    fields = {
        "sampling_rate": 24_000, "hop_length": 320, "codebook_size": 4096, "codebook_fingerprint": "f" * 16,
        "frames_back": 1, "frames_ahead": 1, "last_reach": 1, "num_lstm_layers": 1, "lstm_size": 1,
    }  # fmt: skip
    folder = tmp_path / "exported"
    folder.mkdir()
    files = ["encoder.onnx", "decoder.onnx"]
    (folder / "wavtokenizer_onnx.json").write_text(json.dumps({"files": files, "model": fields}))
    for name in files:
        (folder / name).touch()
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["files"]) == ("onnx", "encoder.onnx, decoder.onnx")
    assert (facts["bits_per_second"], facts["codebook_fingerprint"]) == (900, "f" * 16)
    out = ["--output", str(tmp_path / "out")]
    for command in (
        ["tokenize", str(audio_path.parent), "--model", str(folder)],
        ["export-model", str(folder)],
        ["train", "--train-data", str(audio_path), "--validation-data", str(audio_path), "--model", str(folder)],
    ):
        assert main([*command, *out]) == 2
        error = capsys.readouterr().err
        assert "is a folder of ONNX files" in error and "needs the torch model" in error, error
    with pytest.raises(ValueError, match="needs the torch model"):
        load_model(WavTokenizerModel, folder)


def test_info_describes_a_model_and_a_token_file(model_folder, audio_path, tmp_path, tiny_model, capsys):
    main(["encode", str(audio_path), "-m", model_folder, "-o", str(tmp_path / "tokens.safetensors")])
    capsys.readouterr()
    assert main(["info", model_folder, "--json"]) == 0
    model = json.loads(capsys.readouterr().out)
    assert model["codebook_fingerprint"] == tiny_model.codebook_fingerprint
    assert model["tokens_per_second"] == 1500 and model["bits_per_second"] == 9000
    assert main(["info", str(tmp_path / "tokens.safetensors"), "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)
    assert tokens["num_samples"] == 1003 and tokens["codebook_fingerprint"] == tiny_model.codebook_fingerprint
    assert main(["info", model_folder]) == 0
    assert tiny_model.codebook_fingerprint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "absent.wav", "-m", "MODEL", "-o", "x"], "no file or folder absent.wav"),
        (["encode", "EMPTY", "-m", "MODEL", "-o", "x"], "holds no file that ends in"),
        (["encode", "SOUND", "-m", "absent-model", "-o", "x"], "absent-model"),
        (["encode", "SOUND", "-m", "MODEL", "-o", "x", "--device", "abacus"], "abacus"),
        (["encode", "SOUND", "COPY", "-m", "MODEL", "-o", "x"], "would both become"),
        (["encode", "SOUND", "COPY", "-m", "MODEL", "-o", "-"], "2 files for standard output"),
        (["encode", "SOUND", "-m", "MODEL", "-o", "x.foo"], "expected .safetensors, .json, .npy, .txt"),
        (["reconstruct", "SOUND", "-m", "MODEL", "-o", "x.foo"], "expected .wav, .flac, .ogg, .mp3"),
        (["reconstruct", "SOUND", "-m", "MODEL", "-o", "x"], "Got no extension of the output x"),
        (
            ["encode", "SOUND", "COPY", "-m", "MODEL", "-o", "x.json"],
            "as the output of 2 files, expected a folder: x/",
        ),
        (["info", "SOUND"], "is not a token file"),
        (["info", "CAUSAL"], "use_causal_conv="),
        (["convert", "SOUND", "-o", "x"], "sound.wav"),
    ],
)
def test_invalid_input_gives_one_line_and_exit_code_2(
    arguments, message, model_folder, audio_path, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "sound.wav").write_bytes(audio_path.read_bytes())
    (tmp_path / "causal").mkdir()
    (tmp_path / "causal" / "config.json").write_text('{"model_type": "wavtokenizer", "use_causal_conv": true}')
    names = {
        "CAUSAL": "causal",
        "MODEL": model_folder,
        "SOUND": "sound.wav",
        "EMPTY": "empty",
        "COPY": "copy/sound.wav",
    }
    assert main([names.get(argument, argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.strip().splitlines() if line.startswith("wavtokenizer ")]
    assert len(lines) == 1 and message in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "x").exists()


def test_a_model_that_lacks_tensors_or_is_damaged_is_refused(model_folder, audio_path, tiny_model, tmp_path, capsys):
    tiny_model.encoder_model.save_pretrained(tmp_path / "encoder")
    tiny_model.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    main(["encode", str(audio_path), "-m", str(tmp_path / "encoder"), "-o", str(tmp_path / "tokens.safetensors")])
    capsys.readouterr()
    for name, message in (("encoder", "holds an encoder"), ("cut", "Cannot load the model")):
        arguments = ["-m", str(tmp_path / name), "-o", str(tmp_path / "x.wav")]
        assert main(["decode", str(tmp_path / "tokens.safetensors"), *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x.wav").exists()


def test_the_requested_format_wins_over_the_file_extension(model_folder, audio_path, tmp_path):
    output = tmp_path / "tokens.txt"
    assert main(["encode", str(audio_path), "-m", model_folder, "-o", str(output), "--format", "json"]) == 0
    assert json.loads(output.read_text())["num_samples"] == 1003


def test_an_audio_file_is_not_overwritten_by_its_own_reconstruction(model_folder, audio_path, capsys):
    before = audio_path.read_bytes()
    assert main(["reconstruct", str(audio_path), "-m", model_folder, "-o", str(audio_path)]) == 2
    assert audio_path.read_bytes() == before


@pytest.mark.parametrize("command", [[], ["encode"], ["decode"], ["reconstruct"], ["evaluate"], ["convert"], ["info"]])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert len(capsys.readouterr().out) > 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_codes": np.array([70000])}, "expected 0 to 65535"),
        ({"audio_codes": np.array([-1])}, "expected 0 to 65535"),
        ({"audio_codes": np.array([0.5])}, "expected integers"),
        ({"audio_codes": np.zeros((1, 3), int)}, r"shape \(1, 3\)"),
        ({"audio_codes": np.zeros(0, int)}, r"shape \(0,\)"),
        ({"hop_length": 0}, "hop_length=0"),
        ({"num_samples": 17}, "Got 1 codes for 17 samples at 16 samples per code, expected 2"),
    ],
)
def test_a_token_file_with_inconsistent_fields_is_refused(changes, message):
    fields = {"audio_codes": np.array([1]), "model": "m", "codebook_fingerprint": "f"}
    with pytest.raises(ValueError, match=message):
        TokenFile(**{**fields, "sampling_rate": 24000, "hop_length": 16, "num_samples": 16, **changes})


@pytest.mark.parametrize("name", ["tokens.safetensors", "tokens.json", "tokens.npy", "tokens.txt"])
def test_a_damaged_token_file_is_refused_in_one_line(name, model_folder, tmp_path, capsys):
    (tmp_path / name).write_bytes(b'{"audio_codes": [1, 2')
    assert main(["decode", str(tmp_path / name), "-m", model_folder, "-o", str(tmp_path / "x.wav")]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len([line for line in printed if line.startswith("wavtokenizer decode: ") and name in line]) == 1
    assert not (tmp_path / "x.wav").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "a.wav", "-o", "x.json"], "-m bundled is the small model of this package"),
        (["encode", "a.wav", "-o", "x.json", "-m"], "-m bundled is the small model of this package"),
        (["encode", "a.wav", "-o", "x.json", "-m", "bundled", "--foo"], "unrecognized arguments: --foo"),
        (
            ["encode", "a.wav", "-o", "x.json", "-m", "bundled", "--peak-dbfs", "3"],
            "expected a level of at most 0 dBFS",
        ),
    ],
)
def test_wrong_arguments_show_the_usage_of_their_command(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("usage: wavtokenizer encode ") and message in printed.splitlines()[-1]


def test_incompatible_arguments_show_the_usage_of_their_command(capsys):
    assert main(["tokenize", "corpus", "-o", "tokens"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("usage: wavtokenizer tokenize ") and "-m bundled" in printed.splitlines()[-1]


def test_options_have_hyphens_and_the_names_of_recipes_still_work():
    parser, commands = _parsers(None)
    for command in commands.values():
        shown = re.findall(r"^  +(?:-\w[^-]*, )?(--[\w-]+)", command.format_help(), re.MULTILINE)
        assert shown and not any("_" in option for option in shown)
    arguments = parser.parse_args(["train", "--batch_size", "3", "--num-workers", "0", "--no-normalize_encoder"])
    assert (arguments.batch_size, arguments.num_workers, arguments.normalize_encoder) == ("3", "0", False)


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"wavtokenizer_hf {__version__}\n"


def test_peak_dbfs_scales_each_clip_like_the_feature_extractor(model_folder, tmp_path, tiny_model):
    quiet = 0.01 * NOISE
    soundfile.write(tmp_path / "quiet.wav", quiet, 24000, subtype="FLOAT")
    found = {}
    for level in ("-3", "none", "model"):
        output = tmp_path / f"{level}.npy"
        line = ["encode", str(tmp_path / "quiet.wav"), "-m", model_folder, "-o", str(output), "--peak-dbfs", level]
        assert main(line) == 0
        found[level] = np.load(output)
    extractor = WavTokenizerFeatureExtractor(hop_length=16, normalize_audio=True, target_peak_dB_FS=-3.0)
    inputs = extractor(quiet, sampling_rate=24000, return_tensors="pt")
    np.testing.assert_array_equal(found["-3"], tiny_model.encode(**inputs).audio_codes[0, 0].numpy())
    assert not np.array_equal(found["-3"], found["none"])
    np.testing.assert_array_equal(found["none"], found["model"])  # the folder requests none


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work_of_half_a_second(progress: Progress) -> None:
    for _ in range(10):
        time.sleep(0.05)
        progress.update()


def test_progress_is_a_line_with_the_time_left_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.2)
    with Progress(10, "files") as outer, Progress(5, "s of audio"):
        work_of_half_a_second(outer)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"\d+ of 10 files, about 0:00:0\d left", line) for line in lines)


def test_progress_is_a_bar_on_a_terminal_and_is_removed(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress_module, "DELAY_SECONDS", 0.1)
    with Progress(10, "files") as progress:
        work_of_half_a_second(progress)
    shown = sys.stderr.getvalue()
    assert "/10 files [00:00, 00:00 left" in shown
    assert shown.rstrip(" ").endswith("\r") and "\n" not in shown


def test_short_and_silenced_work_shows_no_progress(monkeypatch, capsys):
    with Progress(10, "files") as progress:
        work_of_half_a_second(progress)
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.1)
    with Progress(10, "files", shown=False) as progress:
        work_of_half_a_second(progress)
    assert capsys.readouterr().err == ""


def test_standard_error_holds_only_the_commands_own_messages(run, audio_path, tmp_path):
    """It holds no progress bars of transformers, such as "Loading weights"."""
    result = run("encode", audio_path, "-o", tmp_path / "x.json")
    assert result.returncode == 0 and result.stderr == b""


def test_the_shell_gets_completions(tmp_path):
    pytest.importorskip("argcomplete")
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out"),
        "COMP_LINE": "wavtokenizer recon",
        "COMP_POINT": "18",
    }
    subprocess.run([sys.executable, "-m", "wavtokenizer_hf"], env=environment, timeout=300)
    assert (tmp_path / "out").read_text().strip() == "reconstruct"


# ---------------------------------------------------------------------------------------------------------------------
# Long files and pipes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(model_folder):
    """Return a function that runs a command in a separate process, with bytes on standard input."""

    def run(command, *arguments, stdin=b""):
        line = [sys.executable, "-m", "wavtokenizer_hf", command, *map(str, arguments), "-m", model_folder]
        return subprocess.run(line, input=stdin, capture_output=True, timeout=300)

    return run


class Stdin(io.TextIOWrapper):
    def __init__(self, content: bytes):
        super().__init__(io.BufferedReader(io.BytesIO(content)))


def wav(samples, subtype="PCM_16", sizes=None, format="WAV") -> bytes:
    """Return a WAV file. `sizes` replaces the sizes of the RIFF and data chunks."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 24000, subtype=subtype, format=format)
    content = bytearray(buffer.getvalue())
    if sizes is not None:
        content[4:8] = struct.pack("<I", sizes)
        position = content.index(b"data") + 4
        content[position : position + 4] = struct.pack("<I", sizes)
    return bytes(content)


NOISE = np.random.default_rng(1).uniform(-1, 1, 40003).astype(np.float32)


@pytest.mark.parametrize("rate", [16000, 24000, 44100])
@pytest.mark.parametrize("format", ["wav", "flac"])
@pytest.mark.parametrize("channels", [1, 2])
def test_codes_do_not_depend_on_whether_a_file_is_read_whole_or_in_blocks(
    rate, format, channels, tiny_model, tmp_path
):
    path = tmp_path / f"a.{format}"
    soundfile.write(path, 0.9 * NOISE.repeat(channels).reshape(-1, channels), rate)
    whole = tiny_model.encode(torch.from_numpy(audio.load(path))[None, None]).audio_codes[0, 0].numpy()
    chunks = list(iter_codes(tiny_model, audio.read_blocks(path, 24000, block_seconds=0.2), whole_seconds=0))
    assert len(chunks) > 3 and len(np.unique(whole)) > 5
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


@pytest.mark.parametrize("sizes", [None, 0, 0xFFFFFFFF, 0x7FFFF000])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "FLOAT"])
def test_a_wav_stream_gives_the_same_codes_as_the_file(sizes, subtype, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(NOISE, subtype, format="WAVEX"))
    stream = io.BufferedReader(io.BytesIO(wav(NOISE, subtype, sizes, format="WAV" if sizes else "WAVEX")))
    np.testing.assert_array_equal(np.concatenate(list(pipes.read_audio(stream))), audio.load(tmp_path / "a.wav"))


@pytest.mark.parametrize(
    ("content", "raw", "num_samples", "message"),
    [
        (wav(NOISE[:100], sizes=0xFFFFFFFF)[:-1], None, 99, "within a sample, after 1 of its 2 bytes"),
        (wav(NOISE[:100])[:-20], None, 90, "180 of the 200 bytes"),
        (bytes(201), 24000, 100, "within a sample"),
    ],
)
def test_a_truncated_stream_gives_its_codes_and_then_an_error(content, raw, num_samples, message):
    blocks, stream = [], io.BufferedReader(io.BytesIO(content))
    with pytest.raises(audio.TruncatedAudioError, match=message):
        blocks.extend(pipes.read_audio(stream, 24000, raw))
    assert sum(map(len, blocks)) == num_samples


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"fLaC" + bytes(100), "Cannot read standard input as audio"),
        (b"<html>" + bytes(100), "begins with b'<htm', expected a WAV file"),
        (b"RIFF\0\0\0\0WAVEfmt ", "ends before its samples begin"),
        (b"RIFF\0\0\0\0WAVEdata\0\0\0\0", "has no sample format"),
        (wav(NOISE[:100]).replace(b"\1\0\1\0", b"\x55\0\1\0"), "Cannot read standard input as audio"),
        (wav(NOISE[:0]), "no samples"),
    ],
)
def test_a_stream_without_audio_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        list(pipes.read_audio(io.BufferedReader(io.BytesIO(content))))


def test_a_pipe_from_audio_to_tokens_to_audio_gives_the_same_result_as_files(run, model_folder, tiny_model, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(NOISE))
    encoded = run("encode", "-", "-o", "-", "--format", "txt", stdin=wav(NOISE, sizes=0xFFFFFFFF))
    assert encoded.returncode == 0, encoded.stderr
    codes = np.array(encoded.stdout.decode().splitlines(), int)
    np.testing.assert_array_equal(codes, expected_codes(model_folder, tmp_path / "a.wav"))
    decoded = run("decode", "-", "-o", "-", "--raw-output", "--window-seconds", "0.5", stdin=encoded.stdout)
    assert decoded.returncode == 0, decoded.stderr
    assert b"in windows of 0.5 s" in decoded.stderr
    with torch.inference_mode():
        audio_values = tiny_model.decode(
            torch.from_numpy(codes)[None, None], window_seconds=0.5, overlap_seconds=0.5 / 3
        ).audio_values
    samples = np.frombuffer(decoded.stdout, "<i2") / 32768
    expected = audio_values[0, 0].clamp(-1, 32767 / 32768).numpy()
    np.testing.assert_allclose(samples, expected, atol=1.01 / 32768)  # a step of 16-bit integers


@pytest.mark.parametrize("format", ["safetensors", "json", "npy", "txt"])
def test_token_files_of_every_format_are_read_from_standard_input(
    format, model_folder, audio_path, tmp_path, monkeypatch, capsys
):
    tokens = tmp_path / f"tokens.{format}"
    assert main(["encode", str(audio_path), "-m", model_folder, "-o", str(tokens)]) == 0
    assert main(["decode", str(tokens), "-m", model_folder, "-o", str(tmp_path / "file.wav")]) == 0
    monkeypatch.setattr(sys, "stdin", Stdin(tokens.read_bytes()))
    assert main(["decode", "-", "-m", model_folder, "-o", str(tmp_path / "pipe.wav")]) == 0
    assert (tmp_path / "pipe.wav").read_bytes() == (tmp_path / "file.wav").read_bytes()


def test_codes_and_audio_are_written_while_input_still_arrives(model_folder):
    encode, decode = (
        subprocess.Popen(
            [sys.executable, "-m", "wavtokenizer_hf", *line, "-", "-m", model_folder, "-o", "-"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )
        for line in (
            ["encode", "--format", "txt", "--raw", "24000"],
            ["decode", "--raw-output", "--window-seconds", "0.1"],
        )
    )  # fmt: skip
    encode.stdin.write((NOISE[:12000] * 32767).astype("<i2").tobytes())
    encode.stdin.flush()
    lines = [encode.stdout.readline() for _ in range(500)]  # of 750; blocks forever if none are written
    decode.stdin.write(b"".join(lines))
    decode.stdin.flush()
    assert len(decode.stdout.read(1000)) == 1000
    for process in (encode, decode):
        process.communicate()
        assert process.returncode == 0


def test_a_closed_output_pipe_ends_the_command_quietly(model_folder, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(NOISE))
    line = [
        sys.executable, "-m", "wavtokenizer_hf", "encode", tmp_path / "a.wav", "-m", model_folder,
        "-o", "-", "--format", "txt",
    ]  # fmt: skip
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    messages = process.stderr.read()  # only the loading bar of transformers is allowed
    assert b"rror" not in messages and b"ipe" not in messages
    assert process.wait() == 141


def test_audio_before_a_truncation_is_encoded_and_the_truncation_is_reported(
    model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "stdin", Stdin(bytes(2 * 1003 + 1)))
    output = tmp_path / "tokens.json"
    assert main(["encode", "-", "--raw", "24000", "-m", model_folder, "-o", str(output)]) == 1
    assert json.loads(output.read_text())["num_samples"] == 1003
    assert "cut off: The stream ends within a sample" in capsys.readouterr().err


def test_a_long_clip_is_decoded_in_windows_and_the_statistics_record_it(model_folder, tmp_path, capsys, monkeypatch):
    path, decoded = tmp_path / "a.wav", tmp_path / "decoded.wav"
    path.write_bytes(wav(NOISE))
    line = ["reconstruct", str(path), "-m", model_folder, "-o", str(decoded), "--json"]
    statistics = []
    for options in ([], ["--window-seconds", "0.6"], ["--window-seconds", "0"], ["--window-seconds", "2"]):
        assert main([*line, *options]) == 0
        printed = capsys.readouterr()
        statistics.append(json.loads(printed.out))
        assert ("decoded in windows" in printed.err) == (statistics[-1]["window_seconds"] is not None)
        assert soundfile.info(decoded).frames == len(NOISE)
    assert [each["window_seconds"] for each in statistics] == [None, 0.6, None, None]
    monkeypatch.setattr(transcode, "WHOLE_SECONDS", 0.5)
    assert main([*line, "--window-seconds", "0.6", "--overlap-seconds", "0.1"]) == 0
    assert json.loads(capsys.readouterr().out)["overlap_seconds"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "-", "a.wav", "-o", "x"], "standard input among 2 inputs"),
        (["encode", "-", "-o", "."], "has no name"),
        (["encode", "a.wav", "-o", "x", "--raw", "24000"], "--raw without -"),
        (["encode", "-", "-o", "x"], "expected a WAV file"),
        (["encode", "-", "-o", "x", "--raw", "0"], "a sampling rate of 0 Hz"),
        (["decode", "-", "-o", "x.wav", "--format", "txt"], "does not hold codes"),
        (["decode", "-", "-o", "x.wav"], "standard input: "),
        (["decode", "-", "-o", "x.wav", "--raw-output"], "--raw-output without -"),
        (
            ["reconstruct", "a.wav", "-o", "x.wav", "--window-seconds", "1", "--overlap-seconds", "0.6"],
            "twice the overlap",
        ),
        (["reconstruct", "a.wav", "-o", "x.wav", "--window-seconds", "inf"], "finite"),
        (["reconstruct", "a.wav", "-o", "x.wav", "--window-seconds", "-1"], "at least one frame"),
        (["reconstruct", "a.wav", "-o", "x.wav", "--window-seconds", "0", "--overlap-seconds", "1"], "Leave one out"),
        (["reconstruct", "a.wav", "-o", "-", "--plot"], "--plot for a pipe"),
    ],
)  # fmt: skip
def test_invalid_pipe_and_window_arguments_give_one_line_and_exit_code_2(
    arguments, message, model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(wav(NOISE[:1003]))
    monkeypatch.setattr(sys, "stdin", Stdin(b"no sound and no codes"))
    assert main([*arguments, "-m", model_folder]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("wavtokenizer ") and message in line]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "model"]


def test_a_last_code_without_a_newline_is_decoded_and_reported(caplog):
    stream = io.BufferedReader(io.BytesIO(b"1 2\n3"))
    np.testing.assert_array_equal(np.concatenate(list(pipes.read_codes(stream))), [1, 2, 3])
    assert "no newline after the last code, 3" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_memory_does_not_grow_with_the_length(command, model_folder, tmp_path):
    peaks = []
    for minutes in (6, 30):
        with audio.writing(tmp_path / "long.wav") as write:
            for minute in range(minutes):
                write(0.1 * np.random.default_rng(minute).standard_normal(60 * 24000).clip(-9, 9).astype(np.float32))
        code = (  # not ru_maxrss, which starts with that of the parent process
            "import re, sys; from wavtokenizer_hf.cli import main; assert main(sys.argv[1:]) == 0; "
            "print(int(re.search('VmHWM: *[^0-9]*([0-9]+) kB', open('/proc/self/status').read())[1]) // 1024)"
        )
        line = [command, tmp_path / "long.wav", "-m", model_folder, "-o", tmp_path / "out.wav"]
        if command == "encode":
            line[-1] = tmp_path / "out.npy"
        else:
            line += ["--window-seconds", "1"]  # 1500 codes of the tiny model
        output = subprocess.run([sys.executable, "-c", code, *line], check=True, capture_output=True, text=True)
        peaks.append(int(output.stdout.split()[-1]))
    # 24 more minutes of audio are 138 MB of float32, and their 2,160,000 codes 4 MB: only codes stay in memory
    assert peaks[1] - peaks[0] < 50, f"peaks of {peaks} MB"
