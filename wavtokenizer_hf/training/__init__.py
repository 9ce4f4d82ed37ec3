"""Training: new models, and more training for converted ones. Needs the extra `training` (accelerate, TensorBoard).

loop.py              the loop, one step, validation: read this first
state.py             what a run consists of; making it, saving it, going on from it
settings.py          one dataclass; YAML recipes and command-line arguments follow from it
data.py              segments of sound from lists, folders and datasets
losses.py            all losses by name
discriminators.py    the three discriminators
codebook.py          k-means, moving averages, replacement of unused entries
checkpoints.py       folders that are whole or absent
log.py               TensorBoard, samples to hear, a picture of the curves
memory.py            whether a run fits, from the memory of two small steps

from wavtokenizer_hf.training import Settings, train

train(Settings.load("small_cpu", {"train_data": "clips", "validation_data": "other_clips", "output": "run"}))
"""

import importlib
from typing import TYPE_CHECKING, Any

from .settings import Settings


if TYPE_CHECKING:
    from .loop import train
    from .state import State


if not TYPE_CHECKING:  # to a type checker every name would exist, and be Any

    def __getattr__(name: str) -> Any:
        # torch is imported with these, and the settings are arguments of the command line, whose help must not wait
        # for it
        modules = {"State": "state", "train": "loop"}
        if name not in modules:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{modules[name]}", __name__), name)


__all__ = ["Settings", "State", "train"]
