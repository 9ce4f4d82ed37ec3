"""Training as one page. `train` runs it; `train_step` is what happens to a batch; `State` is all that a run consists
of.

Two optimizers take turns: first the discriminators learn to tell the codec's audio from real audio, then the codec
learns to be closer to real audio, also in their eyes; then the codebook moves. A step is a function of the state and
of the settings' seed alone, so a resumed run goes the way of one that was never stopped.
"""

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import cached

from ..progress import Progress, write
from .codebook import all_reduce_sum, usage_figures, world_size
from .data import Batch, Clips, one_warning_of_a_kind, open_clips, training_batches, validation_clips
from .log import Log, write_curves
from .losses import adversarial_losses, discriminator_losses, sum_losses, total
from .memory import GB, Estimate, PeakMemory, available_memory, estimate, refusal
from .settings import Settings, derived_seed
from .state import State, autocast, build, check_output, prepare_hub, restore, save, upload


logger = logging.getLogger(__name__)

LONGEST_WINDOW = 2048  # samples, of the losses' spectrograms, which continue the audio by half of it at either end
SHORT_CLIPS = (
    "All clips so far are shorter than segment_seconds=%g and were repeated to that length. Choose shorter segments."
)


def train(settings: Settings, train_data: Clips | None = None, validation_data: Clips | None = None) -> State:
    """
    Trains a model; on several GPUs where accelerate or torchrun started several processes.

    Args:
        settings: of the run.
        train_data, validation_data: datasets or sequences (see `data.open_clips`) in place of the settings' paths.

    Returns:
        What the run ended with. `settings.output` holds best/ and last/, which from_pretrained loads, and log/.

    Raises:
        ValueError: There is no data; training and validation data are the same; the steps need more memory than there
            is; settings contradict each other, the model, or the run that is to be resumed; a loss is not finite (the
            message names the step, and the last checkpoint stays).
        OSError: a checkpoint cannot be written (the last one stays).
        ImportError: a package of the extra `training` is missing.
    """
    with one_warning_of_a_kind():
        train_data = _given(settings, "train_data") if train_data is None else train_data
        clips = open_clips(train_data)
        validation_data = _given(settings, "validation_data") if validation_data is None else validation_data
        check_apart(train_data, validation_data)
        output = Path(_given(settings, "output"))
        check_output(settings, output)
        state = build(settings)
        config, accelerator = state.model.config, state.accelerator
        length = round(settings.segment_seconds * config.sampling_rate)
        if length <= LONGEST_WINDOW // 2:
            raise ValueError(
                f"Got segment_seconds={settings.segment_seconds}, {length} samples at {config.sampling_rate} Hz. The "
                f"losses' spectrograms need more than {LONGEST_WINDOW // 2} samples."
            )
        state.num_clips = len(clips)
        validation = validation_clips(
            validation_data, length, config.sampling_rate, settings.num_validation_clips, settings.channel
        )
        _take(state, validation)
        if settings.resume:
            restore(state, output)
        check_memory(state, length)
        prepare_hub(state)

        def batches(start: int) -> Iterator[Batch]:
            """Of this process without end, from the given batch of the run on."""
            return training_batches(
                clips, length, config.sampling_rate, settings.batch_size, settings.seed, settings.num_workers,
                accelerator.process_index, accelerator.num_processes, start, settings.channel,
            )  # fmt: skip

        if settings.normalize_encoder and settings.model is None and state.step == 0:
            normalize_encoder(state, batches(0))
        log = Log(output, config.sampling_rate, state.step + 1) if accelerator.is_main_process else None
        progress = Progress(settings.steps, "steps", state.step, shown=accelerator.is_main_process)
        try:
            _run(state, batches, validation, output, log, progress)
        finally:
            progress.close()
            if log:
                log.close()
        if log:
            write_curves(output / "log", output / "curves.png")
        if state.skipped and accelerator.is_main_process:
            logger.warning("%d clips could not be read and were skipped.", len(state.skipped))
        upload(state, output)
        return state


