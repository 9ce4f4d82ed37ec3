"""
The bundled model: its files and its audio quality; its recipe: the training clips, the held-out set, and that one
command runs it.
"""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recordings
import sound
import soundfile
import texts
import torch
from conftest import load_script
from tiny_training import write_clips
from transformers import AutoFeatureExtractor, AutoModel

from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerModel, audio, bundled_model
from wavtokenizer_hf.cli import main
from wavtokenizer_hf.evaluation import Model, evaluate
from wavtokenizer_hf.training import Settings


ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "examples" / "bundled_model"
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


def test_the_bundled_model_is_complete_has_the_recipes_shape_and_at_most_24_megabytes():
    assert sorted(path.name for path in bundled_model().iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    assert (bundled_model() / "model.safetensors").stat().st_size <= 24e6
    model, loading = AutoModel.from_pretrained(bundled_model(), output_loading_info=True)
    assert isinstance(model, WavTokenizerModel) and not loading["missing_keys"] and not loading["unexpected_keys"]
    recipe = WavTokenizerConfig(**Settings.load(str(RECIPE / "recipe.yaml")).config).to_dict()
    own = {"codebook_fingerprint", "architectures", "dtype", "transformers_version", "_name_or_path"}
    assert {name: value for name, value in model.config.to_dict().items() if name not in own} == {
        name: value for name, value in recipe.items() if name not in own
    }
    assert AutoFeatureExtractor.from_pretrained(bundled_model()).hop_length == model.config.hop_length == 320


def test_the_fingerprint_is_in_config_and_card():
    model = WavTokenizerModel.from_pretrained(bundled_model())
    assert model.config.codebook_fingerprint == model.codebook_fingerprint
    assert f"`{model.codebook_fingerprint}`" in (bundled_model() / "README.md").read_text()


def test_every_command_with_a_model_option_accepts_the_bundled_name(tmp_path):
    """These are the commands that the README does not show."""
    clips = str(write_clips(tmp_path / "clips", count=2, seconds=0.2))
    other = str(write_clips(tmp_path / "other", count=1, seconds=0.2))
    assert main(["tokenize", clips, "--model", "bundled", "--output", str(tmp_path / "tokens")]) == 0
    tiny = ["--steps=1", "--mel_only_steps=1", "--batch_size=1", "--segment_seconds=0.1", "--num_workers=0"]
    data = ["--train-data", clips, "--validation-data", other, "--num-validation-clips=1"]
    assert main(["train", "--model", "bundled", *data, "--output", str(tmp_path / "run"), *tiny]) == 0
    assert WavTokenizerModel.from_pretrained(tmp_path / "run" / "last").config.codebook_size == 4096


@pytest.mark.parametrize(("name", "least"), [("speech", 0.75), ("synthetic", 0.75)])
def test_held_out_speech_stays_intelligible(name, least):
    model = WavTokenizerModel.from_pretrained(bundled_model()).eval()
    file = ROOT / "examples" / f"{name}.flac"
    report = evaluate([(file, Path(file.name))], [Model("bundled", model)], metrics=["stoi"], num_workers=0)
    result = report.to_dict()["systems"][0]
    assert result["metrics"]["stoi"]["mean"] >= least
    assert result["all_codes"]["num_used"] > 150  # of some 430 codes


@pytest.mark.parametrize("name", ["speech", "synthetic"])
def test_encoding_decoded_speech_gives_many_of_the_same_codes(name):
    model = WavTokenizerModel.from_pretrained(bundled_model()).eval()
    waveform = torch.from_numpy(audio.load(ROOT / "examples" / f"{name}.flac"))[None, None]
    with torch.inference_mode():
        first = model.encode(waveform).audio_codes
        again = model.encode(model.decode(first).audio_values[..., : waveform.shape[-1]]).audio_codes
    # without the loss `reencoding` it is about a tenth
    assert (first == again).float().mean() > 0.4


@pytest.mark.slow
@needs_espeak
def test_a_decoder_learns_a_new_voice_and_no_code_changes(tmp_path):
    """Run `fine_tune_decoder` on a few minutes of one voice, on an ordinary CPU."""
    for name, sentences in (("clips", slice(0, 40)), ("other", slice(40, 50))):
        (tmp_path / name).mkdir()
        chosen = [each for group in texts.HELD_OUT_SENTENCES.values() for each in group][sentences]
        for index, sentence in enumerate(chosen):
            audio.save(tmp_path / name / f"{index}.wav", sound.speak(sentence, "en+f4", 150, 60), 24000)
    data = ["--train-data", str(tmp_path / "clips"), "--validation-data", str(tmp_path / "other")]
    options = ["--steps=200", "--validate-every=200", "--output", str(tmp_path / "run")]
    assert main(["train", "fine_tune_decoder", "--model", "bundled", *data, *options]) == 0
    before, after = (
        WavTokenizerModel.from_pretrained(each).eval() for each in (bundled_model(), tmp_path / "run" / "last")
    )
    files = sorted((tmp_path / "other").iterdir())
    systems = [Model("before", before), Model("after", after)]
    report = evaluate([(file, Path(file.name)) for file in files], systems, metrics=["mel_distance"])
    first, second = (each["metrics"]["mel_distance"]["mean"] for each in report.to_dict()["systems"])
    assert second < first
    for file in files:
        waveform = torch.from_numpy(audio.load(file))[None, None]
        assert torch.equal(before.encode(waveform).audio_codes, after.encode(waveform).audio_codes)


@pytest.mark.slow
@needs_espeak
def test_the_card_states_the_quality_on_held_out_utterances(tmp_path):
    make = load_script(RECIPE / "make.py")

    sound.make_held_out(tmp_path / "held_out", seed=0)
    model = WavTokenizerModel.from_pretrained(bundled_model()).eval()
    measured = make.measure(tmp_path / "held_out", tmp_path / "report", model)
    result, card = measured.report.to_dict()["systems"][0], (bundled_model() / "README.md").read_text()
    assert len(list((tmp_path / "held_out").iterdir())) == 50
    assert f"| STOI | {result['metrics']['stoi']['mean']:.3f}" in card
    assert f"{measured.agreement:.1%}" in card


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, np.ndarray]:
    """Return a minute or two of training clips by name."""
    folder = tmp_path_factory.mktemp("sound") / "clips"
    sound.make_clips(folder, 0.001, 0, "training", 1)
    return {file.name: soundfile.read(file)[0] for file in sorted(folder.iterdir())}


