"""Settings of a training run. One dataclass defines the YAML recipes and the command-line options."""

import argparse
import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..audio_errors import check_channel
from ..limited_files import MAX_YAML_BYTES, one_line, parse_yaml, read_file


RECIPES = Path(__file__).parent / "recipes"

WEIGHTS = {
    "mel": 45.0,
    "mel_scales": 0.0,  # not in the published objective; see losses.MelScalesLoss
    "instantaneous_frequency": 0.0,  # not in the published objective; see losses.InstantaneousFrequencyLoss
    "commitment": 1000.0,
    # not in the published objective: re-encoded decoder output against the entries that it was decoded from
    "reencoding": 0.0,
    "multi_period": 1.0,
    "multi_period_features": 1.0,
    "multi_resolution": 1.0,
    "multi_resolution_features": 1.0,
    "dac": 1.0,
    "dac_features": 1.0,
}
"""Default weights of the generator's losses, as published. A discriminator with both weights 0 is not created."""


def _field(
    help: str, default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING, may_change: bool = False
) -> Any:
    """
    Return a dataclass field with a help text.

    Args:
        help: Help text of the command-line option.
        default, factory: As in `dataclasses.field`.
        may_change: Whether a resumed run may have another value, because the result does not depend on it.
    """
    return field(default=default, default_factory=factory, metadata={"help": help, "may_change": may_change})