def _run(
    state: State,
    batches: Callable[[int], Iterator[Batch]],
    validation: Batch,
    output: Path,
    log: Log | None,
    progress: Progress,
) -> None:
    """The loop: steps, entries in the log, validations and checkpoints."""
    settings, device = state.settings, state.accelerator.device
    stream = batches(state.step * settings.gradient_accumulation)
    taken_before, repeated_before = state.num_taken, state.num_repeated  # the validation's
    warned = False
    if state.step == 0 and state.model.quantizer.codebook.inited:  # a new model has no codes yet that could be judged
        validate(state, validation, log)
    while state.step < settings.steps:
        if state.quantizes and not state.model.quantizer.codebook.inited:
            if log:
                entries = state.model.config.codebook_size
                write(
                    f"Step {state.step}: choosing {entries} codebook entries by k-means from "
                    f"{settings.kmeans_latents} latents. This takes a while.",
                    file=sys.stderr,
                )
            start_codebook(state, batches(state.step * settings.gradient_accumulation))
        figures = train_step(state, [_take(state, next(stream)) for _ in range(settings.gradient_accumulation)])
        progress.update()
        last = state.step == settings.steps
        if state.step % settings.log_every == 0 or last:
            figures["data/repeated"] = (state.num_repeated - repeated_before) / (state.num_taken - taken_before)
            figures = _mean_over_processes(figures, device)
            figures |= {f"codebook/{name}": value for name, value in state.learner.report().items()}
            _share_skipped(state)
            figures["data/skipped"] = len(state.skipped)
            progress.show_figures(_shown(figures))
            if log:
                log.figures(figures, state.step)
            if log and figures["data/repeated"] == 1 and not warned:
                logger.warning(SHORT_CLIPS, settings.segment_seconds)
                warned = True
        if state.step % settings.validate_every == 0 or last:
            score = validate(state, validation, log)["validation/score"]
            improved = score < state.best_score
            state.best_score = min(state.best_score, score)
            save(state, output, improved)


def train_step(state: State, batches: list[torch.Tensor]) -> dict[str, float]:
    """
    One step of all optimizers and of the codebook, on batches of audio (B, 1, T) whose gradients are accumulated.

    Returns:
        The step's losses, gradient norms and learning rates, by the names under which they are logged.

    Raises:
        ValueError: a loss or gradient is not finite; its optimizer and the codebook have not moved.
    """
    return _train_step(state, batches, rehearsal=False)


def _train_step(state: State, batches: list[torch.Tensor], rehearsal: bool) -> dict[str, float]:
    """`train_step`; or, as a rehearsal, all that a step with discriminators computes, which changes nothing."""
    settings = state.settings
    figures: dict[str, float] = {}
    num_embeddings = state.model.config.adanorm_num_embeddings
    bandwidth_id = derived_seed(settings.seed, "bandwidth_id", state.step) % num_embeddings
    state.model.train()
    trains_discriminators, made = state.discriminators is not None if rehearsal else state.trains_discriminators, None
    learns_codebook = state.quantizes and not settings.freeze and not rehearsal
    if trains_discriminators:
        made = _train_discriminators(state, batches, bandwidth_id, figures, rehearsal)
    for index, audio in enumerate(batches):
        with _synchronized(state, state.codec, last=index == len(batches) - 1):
            # of several batches no graph was kept, since they would fill the memory
            output = made if len(batches) == 1 and made else _run_codec(state, audio, index, bandwidth_id)
            made_audio, codebook_losses, latents, audio_codes = output
            losses = {"mel": state.mel_loss(made_audio[:, 0], audio[:, 0]), **codebook_losses}
            if state.mel_scales_loss is not None:
                losses["mel_scales"] = state.mel_scales_loss(made_audio[:, 0], audio[:, 0])
            if state.frequency_loss is not None:
                losses["instantaneous_frequency"] = state.frequency_loss(made_audio[:, 0], audio[:, 0])
            if trains_discriminators:
                losses |= _judge(state, audio, made_audio, bandwidth_id)
            loss = total(losses, settings.loss_weights)
            _note(figures, "loss", losses | {"total": loss}, len(batches))
            # not by accelerator.backward, which follows the environment in how it scales a loss
            (loss / len(batches)).backward()
        if learns_codebook:
            state.learner.observe(latents, audio_codes)
    if rehearsal:
        state.optimizer.zero_grad()
        return figures
    _step(state, state.optimizer, state.schedule, figures, "codec", "loss")
    if learns_codebook:
        state.learner.update(state.step)
    state.step += 1
    return figures


