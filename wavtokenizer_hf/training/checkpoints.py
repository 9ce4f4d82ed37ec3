"""Folders of a run that are whole or absent: what from_pretrained loads, the discriminators, and the state to go on from.

best/, last/    config.json, model.safetensors, preprocessor_config.json, the code, discriminators.safetensors
last/training_state/    state.json, optimizers.pt
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from ..feature_extraction_wavtokenizer import WavTokenizerFeatureExtractor
from ..modeling_wavtokenizer import WavTokenizerModel
from .discriminators import NAMES, Discriminators


DISCRIMINATORS = "discriminators.safetensors"
STATE = "training_state"


def save_checkpoint(
    folder: Path,
    model: WavTokenizerModel,
    discriminators: Discriminators | None,
    facts: dict[str, Any] | None = None,
    optimizers: dict[str, Any] | None = None,
) -> None:
    """
    Writes a checkpoint beside `folder`, then puts it in its place; whatever fails, the one that was there stays whole.

    Args:
        folder: where.
        model, discriminators: of the run; the latter only if it has them.
        facts: plain values of the state, for state.json; None where nobody will go on from here.
        optimizers: state dicts and tensors of the state, for optimizers.pt.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    with _replaced(folder) as partial:
        try:
            _write_model(partial, model)
            if discriminators is not None:
                save_file(discriminators.state_dict(), partial / DISCRIMINATORS)
            for file in partial.glob("*.safetensors"):  # safetensors 0.8 lets the owner alone read
                shutil.copymode(partial / "config.json", file)
            if facts is not None:
                (partial / STATE).mkdir()
                torch.save(optimizers, partial / STATE / "optimizers.pt")
                (partial / STATE / "state.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        except (SafetensorError, RuntimeError, OSError) as error:  # what safetensors and torch make of a full disk
            raise OSError(
                f"Cannot write the checkpoint {folder}: {error}. What was there before is intact."
            ) from error


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`facts` and `optimizers` of a checkpoint. Raises ValueError if there is none to go on from."""
    try:
        facts = json.loads((folder / STATE / "state.json").read_text(encoding="utf-8"))
        optimizers = torch.load(folder / STATE / "optimizers.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"There is no state of training in {folder} to go on from: {error}") from error
    return facts, optimizers


def load_discriminators(source: str, discriminators: Discriminators) -> bool:
    """Fills in the discriminators from the second file of a model, on disk or on the Hub; False if it has none."""
    path = cached_file(source, DISCRIMINATORS, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return False
    prefixes = tuple(f"{NAMES[name]}." for name in discriminators.names)
    tensors = {name: tensor for name, tensor in load_file(path).items() if name.startswith(prefixes)}
    try:
        discriminators.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds other discriminators than this run: {' '.join(str(error).split())[:300]}. "
            "Use the discriminator_scale and the losses that they were trained with, or remove the file."
        ) from error
    return True


def recover(folder: Path) -> None:
    """Completes a replacement that was interrupted between its two renames."""
    old = _beside(folder, "old")
    if old.is_dir():
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):  # another process of the run was faster
                os.replace(old, folder)


def _write_model(folder: Path, model: WavTokenizerModel) -> None:
    extractor_class = WavTokenizerFeatureExtractor
    module = extractor_class.__module__.rsplit(".", 1)[-1]
    # saving the model completes auto_map, but knows nothing of the feature extractor
    model.config.auto_map = {"AutoFeatureExtractor": f"{module}.{extractor_class.__name__}"}
    model.save_pretrained(folder)
    extractor_class(sampling_rate=model.config.sampling_rate, hop_length=model.config.hop_length).save_pretrained(
        folder
    )


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` if all goes well."""
    recover(folder)
    partial, old = _beside(folder, "partial"), _beside(folder, "old")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():  # a folder cannot be renamed onto another: in between, only `old` is there, see `recover`
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f"{folder.name}.{what}")
