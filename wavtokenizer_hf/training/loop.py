"""Training loop. `train` runs it, `train_step` is one optimization step, and `State` holds the state of a run.

A step has three parts:

1. The discriminators learn to distinguish the codec's output from real audio.
2. The codec learns from reconstruction losses and from the discriminators.
3. The codebook is updated.

A step depends only on the state and on the seed, so a resumed run gives the same result as an uninterrupted one.
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
from .codebook import all_reduce_sum, usage_metrics, world_size
from .data import Batch, Clips, log_each_kind_once, open_clips, training_batches, validation_clips
from .log import Log, write_curves
from .losses import adversarial_losses, discriminator_losses, sum_losses, weighted_sum
from .memory import GB, MemoryEstimate, PeakMemory, available_memory, estimate_memory, refusal_reason
from .settings import Settings, derived_seed
from .state import State, autocast, build, check_output, prepare_hub, restore, save, upload


logger = logging.getLogger(__name__)

MAX_WINDOW = 2048  # samples; the spectrograms of the losses pad the audio by half a window at both ends
SHORT_CLIPS = (
    "All clips so far are shorter than segment_seconds=%g and were repeated to that length. Choose shorter segments."
)


def train(settings: Settings, train_data: Clips | None = None, validation_data: Clips | None = None) -> State:
    """
    Train a model. Uses several GPUs if accelerate or torchrun started several processes.

    Args:
        settings: Settings of the run.
        train_data, validation_data: Datasets or sequences (see `data.open_clips`). Default to the paths in `settings`.

    Returns:
        State at the end of the run. `settings.output` holds log/ and the checkpoints best/ and last/, which
        `from_pretrained` loads.

    Raises:
        ValueError: There are no data, training and validation data are the same, a step needs more memory than is
            available, or settings contradict each other, the model, or the run to resume. Also if a loss is not
            finite: the message names the step, and the last checkpoint stays.
        OSError: A checkpoint cannot be written. The last one stays.
        ImportError: A package of the extra `training` is missing.
    """
    with log_each_kind_once():
        train_data = _required(settings, "train_data") if train_data is None else train_data
        clips = open_clips(train_data)
        validation_data = _required(settings, "validation_data") if validation_data is None else validation_data
        check_apart(train_data, validation_data)
        output = Path(_required(settings, "output"))
        check_output(settings, output)
        state = build(settings)
        config, accelerator = state.model.config, state.accelerator
        length = round(settings.segment_seconds * config.sampling_rate)
        if length <= MAX_WINDOW // 2:
            raise ValueError(
                f"Got segment_seconds={settings.segment_seconds}, {length} samples at {config.sampling_rate} Hz. The "
                f"losses' spectrograms need more than {MAX_WINDOW // 2} samples."
            )
        state.num_clips = len(clips)
        validation = validation_clips(
            validation_data, length, config.sampling_rate, settings.num_validation_clips, settings.channel
        )
        _take_batch(state, validation)
        if settings.resume:
            restore(state, output)
        check_memory(state, length)
        prepare_hub(state)

        def batches(start: int) -> Iterator[Batch]:
            """Return endless batches of this process, from batch `start` of the run on."""
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
    """Run the training loop: steps, log entries, validations and checkpoints."""
    settings, device = state.settings, state.accelerator.device
    stream = batches(state.step * settings.gradient_accumulation)
    taken_before, repeated_before = state.num_taken, state.num_repeated  # counts of the validation clips
    warned_short_clips = False
    if state.step == 0 and state.model.quantizer.codebook.inited:  # a new model has no codebook to validate yet
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
        metrics = train_step(state, [_take_batch(state, next(stream)) for _ in range(settings.gradient_accumulation)])
        progress.update()
        last = state.step == settings.steps
        if state.step % settings.log_every == 0 or last:
            metrics["data/repeated"] = (state.num_repeated - repeated_before) / (state.num_taken - taken_before)
            metrics = _mean_over_processes(metrics, device)
            metrics |= {f"codebook/{name}": value for name, value in state.learner.report().items()}
            _share_skipped(state)
            metrics["data/skipped"] = len(state.skipped)
            progress.show_metrics(_progress_values(metrics))
            if log:
                log.scalars(metrics, state.step)
            if log and metrics["data/repeated"] == 1 and not warned_short_clips:
                logger.warning(SHORT_CLIPS, settings.segment_seconds)
                warned_short_clips = True
        if state.step % settings.validate_every == 0 or last:
            score = validate(state, validation, log)["validation/score"]
            improved = score < state.best_score
            state.best_score = min(state.best_score, score)
            save(state, output, improved)


def train_step(state: State, batches: list[torch.Tensor]) -> dict[str, float]:
    """
    Run one step of all optimizers and of the codebook.

    Args:
        state: State of the run. It is updated in place.
        batches: Audio (B, 1, T). Gradients are accumulated over the batches.

    Returns:
        Losses, gradient norms and learning rates of the step, by their names in the log.

    Raises:
        ValueError: A loss or gradient is not finite. Its optimizer and the codebook are not updated.
    """
    return _train_step(state, batches, dry_run=False)


def _train_step(state: State, batches: list[torch.Tensor], dry_run: bool) -> dict[str, float]:
    """Run `train_step`. A dry run computes all of a step with discriminators, and updates nothing."""
    settings = state.settings
    metrics: dict[str, float] = {}
    num_embeddings = state.model.config.adanorm_num_embeddings
    bandwidth_id = derived_seed(settings.seed, "bandwidth_id", state.step) % num_embeddings
    state.model.train()
    trains_discriminators = state.discriminators is not None if dry_run else state.trains_discriminators
    last_output = None
    learns_codebook = state.quantizes and not settings.freeze and not dry_run
    if trains_discriminators:
        last_output = _train_discriminators(state, batches, bandwidth_id, metrics, dry_run)
    for index, audio in enumerate(batches):
        with _synchronized(state, state.codec, last=index == len(batches) - 1):
            # with several batches, _train_discriminators keeps no graph, because the graphs would fill the memory
            output = last_output if len(batches) == 1 else None
            fake, codebook_losses, latents, audio_codes = output or _run_codec(state, audio, index, bandwidth_id)
            losses = {"mel": state.mel_loss(fake[:, 0], audio[:, 0]), **codebook_losses}
            if state.mel_scales_loss is not None:
                losses["mel_scales"] = state.mel_scales_loss(fake[:, 0], audio[:, 0])
            if state.frequency_loss is not None:
                losses["instantaneous_frequency"] = state.frequency_loss(fake[:, 0], audio[:, 0])
            if trains_discriminators:
                losses |= _codec_adversarial_losses(state, audio, fake, bandwidth_id)
            loss = weighted_sum(losses, settings.loss_weights)
            _add_losses(metrics, "loss", losses | {"total": loss}, len(batches))
            # not accelerator.backward, whose loss scaling depends on the environment
            (loss / len(batches)).backward()
        if learns_codebook:
            state.learner.observe(latents, audio_codes)
    if dry_run:
        state.optimizer.zero_grad()
        return metrics
    _step(state, state.optimizer, state.schedule, metrics, "codec", "loss")
    if learns_codebook:
        state.learner.update(state.step)
    state.step += 1
    return metrics


def _train_discriminators(
    state: State, batches: list[torch.Tensor], bandwidth_id: int, metrics: dict[str, float], dry_run: bool
) -> tuple:
    """
    Train the discriminators for one step.

    Returns:
        Output of the codec for the last batch. It has its graph only if there is one batch.
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
                real_and_fake = torch.cat([audio[:, 0], output[0][:, 0].detach()])
                real, fake = _split_real_fake(discriminators(real_and_fake, bandwidth_id))
            losses = discriminator_losses(real, fake)
            loss = sum_losses(losses.values())
            _add_losses(metrics, "discriminator", losses | {"total": loss}, len(batches))
            (loss / len(batches)).backward()
    if dry_run:
        optimizer.zero_grad()
    else:
        _step(state, optimizer, schedule, metrics, "discriminators", "discriminator")
    return output


