"""The commands of `wavtokenizer`. Each module adds the parsers of its commands with `add`.

arguments.py and files.py hold what the commands share. Modules import torch, transformers and numpy inside functions,
because `--help` and errors of wrong arguments must not wait for these imports.
"""

COMMANDS = {
    "encode": ("codec", "encode audio files to token files"),
    "decode": ("codec", "decode token files to audio files"),
    "reconstruct": ("codec", "encode and decode audio files, to hear what the codec loses"),
    "tokenize": ("tokenize", "encode a corpus to a folder of Parquet files, resumable"),
    "export": ("export", "write a token folder as training files for language models"),
    "evaluate": ("evaluate", "measure the quality of a model, or of the output of any other codec"),
    "convert": ("convert", "convert an original checkpoint to a folder for transformers and the Hub"),
    "checkpoints": ("convert", "list the published checkpoints, whose names work as --model"),
    "export-model": ("export_model", "export a model to ONNX files, which run without torch"),
    "train": ("train", "train a new model, or fine-tune a converted one"),
    "demo": ("demo", "open a page to see and hear the codec in a browser"),
    "info": ("info", "describe a model, a token file or a token folder"),
}
"""Name of each command -> its module in this package, and its one-line help."""
