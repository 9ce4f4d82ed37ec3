"""A training step: gradients, losses, learning rates, the codebook; and that validation does not change the model."""

import itertools
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import tiny_settings
from training_runs import (  # noqa: F401
    clips,
    started,
    without_rehearsal,
)

import wavtokenizer_hf.training.loop as loop
from wavtokenizer_hf.training import train
from wavtokenizer_hf.training.data import Batch
from wavtokenizer_hf.training.loop import train_step, validate
from wavtokenizer_hf.training.settings import WEIGHTS
from wavtokenizer_hf.training.state import build


pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------------------------------
# A step
# ---------------------------------------------------------------------------------------------------------------------


def test_gradients_reach_every_trained_tensor_of_all_discriminators_too(tmp_path, clips, monkeypatch):
    # The reference implementation has two DAC-style discriminators: it optimizes one and puts the other in the loss.
    state = started(tiny_settings(tmp_path, mel_only_steps=0))
    before = {
        f"{kind}.{name}": tensor.clone()
        for kind, module in (("model", state.model), ("discriminators", state.discriminators))
        for name, tensor in module.named_parameters()
    }
    reached = set()
    for kind, module in (("model", state.model), ("discriminators", state.discriminators)):
        for name, parameter in module.named_parameters():

            def note(gradient, name=f"{kind}.{name}"):
                if gradient.any():
                    reached.add(name)

            parameter.register_hook(note)
    for _ in range(2):
        train_step(state, [clips])
    assert set(before) - reached == set()
    assert sum(name.startswith("discriminators.dac.") for name in reached) > 100
    unmoved = [
        name
        for name, tensor in before.items()
        if torch.equal(
            tensor,
            dict((state.model if name.startswith("model.") else state.discriminators).named_parameters())[
                name.split(".", 1)[1]
            ],
        )
    ]
    assert unmoved == []


@pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning")
def test_the_generator_step_leaves_the_discriminators_alone(tmp_path, clips):
    state = started(tiny_settings(tmp_path, mel_only_steps=0))
    state.discriminator_optimizer.step = lambda: None
    before = {name: tensor.clone() for name, tensor in state.discriminators.state_dict().items()}
    train_step(state, [clips])
    assert all(torch.equal(before[name], tensor) for name, tensor in state.discriminators.state_dict().items())
    assert all(parameter.grad is None for parameter in state.discriminators.parameters())


def test_mel_only_steps_run_without_discriminators(tmp_path, clips):
    # the reference implementation crashes here
    state = started(tiny_settings(tmp_path, mel_only_steps=2))
    names = [set(train_step(state, [clips])) for _ in range(3)]
    assert {"loss/mel", "loss/commitment", "loss/total"} <= names[0]
    assert not any(name.startswith("discriminator") or name == "loss/dac" for name in names[1])
    assert {"loss/dac", "loss/dac_features", "discriminator/dac", "gradient_norm/discriminators"} <= names[2]


def test_total_loss_is_the_published_sum(tmp_path, clips):
    metrics = train_step(started(tiny_settings(tmp_path, mel_only_steps=0)), [clips])
    parts = (
        "multi_period",
        "multi_period_features",
        "multi_resolution",
        "multi_resolution_features",
        "dac",
        "dac_features",
    )
    expected = (
        45 * metrics["loss/mel"] + 1000 * metrics["loss/commitment"] + sum(metrics[f"loss/{part}"] for part in parts)
    )
    assert metrics["loss/total"] == pytest.approx(expected, rel=1e-5)  # float32 sum


def test_other_mel_scales_count_only_with_their_own_weight(tmp_path, clips):
    weights = {"mel_scales": 30.0}
    without, counted = (
        train_step(started(tiny_settings(tmp_path, loss_weights=each)), [clips]) for each in ({}, weights)
    )
    assert "loss/mel_scales" not in without and counted["loss/mel_scales"] > 0
    expected = without["loss/total"] + 30 * counted["loss/mel_scales"]
    assert counted["loss/total"] == pytest.approx(expected, rel=1e-5)  # float32 sum


