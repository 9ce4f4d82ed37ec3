"""Read and write the checkpoint folders of a run. They are written atomically.

best/, last/            model files for from_pretrained, with the remote code, and discriminators.safetensors
last/training_state/    state.json and optimizers.pt, to resume from
previous/               the last/ before the current one, to resume from if last/ is damaged
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from ..atomic_files import atomic_folder, remove_leftovers
from ..feature_extraction_wavtokenizer import WavTokenizerFeatureExtractor
from ..limited_files import check_archive, one_line, read_json_object, read_safetensors_header
from ..modeling_wavtokenizer import WavTokenizerModel
from .discriminators import NAMES, Discriminators


DISCRIMINATORS = "discriminators.safetensors"
STATE = "training_state"
LAST, PREVIOUS = "last", "previous"


class DamagedError(ValueError):
    """A checkpoint cannot be read. An older one may work."""


def save_checkpoint(
    folder: Path,
    model: WavTokenizerModel,
    discriminators: Discriminators | None,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
) -> None:
    """
    Write a checkpoint atomically: to a temporary folder, which then replaces `folder`.

    If anything fails, the existing checkpoint stays intact. A `last` that is replaced is kept as `previous`.

    Args:
        folder: Folder of the checkpoint, named `best` or `last`.
        model: Model of the run.
        discriminators: Discriminators of the run, if it trains any.
        metadata: Plain values of the state, for state.json. None: a checkpoint that cannot be resumed from.
        tensors: State dicts and tensors of the state, for optimizers.pt.

    Raises:
        OSError: The checkpoint cannot be written, for example on a full disk.
    """
    recover(folder)
    remove_leftovers(folder.parent)  # temporary folders of killed runs, which can hold gigabytes
    previous = _replaced_folder(folder)
    try:
        with atomic_folder(folder, previous) as partial:
            _write_model(partial, model)
            if discriminators is not None:
                save_file(discriminators.state_dict(), partial / DISCRIMINATORS)
            for file in partial.glob("*.safetensors"):  # safetensors 0.8 lets only the owner read its files
                shutil.copymode(partial / "config.json", file)
            if metadata is not None:
                (partial / STATE).mkdir()
                torch.save(tensors, partial / STATE / "optimizers.pt")
                text = json.dumps(metadata, indent=1, allow_nan=False)
                (partial / STATE / "state.json").write_text(text, encoding="utf-8")
    except (SafetensorError, RuntimeError, OSError) as error:  # raised by safetensors and torch on a full disk
        raise OSError(
            f"Cannot write the checkpoint {folder}: {one_line(error)}. What was there before is intact."
        ) from error
    if folder.name != LAST:
        shutil.rmtree(previous, ignore_errors=True)


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `metadata` and `tensors` of a checkpoint. Raises DamagedError if they cannot be read."""
    file = folder / STATE / "optimizers.pt"
    try:
        metadata = read_json_object(folder / STATE / "state.json")
        check_archive(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load can raise any error for a damaged file
        reason = "it holds more than tensors and plain values" if "weights_only" in str(error) else one_line(error)
        raise DamagedError(f"The state of training in {folder} cannot be read: {reason}") from error
    if not isinstance(tensors, dict):
        raise DamagedError(f"{file} holds a {type(tensors).__name__}, expected the state of the optimizers")
    return metadata, tensors


def load_discriminators(source: str, discriminators: Discriminators) -> bool:
    """Load discriminators.safetensors of a model, from a folder or the Hub. Return False if the model has none."""
    path = cached_file(source, DISCRIMINATORS, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return False
    prefixes = tuple(f"{NAMES[name]}." for name in discriminators.names)
    try:
        read_safetensors_header(path)
        tensors = {name: tensor for name, tensor in load_file(path).items() if name.startswith(prefixes)}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}. Get the file again, or remove it.") from error
    if non_finite := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise ValueError(f"{path} holds NaN or infinite numbers in {non_finite}. Use another file, or remove it.")
    try:
        discriminators.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds other discriminators than this run: {' '.join(str(error).split())[:300]}. "
            "Use the discriminator_scale and the losses that they were trained with, or remove the file."
        ) from error
    return True


def recover(folder: Path) -> None:
    """Finish a replacement of `best` that was interrupted between its two renames."""
    previous = _replaced_folder(folder)
    if folder.name != LAST and previous.is_dir():
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):  # another process of the run renamed it first
                os.replace(previous, folder)


def _replaced_folder(folder: Path) -> Path:
    """Return the folder that the replaced checkpoint is moved to."""
    return folder.with_name(PREVIOUS if folder.name == LAST else f"{folder.name}.old")


def _write_model(folder: Path, model: WavTokenizerModel) -> None:
    extractor_class = WavTokenizerFeatureExtractor
    module = extractor_class.__module__.rsplit(".", 1)[-1]
    # save_pretrained adds the model to auto_map, but not the feature extractor
    model.config.auto_map = {"AutoFeatureExtractor": f"{module}.{extractor_class.__name__}"}
    model.save_pretrained(folder)
    extractor_class(sampling_rate=model.config.sampling_rate, hop_length=model.config.hop_length).save_pretrained(
        folder
    )
