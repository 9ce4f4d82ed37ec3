"""The loop: what a step does, what a run leaves behind, and that it can be stopped, resumed and shared out."""

import itertools
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import soundfile
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import TINY, tiny_settings, train_by_plain_descent, write_clips
from transformers import AutoFeatureExtractor, AutoModel

import wavtokenizer_hf.training.loop as loop
import wavtokenizer_hf.training.state as state_module
from wavtokenizer_hf import WavTokenizerModel, cli
from wavtokenizer_hf.training import Settings, train
from wavtokenizer_hf.training.checkpoints import read_state
from wavtokenizer_hf.training.data import Batch
from wavtokenizer_hf.training.log import Log
from wavtokenizer_hf.training.loop import train_step, validate
from wavtokenizer_hf.training.memory import Estimate, PeakMemory, refusal
from wavtokenizer_hf.training.settings import WEIGHTS, read_arguments
from wavtokenizer_hf.training.state import build, restore, save


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def without_rehearsal(request, monkeypatch):
    """Only tests of memory, and those of other processes, make the small steps that estimate it: they take as long as a tiny run."""
    if "memory" not in request.node.name:
        monkeypatch.setattr(loop, "check_memory", lambda state, length: None)


@pytest.fixture
def sound() -> torch.Tensor:
    torch.manual_seed(0)
    return 0.3 * torch.randn(2, 1, 2400)