def test_voices_and_half_of_the_languages_are_held_out():
    assert not set(texts.TRAINING_VARIANTS) & set(texts.HELD_OUT_VARIANTS)
    sentences = {language: len(each) for language, each in texts.HELD_OUT_SENTENCES.items()}
    assert sum(sentences.values()) == 50
    assert sum(count for language, count in sentences.items() if language not in texts.TRAINING_WORDS) == 25


@needs_espeak
def test_every_language_and_variant_exists_in_espeak_ng():
    for language in (*texts.TRAINING_WORDS, *texts.HELD_OUT_SENTENCES):
        assert len(sound.speak("1 2 3", language, rate=160, pitch=50)) > 0
    listed = subprocess.run(["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True).stdout
    files = {line.split("!v/")[1].split()[0] for line in listed.splitlines() if "!v/" in line}
    assert {*texts.TRAINING_VARIANTS, *texts.HELD_OUT_VARIANTS} <= files


@needs_espeak
def test_clips_are_short_peak_at_minus_3_dbfs_and_are_never_digital_silence(clips):
    assert len(clips) > 10
    for waveform in clips.values():
        assert 1.0 <= len(waveform) / 24000 <= 2.5
        assert np.abs(waveform).max() == pytest.approx(10 ** (-3 / 20), abs=1e-4)  # 16-bit steps
        # the noise floor is at least -75 dBFS, which 16-bit steps of -90 dBFS preserve
        windows = np.lib.stride_tricks.sliding_window_view(waveform, 240)[::240]
        assert (windows != 0).any(axis=1).all()


@pytest.mark.slow
@needs_espeak
def test_a_seed_gives_the_same_audio_and_another_seed_or_name_gives_different_audio(clips, tmp_path):
    for name, seed, workers in (("training", 0, 2), ("training", 1, 1), ("validation", 0, 1)):
        folder = tmp_path / f"{name}_{seed}"
        sound.make_clips(folder, 0.001, seed, name, workers)
        again = {file.name: soundfile.read(file)[0] for file in sorted(folder.iterdir())}
        same = again.keys() == clips.keys() and all(np.array_equal(again[name], clips[name]) for name in again)
        assert same == ((name, seed) == ("training", 0))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """
    Write two packages of recordings that stand in for Debian's: tones of several speakers, some held out, and one of
    telephone quality.
    """

    def unpack(name, folder):
        speakers = {"one": ["it_IT_m_Carlo", "en_US_f_Allison"], "two": ["lt", "ru"]}[name]
        for pitch, speaker in enumerate(speakers, 2):
            for index in range(6):
                path = folder / "sounds" / speaker / "deep" / f"{index}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                rate = 8000 if index == 5 else 44100
                tone = 0.3 * np.sin(2 * np.pi * 100 * pitch * np.arange(int(1.5 * rate)) / rate)
                soundfile.write(path, np.concatenate([np.zeros(rate), tone, np.zeros(rate)]), rate)
                path.with_suffix(".txt").write_text("no sound")
            silence = folder / "sounds" / speaker / "silence" / "1.wav"
            silence.parent.mkdir()
            soundfile.write(silence, 1e-3 * np.ones(3 * 44100), 44100)

    monkeypatch.setattr(recordings, "unpack", unpack)
    monkeypatch.setattr(recordings, "check_programs", lambda: None)
    pattern = r"sounds/([^/]+)/.*\.wav"
    both = (recordings.Package("one", "MIT", pattern), recordings.Package("two", "MIT", pattern, "klettres_"))
    monkeypatch.setattr(recordings, "PACKAGES", both)
    monkeypatch.setattr(recordings, "HELD_OUT_COUNTS", {"it_IT_m_Carlo": 2, "lt": 99, "fr_CA_f_June": 1, "da": 1})
    return tmp_path / "sound"


def test_recordings_are_split_by_speaker_trimmed_and_the_same_for_a_seed(packages, tmp_path):
    taken = recordings.make_recordings(packages, 0, 1)
    speakers = {
        part: {path.name.split("__")[0] for path in (packages / part).iterdir()}
        for part in ("training", "validation", "held_out_voices")
    }
    assert speakers["held_out_voices"] == {"it_IT_m_Carlo", "klettres_lt"}
    assert speakers["training"] == {"en_US_f_Allison", "klettres_ru"} >= speakers["validation"]
    held_out = sorted((packages / "held_out_voices").iterdir())
    assert len(held_out) == 2 + 5  # as many of Carlo as requested; the telephone recordings are left out
    for path in held_out:
        # 1.5 s of tone and 0.12 s of silence at either end, to the nearest 20 ms
        assert soundfile.info(path).duration == pytest.approx(1.74, abs=0.04)
    assert taken["klettres_lt"]["files"] == 5 and taken["klettres_lt"]["package"] == "two"
    recordings.make_recordings(tmp_path / "again", 0, 1)
    for path in packages.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(packages)).read_bytes()


def test_the_required_voices_and_languages_are_held_out_of_every_source():
    assert [recordings.group_of(name) for name in ("it_IT_m_Carlo", "fr_CA_f_June")] == [
        "it_IT_m_Carlo",
        "fr_CA_f_June",
    ]
    assert recordings.group_of("tuxpaint_da") == recordings.group_of("klettres_da") == "da"
    assert recordings.group_of("en_US_f_Allison") is recordings.group_of("klettres_nds") is None
    assert sum(recordings.HELD_OUT_COUNTS.values()) >= 200


def test_unavailable_recordings_raise_an_error_that_names_the_alternative(packages, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))  # no programs on the path
    with pytest.raises(RuntimeError, match=r"program apt-get.* is missing.*--sound synthetic"):
        recordings.make_recordings(tmp_path / "sound", 0, 1)
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate package one' >&2\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    with pytest.raises(RuntimeError, match="Cannot download the Debian package one: E: Unable to locate package one"):
        recordings.unpack("one", tmp_path)