def test_the_reencoding_loss_is_the_distance_of_decoded_audio_from_its_codes(tmp_path, clips):
    weights = {"reencoding": 30.0}
    without, counted = (started(tiny_settings(tmp_path, dropout=0.0, loss_weights=each)) for each in ({}, weights))
    model = without.model.eval()
    with torch.no_grad():  # with the model's public methods
        audio_codes = model.encode(clips).audio_codes
        decoded = model.decode(audio_codes).audio_values[..., : clips.shape[-1]]
        landed = model.encode(decoded, output_latents=True).latents
    expected = (landed - model.quantizer.decode(audio_codes)).square().mean().item()
    without, counted = train_step(without, [clips]), train_step(counted, [clips])
    assert "loss/reencoding" not in without
    # without gradients, the encoder uses other kernels
    assert counted["loss/reencoding"] == pytest.approx(expected, rel=1e-4)
    assert counted["loss/total"] == pytest.approx(without["loss/total"] + 30 * expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_the_reencoding_loss_teaches_encoder_and_decoder(tmp_path, clips):
    state = started(tiny_settings(tmp_path, loss_weights=dict.fromkeys(WEIGHTS, 0.0) | {"reencoding": 1.0}))
    state.optimizer = torch.optim.SGD(state.model.parameters(), 1.0)  # AdamW changes all by weight decay alone
    before = {name: parameter.clone() for name, parameter in state.model.named_parameters()}
    train_step(state, [clips])
    moved = [name for name, parameter in state.model.named_parameters() if not parameter.equal(before[name])]
    assert {name.partition(".")[0] for name in moved} == {name.partition(".")[0] for name in before}


def test_learning_rate_warms_up_and_follows_a_cosine(tmp_path, clips):
    state = started(tiny_settings(tmp_path, steps=8, mel_only_steps=8, warmup_steps=2))
    rates = [train_step(state, [clips])["learning_rate/codec"] for _ in range(8)]
    # warm-up over 2 steps, then (1 + cos) / 2 over the other 6
    assert rates == pytest.approx([0, 5e-4, 1e-3, 9.330127e-4, 7.5e-4, 5e-4, 2.5e-4, 6.698730e-5])


def test_discriminators_may_have_their_own_learning_rate(tmp_path, clips):
    state = started(tiny_settings(tmp_path, mel_only_steps=0, discriminator_learning_rate=1e-4))
    metrics = train_step(state, [clips])
    assert (metrics["learning_rate/codec"], metrics["learning_rate/discriminators"]) == (1e-3, 1e-4)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning")
def test_gradients_are_clipped_to_the_given_norm(tmp_path, clips):
    state = started(tiny_settings(tmp_path, max_gradient_norm=0.01))
    seen = []
    step = state.optimizer.step

    def look():
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        seen.append(torch.nn.utils.get_total_norm(gradients).item())
        step()

    state.optimizer.step = look
    metrics = train_step(state, [clips])
    assert metrics["gradient_norm/codec"] > 0.01  # the logged norm is the one before clipping
    assert seen == pytest.approx([0.01], rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_accumulated_batches_give_the_same_gradients_and_codebook_as_one_batch(tmp_path):
    torch.manual_seed(0)
    audio = 0.3 * torch.randn(4, 1, 2400)
    # no dropout, whose masks differ; plain gradient descent, which does not amplify rounding
    results = []
    for parts in ([audio], list(audio.split(2))):
        state = started(tiny_settings(tmp_path, mel_only_steps=0, dropout=0.0))
        state.optimizer = torch.optim.SGD(state.model.parameters(), 1e-3)
        state.discriminator_optimizer = torch.optim.SGD(state.discriminators.parameters(), 1e-3)
        train_step(state, parts)
        results.append({**state.model.state_dict(), **state.discriminators.state_dict()})
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-5)  # sums in a different order


@pytest.mark.parametrize("name", ["ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"])
def test_a_step_follows_the_settings_for_every_accelerate_configuration(name, tmp_path, clips, monkeypatch):
    steps = []
    for value in (None, {"ACCELERATE_MIXED_PRECISION": "bf16"}.get(name, "4")):
        if value:
            monkeypatch.setenv(name, value)  # like `accelerate config` and the options of `accelerate launch`
        AcceleratorState._reset_state(reset_partial_state=True)
        steps.append(train_step(started(tiny_settings(tmp_path, mel_only_steps=0)), [clips]))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert steps[0] == steps[1]


def test_bfloat16_keeps_latents_and_codes_in_float32(tmp_path):
    # not shorter: on a CPU, torch 2.13 computes bfloat16 convolutions of stride (2, 2) wrongly on maps of width 1 or 2
    clips = 0.3 * torch.randn(1, 1, 12000, generator=torch.Generator().manual_seed(0))
    codes = []
    for precision in ("float32", "bfloat16"):
        state = started(tiny_settings(tmp_path, precision=precision, mel_only_steps=0))
        fake, losses, latents, audio_codes = state.codec(clips, 0)
        assert (latents.dtype, losses["commitment"].dtype, fake.dtype) == (torch.float32,) * 3
        codes.append((audio_codes, fake))
        assert train_step(state, [clips])["loss/total"] < float("inf")
    assert torch.equal(codes[0][0], codes[1][0])
    assert len(codes[0][0].unique()) > 1
    assert not torch.equal(codes[0][1], codes[1][1])  # the decoder does run in bfloat16


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_gives_the_same_result(tmp_path, clips):
    plain, compiled = (
        train_step(started(tiny_settings(tmp_path, mel_only_steps=0, dropout=0.0, compile=each)), [clips])
        for each in (False, True)
    )
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        assert compiled[name] == pytest.approx(value, rel=1e-3), name  # float32 sums in another order


def test_loss_falls_and_utilization_rises(tmp_path, clips):
    settings = {"steps": 60, "mel_only_steps": 60, "codebook_decay": 0.9, "loss_weights": {"commitment": 1.0}}
    state = build(tiny_settings(tmp_path, **settings))
    loop.normalize_encoder(state, iter([Batch(clips)]))
    loop.start_codebook(state, itertools.repeat(Batch(clips)))
    state.model.quantizer.codebook.embed[8:] += 100  # most entries are far from all latents
    metrics = [train_step(state, [clips]) | state.learner.report() for _ in range(60)]
    assert metrics[-1]["loss/mel"] < 0.8 * metrics[0]["loss/mel"]
    assert metrics[0]["utilization"] <= 1 / 8
    assert metrics[-1]["utilization"] > 1 / 2


@pytest.mark.parametrize("rows", [1, 2])  # without gradients, the encoder computes a single row with other kernels
def test_a_normalized_encoder_starts_with_mean_0_and_deviation_1(rows, tmp_path, clips):
    state, clips = build(tiny_settings(tmp_path)), clips[:rows]
    encoder = state.model.encoder_model.encoder
    with torch.no_grad():
        assert encoder(clips).std() < 0.1  # PyTorch's own initialization
        loop.normalize_encoder(state, iter([Batch(clips)]))
        latents = encoder(clips)
    torch.testing.assert_close(latents.mean(dim=(0, 2)), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std(dim=(0, 2), correction=0), torch.ones(16), rtol=0, atol=1e-4)


def test_only_a_new_model_is_normalized(tmp_path):
    settings = {"steps": 2, "mel_only_steps": 2, "validate_every": 1, "normalize_encoder": True}
    train(tiny_settings(tmp_path, **settings, continuous_steps=1))
    (tmp_path / "run" / "last").rename(tmp_path / "earlier")
    weights = load_file(tmp_path / "earlier" / "model.safetensors")
    # like a run that was interrupted in its continuous steps
    weights["encoder_model.quantizer.codebook.inited"] = torch.zeros(1)
    save_file(weights, tmp_path / "earlier" / "model.safetensors", {"format": "pt"})
    # a learning rate at which no weight changes
    again = {"output": str(tmp_path / "again"), "model": str(tmp_path / "earlier"), "learning_rate": 1e-30}
    trained = train(tiny_settings(tmp_path, **{**settings, **again})).model.state_dict()
    for name, tensor in trained.items():
        if ".encoder." in name:
            assert torch.equal(tensor, weights[name])


def test_continuous_steps_leave_the_codebook_alone_and_k_means_follows(tmp_path, clips):
    state = build(tiny_settings(tmp_path, mel_only_steps=4, continuous_steps=1))
    before = state.model.quantizer.codebook.embed.clone()
    assert "loss/commitment" not in train_step(state, [clips])
    assert torch.equal(state.model.quantizer.codebook.embed, before)
    run = train(tiny_settings(tmp_path, mel_only_steps=4, continuous_steps=3))
    assert run.model.quantizer.codebook.inited.item() == 1
    log = EventAccumulator(str(tmp_path / "run" / "log")).Reload()
    assert [event.step for event in log.Scalars("loss/commitment")] == [4]


# ---------------------------------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------------------------------


def test_validation_does_not_change_the_model(tmp_path, clips):
    state = started(tiny_settings(tmp_path))
    # The reference implementation changes the codebook while it encodes in training mode.
    state.model.train()
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    state.model.encode(clips)
    first, second = (validate(state, Batch(clips), None) for _ in range(2))
    assert first == second
    assert first["validation/score"] == pytest.approx(first["validation/mel"] + 1000 * first["validation/commitment"])
    assert first["validation/commitment"] > 0  # the reference implementation returns 0 outside of training
    assert all(torch.equal(before[name], tensor) for name, tensor in state.model.state_dict().items())


def test_encoding_does_not_change_an_uninitialised_codebook(tmp_path, clips):
    # the reference implementation runs k-means in inference where `inited` is 0
    state = build(tiny_settings(tmp_path))
    before = state.model.quantizer.codebook.embed.clone()
    validate(state, Batch(clips), None)
    state.model.train().encode(clips)
    assert state.model.quantizer.codebook.inited.item() == 0
    assert torch.equal(state.model.quantizer.codebook.embed, before)
