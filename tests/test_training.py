"""Memory, frozen encoders, fine-tuning, settings, the command line, and several processes."""

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import TINY, tiny_settings, train_by_plain_descent, write_clips
from training_runs import (  # noqa: F401
    clips,
    finished,
    started,
    without_rehearsal,
)

import wavtokenizer_hf.training.loop as loop
import wavtokenizer_hf.training.state as state_module
from wavtokenizer_hf import WavTokenizerModel, cli
from wavtokenizer_hf.training import Settings, train
from wavtokenizer_hf.training.checkpoints import read_state
from wavtokenizer_hf.training.loop import train_step
from wavtokenizer_hf.training.memory import MemoryEstimate, PeakMemory, refusal_reason
from wavtokenizer_hf.training.settings import read_arguments
from wavtokenizer_hf.training.state import build, save


pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_that_does_not_fit_in_memory_is_refused_with_settings_that_fit():
    found = MemoryEstimate(fixed=3e9, per_segment=0.5e9)
    settings = Settings(batch_size=40, memory_gb=16)
    assert refusal_reason(found, 24e9, settings) is None
    text = refusal_reason(found, 16e9, settings)
    assert "batch_size=40 segments of 3 s needs about 23.0 GB" in text and "16.0 GB are free" in text
    # 0.9 * 16 GB - 3 GB hold 22 segments, and twice 22 are at least 40
    assert "--batch-size 22 --gradient-accumulation 2, which needs about 14.0 GB" in text
    # 3 GB leave nothing. 3.75 GB leave less than one segment of 3 s, but enough for one of 2 s.
    assert "No batch fits" in refusal_reason(found, 3e9, settings)
    assert "--batch-size 1 --segment-seconds 2" in refusal_reason(found, 3.75e9, settings)


def test_too_little_memory_stops_a_run_before_its_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"needs about .* GB.*0\.0 GB are free"):
        train(tiny_settings(tmp_path, memory_gb=0.01))
    assert not (tmp_path / "run" / "last").exists()


def test_the_memory_estimate_does_not_change_the_run(tmp_path, clips):
    states = [started(tiny_settings(tmp_path, mel_only_steps=0)) for _ in range(2)]
    loop.check_memory(states[0], 2400)
    metrics = [train_step(state, [clips]) for state in states]
    assert metrics[0] == metrics[1]
    for one, other in zip(*(state.model.state_dict().values() for state in states), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux reports peak memory")
def test_the_memory_estimate_is_close_to_the_measured_peak(tmp_path):
    config = {**Settings.load("small_cpu").config, "num_filters": 16}
    state = build(
        tiny_settings(tmp_path, config=config, batch_size=24, segment_seconds=1.0, discriminator_scale=1 / 8)
    )
    found = loop.check_memory(state, 24000)
    state.model.quantizer.codebook.inited.fill_(1)
    state.settings.mel_only_steps = 0
    with PeakMemory(torch.device("cpu")) as peak:
        train_step(state, [0.1 * torch.randn(24, 1, 24000)])
    assert found.bytes_for(24) == pytest.approx(peak.bytes, rel=0.15)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory as Linux gives it")
@pytest.mark.parametrize("recipe", ["small_cpu", "fine_tune_decoder", "fine_tune"])
def test_a_documented_training_command_fits_16_gb(recipe, folders, tmp_path):
    """The command of docs/training.md for one step; where it names a model, with one of the published size."""
    page = (FIXTURES.parent.parent / "docs" / "training.md").read_text()
    command = re.findall(rf"^wavtokenizer (train {recipe} .*)$", page, re.MULTILINE)[0]
    (tmp_path / "wavtokenizer-small-75").symlink_to(folders(75))
    for name in ("clips", "other_clips"):
        write_clips(tmp_path / name, count=8, seconds=3.2)
    shorter = [
        "--memory-gb=16",
        "--steps=1",
        "--continuous-steps=0",
        "--num-validation-clips=1",
        "--num-logged-clips=0",
    ]
    with (tmp_path / "stderr.txt").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "wavtokenizer_hf", *command.split(), *shorter], cwd=tmp_path, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (tmp_path / "stderr.txt").read_text()[-2000:]
    memory = usage.ru_maxrss * 1024 / 1e9  # GB: the largest of the process and its children, which only read clips
    print(f"{recipe}: {memory:.1f} GB")
    assert memory < 15


# ---------------------------------------------------------------------------------------------------------------------
# A frozen encoder
# ---------------------------------------------------------------------------------------------------------------------


def test_a_frozen_encoder_and_codebook_stay_bit_for_bit_while_the_decoder_learns(finished, tmp_path):
    _, folder = finished
    source = folder / "run" / "last"
    settings = {
        "model": str(source),
        "config": {},
        "freeze": "encoder",
        "mel_only_steps": 1,
        "dead_code_threshold": 0.5,
    }
    train(tiny_settings(tmp_path, **settings, loss_weights={"reencoding": 1.0}))
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "run" / "last"))
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("encoder_model."))
    moved = [name for name in before if not torch.equal(after[name], before[name])]
    assert len(moved) == sum(not name.startswith("encoder_model.") for name in before)
    one, other = (WavTokenizerModel.from_pretrained(path) for path in (source, tmp_path / "run" / "last"))
    assert one.codebook_fingerprint == other.codebook_fingerprint