def test_a_package_whose_audio_files_moved_is_named(packages, monkeypatch):
    monkeypatch.setattr(recordings, "PACKAGES", (recordings.Package("one", "MIT", r"elsewhere/(.*)\.wav"),))
    with pytest.raises(RuntimeError, match="The package one has no audio at the expected paths"):
        recordings.make_recordings(packages, 0, 1)


@pytest.mark.parametrize(("recorded", "expected"), [(7, 3), (0, 2)])
def test_synthetic_clips_are_repeated_up_to_their_share(recorded, expected, tmp_path):
    make = load_script(RECIPE / "make.py")
    for part, count in (("training", recorded), ("training_synthetic", 2)):
        (tmp_path / part).mkdir()
        for index in range(count):
            (tmp_path / part / f"{index}.wav").touch()
    make.write_training_list(tmp_path)
    listed = (tmp_path / "training.txt").read_text().split()
    assert len(set(listed)) == recorded + 2
    assert sum(line.startswith("training_synthetic/") for line in listed) == expected


def test_the_recipe_gives_a_model_at_75_tokens_per_second_within_24_megabytes():
    config = WavTokenizerConfig(**Settings.load(str(RECIPE / "recipe.yaml")).config)
    assert config.frame_rate == 75
    with torch.device("meta"):
        model = WavTokenizerModel(config)
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) < 24e6


@pytest.mark.slow
@needs_espeak
def test_one_command_goes_from_nothing_to_a_card_and_resumes(tmp_path):
    command = [sys.executable, str(RECIPE / "make.py"), "--output", str(tmp_path / "made"), "--quick"]
    subprocess.run(command, check=True)
    model = AutoModel.from_pretrained(tmp_path / "made" / "model")
    text = (tmp_path / "made" / "model" / "README.md").read_text()
    assert model.codebook_fingerprint in text and "| STOI | " in text and "$" not in text
    points = list(csv.DictReader((tmp_path / "made" / "curves.csv").open()))
    assert [point["step"] for point in points] == ["10", "20"]
    weights = tmp_path / "made" / "run" / "last" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    (tmp_path / "made" / "model" / "README.md").unlink()
    subprocess.run(command, check=True)
    assert weights.stat().st_mtime_ns == before and (tmp_path / "made" / "model" / "README.md").exists()