def _train_discriminators(
    state: State, batches: list[torch.Tensor], bandwidth_id: int, figures: dict[str, float], rehearsal: bool
) -> tuple:
    """
    The discriminators' half of a step; gives the codec's output for the last batch, with its graph if it is the only
    one.
    """
    discriminators, optimizer, schedule = (
        state.prepared_discriminators,
        state.discriminator_optimizer,
        state.discriminator_schedule,
    )
    assert discriminators is not None and optimizer is not None and schedule is not None
    for index, audio in enumerate(batches):
        with torch.set_grad_enabled(len(batches) == 1):
            output = _run_codec(state, audio, index, bandwidth_id)
        with _synchronized(state, discriminators, last=index == len(batches) - 1), cached():
            with autocast(audio.device, state.settings.precision):
                both = torch.cat([audio[:, 0], output[0][:, 0].detach()])
                real, made = _halves(discriminators(both, bandwidth_id))
            losses = discriminator_losses(real, made)
            loss = sum_losses(losses.values())
            _note(figures, "discriminator", losses | {"total": loss}, len(batches))
            (loss / len(batches)).backward()
    if rehearsal:
        optimizer.zero_grad()
    else:
        _step(state, optimizer, schedule, figures, "discriminators", "discriminator")
    return output


def check_apart(train_data: Clips, validation_data: Clips) -> None:
    """Raises ValueError if a run would validate on what it trains on."""
    if not (isinstance(train_data, (str, os.PathLike)) and isinstance(validation_data, (str, os.PathLike))):
        if train_data is validation_data:
            raise ValueError(
                "Got one dataset as train_data and validation_data. Validate on sound that training never sees."
            )
        return
    train_path, validation_path = (Path(data).resolve() for data in (train_data, validation_data))
    if train_path == validation_path or (train_path.is_dir() and train_path in validation_path.parents
                                         and validation_path.is_dir()):  # fmt: skip
        raise ValueError(
            f"Got train_data={str(train_data)!r} and validation_data={str(validation_data)!r}: training would hear "
            "what it is judged by. Keep the clips to validate on in a folder or list of their own."
        )


def check_memory(state: State, length: int) -> Estimate | None:
    """
    Estimates the memory of this run's steps from small ones that change nothing.

    Args:
        state: at its beginning.
        length: samples of a segment.

    Returns:
        The estimate; None where the system does not tell how much memory a process takes.

    Raises:
        ValueError: the steps need more than there is; the message says which settings would fit.
    """
    settings, device = state.settings, state.accelerator.device
    generator = torch.Generator().manual_seed(0)

    def measure(segments: int) -> int | None:
        audio = 0.1 * torch.randn(segments, 1, length, generator=generator).to(device)
        with PeakMemory(device) as peak:
            _train_step(state, [audio] * min(2, settings.gradient_accumulation), rehearsal=True)
        return peak.bytes

    optimizers: list[tuple[torch.optim.Optimizer | None, nn.Module | None]] = [
        (state.optimizer, state.model),
        (state.discriminator_optimizer, state.discriminators),
    ]
    # AdamW keeps two numbers for each that it trains; a resumed run holds them already
    missing = [module for optimizer, module in optimizers if optimizer is not None and not optimizer.state]
    numbers = [p.nbytes for module in filter(None, missing) for p in module.parameters() if p.requires_grad]
    try:
        found = estimate(measure, 2 * sum(numbers), 1)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"A step on two segments of {settings.segment_seconds:g} s does not fit into the memory of {device}. Use "
            "a smaller --segment-seconds, or a GPU with more memory."
        ) from error
    available = available_memory(device, settings, state.accelerator.num_processes)
    if found is not None and available is not None and (reason := refusal(found, available, settings)):
        raise ValueError(reason)
    if found is not None and state.accelerator.is_main_process:
        logger.info("A step needs about %.2f GB.", found.of(settings.batch_size) / GB)
    return found