@dataclass
class Settings:
    """Settings of a training run. Defaults: the published training at 40 tokens/s, except for the number of GPUs."""

    output: str = _field("folder of the run; it gets best/, last/, previous/ and log/", "", may_change=True)
    train_data: str = _field(
        "training audio: a folder to search for audio files, a text file with one path per line (relative to that "
        "file), or a folder that datasets.Dataset.save_to_disk wrote",
        "",
    )
    validation_data: str = _field("validation audio, in the same forms as --train-data; never trained on", "")
    model: str | None = _field(
        "model to start from: a folder, a published checkpoint or a name on the Hub. Its discriminators.safetensors "
        "is loaded too (default: random weights)",
        None,
    )
    config: dict[str, Any] = _field(
        "config fields of a new model, such as 'upsampling_ratios=[8, 5, 4, 2]' for 75 tokens/s. With --model, that "
        "model must have these values",
        factory=dict,
    )

    steps: int = _field("total number of training steps; a resumed run may have more", 1_000_000, may_change=True)
    mel_only_steps: int = _field("number of steps without discriminators at the start of the run", 0)
    freeze: str | None = _field(
        "part of the model that is not trained. encoder: encoder and codebook, so that codes keep their meaning. "
        "none: override the recipe and train everything (default: train everything)",
        None,
    )
    continuous_steps: int = _field(
        "number of steps at the start of the run without the codebook: the decoder gets the encoder output. Then "
        "k-means initializes the codebook. For short runs, whose encoder must learn something first",
        0,
    )
    batch_size: int = _field("number of segments per batch and process", 40)
    gradient_accumulation: int = _field("number of batches per step and process", 1)
    segment_seconds: float = _field("length of a training segment in seconds; shorter clips are repeated", 3.0)
    channel: str = _field("channel of audio that has several: left, right, a number from 0, or mean of all", "mean")
    num_workers: int = _field(
        "number of data loading processes per training process; 0: load audio in the training process",
        8,
        may_change=True,
    )
    seed: int = _field("seed of all random numbers; on a CPU, runs with equal settings are identical", 0)

    learning_rate: float = _field("peak learning rate of AdamW, with cosine decay to 0", 2e-4)
    discriminator_learning_rate: float | None = _field(
        "peak learning rate of the discriminators (default: learning_rate)", None
    )
    warmup_steps: int = _field("number of warmup steps per optimizer, in which its learning rate rises from 0", 0)
    max_gradient_norm: float | None = _field(
        "gradient norm to clip to. none: override the recipe and do not clip (default: no clipping)", None
    )
    precision: str = _field(
        "data type of decoder and discriminators: float32, or bfloat16 by autocast. Encoder and codebook always use "
        "float32",
        "float32",
    )
    compile: bool = _field(
        "compile decoder and discriminators with torch.compile: faster on a GPU after a slow first step (default: no)",
        False,
        may_change=True,
    )
    dropout: float = _field("dropout rate of the residual blocks at the start of the decoder backbone", 0.1)
    loss_weights: dict[str, float] = _field(
        "loss weights to change. Defaults: "
        + ", ".join(f"{name}={weight:g}" for name, weight in WEIGHTS.items())
        + ". A discriminator (multi_period, multi_resolution, dac) with both weights 0 is left out",
        factory=dict,
    )
    discriminator_scale: float = _field(
        "factor by which the published channel counts of the discriminators are multiplied", 1.0
    )

    codebook_decay: float = _field("decay per step of the moving averages of the codebook", 0.99)
    dead_code_threshold: float = _field(
        "usage below which a codebook entry is replaced, as a fraction of the mean usage of all entries", 0.1
    )
    normalize_encoder: bool = _field(
        "initialize a new encoder so that each layer has mean 0 and standard deviation 1 on the first batch "
        "(data-dependent initialization of weight norm). PyTorch's initialization gives latents that hardly vary, and "
        "a slow start (default: no)",
        False,
    )
    kmeans_iterations: int = _field(
        "maximum number of iterations of k-means, which initializes the codebook of a new model", 200
    )
    kmeans_latents: int = _field("number of encoder output vectors for k-means, over all processes", 72_000)

    log_every: int = _field("number of steps between log entries", 100, may_change=True)
    validate_every: int = _field(
        "number of steps between validations. Each validation saves last/, and best/ if the score (mel loss + "
        "weighted commitment loss) fell",
        5000,
    )
    num_validation_clips: int = _field(
        "maximum number of validation clips; only the first segment_seconds of a clip are used", 200
    )
    num_logged_clips: int = _field(
        "number of validation clips whose audio and spectrogram are logged", 4, may_change=True
    )
    resume: bool = _field(
        "resume from last/ in the output folder, or from previous/ if last/ is damaged. The settings must be the "
        "same, but steps may be larger",
        False,
        may_change=True,
    )
    memory_gb: float | None = _field(
        "memory limit of the run in GB (default: the free memory of the GPU, or of the machine and its control "
        "group). A run that needs more is refused before its first step",
        None,
        may_change=True,
    )
    push_to_hub: str | None = _field(
        "Hub repository to upload best/ to at the end of the run (default: no upload)", None, may_change=True
    )

    def __post_init__(self) -> None:
        self.loss_weights = {**WEIGHTS, **self.loss_weights}
        self.config = json.loads(json.dumps(self.config))  # tuples become lists, as in a file that is read back
        self.check()

    def check(self) -> None:
        """Raise ValueError for an invalid value. Paths of data are checked when the data are opened."""
        unknown = sorted(set(self.loss_weights) - set(WEIGHTS))
        if unknown:
            raise ValueError(f"Got loss_weights for {', '.join(unknown)}; the losses are {', '.join(WEIGHTS)}.")
        for name, weight in self.loss_weights.items():
            if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise ValueError(f"Got loss_weights {name}={weight!r}, expected a number of at least 0.")
        at_least = {
            "steps": 1, "mel_only_steps": 0, "continuous_steps": 0, "batch_size": 1, "gradient_accumulation": 1,
            "num_workers": 0, "warmup_steps": 0, "kmeans_iterations": 1, "kmeans_latents": 1, "log_every": 1,
            "validate_every": 1, "num_validation_clips": 1, "num_logged_clips": 0, "dropout": 0,
            "dead_code_threshold": 0, "codebook_decay": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"Got {name}={getattr(self, name)}, expected at least {least}.")
        for name in (
            "segment_seconds", "learning_rate", "discriminator_learning_rate", "discriminator_scale",
            "max_gradient_norm", "memory_gb",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Got {name}={value}, expected more than 0.")
        for name in ("dropout", "dead_code_threshold", "codebook_decay"):
            if not getattr(self, name) < 1:
                raise ValueError(f"Got {name}={getattr(self, name)}, expected less than 1.")
        if self.continuous_steps >= self.steps:
            raise ValueError(
                f"Got continuous_steps={self.continuous_steps} of steps={self.steps}: the codebook would never be "
                "chosen."
            )
        check_channel(self.channel)
        if self.freeze not in (None, "encoder"):
            raise ValueError(f"Got freeze={self.freeze!r}, expected 'encoder': no other part can be frozen alone.")
        if self.freeze and self.continuous_steps:
            raise ValueError(
                f"Got freeze='encoder' and continuous_steps={self.continuous_steps}. A frozen codebook is used from "
                "the first step on: set continuous_steps to 0."
            )
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"Got precision={self.precision!r}, expected 'float32' or 'bfloat16'.")

    @classmethod
    def load(cls, recipe: str | None, changes: dict[str, Any] | None = None) -> "Settings":
        """
        Load settings from a YAML recipe, and override some of them.

        Args:
            recipe: YAML file of fields, or the name of a bundled recipe in `training/recipes`. Defaults to no recipe.
            changes: Field -> value. They override the recipe; those of a dict field are merged into it.

        Raises:
            ValueError: The recipe does not exist or is not YAML, a field is unknown, or a value has the wrong type.
        """
        values = {} if recipe is None else _read_yaml(_find_recipe(recipe))
        types_ = typing.get_type_hints(cls)
        for name, value in (changes or {}).items():
            values[name] = {**(values.get(name) or {}), **value} if isinstance(value, dict) else value
        unknown = sorted(set(values) - set(types_))
        if unknown:
            raise ValueError(
                f"Got unknown settings: {', '.join(unknown)}. `wavtokenizer train --help` lists them all."
            )
        return cls(**{name: _convert(name, value, types_[name]) for name, value in values.items()})

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Describe each setting that differs from the given settings of another run and changes the result."""
        return [
            f"{f.name} was {other.get(f.name, f.default)!r} and is now {getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if not f.metadata["may_change"]
            and other.get(f.name, f.default) != getattr(self, f.name)  # runs of older versions lack some fields
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe and one option per field to a parser. `read_arguments` reads them."""
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("recipe", nargs="?", help=f"YAML file of settings, or the name of a bundled recipe: {recipes}")
    types_ = typing.get_type_hints(Settings)
    for f in dataclasses.fields(Settings):
        help = f.metadata["help"]
        options: dict[str, Any] = {}
        if types_[f.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(types_[f.name]) is dict:
            options |= {"nargs": "+", "metavar": "NAME=VALUE", "type": _parse_pair}
        else:
            options["metavar"] = "X"
            if f.default not in ("", None):
                help += f" (default: {f.default:g})" if isinstance(f.default, float) else f" (default: {f.default})"
        # no default: an option that was not given must not override the recipe
        options |= {"dest": f.name, "default": argparse.SUPPRESS}
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=help.replace("%", "%%"), **options)
        if "_" in f.name:  # the spelling of the field in a recipe
            parser.add_argument(f"--{f.name}", help=argparse.SUPPRESS, **options)


