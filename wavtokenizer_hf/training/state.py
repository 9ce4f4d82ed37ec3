"""State of a training run: build, save and restore it."""

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
    """Encoder, codebook and decoder of a model in one differentiable forward pass."""

    def __init__(
        self, model: WavTokenizerModel, precision: str = "float32", reencode: bool = False, frozen: bool = False
    ):
        super().__init__()
        self.model, self.precision, self.reencode, self.frozen = model, precision, reencode, frozen

    def forward(
        self, audio: torch.Tensor, bandwidth_id: int, quantize: bool = True
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """
        Encode, quantize and decode.

        Args:
            audio: Audio of shape (B, 1, T).
            bandwidth_id: Condition of the decoder.
            quantize: Whether the decoder gets codebook entries. Else it gets the latents, and there are no losses.

        Returns:
            Decoded audio (B, 1, T), codebook losses by name, latents (B, D, L) and their nearest codes (B, 1, L). A
            frozen encoder has no commitment loss, because nothing could lower it.
        """
        model = self.model
        # codes are always computed in float32
        with (
            torch.autocast(audio.device.type, enabled=False),
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen),
        ):
            latents = model.encoder_model.encoder(audio)
            audio_codes = model.quantizer.encode(latents.detach())
            entries = model.quantizer.decode(audio_codes)
            # straight-through gradients
            quantized = latents + (entries - latents).detach() if quantize else latents
        with autocast(audio.device, self.precision):
            decoded = model.head(model.backbone(quantized, bandwidth_id))[..., : audio.shape[-1]]
        losses = {}
        if quantize:
            if not self.frozen:
                losses["commitment"] = F.mse_loss(latents, entries)
            if self.reencode:  # re-encoded audio should give the entries that it was decoded from
                with torch.autocast(audio.device.type, enabled=False):
                    losses["reencoding"] = F.mse_loss(model.encoder_model.encoder(decoded.float()), entries)
        return decoded, losses, latents.detach(), audio_codes


@dataclass
class State:
    """
    State of a training run.

    `codec` and `prepared_discriminators` are wrapped for several GPUs. `model` and `discriminators` are not.
    """

    settings: Settings
    accelerator: Any
    model: WavTokenizerModel
    codec: nn.Module
    mel_loss: MelLoss
    mel_scales_loss: MelScalesLoss | None  # None if its weight is 0
    frequency_loss: InstantaneousFrequencyLoss | None  # None if its weight is 0
    learner: CodebookLearner
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    discriminators: Discriminators | None = None
    prepared_discriminators: nn.Module | None = None
    discriminator_optimizer: torch.optim.Optimizer | None = None
    discriminator_schedule: torch.optim.lr_scheduler.LambdaLR | None = None
    frozen_digest: str | None = None  # digest of encoder and codebook, if they are frozen
    step: int = 0  # number of finished steps
    best_score: float = math.inf
    num_clips: int = 0  # number of training clips
    # since the start of the process; clips of other processes are added with each log entry
    skipped: dict[str, str] = field(default_factory=dict)  # clip that could not be read -> reason
    # of this process, since its start
    num_taken: int = 0  # number of segments
    num_repeated: int = 0  # number of segments from clips shorter than a segment

    @property
    def quantizes(self) -> bool:
        return self.step >= self.settings.continuous_steps

    @property
    def trains_discriminators(self) -> bool:
        return self.discriminators is not None and self.step >= self.settings.mel_only_steps


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def build(settings: Settings) -> State:
    """Build the initial state of a run.

    Raises:
        ValueError: The model cannot be loaded, or contradicts the settings.
    """
    accelerate = require("accelerate", "training")
    # the only buffer is the codebook, which CodebookLearner synchronizes, so no broadcast is needed at every pass
    handlers = [accelerate.DistributedDataParallelKwargs(broadcast_buffers=False)]
    # cpu: without it, on a machine without accelerator, accelerate takes each process of torchrun for the only one.
    # mixed_precision: the settings decide what is computed in bfloat16, not a configuration of accelerate.
    accelerator = accelerate.Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision="no", kwargs_handlers=handlers
    )
    torch.manual_seed(derived_seed(settings.seed, "weights"))
    config = _new_config(settings.config)
    model = _load_model(settings.model) if settings.model else WavTokenizerModel(config)
    for name in settings.config:  # a recipe with a config also works with a model of that config
        if getattr(model.config, name) != getattr(config, name):
            raise ValueError(
                f"The model {settings.model!r} has {name}={getattr(model.config, name)} and the settings' config "
                f"{name}={getattr(config, name)}. A model keeps its config: choose another "
                "recipe, or leave config out."
            )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = settings.dropout
    if settings.freeze:
        _freeze_encoder(settings, model)
    model.to(accelerator.device)
    if settings.compile:  # in place, to keep tensor names; not the encoder, whose codes must not change
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
                "%s has no discriminators.safetensors: the discriminators start with random weights.", settings.model
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
    """Write last/, and best/ if the score improved. Raises RuntimeError if frozen weights have changed."""
    accelerator = state.accelerator
    if state.frozen_digest is not None and _digest(state.model.encoder_model) != state.frozen_digest:
        raise RuntimeError("The encoder or codebook has changed although it is frozen. No checkpoint was written.")
    if accelerator.is_main_process:
        discriminators = state.discriminators if state.trains_discriminators else None
        metadata = {
            "step": state.step,
            "best_score": state.best_score if math.isfinite(state.best_score) else None,  # JSON has no infinity
            "num_processes": accelerator.num_processes,
            "num_clips": state.num_clips,
            "settings": asdict(state.settings),
            "num_restarts": state.learner.num_restarts,
        }
        tensors = {
            "usage": state.learner.usage,
            **{name: part.state_dict() for name, part in _stateful_parts(state).items()},
        }
        save_checkpoint(output / LAST, state.model, discriminators, metadata, tensors)
        if improved:
            save_checkpoint(output / "best", state.model, discriminators)
    accelerator.wait_for_everyone()