def validate(state: State, clips: Batch, log: Log | None) -> dict[str, float]:
    """
    Encodes and decodes the validation clips as a user would; nothing of the model changes.

    The score by which checkpoints are picked is mel + 1000 * commitment: that of the original without UTMOS and PESQ,
    which need packages and weights of their own. The 1000 is the run's own weight of the commitment loss, which sets
    its scale.
    """
    accelerator, model = state.accelerator, state.model.eval()
    sums = torch.zeros(3, device=accelerator.device)  # mel, commitment, clips
    usage = torch.zeros_like(state.learner.usage)
    with torch.inference_mode():
        for index in range(accelerator.process_index, len(clips.audio), accelerator.num_processes):
            audio = clips.audio[index : index + 1].to(accelerator.device)
            encoded = model.encode(audio, output_latents=True)
            made = model.decode(encoded.audio_codes).audio_values[..., : audio.shape[-1]]
            assert encoded.latents is not None
            commitment = F.mse_loss(encoded.latents, model.quantizer.decode(encoded.audio_codes))
            sums += torch.stack([state.mel_loss(made[:, 0], audio[:, 0]), commitment, torch.ones_like(commitment)])
            usage += torch.bincount(encoded.audio_codes.flatten(), minlength=len(usage))
            if log and index // accelerator.num_processes < state.settings.num_logged_clips:
                log.clip(f"clip_{index}/real", audio[0, 0], state.mel_loss, state.step)
                log.clip(f"clip_{index}/made", made[0, 0], state.mel_loss, state.step)
    mel, commitment, count = all_reduce_sum(sums).tolist()
    figures = {"mel": mel / count, "commitment": commitment / count, **usage_figures(all_reduce_sum(usage))}
    figures["score"] = figures["mel"] + state.settings.loss_weights["commitment"] * figures["commitment"]
    figures = {f"validation/{name}": value for name, value in figures.items()}
    if log:
        log.figures(figures, state.step)
    if not math.isfinite(figures["validation/score"]):
        raise ValueError(f"The validation score after step {state.step} is {figures['validation/score']}. Stopped.")
    return figures


