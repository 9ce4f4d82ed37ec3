"""The commands of `wavtokenizer`. Each module adds the arguments of its commands with `add`.

arguments.py and files.py hold what they share. Modules import torch, transformers and numpy inside functions: `--help`
and the errors of wrong arguments need none of them.
"""

COMMANDS = {
    "encode": ("codec", "audio files to token files"),
    "decode": ("codec", "token files to audio files"),
    "reconstruct": ("codec", "audio files to tokens and back, to hear what is lost"),
    "tokenize": ("tokenize", "a corpus to a folder of Parquet files, resumable"),
    "export": ("export", "a token folder to the files that language models are trained from"),
    "evaluate": ("evaluate", "quality metrics of a model, or of the output of any other codec"),
    "convert": ("convert", "an original checkpoint to a folder for transformers and the Hub"),
    "checkpoints": ("convert", "list the published checkpoints, whose names are models everywhere"),
    "export-model": ("export_model", "a model to files for onnxruntime and the like"),
    "train": ("train", "train a new model, or fine-tune a converted one"),
    "demo": ("demo", "open a page to see and hear the codec in a browser"),
    "info": ("info", "describe a model, a token file or a token folder"),
}
"""Name of each command -> its module here, and its help in one line."""