def restore(state: State, output: Path) -> None:
    """
    Restore the state from last/, or from previous/ if last/ is missing or damaged.

    A damaged last/ is renamed to last.damaged/, and one line with the reason is logged.

    Raises:
        ValueError: Neither can be read, or the settings differ from those of the run.
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
        state.accelerator.wait_for_everyone()  # until the other processes have read last/
        if reasons and state.accelerator.is_main_process:
            damaged = output / f"{LAST}.damaged"
            shutil.rmtree(damaged, ignore_errors=True)
            os.replace(output / LAST, damaged)
            logger.warning(
                "%s; it is now %s. Went back to step %d in %s.", reasons[0], damaged.name, state.step, folder
            )
        return
    if not reasons:
        raise ValueError(f"There is no state of training in {output} to resume from.")
    raise ValueError(
        f"There is no checkpoint in {output} to resume from: {'; '.join(reasons)}. Start another run, for example "
        f"with model={output / 'best'}."
    )


def _restore_from(state: State, folder: Path) -> None:
    """Restore the state from a checkpoint.

    Raises:
        DamagedError: The checkpoint cannot be read.
        ValueError: The settings differ from those of the run.
    """
    metadata, tensors = read_state(folder)
    try:
        step, num_processes, best_score = metadata["step"], metadata["num_processes"], metadata["best_score"]
        differences = state.settings.differences(metadata["settings"])
        num_restarts, steps_before = metadata["num_restarts"], int(metadata["settings"]["steps"])
    except (KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"The state of training in {folder} cannot be read: it lacks {error}") from error
    if type(step) is not int or step < 0:
        raise DamagedError(f"The state of training in {folder} cannot be read: it has step={short_repr(step)}")
    if state.settings.steps < steps_before:
        differences.append(f"steps were {steps_before} and are now {state.settings.steps}, which is fewer")
    if num_processes != state.accelerator.num_processes:
        differences.append(f"processes were {num_processes} and are now {state.accelerator.num_processes}")
    if (num_clips := metadata.get("num_clips", state.num_clips)) != state.num_clips:
        differences.append(f"clips were {num_clips} and are now {state.num_clips}")
    if differences:
        raise ValueError(
            f"The run in {folder.parent} had other settings: {'; '.join(differences)}. Resume it with its own "
            f"settings, or start another run from it with model={folder}."
        )
    try:
        state.model.load_state_dict(_load_model(str(folder)).state_dict())
        needed = step >= state.settings.mel_only_steps
        if state.discriminators is not None and needed and not load_discriminators(str(folder), state.discriminators):
            raise ValueError("it lacks its discriminators")
        for name, part in _stateful_parts(state).items():
            _load_part(name, part, tensors[name])
        if state.settings.steps != steps_before:
            for schedule in filter(None, (state.schedule, state.discriminator_schedule)):
                _update_learning_rate(schedule)
        state.learner.usage.copy_(tensors["usage"])
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # any of these can raise any error for a damaged file
        raise DamagedError(f"The checkpoint {folder} cannot be read: {one_line(error)}") from error
    state.learner.num_restarts = num_restarts
    state.step, state.best_score = step, math.inf if best_score is None else best_score


def _load_part(name: str, part: Any, values: Any) -> None:
    """Load the state of an optimizer or schedule. Raises ValueError for keys or shapes that PyTorch does not check."""
    if not isinstance(values, dict) or set(values) != set(part.state_dict()):
        raise ValueError(f"optimizers.pt holds no state of the {name}")
    part.load_state_dict(values)
    for parameter, moments in getattr(part, "state", {}).items():
        for key, tensor in moments.items():
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape != parameter.shape:
                raise ValueError(f"optimizers.pt holds {key} of another shape in the {name}")


def check_output(settings: Settings, output: Path) -> None:
    """Raise ValueError if the run would overwrite the checkpoints of another run."""
    recover(output / "best")
    if any((output / name).exists() for name in (LAST, PREVIOUS, "best")) and not settings.resume:
        raise ValueError(f"{output} already holds a run. Resume it (--resume), or choose another output.")


def prepare_hub(state: State) -> None:
    """Create the Hub repository before the first step, so that errors do not appear after the last one."""
    if state.settings.push_to_hub and state.accelerator.is_main_process:
        _hub().create_repo(state.settings.push_to_hub, exist_ok=True)


def upload(state: State, output: Path) -> None:
    """Upload best/ to the Hub, if `push_to_hub` is set."""
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


def _stateful_parts(state: State) -> dict[str, Any]:
    """Return optimizers and schedules by name."""
    parts: dict[str, Any] = {"optimizer": state.optimizer, "schedule": state.schedule}
    if state.discriminators is not None:
        parts |= {
            "discriminator_optimizer": state.discriminator_optimizer,
            "discriminator_schedule": state.discriminator_schedule,
        }
    return parts


def _update_learning_rate(schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Set the learning rate for a schedule whose state came from a run of another length."""
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
    """Return the SHA-256 of the names and values of all tensors of a module."""
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
    if unknown:  # transformers would accept them silently
        raise ValueError(f"Got config fields that a WavTokenizer does not have: {', '.join(unknown)}.")
    return WavTokenizerConfig(**values)


def _adamw(module: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    fused = next(module.parameters()).device.type in ("cpu", "cuda")
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, learning_rate, fused=fused)
