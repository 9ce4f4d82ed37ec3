"""The settings of a training run: one dataclass, from which YAML recipes and command-line arguments follow."""

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
    "mel_scales": 0.0,  # not in the published objective, see losses.MelScalesLoss
    "instantaneous_frequency": 0.0,  # nor in it, see losses.InstantaneousFrequencyLoss
    "commitment": 1000.0,
    # nor is this: how far decoded audio, encoded again, lands from the entries that it was decoded from
    "reencoding": 0.0,
    "multi_period": 1.0,
    "multi_period_features": 1.0,
    "multi_resolution": 1.0,
    "multi_resolution_features": 1.0,
    "dac": 1.0,
    "dac_features": 1.0,
}
"""The published weights of the generator's losses. A discriminator whose two weights are 0 is not made."""


def _field(
    help: str, default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING, free: bool = False
) -> Any:
    """
    A field with its documentation. `free`: a resumed run may have another value, since the result does not depend on
    it.
    """
    return field(default=default, default_factory=factory, metadata={"help": help, "free": free})


@dataclass
class Settings:
    """What a training run does. The defaults are the published training at 40 tokens/s, but for the number of GPUs."""

    output: str = _field("folder of the run, which gets best/, last/, previous/ and log/", "", free=True)
    train_data: str = _field(
        "audio to train on: a folder to search, a text file with one path per line (relative to the file), or a "
        "folder saved by save_to_disk of datasets",
        "",
    )
    validation_data: str = _field("audio to validate on, given likewise; never trained on", "")
    model: str | None = _field(
        "model to start from: a folder, a published checkpoint or a name on the Hub; its discriminators.safetensors "
        "is used too (default: random weights)",
        None,
    )
    config: dict[str, Any] = _field(
        "fields of a new model's config, such as 'upsampling_ratios=[8, 5, 4, 2]' for 75 tokens/s; a model that is "
        "given must have these values",
        factory=dict,
    )

    steps: int = _field("number of steps in all; may grow when the run is resumed", 1_000_000, free=True)
    mel_only_steps: int = _field("number of first steps without discriminators, on mel and commitment losses alone", 0)
    freeze: str | None = _field(
        "part of the model that is not trained: encoder (with the codebook, so that codes keep their meaning); none "
        "overrides a recipe",
        None,
    )
    continuous_steps: int = _field(
        "number of first steps in which the decoder gets the encoder's output without the codebook; then k-means "
        "chooses the entries. For short runs, whose encoder has to learn something first",
        0,
    )
    batch_size: int = _field("segments per batch and process", 40)
    gradient_accumulation: int = _field("batches per step and process", 1)
    segment_seconds: float = _field("length of a segment, in seconds; shorter clips are repeated", 3.0)
    channel: str = _field(
        "channel to take of clips that have several: mean, left, right, or its number from 0", "mean"
    )
    num_workers: int = _field("processes that load audio, for each process that trains; 0: none", 8, free=True)
    seed: int = _field("seed of all random numbers; equal settings give equal runs on a CPU", 0)

    learning_rate: float = _field("learning rate of the AdamW optimizers; decays to 0 by a cosine", 2e-4)
    discriminator_learning_rate: float | None = _field(
        "learning rate of the discriminators (default: learning_rate)", None
    )
    warmup_steps: int = _field("number of first steps of each optimizer in which its learning rate rises from 0", 0)
    max_gradient_norm: float | None = _field(
        "largest norm of the gradients, which are clipped to it (default: no clipping); none overrides a recipe", None
    )
    precision: str = _field(
        "float32, or bfloat16 for autocast of decoder and discriminators; encoder and codebook always use float32",
        "float32",
    )
    compile: bool = _field(
        "compile the decoder and the discriminators with torch.compile: faster on a GPU after a wait at the first "
        "step",
        False,
        free=True,
    )
    dropout: float = _field("dropout of the residual blocks at the front of the backbone", 0.1)
    loss_weights: dict[str, float] = _field(
        "weights of the losses that differ from the published "
        + ", ".join(f"{name}={weight:g}" for name, weight in WEIGHTS.items())
        + "; 0 for both of a discriminator (multi_period, multi_resolution, dac) leaves it out",
        factory=dict,
    )
    discriminator_scale: float = _field("channels of the discriminators, as a factor of the published ones", 1.0)

    codebook_decay: float = _field("decay of the codebook's moving averages", 0.99)
    dead_code_threshold: float = _field(
        "replace codebook entries that are used less than this share of an even count", 0.1
    )
    normalize_encoder: bool = _field(
        "initialize a new encoder so that each layer has mean 0 and deviation 1 on the first batch (data-dependent "
        "initialization of weight norm). PyTorch's default gives latents that hardly vary, and a slow start",
        False,
    )
    kmeans_iterations: int = _field(
        "largest number of iterations of k-means, which chooses the first codebook of a new model", 200
    )
    kmeans_latents: int = _field("number of encoder outputs for k-means, over all processes", 72_000)

    log_every: int = _field("steps between entries in the log", 100, free=True)
    validate_every: int = _field(
        "steps between validations. Each saves last/, and best/ if the score fell (mel loss + weighted commitment "
        "loss)",
        5000,
    )
    num_validation_clips: int = _field("largest number of validation clips; of each the first segment_seconds", 200)
    num_logged_clips: int = _field("number of validation clips in the log, to hear and see", 4, free=True)
    resume: bool = _field(
        "resume from last/ in the output folder, or from previous/ if last/ is damaged. The settings must be the "
        "same, but steps may be larger",
        False,
        free=True,
    )
    memory_gb: float | None = _field(
        "memory that the run may take, in GB (default: what the GPU, or the machine and its control group, has "
        "free). The run stops after the first step if the next ones need more",
        None,
        free=True,
    )
    push_to_hub: str | None = _field("repository on the Hub to which best/ is uploaded at the end", None, free=True)

    def __post_init__(self) -> None:
        self.loss_weights = {**WEIGHTS, **self.loss_weights}
        self.config = json.loads(json.dumps(self.config))  # lists for tuples, as it will be read from files
        self.check()

    def check(self) -> None:
        """Raises ValueError for values that no run can have; whether the data exist is seen when they are opened."""
        unknown = sorted(set(self.loss_weights) - set(WEIGHTS))
        if unknown:
            raise ValueError(f"Got loss_weights for {', '.join(unknown)}; the losses are {', '.join(WEIGHTS)}.")
        for name, weight in self.loss_weights.items():
            if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise ValueError(f"Got loss_weights {name}={weight!r}, expected a number of at least 0.")
        at_least = {
            "steps": 1, "mel_only_steps": 0, "continuous_steps": 0, "batch_size": 1, "gradient_accumulation": 1,
            "num_workers": 0, "warmup_steps": 0, "kmeans_iterations": 1, "kmeans_latents": 1, "log_every": 1,
            "validate_every": 1, "num_validation_clips": 1, "num_logged_clips": 0, "dropout": 0, "dead_code_threshold": 0, "codebook_decay": 0,
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
        Settings from a YAML recipe, with changes.

        Args:
            recipe: a YAML file of fields, or the name of one in `training/recipes`; None for the defaults.
            changes: values by field that go before the recipe's; those of a dict field are merged into it.

        Raises:
            ValueError: no such recipe, not YAML, an unknown field, or a value of the wrong type.
        """
        values = {} if recipe is None else _read_yaml(_find(recipe))
        types_ = typing.get_type_hints(cls)
        for name, value in (changes or {}).items():
            values[name] = {**(values.get(name) or {}), **value} if isinstance(value, dict) else value
        unknown = sorted(set(values) - set(types_))
        if unknown:
            raise ValueError(
                f"Got unknown settings: {', '.join(unknown)}. `wavtokenizer train --help` lists them all."
            )
        return cls(**{name: _typed(name, value, types_[name]) for name, value in values.items()})

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Settings on which the result of a run depends and that differ from those of another run, in words."""
        return [
            f"{f.name} was {other.get(f.name, f.default)!r} and is now {getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if not f.metadata["free"]
            and other.get(f.name, f.default) != getattr(self, f.name)  # older runs lack fields
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the recipe and one argument for each field; `read_arguments` takes them back."""
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("recipe", nargs="?", help=f"YAML file of settings, or the name of a bundled recipe: {recipes}")
    types_ = typing.get_type_hints(Settings)
    for f in dataclasses.fields(Settings):
        help = f.metadata["help"]
        options: dict[str, Any] = {}
        if types_[f.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(types_[f.name]) is dict:
            options |= {"nargs": "+", "metavar": "NAME=VALUE", "type": _pair}
        else:
            options["metavar"] = "X"
            if f.default not in ("", None):
                help += f" (default {f.default:g})" if isinstance(f.default, float) else f" (default {f.default})"
        # no default here: what is not given must not go before the recipe's value
        options |= {"dest": f.name, "default": argparse.SUPPRESS}
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=help.replace("%", "%%"), **options)
        if "_" in f.name:  # as the field is called in a recipe
            parser.add_argument(f"--{f.name}", help=argparse.SUPPRESS, **options)


def read_arguments(arguments: argparse.Namespace) -> Settings:
    names = {f.name for f in dataclasses.fields(Settings)}
    changes = {name: value for name, value in vars(arguments).items() if name in names}
    changes = {name: dict(value) if isinstance(value, list) else value for name, value in changes.items()}
    return Settings.load(arguments.recipe, changes)


def derived_seed(*parts: int | str) -> int:
    """A seed that depends on all of its parts and on nothing else, such as Python's hash of strings."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _find(recipe: str) -> Path:
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


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=VALUE")
    try:
        return name, parse_yaml(value.encode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text[:100]!r}: {one_line(error)}") from error


def _number(value: Any) -> Any:
    """1e-6, which YAML takes for text, as the number that it is; all else as it came."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _typed(name: str, value: Any, type_: Any) -> Any:
    """
    The value in the field's type; text, as the command line gives it, and 2e-4, which YAML takes for text, are read.
    """
    choices = typing.get_args(type_) if isinstance(type_, types.UnionType) else (type_,)
    if value is None or value == "none":
        if types.NoneType in choices:
            return None
    elif dict in (typing.get_origin(choice) for choice in choices):
        if isinstance(value, dict):
            return {key: _number(each) for key, each in value.items()}
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
