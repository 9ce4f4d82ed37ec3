"""Train new models, or fine-tune converted ones. Needs the extra `training` (accelerate, TensorBoard).

loop.py              training loop, training step and validation; read this first
state.py             state of a run: build, save, restore
settings.py          settings; YAML recipes and command-line options follow from this dataclass
data.py              audio segments from list files, folders and datasets
losses.py            losses
discriminators.py    the three discriminators
codebook.py          codebook learning: k-means, moving averages, replacement of unused entries
checkpoints.py       checkpoint folders, written atomically
log.py               TensorBoard log, audio samples and a plot of the curves
memory.py            memory estimate of a step, from two small steps

from wavtokenizer_hf.training import Settings, train

train(Settings.load("small_cpu", {"train_data": "clips", "validation_data": "other_clips", "output": "run"}))
"""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names
from .settings import Settings


if TYPE_CHECKING:
    from .loop import train
    from .state import State


# `loop` and `state` import torch. The command line imports the settings, and its help must not wait for torch.
if not TYPE_CHECKING:  # for a type checker, __getattr__ would make every name exist as Any
    __getattr__, __dir__ = lazy_names(__name__, {"State": "state", "train": "loop"})


__all__ = ["Settings", "State", "train"]
