"""What a run consists of: making it, saving it, and going on from what was saved."""

import hashlib
import logging
import math
import os
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from ..configuration_wavtokenizer import WavTokenizerConfig
from ..extras import require
from ..limited_files import one_line, short_repr
from ..loading import load_model
from ..modeling_wavtokenizer import WavTokenizerModel
from .checkpoints import LAST, PREVIOUS, DamagedError, load_discriminators, read_state, recover, save_checkpoint
from .codebook import CodebookLearner
from .discriminators import Discriminators
from .losses import InstantaneousFrequencyLoss, MelLoss, MelScalesLoss, used_discriminators
from .settings import Settings, derived_seed


if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)


class Codec(nn.Module):
    """The model as training sees it: encoder, codebook and decoder in one differentiable pass."""

    def __init__(
        self, model: WavTokenizerModel, precision: str = "float32", reencode: bool = False, frozen: bool = False
    ):
        super().__init__()
        self.model, self.precision, self.reencode, self.frozen = model, precision, reencode, frozen

    def forward(
        self, audio: torch.Tensor, bandwidth_id: int, quantize: bool = True
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """audio (B, 1, T) -> made (B, 1, T), the codebook's losses by name, latents (B, D, L) and their codes (B, 1,
        L).

        Without `quantize` the decoder gets the latents themselves, there are no losses, and the codes are the nearest
        all the same. With a frozen encoder there is no commitment loss, which nothing could lower.
        """
        model = self.model
        # codes are always decided in float32
        with (
            torch.autocast(audio.device.type, enabled=False),
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen),
        ):
            latents = model.encoder_model.encoder(audio)
            audio_codes = model.quantizer.encode(latents.detach())
            entries = model.quantizer.decode(audio_codes)
            # gradients pass straight through the choice
            quantized = latents + (entries - latents).detach() if quantize else latents
        with autocast(audio.device, self.precision):
            made = model.head(model.backbone(quantized, bandwidth_id))[..., : audio.shape[-1]]
        losses = {}
        if quantize:
            if not self.frozen:
                losses["commitment"] = F.mse_loss(latents, entries)
            if self.reencode:  # what the encoder makes of the decoder's audio should be where that audio came from
                with torch.autocast(audio.device.type, enabled=False):
                    losses["reencoding"] = F.mse_loss(model.encoder_model.encoder(made.float()), entries)
        return made, losses, latents.detach(), audio_codes


@dataclass
class State:
    """
    All that a run consists of. Prepared modules are wrapped for several GPUs; `model` and `discriminators` are what is
    inside.
    """

    settings: Settings
    accelerator: Any
    model: WavTokenizerModel
    codec: nn.Module
    mel_loss: MelLoss
    mel_scales_loss: MelScalesLoss | None  # only if it has a weight
    frequency_loss: InstantaneousFrequencyLoss | None  # likewise
    learner: CodebookLearner
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    discriminators: Discriminators | None = None
    prepared_discriminators: nn.Module | None = None
    discriminator_optimizer: torch.optim.Optimizer | None = None
    discriminator_schedule: torch.optim.lr_scheduler.LambdaLR | None = None
    frozen_digest: str | None = None  # of the encoder and codebook, if they are frozen
    step: int = 0  # steps done
    best_score: float = math.inf
    num_clips: int = 0  # to train on
    # since the process began, of all processes at the last entry in the log
    skipped: dict[str, str] = field(default_factory=dict)  # clips that could not be read, and why
    # of this process, since it began
    num_taken: int = 0  # segments
    num_repeated: int = 0  # of those, from clips shorter than a segment

    @property
    def quantizes(self) -> bool:
        return self.step >= self.settings.continuous_steps

    @property
    def trains_discriminators(self) -> bool:
        return self.discriminators is not None and self.step >= self.settings.mel_only_steps


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def build(settings: Settings) -> State:
    """A run at its beginning: model, discriminators, optimizers. Raises ValueError for a model that cannot be had."""
    accelerate = require("accelerate", "training")
    # the codebook, the only buffer, agrees over workers by its own sums; nothing has to be broadcast at every pass
    handlers = [accelerate.DistributedDataParallelKwargs(broadcast_buffers=False)]
    # unless it is told that there is nothing but CPUs, accelerate takes each process that torchrun started for the
    # only one the settings say what is computed in bfloat16, and not what accelerate was once configured to
    accelerator = accelerate.Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision="no", kwargs_handlers=handlers
    )
    torch.manual_seed(derived_seed(settings.seed, "weights"))
    config = _new_config(settings.config)
    model = _load_model(settings.model) if settings.model else WavTokenizerModel(config)
    for name in settings.config:  # a recipe may be used for a model of its shape
        if getattr(model.config, name) != getattr(config, name):
            raise ValueError(
                f"The model {settings.model!r} has {name}={getattr(model.config, name)} and the settings' config "
                f"{name}={getattr(config, name)}. A model keeps its shape: choose another recipe, or leave config out."
            )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = settings.dropout
    if settings.freeze:
        _freeze_encoder(settings, model)
    model.to(accelerator.device)
    if settings.compile:  # in place, so that names in checkpoints stay; the encoder decides codes and is left as it is
        model.backbone.compile()
        model.head.compile()
    optimizer = _adamw(model, settings.learning_rate)
    codec = Codec(
        model, settings.precision, reencode=bool(settings.loss_weights["reencoding"]), frozen=bool(settings.freeze)
    )
    weights, sampling_rate, device = settings.loss_weights, model.config.sampling_rate, accelerator.device
    state = State(
        settings, accelerator, model, accelerator.prepare(codec),
        MelLoss(sampling_rate).to(device),
        MelScalesLoss(sampling_rate).to(device) if weights["mel_scales"] else None,
        InstantaneousFrequencyLoss(sampling_rate).to(device) if weights["instantaneous_frequency"] else None,
        CodebookLearner(model.quantizer, settings.codebook_decay, settings.dead_code_threshold, settings.seed),
        optimizer, get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps),
    )  # fmt: skip
    if settings.freeze:
        state.frozen_digest = _digest(model.encoder_model)
    names, discriminator_steps = used_discriminators(settings.loss_weights), settings.steps - settings.mel_only_steps
    if names and discriminator_steps > 0:
        torch.manual_seed(derived_seed(settings.seed, "discriminators"))
        state.discriminators = Discriminators(model.config.adanorm_num_embeddings, settings.discriminator_scale, names)
        if settings.model and not load_discriminators(settings.model, state.discriminators):
            logger.warning(
                "%s has no discriminators.safetensors: the discriminators begin with random weights.", settings.model
            )
        state.discriminators.to(accelerator.device)
        if settings.compile:
            state.discriminators.compile()
        state.prepared_discriminators = accelerator.prepare(state.discriminators)
        state.discriminator_optimizer = _adamw(
            state.discriminators, settings.discriminator_learning_rate or settings.learning_rate
        )
        state.discriminator_schedule = get_cosine_schedule_with_warmup(
            state.discriminator_optimizer, settings.warmup_steps, discriminator_steps
        )
    return state