def normalize_encoder(state: State, stream: Iterator[Batch]) -> None:
    """Sets the gains and biases of a new encoder so that each layer gives mean 0 and deviation 1 over the first joint
    batch.

    Salimans and Kingma (2016) begin weight-normed networks so. PyTorch's own initialization shrinks the signal at
    every layer.
    """

    @torch.no_grad()
    def normalize(conv: Any, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        count = all_reduce_sum(output.new_tensor(output.shape[0] * output.shape[2]))
        mean = all_reduce_sum(output.sum((0, 2))) / count
        deviation = (all_reduce_sum((output - mean[:, None]).square().sum((0, 2))) / count).sqrt().clamp(min=1e-5)
        conv.parametrizations.weight.original0.div_(deviation[:, None, None])
        conv.bias.sub_(mean).div_(deviation)
        return (output - mean[:, None]) / deviation[:, None]  # so that the next layer sees what it will see

    encoder = state.model.encoder_model.encoder
    layers = [module for module in encoder.modules() if isinstance(module, nn.Conv1d)]
    hooks = [layer.register_forward_hook(normalize) for layer in layers]
    try:
        encoder(next(stream).audio.to(state.accelerator.device))
    finally:
        for hook in hooks:
            hook.remove()


def start_codebook(state: State, stream: Iterator[Batch]) -> None:
    """Chooses the first codebook of a new model by k-means on what its encoder makes of the first batches."""
    settings, accelerator = state.settings, state.accelerator
    batches: list[torch.Tensor] = []
    wanted = max(1, settings.kmeans_latents // accelerator.num_processes)
    while sum(len(latents) for latents in batches) < wanted:
        audio = next(stream).audio.to(accelerator.device)
        with torch.inference_mode():
            latents = state.model.encoder_model.encoder(audio)
        batches.append(latents.transpose(1, 2).flatten(0, 1))
    joint = len(batches[0]) * accelerator.num_processes * settings.gradient_accumulation
    state.learner.start(batches, settings.kmeans_iterations, joint)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of a step
# ---------------------------------------------------------------------------------------------------------------------


def _run_codec(state: State, audio: torch.Tensor, index: int, bandwidth_id: int) -> tuple:
    # dropout depends on where the run is and on nothing before it, so a run can be resumed, and a pass repeated
    torch.manual_seed(derived_seed(state.settings.seed, "dropout", state.step, index, state.accelerator.process_index))
    return state.codec(audio, bandwidth_id, state.quantizes)


def _judge(state: State, audio: torch.Tensor, made: torch.Tensor, bandwidth_id: int) -> dict[str, torch.Tensor]:
    """The discriminators' losses for the codec. They learn nothing here, so nothing is computed for them."""
    assert state.discriminators is not None
    state.discriminators.requires_grad_(False)
    try:
        with cached(), autocast(audio.device, state.settings.precision):
            with torch.no_grad():
                real = state.discriminators(audio[:, 0], bandwidth_id)
            return adversarial_losses(real, state.discriminators(made[:, 0], bandwidth_id))
    finally:
        state.discriminators.requires_grad_(True)


def _halves(judgements: dict) -> tuple[dict, dict]:
    """What was said of a batch of real audio followed by made audio -> of each of the two."""
    split = {name: [judgement.halves() for judgement in each] for name, each in judgements.items()}
    real, made = ({name: [pair[half] for pair in pairs] for name, pairs in split.items()} for half in (0, 1))
    return real, made


def _synchronized(state: State, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Gradients are exchanged between processes with the last of several batches."""
    return nullcontext() if last else state.accelerator.no_sync(module)


def _step(
    state: State,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    figures: dict[str, float],
    name: str,
    losses: str,
) -> None:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    # the norm is the same on all processes, as their gradients are; a loss may be one's own, and its launcher stops
    # the others
    if not norm.isfinite() or not math.isfinite(figures[f"{losses}/total"]):
        optimizer.zero_grad()
        values = ", ".join(f"{key} {value:.3g}" for key, value in figures.items() if key.startswith(f"{losses}/"))
        raise ValueError(
            f"Step {state.step + 1}: loss or gradients of the {name} are not finite ({values}). Stopped; the last "
            "checkpoint is that of the last validation. Start another run from it, with a lower learning_rate or a "
            f"max_gradient_norm and --model {Path(state.settings.output, 'last')}."
        )
    if state.settings.max_gradient_norm is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, state.settings.max_gradient_norm, norm)
    figures[f"gradient_norm/{name}"] = norm.item()
    figures[f"learning_rate/{name}"] = float(schedule.get_last_lr()[0])
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def _note(figures: dict[str, float], group: str, losses: dict[str, torch.Tensor], parts: int) -> None:
    for name, loss in losses.items():
        key = f"{group}/{name}"
        figures[key] = figures.get(key, 0.0) + loss.item() / parts


def _mean_over_processes(figures: dict[str, float], device: torch.device) -> dict[str, float]:
    values = all_reduce_sum(torch.tensor(list(figures.values()), device=device)) / world_size()
    return dict(zip(figures, values.tolist(), strict=True))


def _shown(figures: dict[str, float]) -> dict[str, str]:
    short = {
        "loss/mel": "mel",
        "loss/commitment": "commit",
        "discriminator/total": "disc",
        "codebook/utilization": "used",
    }
    return {short[name]: f"{value:.3g}" for name, value in figures.items() if name in short}


def _take(state: State, batch: Batch) -> torch.Tensor:
    """The segments of a batch on the device of this process; what was wrong with its clips is counted and reported."""
    for clip, reason in batch.skipped.items():
        if clip not in state.skipped:
            state.skipped[clip] = reason
            logger.warning("Skipped %s: %s", clip, reason)
    state.num_taken += len(batch.audio)
    state.num_repeated += batch.num_repeated
    return batch.audio.to(state.accelerator.device)


def _share_skipped(state: State) -> None:
    """Lets every process know which clips the others could not read."""
    from accelerate.utils import gather_object

    state.skipped = dict(gather_object(list(state.skipped.items())))


def _given(settings: Settings, name: str) -> str:
    value = getattr(settings, name)
    if not value:
        raise ValueError(f"Got no {name}. Give --{name.replace('_', '-')}, or set it in the recipe.")
    return value