def started(settings: Settings):
    """A state whose codebook has begun, as after k-means."""
    state = build(settings)
    torch.manual_seed(0)
    with torch.no_grad():
        latents = state.model.encoder_model.encoder(0.3 * torch.randn(4, 1, 2400))
    state.learner.start([latents.transpose(1, 2).flatten(0, 1)], 10, 300)
    return state


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, three of them with discriminators, and the folder that it left behind."""
    folder = tmp_path_factory.mktemp("finished")
    return train(tiny_settings(folder, mel_only_steps=1, num_logged_clips=1)), folder


# ---------------------------------------------------------------------------------------------------------------------
# A step
# ---------------------------------------------------------------------------------------------------------------------


def test_gradients_reach_every_trained_tensor_of_all_discriminators_too(tmp_path, sound, monkeypatch):
    # in the original the optimizer holds one DAC-style discriminator and the loss another, which so never learns
    state = started(tiny_settings(tmp_path, mel_only_steps=0))
    before = {
        f"{kind}.{name}": tensor.clone()
        for kind, module in (("model", state.model), ("critics", state.critics))
        for name, tensor in module.named_parameters()
    }
    reached = set()
    for kind, module in (("model", state.model), ("critics", state.critics)):
        for name, parameter in module.named_parameters():

            def note(gradient, name=f"{kind}.{name}"):
                if gradient.any():
                    reached.add(name)

            parameter.register_hook(note)
    for _ in range(2):
        train_step(state, [sound])
    assert set(before) - reached == set()
    assert sum(name.startswith("critics.dac.") for name in reached) > 100
    unmoved = [
        name
        for name, tensor in before.items()
        if torch.equal(
            tensor,
            dict((state.model if name.startswith("model.") else state.critics).named_parameters())[
                name.split(".", 1)[1]
            ],
        )
    ]
    assert unmoved == []


@pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning")
def test_the_codecs_step_leaves_the_discriminators_alone(tmp_path, sound):
    state = started(tiny_settings(tmp_path, mel_only_steps=0))
    state.critics_optimizer.step = lambda: None
    before = {name: tensor.clone() for name, tensor in state.critics.state_dict().items()}
    train_step(state, [sound])
    assert all(torch.equal(before[name], tensor) for name, tensor in state.critics.state_dict().items())
    assert all(parameter.grad is None for parameter in state.critics.parameters())


def test_mel_only_steps_run_without_discriminators(tmp_path, sound):
    # the original crashes there
    state = started(tiny_settings(tmp_path, mel_only_steps=2))
    names = [set(train_step(state, [sound])) for _ in range(3)]
    assert {"loss/mel", "loss/commitment", "loss/total"} <= names[0]
    assert not any(name.startswith("discriminator") or name == "loss/dac" for name in names[1])
    assert {"loss/dac", "loss/dac_features", "discriminator/dac", "gradient_norm/discriminators"} <= names[2]


def test_total_loss_is_the_published_sum(tmp_path, sound):
    figures = train_step(started(tiny_settings(tmp_path, mel_only_steps=0)), [sound])
    parts = (
        "multi_period",
        "multi_period_features",
        "multi_resolution",
        "multi_resolution_features",
        "dac",
        "dac_features",
    )
    expected = (
        45 * figures["loss/mel"] + 1000 * figures["loss/commitment"] + sum(figures[f"loss/{part}"] for part in parts)
    )
    assert figures["loss/total"] == pytest.approx(expected, rel=1e-5)  # float32 sum


def test_other_mel_scales_count_only_with_a_weight_of_their_own(tmp_path, sound):
    weights = {"mel_scales": 30.0}
    without, counted = (
        train_step(started(tiny_settings(tmp_path, loss_weights=each)), [sound]) for each in ({}, weights)
    )
    assert "loss/mel_scales" not in without and counted["loss/mel_scales"] > 0
    expected = without["loss/total"] + 30 * counted["loss/mel_scales"]
    assert counted["loss/total"] == pytest.approx(expected, rel=1e-5)  # float32 sum


def test_the_reencoding_loss_is_how_far_decoded_audio_lands_from_its_codes(tmp_path, sound):
    weights = {"reencoding": 30.0}
    without, counted = (started(tiny_settings(tmp_path, dropout=0.0, loss_weights=each)) for each in ({}, weights))
    model = without.model.eval()
    with torch.no_grad():  # by the model's public methods
        audio_codes = model.encode(sound).audio_codes
        decoded = model.decode(audio_codes).audio_values[..., : sound.shape[-1]]
        landed = model.encode(decoded, output_latents=True).latents
    expected = (landed - model.quantizer.decode(audio_codes)).square().mean().item()
    without, counted = train_step(without, [sound]), train_step(counted, [sound])
    assert "loss/reencoding" not in without
    # the encoder computes by other means where it needs no gradients
    assert counted["loss/reencoding"] == pytest.approx(expected, rel=1e-4)
    assert counted["loss/total"] == pytest.approx(without["loss/total"] + 30 * expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_the_reencoding_loss_teaches_encoder_and_decoder(tmp_path, sound):
    state = started(tiny_settings(tmp_path, loss_weights=dict.fromkeys(WEIGHTS, 0.0) | {"reencoding": 1.0}))
    state.optimizer = torch.optim.SGD(state.model.parameters(), 1.0)  # AdamW would move all by weight decay alone
    before = {name: parameter.clone() for name, parameter in state.model.named_parameters()}
    train_step(state, [sound])
    moved = [name for name, parameter in state.model.named_parameters() if not parameter.equal(before[name])]
    assert {name.partition(".")[0] for name in moved} == {name.partition(".")[0] for name in before}


def test_learning_rate_warms_up_and_falls_by_a_cosine(tmp_path, sound):
    state = started(tiny_settings(tmp_path, steps=8, mel_only_steps=8, warmup_steps=2))
    rates = [train_step(state, [sound])["learning_rate/codec"] for _ in range(8)]
    # rise over 2 steps, then (1 + cos) / 2 over the other 6
    assert rates == pytest.approx([0, 5e-4, 1e-3, 9.330127e-4, 7.5e-4, 5e-4, 2.5e-4, 6.698730e-5])


def test_discriminators_may_have_a_learning_rate_of_their_own(tmp_path, sound):
    state = started(tiny_settings(tmp_path, mel_only_steps=0, discriminator_learning_rate=1e-4))
    figures = train_step(state, [sound])
    assert (figures["learning_rate/codec"], figures["learning_rate/discriminators"]) == (1e-3, 1e-4)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning")
def test_gradients_are_clipped_to_the_given_norm(tmp_path, sound):
    state = started(tiny_settings(tmp_path, max_gradient_norm=0.01))
    seen = []
    step = state.optimizer.step

    def look():
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        seen.append(torch.nn.utils.get_total_norm(gradients).item())
        step()

    state.optimizer.step = look
    figures = train_step(state, [sound])
    assert figures["gradient_norm/codec"] > 0.01  # what is logged is the norm before
    assert seen == pytest.approx([0.01], rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_accumulated_batches_give_the_gradients_and_codebook_of_one(tmp_path):
    torch.manual_seed(0)
    audio = 0.3 * torch.randn(4, 1, 2400)
    # no dropout, whose masks differ; plain gradient descent, which does not blow rounding up
    results = []
    for parts in ([audio], list(audio.split(2))):
        state = started(tiny_settings(tmp_path, mel_only_steps=0, dropout=0.0))
        state.optimizer = torch.optim.SGD(state.model.parameters(), 1e-3)
        state.critics_optimizer = torch.optim.SGD(state.critics.parameters(), 1e-3)
        train_step(state, parts)
        results.append({**state.model.state_dict(), **state.critics.state_dict()})
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("name", ["ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"])
def test_a_step_is_what_the_settings_say_whatever_accelerate_was_configured_to(name, tmp_path, sound, monkeypatch):
    steps = []
    for value in (None, {"ACCELERATE_MIXED_PRECISION": "bf16"}.get(name, "4")):
        if value:
            monkeypatch.setenv(name, value)  # as `accelerate config` and the options of `accelerate launch` do
        AcceleratorState._reset_state(reset_partial_state=True)
        steps.append(train_step(started(tiny_settings(tmp_path, mel_only_steps=0)), [sound]))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert steps[0] == steps[1]


def test_bfloat16_keeps_latents_and_codes_in_float32(tmp_path):
    # not shorter: on a CPU, torch 2.13 computes bfloat16 convolutions of stride (2, 2) over maps of width 1 or 2 wrongly
    sound = 0.3 * torch.randn(1, 1, 12000, generator=torch.Generator().manual_seed(0))
    codes = []
    for precision in ("float32", "bfloat16"):
        state = started(tiny_settings(tmp_path, precision=precision, mel_only_steps=0))
        made, losses, latents, audio_codes = state.codec(sound, 0)
        assert (latents.dtype, losses["commitment"].dtype, made.dtype) == (torch.float32,) * 3
        codes.append((audio_codes, made))
        assert train_step(state, [sound])["loss/total"] < float("inf")
    assert torch.equal(codes[0][0], codes[1][0])
    assert len(codes[0][0].unique()) > 1
    assert not torch.equal(codes[0][1], codes[1][1])  # and the decoder does run in bfloat16


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_computes_what_the_step_computes(tmp_path, sound):
    plain, compiled = (
        train_step(started(tiny_settings(tmp_path, mel_only_steps=0, dropout=0.0, compile=each)), [sound])
        for each in (False, True)
    )
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        assert compiled[name] == pytest.approx(value, rel=1e-3), name  # float32 sums in another order


def test_loss_falls_and_utilization_rises(tmp_path, sound):
    settings = {"steps": 60, "mel_only_steps": 60, "codebook_decay": 0.9, "loss_weights": {"commitment": 1.0}}
    state = build(tiny_settings(tmp_path, **settings))
    loop.normalize_encoder(state, iter([Batch(sound)]))
    loop.start_codebook(state, itertools.repeat(Batch(sound)))
    state.model.quantizer.codebook.embed[8:] += 100  # most entries lie where no latent is
    figures = [train_step(state, [sound]) | state.learner.report() for _ in range(60)]
    assert figures[-1]["loss/mel"] < 0.8 * figures[0]["loss/mel"]
    assert figures[0]["utilization"] <= 1 / 8
    assert figures[-1]["utilization"] > 1 / 2


@pytest.mark.parametrize("rows", [1, 2])  # without gradients, one row goes through the encoder by other means
def test_a_normalized_encoder_begins_with_mean_0_and_deviation_1(rows, tmp_path, sound):
    state, sound = build(tiny_settings(tmp_path)), sound[:rows]
    encoder = state.model.encoder_model.encoder
    with torch.no_grad():
        assert encoder(sound).std() < 0.1  # PyTorch's own initialization
        loop.normalize_encoder(state, iter([Batch(sound)]))
        latents = encoder(sound)
    torch.testing.assert_close(latents.mean(dim=(0, 2)), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std(dim=(0, 2), correction=0), torch.ones(16), rtol=0, atol=1e-4)


def test_only_a_new_model_is_normalized(tmp_path):
    settings = {"steps": 2, "mel_only_steps": 2, "validate_every": 1, "normalize_encoder": True}
    train(tiny_settings(tmp_path, **settings, continuous_steps=1))
    (tmp_path / "run" / "last").rename(tmp_path / "earlier")
    weights = load_file(tmp_path / "earlier" / "model.safetensors")
    # as of a run that was cut off in its continuous steps
    weights["encoder_model.quantizer.codebook.inited"] = torch.zeros(1)
    save_file(weights, tmp_path / "earlier" / "model.safetensors", {"format": "pt"})
    # a rate at which nothing moves
    again = {"output": str(tmp_path / "again"), "model": str(tmp_path / "earlier"), "learning_rate": 1e-30}
    trained = train(tiny_settings(tmp_path, **{**settings, **again})).model.state_dict()
    for name, tensor in trained.items():
        if ".encoder." in name:
            assert torch.equal(tensor, weights[name])


def test_continuous_steps_leave_the_codebook_alone_and_k_means_follows(tmp_path, sound):
    state = build(tiny_settings(tmp_path, mel_only_steps=4, continuous_steps=1))
    before = state.model.quantizer.codebook.embed.clone()
    assert "loss/commitment" not in train_step(state, [sound])
    assert torch.equal(state.model.quantizer.codebook.embed, before)
    run = train(tiny_settings(tmp_path, mel_only_steps=4, continuous_steps=3))
    assert run.model.quantizer.codebook.inited.item() == 1
    log = EventAccumulator(str(tmp_path / "run" / "log")).Reload()
    assert [event.step for event in log.Scalars("loss/commitment")] == [4]


# ---------------------------------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------------------------------


def test_validation_changes_nothing_of_the_model(tmp_path, sound):
    state = started(tiny_settings(tmp_path))
    state.model.train()  # an encoder left in training mode rewrites the original's codebook while it encodes
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    state.model.encode(sound)
    first, second = (validate(state, Batch(sound), None) for _ in range(2))
    assert first == second
    assert first["validation/score"] == pytest.approx(first["validation/mel"] + 1000 * first["validation/commitment"])
    assert first["validation/commitment"] > 0  # the original's is 0 outside of training
    assert all(torch.equal(before[name], tensor) for name, tensor in state.model.state_dict().items())


def test_encoding_leaves_a_codebook_alone_that_was_never_started(tmp_path, sound):
    # the original runs k-means in inference where `inited` is 0
    state = build(tiny_settings(tmp_path))
    before = state.model.quantizer.codebook.embed.clone()
    validate(state, Batch(sound), None)
    state.model.train().encode(sound)
    assert state.model.quantizer.codebook.inited.item() == 0
    assert torch.equal(state.model.quantizer.codebook.embed, before)


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind
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
    assert log.Tags()["audio"] == ["clip_0/real", "clip_0/made"]
    assert log.Tags()["images"] == ["clip_0/real/mel", "clip_0/made/mel"]
    assert [event.step for event in log.Images("clip_0/made/mel")] == [2, 4]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(finished, tmp_path, monkeypatch):
    _, folder = finished
    settings = {
        "train_data": str(folder / "clips"),
        "validation_data": str(folder / "validation"),
        "output": str(tmp_path / "run"),
        "mel_only_steps": 1,  # the checkpoint, after two, holds discriminators that have learned, and their optimizer's state
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
    for optimizer in ("optimizer", "critics_optimizer"):
        assert tensors[optimizer]["state"]
        for index, values in tensors[optimizer]["state"].items():
            assert all(
                torch.equal(value, other_tensors[optimizer]["state"][index][name]) for name, value in values.items()
            )


def test_resuming_with_other_settings_says_which(finished):
    _, folder = finished
    with pytest.raises(ValueError, match=r"batch_size was 2 and is now 3; learning_rate was 0\.001 and is now 0\.01"):
        train(tiny_settings(folder, mel_only_steps=1, batch_size=3, learning_rate=0.01, log_every=7, resume=True))


def test_resuming_with_a_folder_that_has_grown_is_refused(tmp_path):
    # another number of clips is another order of clips
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


def test_a_finished_run_leaves_curves_and_samples_to_hear(finished):
    _, folder = finished
    picture = (folder / "run" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    real, made = (soundfile.read(folder / "run" / "samples" / f"clip_0_{name}.wav") for name in ("real", "made"))
    assert len(real[0]) == len(made[0]) == 2400 and real[1] == 24000
    assert abs(abs(real[0]).max() - 10 ** (-3 / 20)) < 1e-3  # the validation clip at -3 dBFS


def test_a_model_that_is_trained_further_is_validated_before_the_first_step(finished, tmp_path):
    _, folder = finished
    train(tiny_settings(tmp_path, model=str(folder / "run" / "last"), config={}, steps=1))
    log = EventAccumulator(str(tmp_path / "run" / "log")).Reload()
    assert [event.step for event in log.Scalars("validation/mel")] == [0, 1]
    assert [
        event.step for event in EventAccumulator(str(folder / "run" / "log")).Reload().Scalars("validation/mel")
    ] == [2, 4]


def test_the_choice_of_the_codebook_is_announced(tmp_path, capsys):
    train(tiny_settings(tmp_path, steps=1))
    assert "choosing 64 codebook entries by k-means from 600 latents" in capsys.readouterr().err


@pytest.mark.parametrize("validation", ["clips", "clips/part", "."])
def test_training_on_what_validates_is_refused(validation, tmp_path):
    write_clips(tmp_path / "clips")
    write_clips(tmp_path / "clips" / "part")
    changes = {"validation_data": str(tmp_path / validation)}
    if validation == ".":  # around the training clips: the same sound once more
        changes = {"validation_data": str(tmp_path / "clips"), "train_data": str(tmp_path / "." / "clips")}
    with pytest.raises(ValueError, match="would hear what it is judged by"):
        train(tiny_settings(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_that_does_not_fit_is_refused_with_settings_that_do():
    found = Estimate(fixed=3e9, per_segment=0.5e9)
    settings = Settings(batch_size=40, memory_gb=16)
    assert refusal(found, 24e9, settings) is None
    text = refusal(found, 16e9, settings)
    assert "batch_size=40 segments of 3 s needs about 23.0 GB" in text and "16.0 GB are free" in text
    # 0.9 * 16 GB - 3 GB hold 22 segments, and twice 22 are at least 40
    assert "--batch-size 22 --gradient-accumulation 2, which needs about 14.0 GB" in text
    # of 3 GB nothing is left; of 3.4 GB, 0.06 GB: a tenth of a segment is too short, and of 4 GB six fifths are not
    assert "No batch fits" in refusal(found, 3e9, settings)
    assert "--batch-size 1 --segment-seconds 2" in refusal(found, 3.75e9, settings)


def test_memory_that_is_too_small_stops_a_run_before_its_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"needs about .* GB.*0\.0 GB are free"):
        train(tiny_settings(tmp_path, memory_gb=0.01))
    assert not (tmp_path / "run" / "last").exists()


def test_the_estimate_of_memory_changes_nothing_of_the_run(tmp_path, sound):
    states = [started(tiny_settings(tmp_path, mel_only_steps=0)) for _ in range(2)]
    loop.check_memory(states[0], 2400)
    figures = [train_step(state, [sound]) for state in states]
    assert figures[0] == figures[1]
    for one, other in zip(*(state.model.state_dict().values() for state in states), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a while")
def test_the_estimate_of_memory_is_near_what_a_step_takes(tmp_path):
    config = {**Settings.load("small_cpu").config, "num_filters": 16}
    state = build(
        tiny_settings(tmp_path, config=config, batch_size=24, segment_seconds=1.0, discriminator_scale=1 / 8)
    )
    found = loop.check_memory(state, 24000)
    state.model.quantizer.codebook.inited.fill_(1)
    state.settings.mel_only_steps = 0
    with PeakMemory(torch.device("cpu")) as peak:
        train_step(state, [0.1 * torch.randn(24, 1, 24000)])
    assert found.of(24) == pytest.approx(peak.bytes, rel=0.15)


# ---------------------------------------------------------------------------------------------------------------------
# A frozen encoder
# ---------------------------------------------------------------------------------------------------------------------


def test_a_frozen_encoder_and_codebook_stay_bit_for_bit_while_the_decoder_learns(finished, tmp_path):
    _, folder = finished
    source = folder / "run" / "last"
    settings = {"model": str(source), "config": {}, "freeze": "encoder", "mel_only_steps": 1, "restart_below": 0.5}
    train(tiny_settings(tmp_path, **settings, loss_weights={"reencoding": 1.0}))
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "run" / "last"))
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("encoder_model."))
    moved = [name for name in before if not torch.equal(after[name], before[name])]
    assert len(moved) == sum(not name.startswith("encoder_model.") for name in before)
    one, other = (WavTokenizerModel.from_pretrained(path) for path in (source, tmp_path / "run" / "last"))
    assert one.codebook_fingerprint == other.codebook_fingerprint


def test_a_frozen_encoder_that_changes_all_the_same_stops_the_run(finished, tmp_path):
    _, folder = finished
    state = build(tiny_settings(tmp_path, model=str(folder / "run" / "last"), config={}, freeze="encoder"))
    state.model.quantizer.codebook.embed[0, 0] += 1e-6
    with pytest.raises(RuntimeError, match="changed although it is frozen"):
        save(state, tmp_path / "run", improved=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": "decoder"}, "freeze='decoder', expected 'encoder'"),
        ({"freeze": "encoder", "continuous_steps": 1}, "continuous_steps=1"),
        ({"freeze": "encoder"}, "without a model"),
    ],
)
def test_what_cannot_be_frozen_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tiny_settings(tmp_path, **changes))


def test_a_model_without_a_codebook_cannot_be_frozen(tmp_path):
    build(tiny_settings(tmp_path)).model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has no codebook yet"):
        build(tiny_settings(tmp_path, model=str(tmp_path / "model"), config={}, freeze="encoder"))


def test_settings_given_as_tuples_can_be_resumed(tmp_path):
    config = {**TINY, "upsampling_ratios": tuple(TINY["upsampling_ratios"])}
    train(tiny_settings(tmp_path, steps=1, mel_only_steps=1, config=config))
    assert train(tiny_settings(tmp_path, steps=1, mel_only_steps=1, config=config, resume=True)).step == 1


def test_a_run_does_not_overwrite_another(finished):
    _, folder = finished
    with pytest.raises(ValueError, match="holds a run already"):
        train(tiny_settings(folder))


def test_a_run_does_not_overwrite_the_best_model_of_one_whose_state_is_gone(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.safetensors").write_bytes(b"of the user")
    with pytest.raises(ValueError, match="holds a run already"):
        state_module.check_output(tiny_settings(tmp_path), tmp_path)


def test_resuming_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no state of training"):
        train(tiny_settings(tmp_path, resume=True))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    def poisoned(state, batches):
        return train_step(state, [audio * (float("nan") if state.step == 2 else 1) for audio in batches])

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(ValueError, match=r"Step 3: .*not finite.*mel nan.*--model \S*last"):
        train(tiny_settings(tmp_path, mel_only_steps=4))
    model = WavTokenizerModel.from_pretrained(tmp_path / "run" / "last")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert read_state(tmp_path / "run" / "last")[0]["step"] == 2


def test_a_loss_that_is_not_finite_stops_the_run_even_where_its_gradients_are(tmp_path, sound):
    state = started(tiny_settings(tmp_path, mel_only_steps=4))
    state.mel_loss = lambda made, real: 0 * made.sum() + float("nan")  # the gradient of |x| is 0 where x is NaN
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"Step 1: .*not finite.*mel nan"):
        train_step(state, [sound])
    assert all(torch.equal(before[name], tensor) for name, tensor in state.model.state_dict().items())


def test_a_disk_that_fills_leaves_the_last_checkpoint_intact(tmp_path):
    state = started(tiny_settings(tmp_path))
    output = tmp_path / "run"
    save(state, output, improved=True)
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    state.step += 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no file can grow beyond, as on a full disk
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
    """A run with last/ after step 2, with discriminators, and previous/ after step 1; and a state to restore into."""
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
def test_a_damaged_checkpoint_falls_back_to_the_one_before_it_in_one_line(
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
    save(state, tmp_path / "run", improved=False)  # what was good stays beside it
    assert (
        read_state(tmp_path / "run" / "last")[0]["step"] == read_state(tmp_path / "run" / "previous")[0]["step"] == 1
    )
    assert not (tmp_path / "executed").exists()


def test_two_damaged_checkpoints_are_refused_in_one_line(two_checkpoints, tmp_path, capsys):
    folder, state = two_checkpoints
    shutil.copytree(folder / "run", tmp_path / "run")
    for name in ("last", "previous"):
        _cut(tmp_path / "run" / name / "model.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint in .* to go on from: .*last.*previous") as error:
        restore(state, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert (tmp_path / "run" / "last").is_dir()


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path, caplog, capfd):
    log = Log(tmp_path / "log", 24000, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        for step in range(200):
            log.figures({f"loss/{number}": 0.5 for number in range(10)}, step)
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (said,) = [record.getMessage() for record in caplog.records if "nothing more is logged" in record.getMessage()]
    assert str(tmp_path / "log") in said and "File too large" in said
    assert "Traceback" not in capfd.readouterr().err


def test_a_segment_too_short_for_the_losses_spectrograms_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"segment_seconds=0\.04.*more than 1024 samples"):
        train(tiny_settings(tmp_path, segment_seconds=0.04))


def test_clips_that_are_all_shorter_than_a_segment_are_warned_of(tmp_path, caplog):
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


# ---------------------------------------------------------------------------------------------------------------------
# Going on from other models
# ---------------------------------------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_the_models_weights_and_discriminators(finished, tmp_path):
    _, folder = finished
    state = build(tiny_settings(tmp_path, model=str(folder / "run" / "best"), config={}))
    weights = load_file(folder / "run" / "best" / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in state.model.state_dict().items())
    critics = load_file(folder / "run" / "best" / "discriminators.safetensors")
    assert all(torch.equal(tensor, critics[name]) for name, tensor in state.critics.state_dict().items())
    assert len(critics) > 400


def test_a_recipe_for_new_models_serves_a_model_of_its_shape_and_no_other(finished, tmp_path):
    _, folder = finished
    model = str(folder / "run" / "best")
    build(tiny_settings(tmp_path, model=model, config={"upsampling_ratios": (4, 2, 2), "codebook_size": 64}))
    with pytest.raises(ValueError, match=r"num_filters=4 and the settings' config num_filters=8"):
        build(tiny_settings(tmp_path, model=model, config={"num_filters": 8}))


def test_a_model_without_discriminators_is_said_to_have_none(tmp_path, caplog):
    build(tiny_settings(tmp_path)).model.save_pretrained(tmp_path / "model")
    assert not caplog.records
    build(tiny_settings(tmp_path, model=str(tmp_path / "model"), config={}))
    assert "has no discriminators.safetensors" in caplog.text
    caplog.clear()
    build(tiny_settings(tmp_path, model=str(tmp_path / "model"), config={}, mel_only_steps=4))  # which needs none
    assert not caplog.records


def test_discriminators_of_another_size_are_refused(finished, tmp_path):
    _, folder = finished
    with pytest.raises(ValueError, match="discriminator_scale"):
        build(tiny_settings(tmp_path, model=str(folder / "run" / "best"), config={}, discriminator_scale=1 / 16))


# ---------------------------------------------------------------------------------------------------------------------
# Settings and the command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["published_75", "published_40", "small_cpu"])
def test_recipes_for_new_models_are_settings_of_a_model_that_can_be_built(name):
    settings = Settings.load(name)
    with torch.device("meta"):
        model = WavTokenizerModel(state_module._new_config(settings.config))
    assert model.config.frame_rate == (40 if name == "published_40" else 75)


@pytest.mark.parametrize(("name", "frames"), [("published_75", 225), ("published_40", 120)])  # in 3 s
def test_published_recipes_are_the_published_training(name, frames):
    settings = Settings.load(name)
    assert (settings.batch_size, settings.segment_seconds, settings.steps) == (40, 3, 1_000_000)
    assert (settings.learning_rate, settings.discriminator_learning_rate, settings.warmup_steps) == (2e-4, None, 0)
    assert (settings.mel_only_steps, settings.continuous_steps, settings.max_gradient_norm) == (0, 0, None)
    assert (settings.codebook_decay, settings.kmeans_iterations, settings.dropout) == (0.99, 200, 0.1)
    assert (settings.gradient_accumulation, settings.discriminator_scale, settings.model) == (1, 1, None)
    weights = {loss: weight for loss, weight in settings.loss_weights.items() if weight}
    assert (weights.pop("mel"), weights.pop("commitment")) == (45, 1000)
    assert len(weights) == 6 and set(weights.values()) == {1}
    # on 8 GPUs: k-means on the first batch; entries below a count of 2 are replaced, as a share of an even count
    assert settings.kmeans_latents == 8 * 40 * frames
    assert settings.restart_below * 8 * 40 * frames / 4096 == pytest.approx(2, rel=5e-3)  # three digits


def test_the_small_models_file_stays_within_12_megabytes():
    with torch.device("meta"):
        model = WavTokenizerModel(state_module._new_config(Settings.load("small_cpu").config))
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    assert 4 * numbers < 12_000_000 - 50_000  # the header takes less than that


def test_the_command_line_goes_before_the_recipe(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 7\nlearning_rate: 1e-4\nconfig: {num_filters: 8, hidden_size: 64}\n")
    parser = cli._parser()
    arguments = ["train", str(recipe), "--steps", "3", "--config", "num_filters=16", "codebook_size=32", "--resume"]
    settings = read_arguments(parser.parse_args([*arguments, "--max_gradient_norm", "none"]))
    assert (settings.steps, settings.learning_rate, settings.resume, settings.max_gradient_norm) == (
        3,
        1e-4,
        True,
        None,
    )
    assert settings.config == {"num_filters": 16, "hidden_size": 64, "codebook_size": 32}
    with pytest.raises(SystemExit):
        parser.parse_args(["train", "--help"])
    assert "--restart-below" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"stpes": 3}, "unknown settings: stpes"),
        ({"learning_rate": "fast"}, "learning_rate='fast'"),
        ({"precision": "float16"}, "precision='float16'"),
        ({"loss_weights": {"stft": 1}}, "loss_weights for stft"),
        ({"loss_weights": {"mel": "much"}}, "loss_weights mel='much'"),
        ({"loss_weights": {"mel": -1}}, "loss_weights mel=-1"),
        ({"steps": 5, "continuous_steps": 5}, "continuous_steps=5 of steps=5"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings.load(None, changes)


def test_config_fields_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_filter"):
        build(tiny_settings(tmp_path, config={"num_filter": 8}))


def test_the_command_trains_and_says_what_came_of_it(tmp_path, capsys):
    clips = write_clips(tmp_path / "clips")
    config = [f"{name}={json.dumps(value)}" for name, value in TINY.items()]
    other = write_clips(tmp_path / "other", count=2)
    arguments = ["--train_data", str(clips), "--validation-data", str(other), "--output", str(tmp_path / "run")]
    arguments += [
        "--steps",
        "1",
        "--mel_only_steps",
        "1",
        "--batch_size",
        "2",
        "--segment_seconds",
        "0.1",
        "--num_workers",
        "0",
    ]
    assert cli.main(["train", *arguments, "--kmeans_latents", "200", "--json", "--config", *config]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["steps"] == 1
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()


def test_missing_data_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert cli.main(["train", "--train_data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "run")]) == 2
    assert "nowhere" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def two_processes(code: str, *arguments):
    """Meanwhile runs code in two processes that find each other by the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        yield
        for process in processes:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()