def save(state: State, output: Path, improved: bool) -> None:
    """Writes last/, and best/ if the score fell. Raises RuntimeError if what is frozen has changed."""
    accelerator = state.accelerator
    if state.frozen_digest is not None and _digest(state.model.encoder_model) != state.frozen_digest:
        raise RuntimeError("The encoder or codebook has changed although it is frozen. No checkpoint was written.")
    if accelerator.is_main_process:
        discriminators = state.discriminators if state.trains_discriminators else None
        facts = {
            "step": state.step,
            "best_score": state.best_score if math.isfinite(state.best_score) else None,  # JSON has no infinity
            "num_processes": accelerator.num_processes,
            "num_clips": state.num_clips,
            "settings": asdict(state.settings),
            "num_restarts": state.learner.num_restarts,
        }
        tensors = {"usage": state.learner.usage, **{name: part.state_dict() for name, part in _steered(state).items()}}
        save_checkpoint(output / LAST, state.model, discriminators, facts, tensors)
        if improved:
            save_checkpoint(output / "best", state.model, discriminators)
    accelerator.wait_for_everyone()


def restore(state: State, output: Path) -> None:
    """
    Go back to last/, or to previous/ if last/ is missing or damaged.

    A damaged last/ is renamed to last.damaged/, and the log says why in one line.

    Raises:
        ValueError: Neither can be read, or they were made with other settings.
    """
    reasons = []
    for folder in (output / LAST, output / PREVIOUS):
        if not folder.is_dir():
            continue
        try:
            _restore_from(state, folder)
        except DamagedError as error:
            reasons.append(str(error))
            continue
        state.accelerator.wait_for_everyone()  # until the others have read last/ as well
        if reasons and state.accelerator.is_main_process:
            damaged = output / f"{LAST}.damaged"
            shutil.rmtree(damaged, ignore_errors=True)
            os.replace(output / LAST, damaged)
            logger.warning(
                "%s; it is now %s. Went back to step %d in %s.", reasons[0], damaged.name, state.step, folder
            )
        return
    if not reasons:
        raise ValueError(f"There is no state of training in {output} to go on from.")
    raise ValueError(
        f"There is no checkpoint in {output} to go on from: {'; '.join(reasons)}. Start another run, for example with "
        f"model={output / 'best'}."
    )


