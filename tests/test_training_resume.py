"""The files of a training run, and resuming it: after a kill, a full disk, or a damaged checkpoint."""

import os
import resource
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import TINY, tiny_settings, write_clips
from training_runs import (  # noqa: F401
    clips,
    finished,
    started,
    without_rehearsal,
)
from transformers import AutoFeatureExtractor, AutoModel

import wavtokenizer_hf.training.loop as loop
import wavtokenizer_hf.training.state as state_module
from wavtokenizer_hf import WavTokenizerModel
from wavtokenizer_hf.training import Settings, train
from wavtokenizer_hf.training.checkpoints import read_state
from wavtokenizer_hf.training.log import Log
from wavtokenizer_hf.training.loop import train_step
from wavtokenizer_hf.training.state import build, restore, save


pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["best", "last"])
def test_checkpoints_load_with_auto_classes_and_are_complete(finished, name):
    state, folder = finished
    model, loading = AutoModel.from_pretrained(folder / "run" / name, output_loading_info=True)
    assert not any(loading.values())
    assert model.config.codebook_fingerprint == model.codebook_fingerprint
    extractor = AutoFeatureExtractor.from_pretrained(folder / "run" / name)
    assert extractor.hop_length == model.config.hop_length == 16
    assert len({file.stat().st_mode for file in (folder / "run" / name).iterdir() if file.is_file()}) == 1
    if name == "last":
        for tensor_name, tensor in state.model.state_dict().items():
            assert torch.equal(model.state_dict()[tensor_name], tensor)


def test_the_log_holds_every_loss_and_the_clips(finished):
    _, folder = finished
    log = EventAccumulator(str(folder / "run" / "log")).Reload()
    names = set(log.Tags()["scalars"])
    used = {name for name, weight in Settings().loss_weights.items() if weight}
    assert {name.removeprefix("loss/") for name in names if name.startswith("loss/")} == {*used, "total"}
    assert {"gradient_norm/codec", "gradient_norm/discriminators", "learning_rate/codec"} <= names
    assert {"codebook/utilization", "codebook/perplexity", "codebook/restarts", "validation/score"} <= names
    assert [event.step for event in log.Scalars("loss/mel")] == [1, 2, 3, 4]
    assert log.Tags()["audio"] == ["clip_0/real", "clip_0/decoded"]
    assert log.Tags()["images"] == ["clip_0/real/mel", "clip_0/decoded/mel"]
    assert [event.step for event in log.Images("clip_0/decoded/mel")] == [2, 4]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(finished, tmp_path, monkeypatch):
    _, folder = finished
    settings = {
        "train_data": str(folder / "clips"),
        "validation_data": str(folder / "validation"),
        "output": str(tmp_path / "run"),
        # the checkpoint after two steps holds trained discriminators and their optimizer state
        "mel_only_steps": 1,
    }

    def crash_in_the_fourth_step(state, batches):
        if state.step == 3:
            raise KeyboardInterrupt
        return train_step(state, batches)

    monkeypatch.setattr(loop, "train_step", crash_in_the_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_settings(tmp_path, **settings))
    monkeypatch.undo()
    torch.manual_seed(12345)  # another process would not have the random state either
    resumed = train(tiny_settings(tmp_path, **settings, resume=True))
    assert resumed.step == 4
    log = EventAccumulator(str(tmp_path / "run" / "log")).Reload()
    assert [event.step for event in log.Scalars("loss/mel")] == [1, 2, 3, 4]  # the third was logged twice
    whole, again = folder / "run" / "last", tmp_path / "run" / "last"
    for file in ("model.safetensors", "discriminators.safetensors"):
        expected, got = load_file(whole / file), load_file(again / file)
        assert all(torch.equal(expected[name], got[name]) for name in expected)
    (facts, tensors), (other_facts, other_tensors) = read_state(whole), read_state(again)
    assert facts["best_score"] == other_facts["best_score"]
    for optimizer in ("optimizer", "discriminator_optimizer"):
        assert tensors[optimizer]["state"]
        for index, values in tensors[optimizer]["state"].items():
            assert all(
                torch.equal(value, other_tensors[optimizer]["state"][index][name]) for name, value in values.items()
            )


def test_resuming_with_other_settings_names_them(finished):
    _, folder = finished
    with pytest.raises(ValueError, match=r"batch_size was 2 and is now 3; learning_rate was 0\.001 and is now 0\.01"):
        train(tiny_settings(folder, mel_only_steps=1, batch_size=3, learning_rate=0.01, log_every=7, resume=True))


def test_resuming_with_added_training_data_is_refused(tmp_path):
    # another number of clips gives another order of clips
    train(tiny_settings(tmp_path, steps=1, mel_only_steps=1))
    write_clips(tmp_path / "clips", count=7)
    with pytest.raises(ValueError, match="clips were 6 and are now 7"):
        train(tiny_settings(tmp_path, steps=1, mel_only_steps=1, resume=True))


