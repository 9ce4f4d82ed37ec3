"""The command line, run as a user runs it, on a tiny model in a folder."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open

from wavtokenizer_hf import WavTokenizerModel, audio
from wavtokenizer_hf.cli import main
from wavtokenizer_hf.token_file import TokenFile


@pytest.fixture
def model_folder(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def sound(tmp_path):
    """A sound file of 1003 samples, which is no multiple of the tiny model's 16 samples per token."""
    path = tmp_path / "sound.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 1003).astype(np.float32), 24000, subtype="FLOAT")
    return path


@pytest.fixture
def corpus(tmp_path, sound):
    """A folder with two sound files, one of them in a sub-folder, a damaged one, and a text."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for place in ("a.wav", "deep/b.wav"):
        (folder / place).write_bytes(sound.read_bytes())
    (folder / "broken.flac").write_bytes(b"fLaC and then nothing")
    (folder / "notes.md").write_text("not sound")
    return folder


def expected_codes(model_folder, path):
    model = WavTokenizerModel.from_pretrained(model_folder).eval()
    return model.encode(torch.from_numpy(audio.load(path))[None, None]).audio_codes[0, 0].numpy()


def test_a_token_file_holds_the_codes_and_what_decoding_needs(model_folder, sound, tmp_path, tiny_model):
    assert main(["encode", str(sound), "-m", model_folder, "-o", str(tmp_path / "out.safetensors")]) == 0
    with safe_open(tmp_path / "out.safetensors", framework="numpy") as file:
        codes, metadata = file.get_tensor("audio_codes"), file.metadata()
    assert codes.dtype == np.uint16 and len(np.unique(codes)) > 5
    np.testing.assert_array_equal(codes, expected_codes(model_folder, sound))
    assert metadata == {
        "model": model_folder,
        "codebook_fingerprint": tiny_model.codebook_fingerprint,
        "sampling_rate": "24000",
        "hop_length": "16",
        "num_samples": "1003",
    }


@pytest.mark.parametrize("format", ["safetensors", "json"])
def test_decode_gives_back_exactly_the_original_length(model_folder, sound, tmp_path, format):
    tokens, decoded = str(tmp_path / f"tokens.{format}"), tmp_path / "decoded.wav"
    assert main(["encode", str(sound), "-m", model_folder, "-o", tokens]) == 0
    assert main(["decode", tokens, "-m", model_folder, "-o", str(decoded)]) == 0
    assert soundfile.info(decoded).frames == 1003
    again = tmp_path / "again.wav"
    assert main(["reconstruct", str(sound), "-m", model_folder, "-o", str(again), "--plot"]) == 0
    np.testing.assert_array_equal(audio.load(again), audio.load(decoded))
    assert again.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("format", ["npy", "txt"])
def test_bare_codes_decode_to_whole_tokens_and_the_missing_check_is_said(
    model_folder, sound, tmp_path, format, capsys
):
    tokens = tmp_path / f"tokens.{format}"
    assert main(["encode", str(sound), "-m", model_folder, "-o", str(tokens)]) == 0
    codes = np.load(tokens) if format == "npy" else np.array(tokens.read_text().split(), int)
    np.testing.assert_array_equal(codes, expected_codes(model_folder, sound))
    assert main(["decode", str(tokens), "-m", model_folder, "-o", str(tmp_path / "decoded.wav")]) == 0
    assert soundfile.info(tmp_path / "decoded.wav").frames == 63 * 16
    assert "decoded unchecked" in capsys.readouterr().err


def test_a_folder_is_mirrored_and_a_damaged_file_does_not_stop_the_rest(model_folder, corpus, tmp_path, capsys):
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
def test_codes_go_to_standard_output_for_pipes(model_folder, sound, format, read):
    process = subprocess.run(
        [sys.executable, "-m", "wavtokenizer_hf", "encode", sound, "-m", model_folder, "-o", "-", "--format", format],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    np.testing.assert_array_equal(np.array(read(process.stdout), int), expected_codes(model_folder, sound))


def test_codes_of_another_codebook_are_refused_with_both_fingerprints(
    model_folder, sound, tmp_path, tiny_model, capsys
):
    tokens = str(tmp_path / "tokens.safetensors")
    main(["encode", str(sound), "-m", model_folder, "-o", tokens])
    own = tiny_model.codebook_fingerprint
    tiny_model.quantizer.codebook.embed.data.add_(1)
    tiny_model.save_pretrained(tmp_path / "other")
    assert main(["decode", tokens, "-m", str(tmp_path / "other"), "-o", str(tmp_path / "decoded.wav")]) == 2
    printed = capsys.readouterr().err
    assert own in printed and tiny_model.codebook_fingerprint in printed
    assert not (tmp_path / "decoded.wav").exists()


def test_the_device_and_the_dtype_are_obeyed(model_folder, sound, tmp_path):
    outputs = {}
    for dtype in ("float32", "bfloat16"):
        outputs[dtype] = tmp_path / f"{dtype}.wav"
        arguments = ["--device", "cpu", "--dtype", dtype, "-o", str(outputs[dtype])]
        assert main(["reconstruct", str(sound), "-m", model_folder, *arguments]) == 0
    assert not np.array_equal(audio.load(outputs["float32"]), audio.load(outputs["bfloat16"]))


def test_info_describes_a_model_and_a_token_file(model_folder, sound, tmp_path, tiny_model, capsys):
    main(["encode", str(sound), "-m", model_folder, "-o", str(tmp_path / "tokens.safetensors")])
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
        (["info", "SOUND"], "is not a token file"),
        (["info", "CAUSAL"], "use_causal_conv=True; WavTokenizer has use_causal_conv=False"),
        (["convert", "SOUND", "-o", "x"], "sound.wav"),
    ],
)
def test_what_cannot_be_done_as_given_is_one_line_and_exit_code_2(
    arguments, message, model_folder, sound, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "sound.wav").write_bytes(sound.read_bytes())
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


def test_a_model_that_lacks_tensors_or_is_damaged_is_refused(model_folder, sound, tiny_model, tmp_path, capsys):
    tiny_model.encoder_model.save_pretrained(tmp_path / "encoder")
    tiny_model.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    main(["encode", str(sound), "-m", str(tmp_path / "encoder"), "-o", str(tmp_path / "tokens.safetensors")])
    capsys.readouterr()
    for name, message in (("encoder", "tensors, such as backbone."), ("cut", "Cannot load the model")):
        arguments = ["-m", str(tmp_path / name), "-o", str(tmp_path / "x.wav")]
        assert main(["decode", str(tmp_path / "tokens.safetensors"), *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x.wav").exists()


def test_the_format_asked_for_wins_over_the_ending(model_folder, sound, tmp_path):
    output = tmp_path / "tokens.txt"
    assert main(["encode", str(sound), "-m", model_folder, "-o", str(output), "--format", "json"]) == 0
    assert json.loads(output.read_text())["num_samples"] == 1003


def test_a_sound_is_not_overwritten_by_its_own_reconstruction(model_folder, sound, capsys):
    before = sound.read_bytes()
    assert main(["reconstruct", str(sound), "-m", model_folder, "-o", str(sound)]) == 2
    assert sound.read_bytes() == before


@pytest.mark.parametrize("command", [[], ["encode"], ["decode"], ["reconstruct"], ["evaluate"], ["convert"], ["info"]])
def test_every_command_explains_itself(command, capsys):
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
def test_a_token_file_refuses_what_makes_no_sense(changes, message):
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