def _restore_from(state: State, folder: Path) -> None:
    """Raises DamagedError if the checkpoint cannot be read, ValueError if it was made with other settings."""
    facts, tensors = read_state(folder)
    try:
        step, num_processes, best_score = facts["step"], facts["num_processes"], facts["best_score"]
        differences = state.settings.differences(facts["settings"])
        num_restarts, steps_before = facts["num_restarts"], int(facts["settings"]["steps"])
    except (KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"The state of training in {folder} cannot be read: it lacks {error}") from error
    if type(step) is not int or step < 0:
        raise DamagedError(f"The state of training in {folder} cannot be read: it has step={short_repr(step)}")
    if state.settings.steps < steps_before:
        differences.append(f"steps were {steps_before} and are now {state.settings.steps}, which is fewer")
    if num_processes != state.accelerator.num_processes:
        differences.append(f"processes were {num_processes} and are now {state.accelerator.num_processes}")
    if (num_clips := facts.get("num_clips", state.num_clips)) != state.num_clips:
        differences.append(f"clips were {num_clips} and are now {state.num_clips}")
    if differences:
        raise ValueError(
            f"The run in {folder.parent} had other settings: {'; '.join(differences)}. Resume it with its own, or "
            f"start another from it with model={folder}."
        )
    try:
        state.model.load_state_dict(_load_model(str(folder)).state_dict())
        needed = step >= state.settings.mel_only_steps
        if state.discriminators is not None and needed and not load_discriminators(str(folder), state.discriminators):
            raise ValueError("it lacks its discriminators")
        for name, part in _steered(state).items():
            _load_part(name, part, tensors[name])
        if state.settings.steps != steps_before:
            for schedule in filter(None, (state.schedule, state.discriminator_schedule)):
                _follow_new_length(schedule)
        state.learner.usage.copy_(tensors["usage"])
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make any of these raise anything
        raise DamagedError(f"The checkpoint {folder} cannot be read: {one_line(error)}") from error
    state.learner.num_restarts = num_restarts
    state.step, state.best_score = step, math.inf if best_score is None else best_score


def _load_part(name: str, part: Any, values: Any) -> None:
    """Load an optimizer or schedule. Raises an error where PyTorch would take what belongs to something else."""
    if not isinstance(values, dict) or set(values) != set(part.state_dict()):
        raise ValueError(f"optimizers.pt holds no state of the {name}")
    part.load_state_dict(values)
    for parameter, numbers in getattr(part, "state", {}).items():
        for key, tensor in numbers.items():
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape != parameter.shape:
                raise ValueError(f"optimizers.pt holds {key} of another shape in the {name}")


def check_output(settings: Settings, output: Path) -> None:
    """Raises ValueError if a run would overwrite another, or the best model of one."""
    recover(output / "best")
    if any((output / name).exists() for name in (LAST, PREVIOUS, "best")) and not settings.resume:
        raise ValueError(f"{output} holds a run already. Resume it (--resume), or choose another output.")


def prepare_hub(state: State) -> None:
    """Makes the repository before the first step, rather than fail after the last one."""
    if state.settings.push_to_hub and state.accelerator.is_main_process:
        _hub().create_repo(state.settings.push_to_hub, exist_ok=True)


def upload(state: State, output: Path) -> None:
    """Sends best/ to the Hub, if the settings say so."""
    if state.settings.push_to_hub and state.accelerator.is_main_process:
        _hub().upload_folder(
            repo_id=state.settings.push_to_hub,
            folder_path=output / "best",
            commit_message=f"Best model of {state.step} steps: validation score {state.best_score:.4f}",
        )
    state.accelerator.wait_for_everyone()


def _hub() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi()


def _steered(state: State) -> dict[str, Any]:
    """The parts with a state of their own beside the weights."""
    parts: dict[str, Any] = {"optimizer": state.optimizer, "schedule": state.schedule}
    if state.discriminators is not None:
        parts |= {
            "discriminator_optimizer": state.discriminator_optimizer,
            "discriminator_schedule": state.discriminator_schedule,
        }
    return parts


def _follow_new_length(schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """
    Sets the learning rate to that of the schedule's own function, where the state came from one of another length.
    """
    rates = [
        base * function(schedule.last_epoch)
        for base, function in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _freeze_encoder(settings: Settings, model: WavTokenizerModel) -> None:
    if settings.model is None:
        raise ValueError("Got freeze='encoder' without a model: random weights would be frozen. Give --model.")
    if not model.quantizer.codebook.inited.item():
        raise ValueError(
            f"Got freeze='encoder', but the model {settings.model!r} has no codebook yet. Train it without freeze "
            "first."
        )
    model.encoder_model.requires_grad_(False)


def _digest(module: nn.Module) -> str:
    """SHA-256 over the names and values of all tensors of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load_model(name: str) -> WavTokenizerModel:
    return load_model(WavTokenizerModel, name, dtype=torch.float32)


def _new_config(values: dict[str, Any]) -> WavTokenizerConfig:
    known = {f.name for f in fields(WavTokenizerConfig)}
    unknown = sorted(set(values) - known)
    if unknown:  # transformers would keep them without a word
        raise ValueError(f"Got config fields that a WavTokenizer does not have: {', '.join(unknown)}.")
    return WavTokenizerConfig(**values)


def _adamw(module: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    fused = next(module.parameters()).device.type in ("cpu", "cuda")
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, learning_rate, fused=fused)