def read_arguments(arguments: argparse.Namespace) -> Settings:
    names = {f.name for f in dataclasses.fields(Settings)}
    changes = {name: value for name, value in vars(arguments).items() if name in names}
    changes = {name: dict(value) if isinstance(value, list) else value for name, value in changes.items()}
    return Settings.load(arguments.recipe, changes)


def derived_seed(*parts: int | str) -> int:
    """Return a seed that depends on all parts alone. Python's hash of strings would differ between processes."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _find_recipe(recipe: str) -> Path:
    for path in (Path(recipe), RECIPES / recipe, RECIPES / f"{recipe}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise ValueError(f"There is no recipe {recipe}. Give a YAML file, or one of the bundled recipes: {names}.")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(read_file(path, MAX_YAML_BYTES))
    except ValueError as error:
        raise ValueError(f"{path} is not plain YAML: {one_line(error)}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} holds {type(values).__name__}, expected settings, one `name: value` a line.")
    return values


def _parse_pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=VALUE")
    try:
        return name, parse_yaml(value.encode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text[:100]!r}: {one_line(error)}") from error


def _parse_number(value: Any) -> Any:
    """Convert text such as 1e-6 to a float, because YAML reads it as a string. Return other values unchanged."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _convert(name: str, value: Any, type_: Any) -> Any:
    """
    Return the value in the type of its field. Text is converted: options are text, and YAML reads 2e-4 as text.
    """
    choices = typing.get_args(type_) if isinstance(type_, types.UnionType) else (type_,)
    if value is None or value == "none":
        if types.NoneType in choices:
            return None
    elif dict in (typing.get_origin(choice) for choice in choices):
        if isinstance(value, dict):
            return {key: _parse_number(each) for key, each in value.items()}
    else:
        kind = choices[0]
        if kind is bool and isinstance(value, bool):
            return value
        if kind is str and isinstance(value, str):
            return value
        if kind in (int, float) and not isinstance(value, bool):
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = None
            if number is not None and (kind is float or number.is_integer()):
                return kind(number)
    raise ValueError(f"Got {name}={value!r}, expected {getattr(type_, '__name__', type_)}.")