def check_apart(train_data: Clips, validation_data: Clips) -> None:
    """Raise ValueError if training and validation data are the same."""
    if not (isinstance(train_data, (str, os.PathLike)) and isinstance(validation_data, (str, os.PathLike))):
        if train_data is validation_data:
            raise ValueError(
                "Got one dataset as train_data and validation_data. Validate on audio that is not trained on."
            )
        return
    train_path, validation_path = (Path(data).resolve() for data in (train_data, validation_data))
    if train_path == validation_path or (train_path.is_dir() and train_path in validation_path.parents
                                         and validation_path.is_dir()):  # fmt: skip
        raise ValueError(
            f"Got train_data={str(train_data)!r} and validation_data={str(validation_data)!r}: the "
            "validation clips would be trained on. Keep them in a separate folder or list."
        )


def check_memory(state: State, length: int) -> MemoryEstimate | None:
    """
    Estimate the memory of a step from small steps that change nothing.

    Args:
        state: State before the first step of this process.
        length: Samples per segment.

    Returns:
        The estimate, or None if the system does not report the memory of a process.

    Raises:
        ValueError: A step needs more memory than is available. The message names settings that fit.
    """
    settings, device = state.settings, state.accelerator.device
    generator = torch.Generator().manual_seed(0)

    def measure(segments: int) -> int | None:
        audio = 0.1 * torch.randn(segments, 1, length, generator=generator).to(device)
        with PeakMemory(device) as peak:
            _train_step(state, [audio] * min(2, settings.gradient_accumulation), dry_run=True)
        return peak.bytes

    optimizers: list[tuple[torch.optim.Optimizer | None, nn.Module | None]] = [
        (state.optimizer, state.model),
        (state.discriminator_optimizer, state.discriminators),
    ]
    # AdamW will allocate two moments per trained parameter; a resumed run has them already
    without_moments = [module for optimizer, module in optimizers if optimizer is not None and not optimizer.state]
    sizes = [p.nbytes for module in filter(None, without_moments) for p in module.parameters() if p.requires_grad]
    try:
        found = estimate_memory(measure, 2 * sum(sizes), 1)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"A step on two segments of {settings.segment_seconds:g} s does not fit into the memory of {device}. Use "
            "a smaller --segment-seconds, or a GPU with more memory."
        ) from error
    available = available_memory(device, settings, state.accelerator.num_processes)
    if found is not None and available is not None and (reason := refusal_reason(found, available, settings)):
        raise ValueError(reason)
    if found is not None and state.accelerator.is_main_process:
        logger.info("A step needs about %.2f GB.", found.bytes_for(settings.batch_size) / GB)
    return found