def test_a_resumed_run_may_be_longer_and_follows_the_longer_cosine(tmp_path):
    train(tiny_settings(tmp_path, steps=2, mel_only_steps=1))
    state = train(tiny_settings(tmp_path, steps=4, mel_only_steps=1, resume=True))
    assert state.step == 4
    log = EventAccumulator(str(tmp_path / "run" / "log")).Reload()
    # (1 + cos(pi step / steps)) / 2 of 1e-3: of two steps, then of four; the discriminators begin one step later
    assert [event.value for event in log.Scalars("learning_rate/codec")] == pytest.approx(
        [1e-3, 5e-4, 5e-4, 1.464466e-4]
    )
    assert [event.value for event in log.Scalars("learning_rate/discriminators")] == pytest.approx(
        [1e-3, 7.5e-4, 2.5e-4]
    )
    with pytest.raises(ValueError, match="steps were 4 and are now 3, which is fewer"):
        train(tiny_settings(tmp_path, steps=3, mel_only_steps=1, resume=True))


def test_a_finished_run_writes_curves_and_audio_samples(finished):
    _, folder = finished
    picture = (folder / "run" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    real, fake = (soundfile.read(folder / "run" / "samples" / f"clip_0_{name}.wav") for name in ("real", "decoded"))
    assert len(real[0]) == len(fake[0]) == 2400 and real[1] == 24000
    assert abs(abs(real[0]).max() - 10 ** (-3 / 20)) < 1e-3  # the validation clip at -3 dBFS


def test_a_fine_tuned_model_is_validated_before_the_first_step(finished, tmp_path):
    _, folder = finished
    train(tiny_settings(tmp_path, model=str(folder / "run" / "last"), config={}, steps=1))
    log = EventAccumulator(str(tmp_path / "run" / "log")).Reload()
    assert [event.step for event in log.Scalars("validation/mel")] == [0, 1]
    assert [
        event.step for event in EventAccumulator(str(folder / "run" / "log")).Reload().Scalars("validation/mel")
    ] == [2, 4]


def test_the_choice_of_the_codebook_is_logged(tmp_path, capsys):
    train(tiny_settings(tmp_path, steps=1))
    assert "choosing 64 codebook entries by k-means from 600 latents" in capsys.readouterr().err


@pytest.mark.parametrize("validation", ["clips", "clips/part", "."])
def test_training_on_validation_data_is_refused(validation, tmp_path):
    write_clips(tmp_path / "clips")
    write_clips(tmp_path / "clips" / "part")
    changes = {"validation_data": str(tmp_path / validation)}
    if validation == ".":  # a folder around the training clips, with the same audio again
        changes = {"validation_data": str(tmp_path / "clips"), "train_data": str(tmp_path / "." / "clips")}
    with pytest.raises(ValueError, match="validation clips would be trained on"):
        train(tiny_settings(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Failures
# ---------------------------------------------------------------------------------------------------------------------


def test_settings_given_as_tuples_can_be_resumed(tmp_path):
    config = {**TINY, "upsampling_ratios": tuple(TINY["upsampling_ratios"])}
    train(tiny_settings(tmp_path, steps=1, mel_only_steps=1, config=config))
    assert train(tiny_settings(tmp_path, steps=1, mel_only_steps=1, config=config, resume=True)).step == 1


def test_a_run_does_not_overwrite_another(finished):
    _, folder = finished
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny_settings(folder))


def test_a_run_does_not_overwrite_the_best_model_of_a_run_without_state(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.safetensors").write_bytes(b"of the user")
    with pytest.raises(ValueError, match="already holds a run"):
        state_module.check_output(tiny_settings(tmp_path), tmp_path)


def test_resuming_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no state of training"):
        train(tiny_settings(tmp_path, resume=True))


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    def poisoned(state, batches):
        return train_step(state, [audio * (float("nan") if state.step == 2 else 1) for audio in batches])

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(ValueError, match=r"Step 3: .*not finite.*mel nan.*--model \S*last"):
        train(tiny_settings(tmp_path, mel_only_steps=4))
    model = WavTokenizerModel.from_pretrained(tmp_path / "run" / "last")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert read_state(tmp_path / "run" / "last")[0]["step"] == 2


def test_a_non_finite_loss_stops_the_run_even_with_finite_gradients(tmp_path, clips):
    state = started(tiny_settings(tmp_path, mel_only_steps=4))
    state.mel_loss = lambda fake, real: 0 * fake.sum() + float("nan")  # the gradient of |x| is 0 where x is NaN
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"Step 1: .*not finite.*mel nan"):
        train_step(state, [clips])
    assert all(torch.equal(before[name], tensor) for name, tensor in state.model.state_dict().items())


def test_a_full_disk_leaves_the_last_checkpoint_intact(tmp_path):
    state = started(tiny_settings(tmp_path))
    output = tmp_path / "run"
    save(state, output, improved=True)
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    state.step += 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # limits the size of files, as on a full disk
    try:
        with pytest.raises(OSError, match="intact"):
            save(state, output, improved=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before
    restore(state, output)
    assert state.step == 0


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    state = started(tiny_settings(tmp_path))
    save(state, tmp_path / "run", improved=False)
    os.rename(tmp_path / "run" / "last", tmp_path / "run" / "previous")
    state_module.check_output(tiny_settings(tmp_path, resume=True), tmp_path / "run")
    restore(state, tmp_path / "run")
    save(state, tmp_path / "run", improved=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["best", "last", "previous"]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """
    Return a run with last/ after step 2, with discriminators, and previous/ after step 1; and a state to restore into.
    """
    folder = tmp_path_factory.mktemp("two")
    settings = {"steps": 2, "mel_only_steps": 1, "validate_every": 1}
    train(tiny_settings(folder, **settings))
    state = build(tiny_settings(folder, **settings, resume=True))
    state.num_clips = 6
    return folder, state


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _pickle_of_a_call(path):
    path.write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")


DAMAGES = {
    "weights cut": ("model.safetensors", _cut),
    "weights gone": ("model.safetensors", os.remove),
    "discriminators cut": ("discriminators.safetensors", _cut),
    "discriminators gone": ("discriminators.safetensors", os.remove),
    "optimizers empty": ("training_state/optimizers.pt", lambda path: path.write_bytes(b"")),
    "optimizers cut": ("training_state/optimizers.pt", _cut),
    "optimizers are a list": ("training_state/optimizers.pt", lambda path: torch.save([1, 2], path)),
    "optimizers of another": ("training_state/optimizers.pt", lambda path: torch.save({"optimizer": {"x": 1}}, path)),
    "optimizers run code": ("training_state/optimizers.pt", _pickle_of_a_call),
    "a foreign class": ("training_state/optimizers.pt", lambda path: torch.save({"a": Path("x")}, path)),
    "state is no JSON": ("training_state/state.json", lambda path: path.write_text("{")),
    "state is a list": ("training_state/state.json", lambda path: path.write_text("[1]")),
    "state lacks its step": ("training_state/state.json", lambda path: path.write_text("{}")),
    "config is a list": ("config.json", lambda path: path.write_text("[]")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_previous_one_in_one_line(
    damage, two_checkpoints, tmp_path, caplog, monkeypatch
):
    folder, state = two_checkpoints
    shutil.copytree(folder / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    name, do = DAMAGES[damage]
    do(tmp_path / "run" / "last" / name)
    restore(state, tmp_path / "run")
    assert state.step == 1
    expected = load_file(folder / "run" / "previous" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.model.state_dict().items())
    (said,) = [record.getMessage() for record in caplog.records if "Went back to step 1" in record.getMessage()]
    assert "\n" not in said and len(said) < 800
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best",
        "curves.png",
        "last.damaged",
        "log",
        "previous",
    ]
    save(state, tmp_path / "run", improved=False)  # the intact checkpoint stays beside it
    assert (
        read_state(tmp_path / "run" / "last")[0]["step"] == read_state(tmp_path / "run" / "previous")[0]["step"] == 1
    )
    assert not (tmp_path / "executed").exists()


def test_two_damaged_checkpoints_are_refused_in_one_line(two_checkpoints, tmp_path, capsys):
    folder, state = two_checkpoints
    shutil.copytree(folder / "run", tmp_path / "run")
    for name in ("last", "previous"):
        _cut(tmp_path / "run" / name / "model.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint in .* to resume from: .*last.*previous") as error:
        restore(state, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert (tmp_path / "run" / "last").is_dir()


def test_an_unwritable_log_gives_one_warning(tmp_path, caplog, capfd):
    log = Log(tmp_path / "log", 24000, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        for step in range(200):
            log.scalars({f"loss/{number}": 0.5 for number in range(10)}, step)
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (said,) = [record.getMessage() for record in caplog.records if "nothing more is logged" in record.getMessage()]
    assert str(tmp_path / "log") in said and "File too large" in said
    assert "Traceback" not in capfd.readouterr().err


def test_a_segment_too_short_for_the_losses_spectrograms_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"segment_seconds=0\.04.*more than 1024 samples"):
        train(tiny_settings(tmp_path, segment_seconds=0.04))


def test_a_warning_is_given_if_all_clips_are_shorter_than_a_segment(tmp_path, caplog):
    train(tiny_settings(tmp_path, steps=1, segment_seconds=0.5))
    assert "shorter than segment_seconds=0.5" in caplog.text


def test_push_to_hub_uploads_the_best_folder(tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, exist_ok):
            calls.append(("create", name))

        def upload_folder(self, repo_id, folder_path, commit_message):
            assert AutoModel.from_pretrained(folder_path).config.hop_length == 16
            calls.append(("upload", repo_id, Path(folder_path).name))

    monkeypatch.setattr(state_module, "_hub", Hub)
    train(tiny_settings(tmp_path, steps=1, push_to_hub="someone/model"))
    assert calls == [("create", "someone/model"), ("upload", "someone/model", "best")]