ACCUMULATED = {"gradient_accumulation": 2, "steps": 2, "mel_only_steps": 1}
WORKER = f"""
import sys
from pathlib import Path
import torch
from tiny_training import train_by_plain_descent

torch.set_num_threads(1)
folder = Path(sys.argv[1])
train_by_plain_descent(folder, folder / "two", batch_size=2)
train_by_plain_descent(folder, folder / "two_accumulated", batch_size=1, **{ACCUMULATED})
"""


def test_two_processes_give_the_weights_and_codebook_of_one(tmp_path):
    # through the whole loop: k-means, mel-only steps and steps with discriminators, restarts, a clip that is skipped
    clips = write_clips(tmp_path / "clips")
    (clips / "clip_2_broken.wav").write_bytes(b"RIFF and nothing more")
    with two_processes(WORKER, tmp_path):
        train_by_plain_descent(tmp_path, tmp_path / "one", batch_size=4)
        train_by_plain_descent(tmp_path, tmp_path / "one_accumulated", batch_size=2, **ACCUMULATED)
    for one, two in (("one", "two"), ("one_accumulated", "two_accumulated")):
        for file in ("model.safetensors", "discriminators.safetensors"):
            expected, got = (load_file(tmp_path / name / "last" / file) for name in (one, two))
            for name, tensor in expected.items():
                # float32 sums in another order: weights move by about 1e-5, entries by 0.1, and averages are tens of entries
                tolerance = 1e-3 if ".codebook." in name else 2e-6
                torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=tolerance)
        facts = [read_state(tmp_path / name / "last")[0] for name in (one, two)]
        assert facts[0]["best_score"] == pytest.approx(facts[1]["best_score"], rel=1e-4)
        assert [each["num_processes"] for each in facts] == [1, 2]
        # and what one process logs is of all of them
        logs = [EventAccumulator(str(tmp_path / name / "log")).Reload() for name in (one, two)]
        for tag in ("loss/mel", "discriminator/total", "codebook/utilization", "codebook/restarts", "data/skipped"):
            expected, got = ([event.value for event in log.Scalars(tag)] for log in logs)
            assert got == pytest.approx(expected, rel=1e-4)
        assert sum(event.value for event in logs[0].Scalars("codebook/restarts")) > 0
        assert logs[0].Scalars("data/skipped")[-1].value == 1