def validate(state: State, clips: Batch, log: Log | None) -> dict[str, float]:
    """
    Encode and decode the validation clips as in inference, and return metrics. The model does not change.

    The score that selects checkpoints is mel + weight * commitment, with the commitment weight of the run, which is
    1000 by default. The reference implementation adds UTMOS and PESQ, which need more packages and weights.
    """
    accelerator, model = state.accelerator, state.model.eval()
    sums = torch.zeros(3, device=accelerator.device)  # mel, commitment, clips
    usage = torch.zeros_like(state.learner.usage)
    with torch.inference_mode():
        for index in range(accelerator.process_index, len(clips.audio), accelerator.num_processes):
            audio = clips.audio[index : index + 1].to(accelerator.device)
            encoded = model.encode(audio, output_latents=True)
            decoded = model.decode(encoded.audio_codes).audio_values[..., : audio.shape[-1]]
            assert encoded.latents is not None
            commitment = F.mse_loss(encoded.latents, model.quantizer.decode(encoded.audio_codes))
            sums += torch.stack([state.mel_loss(decoded[:, 0], audio[:, 0]), commitment, torch.ones_like(commitment)])
            usage += torch.bincount(encoded.audio_codes.flatten(), minlength=len(usage))
            if log and index // accelerator.num_processes < state.settings.num_logged_clips:
                log.clip(f"clip_{index}/real", audio[0, 0], state.mel_loss, state.step)
                log.clip(f"clip_{index}/decoded", decoded[0, 0], state.mel_loss, state.step)
    mel, commitment, count = all_reduce_sum(sums).tolist()
    metrics = {"mel": mel / count, "commitment": commitment / count, **usage_metrics(all_reduce_sum(usage))}
    metrics["score"] = metrics["mel"] + state.settings.loss_weights["commitment"] * metrics["commitment"]
    metrics = {f"validation/{name}": value for name, value in metrics.items()}
    if log:
        log.scalars(metrics, state.step)
    if not math.isfinite(metrics["validation/score"]):
        raise ValueError(f"The validation score after step {state.step} is {metrics['validation/score']}. Stopped.")
    return metrics


