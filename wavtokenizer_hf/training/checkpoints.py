"""Folders of a run that are whole or absent: what from_pretrained loads, the discriminators, and the state to go on
from.

best/, last/    config.json, model.safetensors, preprocessor_config.json, the code, discriminators.safetensors
last/training_state/    state.json, optimizers.pt
previous/    the last/ before, to go on from if last/ is damaged
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
    facts: dict[str, Any] | None = None,
    optimizers: dict[str, Any] | None = None,
) -> None:
    """
    Write a checkpoint beside `folder`, then put it in its place; whatever fails, the one that was there stays whole.

    The checkpoint that a `last` replaces stays as `previous`.

    Args:
        folder: Where, named `best` or `last`.
        model, discriminators: Of the run; the latter only if it has them.
        facts: Plain values of the state, for state.json; None where nobody will go on from here.
        optimizers: State dicts and tensors of the state, for optimizers.pt.

    Raises:
        OSError: It cannot be written, as on a full disk.
    """
    recover(folder)
    remove_leftovers(folder.parent)  # left by runs that were killed; each may hold gigabytes
    previous = _replaced(folder)
    try:
        with atomic_folder(folder, previous) as partial:
            _write_model(partial, model)
            if discriminators is not None:
                save_file(discriminators.state_dict(), partial / DISCRIMINATORS)
            for file in partial.glob("*.safetensors"):  # safetensors 0.8 gives only the owner read permission
                shutil.copymode(partial / "config.json", file)
            if facts is not None:
                (partial / STATE).mkdir()
                torch.save(optimizers, partial / STATE / "optimizers.pt")
                text = json.dumps(facts, indent=1, allow_nan=False)
                (partial / STATE / "state.json").write_text(text, encoding="utf-8")
    except (SafetensorError, RuntimeError, OSError) as error:  # raised by safetensors and torch on a full disk
        raise OSError(
            f"Cannot write the checkpoint {folder}: {one_line(error)}. What was there before is intact."
        ) from error
    if folder.name != LAST:
        shutil.rmtree(previous, ignore_errors=True)


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `facts` and `optimizers` of a checkpoint. Raises DamagedError if they cannot be read."""
    file = folder / STATE / "optimizers.pt"
    try:
        facts = read_json_object(folder / STATE / "state.json")
        check_archive(file)
        optimizers = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make torch.load raise anything
        reason = "it holds more than tensors and plain values" if "weights_only" in str(error) else one_line(error)
        raise DamagedError(f"The state of training in {folder} cannot be read: {reason}") from error
    if not isinstance(optimizers, dict):
        raise DamagedError(f"{file} holds a {type(optimizers).__name__}, expected the state of the optimizers")
    return facts, optimizers


def load_discriminators(source: str, discriminators: Discriminators) -> bool:
    """Load the discriminators from the second file of a model, on disk or on the Hub. Return False if it has none."""
    path = cached_file(source, DISCRIMINATORS, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return False
    prefixes = tuple(f"{NAMES[name]}." for name in discriminators.names)
    try:
        read_safetensors_header(path)
        tensors = {name: tensor for name, tensor in load_file(path).items() if name.startswith(prefixes)}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}. Get the file again, or remove it.") from error
    if broken := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise ValueError(f"{path} holds NaN or infinite numbers in {broken}. Use another file, or remove it.")
    try:
        discriminators.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds other discriminators than this run: {' '.join(str(error).split())[:300]}. "
            "Use the discriminator_scale and the losses that they were trained with, or remove the file."
        ) from error
    return True


def recover(folder: Path) -> None:
    """Complete a replacement of `best` that was interrupted between its two renames."""
    previous = _replaced(folder)
    if folder.name != LAST and previous.is_dir():
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):  # another process of the run did it first
                os.replace(previous, folder)


def _replaced(folder: Path) -> Path:
    """Return the folder to which the replaced checkpoint is moved."""
    return folder.with_name(PREVIOUS if folder.name == LAST else f"{folder.name}.old")


def _write_model(folder: Path, model: WavTokenizerModel) -> None:
    extractor_class = WavTokenizerFeatureExtractor
    module = extractor_class.__module__.rsplit(".", 1)[-1]
    # saving the model writes auto_map without the feature extractor
    model.config.auto_map = {"AutoFeatureExtractor": f"{module}.{extractor_class.__name__}"}
    model.save_pretrained(folder)
    extractor_class(sampling_rate=model.config.sampling_rate, hop_length=model.config.hop_length).save_pretrained(
        folder
    )