def test_a_frozen_encoder_that_changes_stops_the_run(finished, tmp_path):
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
def test_invalid_freeze_options_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tiny_settings(tmp_path, **changes))


def test_a_model_without_a_codebook_cannot_be_frozen(tmp_path):
    build(tiny_settings(tmp_path)).model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has no codebook yet"):
        build(tiny_settings(tmp_path, model=str(tmp_path / "model"), config={}, freeze="encoder"))


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning other models
# ---------------------------------------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_the_models_weights_and_discriminators(finished, tmp_path):
    _, folder = finished
    state = build(tiny_settings(tmp_path, model=str(folder / "run" / "best"), config={}))
    weights = load_file(folder / "run" / "best" / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in state.model.state_dict().items())
    discriminators = load_file(folder / "run" / "best" / "discriminators.safetensors")
    assert all(torch.equal(tensor, discriminators[name]) for name, tensor in state.discriminators.state_dict().items())
    assert len(discriminators) > 400


def test_a_recipe_for_new_models_accepts_only_a_model_of_its_shape(finished, tmp_path):
    _, folder = finished
    model = str(folder / "run" / "best")
    build(tiny_settings(tmp_path, model=model, config={"upsampling_ratios": (4, 2, 2), "codebook_size": 64}))
    with pytest.raises(ValueError, match=r"num_filters=4 and the settings' config num_filters=8"):
        build(tiny_settings(tmp_path, model=model, config={"num_filters": 8}))


def test_a_model_without_discriminators_is_reported(tmp_path, caplog):
    build(tiny_settings(tmp_path)).model.save_pretrained(tmp_path / "model")
    assert not caplog.records
    build(tiny_settings(tmp_path, model=str(tmp_path / "model"), config={}))
    assert "has no discriminators.safetensors" in caplog.text
    caplog.clear()
    build(tiny_settings(tmp_path, model=str(tmp_path / "model"), config={}, mel_only_steps=4))  # needs none
    assert not caplog.records


def test_discriminators_of_another_size_are_refused(finished, tmp_path):
    _, folder = finished
    with pytest.raises(ValueError, match="discriminator_scale"):
        build(tiny_settings(tmp_path, model=str(folder / "run" / "best"), config={}, discriminator_scale=1 / 16))


# ---------------------------------------------------------------------------------------------------------------------
# Settings and the command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["published_75", "published_40", "small_cpu"])
def test_recipes_for_new_models_describe_models_that_can_be_built(name):
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
    assert settings.dead_code_threshold * 8 * 40 * frames / 4096 == pytest.approx(2, rel=5e-3)  # three digits


def test_the_small_models_file_has_at_most_12_megabytes():
    with torch.device("meta"):
        model = WavTokenizerModel(state_module._new_config(Settings.load("small_cpu").config))
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    assert 4 * numbers < 12_000_000 - 50_000  # the header is smaller than that


def test_the_command_line_overrides_the_recipe(tmp_path, capsys):
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
    assert "--dead-code-threshold" in capsys.readouterr().out


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
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings.load(None, changes)


def test_config_fields_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_filter"):
        build(tiny_settings(tmp_path, config={"num_filter": 8}))


def test_the_command_trains_and_reports_the_result(tmp_path, capsys):
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


def test_missing_data_gives_one_line_and_exit_code_2(tmp_path, capsys):
    assert cli.main(["train", "--train_data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "run")]) == 2
    assert "nowhere" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def two_processes(code: str, *arguments):
    """Run code in two processes during the block. They find each other by the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(FIXTURES.parent), str(FIXTURES), str(FIXTURES.parent.parent)]
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


def test_two_processes_give_the_same_weights_and_codebook_as_one(tmp_path):
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
                # float32 sums in another order: weights differ by about 1e-5, entries by 0.1, and averages are tens of
                # entries
                tolerance = 1e-3 if ".codebook." in name else 2e-6
                torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=tolerance)
        facts = [read_state(tmp_path / name / "last")[0] for name in (one, two)]
        assert facts[0]["best_score"] == pytest.approx(facts[1]["best_score"], rel=1e-4)
        assert [each["num_processes"] for each in facts] == [1, 2]
        # the log of one process covers all of them
        logs = [EventAccumulator(str(tmp_path / name / "log")).Reload() for name in (one, two)]
        for tag in ("loss/mel", "discriminator/total", "codebook/utilization", "codebook/restarts", "data/skipped"):
            expected, got = ([event.value for event in log.Scalars(tag)] for log in logs)
            assert got == pytest.approx(expected, rel=1e-4)
        assert sum(event.value for event in logs[0].Scalars("codebook/restarts")) > 0
        assert logs[0].Scalars("data/skipped")[-1].value == 1