def normalize_encoder(state: State, stream: Iterator[Batch]) -> None:
    """
    Initialize a new encoder so that each layer has mean 0 and standard deviation 1 on the first joint batch.

    This is the initialization of Salimans and Kingma (2016) for weight-normalized networks. PyTorch's initialization
    shrinks the signal at every layer.
    """

    @torch.no_grad()
    def normalize(conv: Any, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        count = all_reduce_sum(output.new_tensor(output.shape[0] * output.shape[2]))
        mean = all_reduce_sum(output.sum((0, 2))) / count
        deviation = (all_reduce_sum((output - mean[:, None]).square().sum((0, 2))) / count).sqrt().clamp(min=1e-5)
        conv.parametrizations.weight.original0.div_(deviation[:, None, None])
        conv.bias.sub_(mean).div_(deviation)
        return (output - mean[:, None]) / deviation[:, None]  # the output after the change

    encoder = state.model.encoder_model.encoder
    layers = [module for module in encoder.modules() if isinstance(module, nn.Conv1d)]
    hooks = [layer.register_forward_hook(normalize) for layer in layers]
    try:
        encoder(next(stream).audio.to(state.accelerator.device))
    finally:
        for hook in hooks:
            hook.remove()


def start_codebook(state: State, stream: Iterator[Batch]) -> None:
    """Initialize the codebook of a new model by k-means on the encoder output of the next batches."""
    settings, accelerator = state.settings, state.accelerator
    batches: list[torch.Tensor] = []
    num_latents = max(1, settings.kmeans_latents // accelerator.num_processes)
    while sum(len(latents) for latents in batches) < num_latents:
        audio = next(stream).audio.to(accelerator.device)
        with torch.inference_mode():
            latents = state.model.encoder_model.encoder(audio)
        batches.append(latents.transpose(1, 2).flatten(0, 1))
    latents_per_step = len(batches[0]) * accelerator.num_processes * settings.gradient_accumulation
    state.learner.start(batches, settings.kmeans_iterations, latents_per_step)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a step
# ---------------------------------------------------------------------------------------------------------------------


def _run_codec(state: State, audio: torch.Tensor, index: int, bandwidth_id: int) -> tuple:
    # seed dropout from the position in the run, so that a resumed run or a repeated pass draws the same
    torch.manual_seed(derived_seed(state.settings.seed, "dropout", state.step, index, state.accelerator.process_index))
    return state.codec(audio, bandwidth_id, state.quantizes)


def _codec_adversarial_losses(
    state: State, audio: torch.Tensor, fake: torch.Tensor, bandwidth_id: int
) -> dict[str, torch.Tensor]:
    """Return the adversarial losses of the codec, without gradients for the discriminators."""
    assert state.discriminators is not None
    state.discriminators.requires_grad_(False)
    try:
        with cached(), autocast(audio.device, state.settings.precision):
            with torch.no_grad():
                real = state.discriminators(audio[:, 0], bandwidth_id)
            return adversarial_losses(real, state.discriminators(fake[:, 0], bandwidth_id))
    finally:
        state.discriminators.requires_grad_(True)


def _split_real_fake(outputs: dict) -> tuple[dict, dict]:
    """Split discriminator outputs for a batch of real audio followed by fake audio."""
    halves = {name: [output.split_halves() for output in each] for name, each in outputs.items()}
    real, fake = ({name: [pair[half] for pair in pairs] for name, pairs in halves.items()} for half in (0, 1))
    return real, fake


def _synchronized(state: State, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Return a context that exchanges gradients between processes only in the last of several batches."""
    return nullcontext() if last else state.accelerator.no_sync(module)


def _step(
    state: State,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    metrics: dict[str, float],
    name: str,
    losses: str,
) -> None:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    # All processes have the same gradients and norm, so they stop together. A loss may be non-finite in one process
    # only; its launcher stops the others.
    if not norm.isfinite() or not math.isfinite(metrics[f"{losses}/total"]):
        optimizer.zero_grad()
        values = ", ".join(f"{key} {value:.3g}" for key, value in metrics.items() if key.startswith(f"{losses}/"))
        raise ValueError(
            f"Step {state.step + 1}: loss or gradients of the {name} are not finite ({values}). Stopped; the last "
            "checkpoint is that of the last validation. Start another run from it, with a lower learning_rate or a "
            f"max_gradient_norm and --model {Path(state.settings.output, 'last')}."
        )
    if state.settings.max_gradient_norm is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, state.settings.max_gradient_norm, norm)
    metrics[f"gradient_norm/{name}"] = norm.item()
    metrics[f"learning_rate/{name}"] = float(schedule.get_last_lr()[0])
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def _add_losses(metrics: dict[str, float], group: str, losses: dict[str, torch.Tensor], num_batches: int) -> None:
    """Add the losses of one of `num_batches` batches to the mean in the metrics."""
    for name, loss in losses.items():
        key = f"{group}/{name}"
        metrics[key] = metrics.get(key, 0.0) + loss.item() / num_batches


def _mean_over_processes(metrics: dict[str, float], device: torch.device) -> dict[str, float]:
    values = all_reduce_sum(torch.tensor(list(metrics.values()), device=device)) / world_size()
    return dict(zip(metrics, values.tolist(), strict=True))


def _progress_values(metrics: dict[str, float]) -> dict[str, str]:
    short = {
        "loss/mel": "mel",
        "loss/commitment": "commit",
        "discriminator/total": "disc",
        "codebook/utilization": "used",
    }
    return {short[name]: f"{value:.3g}" for name, value in metrics.items() if name in short}


def _take_batch(state: State, batch: Batch) -> torch.Tensor:
    """Move a batch to the device of this process. Count its segments, and log clips that could not be read."""
    for clip, reason in batch.skipped.items():
        if clip not in state.skipped:
            state.skipped[clip] = reason
            logger.warning("Skipped %s: %s", clip, reason)
    state.num_taken += len(batch.audio)
    state.num_repeated += batch.num_repeated
    return batch.audio.to(state.accelerator.device)


def _share_skipped(state: State) -> None:
    """Collect the unreadable clips of all processes in every process."""
    from accelerate.utils import gather_object

    state.skipped = dict(gather_object(list(state.skipped.items())))


def _required(settings: Settings, name: str) -> str:
    value = getattr(settings, name)
    if not value:
        raise ValueError(f"Got no {name}. Give --{name.replace('_', '-')}, or set it in the recipe.")
    return value
