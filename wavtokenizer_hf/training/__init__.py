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

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names
from .settings import Settings


if TYPE_CHECKING:
    from .loop import train
    from .state import State


# these import torch, and the settings are arguments of the command line, whose help must not wait for it
if not TYPE_CHECKING:  # to a type checker every name would exist, and be Any
    __getattr__, __dir__ = lazy_names(__name__, {"State": "state", "train": "loop"})


__all__ = ["Settings", "State", "train"]
