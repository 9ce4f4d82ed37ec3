"""Training: new models, and more training for converted ones. Needs the extra `training` (accelerate, TensorBoard, PyYAML).

train.py             the loop, one step, validation: read this first
state.py             what a run consists of; making it, saving it, going on from it
settings.py          one dataclass; YAML recipes and command-line arguments follow from it
data.py              segments of sound from lists, folders and datasets
losses.py            all losses by name
discriminators.py    the three critics
codebook.py          k-means, moving averages, replacement of unused entries
checkpoints.py       folders that are whole or absent
log.py               TensorBoard, samples to hear, a picture of the curves
memory.py            whether a run fits, from the memory of two small steps

from wavtokenizer_hf.training import Settings, train

train(Settings.load("small_cpu", {"train_data": "clips", "validation_data": "other_clips", "output": "run"}))
"""

from .settings import Settings
from .state import State
from .train import train


__all__ = ["Settings", "State", "train"]
